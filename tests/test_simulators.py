"SimplerEnv and LIBERO: simulators in processes of their own, watched, killed and resumed; the real ones where they are installed."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ENV, ROOT, last_line

from defi_nb.eval.rollout import NoOpPolicy, RandomPolicy
from defi_nb.serve.inference import Contract
from defi_nb.serve.server import PolicyServer, serving
from defi_nb.benchmarks.suites import ACTION_UNITS, scores
from defi_nb.benchmarks.venvs import ASSETS, PROBES, check_environment, environment_of, python_of
from defi_nb.benchmarks.suites import SimplerAction, simpler_episodes
from defi_nb.benchmarks.harness import BenchConfig, main, run_benchmark
from defi_nb.eval.workers import Patience

COUNTS = {"google_vm": {"pick_coke_can": 300, "move_near": 240, "drawer": 216}, "google_va": {"pick_coke_can": 675, "move_near": 480, "drawer": 378},
          "widowx": dict.fromkeys(("spoon_on_towel", "carrot_on_plate", "stack_cube", "eggplant_in_basket"), 24)}

ODD = '''
"Simulators that misbehave: stand-ins with a fault in one episode."
import os, subprocess, sys, time
from pathlib import Path
from defi_nb.benchmarks.worker import Replay

HERE = Path(__file__).parent

def first_time(name):
    try: (HERE/f"flag_{name}").touch(exist_ok=False)
    except FileExistsError: return False
    return True

class Slow(Replay):
    def step(self, action, look):
        time.sleep(.02)
        return super().step(action, look)

class Hangs(Replay):
    always = False
    def step(self, action, look):
        if self.at == 2 and (self.always or first_time("hung")):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            (HERE/"child").write_text(str(child.pid))
            time.sleep(600)
        return super().step(action, look)

class Stuck(Hangs): always = True

class Crashes(Replay):
    def step(self, action, look):
        print("words of a simulator on its standard output")
        os.write(1, b"and of a library below it\\n")
        if self.at == 3 and first_time("crashed"): os.kill(os.getpid(), 11)
        return super().step(action, look)

class Raises(Replay):
    def step(self, action, look):
        if first_time(f"raised{self.at}") and self.at == 1: raise RuntimeError("physics exploded")
        return super().step(action, look)

class OneEyed(Replay):
    def _seen(self):
        seen, prompt = super()._seen()
        return {k: v for k, v in seen.items() if "wrist" not in k}, prompt

class Newer(Replay):
    def __init__(self, config):
        super().__init__(config)
        self.versions = self.versions | {"simulator": "a newer one"}
'''


@pytest.fixture
def odd(tmp_path):
    "worker(class) -> how a misbehaving stand-in's process is started."
    (tmp_path/"odd_simulators.py").write_text(ODD)
    env = dict(ENV) | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return lambda name: (sys.executable, env, f"odd_simulators:{name}", {})


@pytest.fixture
def recordings(tmp_path):
    "Three recordings of moving squares."
    episodes = []
    for number in range(3):
        image = np.zeros((9, 24, 24, 3), np.uint8)
        for t in range(9): image[t, t:t + 8, number*8:number*8 + 8] = 255
        path = tmp_path/f"square{number}.npz"
        np.savez(path, image=image, wrist_image=image[:, :8, :8], state=np.zeros((9, 15), np.float32), prompt=f"push square {number}", solved=np.arange(9) >= (7 if number else 99))
        make = {"recording": str(path), "max_episode_steps": 8}
        episodes.append({"suite": "replay", "number": number, "task": f"square{number}", "group": "all", "variant": "base", "make": make, "reset": {}})
    return episodes


@pytest.fixture(scope="module")
def url():
    with serving(PolicyServer(RandomPolicy(), Contract("random", horizon=4))) as address: yield address


def timeless(result):
    clock = ("seconds", "start", "policy", "simulator")
    return {k: v for k, v in result.items() if k not in ("seconds", "episodes", "versions")} | {"episodes": [{k: v for k, v in row.items() if k not in clock} for row in result["episodes"]]}


PATIENCE = Patience(opening=60, step=1.5, attempts=3)


def play(url, out, recordings, worker=None, patience=PATIENCE, config=None, **more):
    return run_benchmark(config or BenchConfig("replay"), url, out, recordings=recordings, worker=worker, patience=patience, progress=False, **more)


def test_counts_of_every_grid():
    for suite, tasks in COUNTS.items():
        found = [e["task"] for e in simpler_episodes(suite)]
        assert {task: found.count(task) for task in found} == tasks


def test_a_tasks_score_is_a_mean_of_means():
    "25 episodes of each of 9 variants and 3 orientations, of which one variant is lost in one orientation."
    rows = [e | {"success": not (e["variant"] == "distractors" and e["group"] == "standing")} for e in simpler_episodes("google_va") if e["task"] == "pick_coke_can"]
    found = scores(rows)["tasks"]["pick_coke_can"]
    assert found["groups"] == {"horizontal": 1, "standing": pytest.approx(8/9), "vertical": 1} and found["rate"] == pytest.approx((2 + 8/9)/3)


def test_a_policys_action_becomes_a_robots():
    "CALVIN's units on both robots: metres, axis times angle, and each robot's own gripper."
    action = [1, 0, -.5, 0, 0, 1, 1]
    widowx, google = (SimplerAction(robot, ACTION_UNITS["calvin"], hold=2) for robot in ("widowx", "google_robot_static"))
    assert widowx(action) == pytest.approx([.02, 0, -.01, 0, 0, .05, 1])
    grips = [float(google([*action[:6], grip])[6]) for grip in (1, -1, 1, -1, -1)]
    assert grips == [0, 1, 1, 1, 1] # closing is held for two steps, opening in them unheard; then the next change, again a closing


def test_end_to_end_and_the_same_with_more_workers(url, recordings, tmp_path):
    one = play(url, tmp_path/"one", recordings)
    three = play(url, tmp_path/"three", recordings, n_workers=3)
    assert timeless(one) == timeless(three)
    assert one["stand_in"] and one["complete"] and [row["success"] for row in one["episodes"]] == [False, True, True]
    assert one["average"] == pytest.approx(2/3) and one["tasks"]["square1"]["interval"][1] == 1
    assert [row["prompt"] for row in one["episodes"]] == [f"push square {i}" for i in range(3)]
    assert json.loads((tmp_path/"one/result.json").read_text()) == json.loads(json.dumps(one))


RUN = """
import json, sys
from defi_nb.benchmarks.harness import BenchConfig, run_benchmark
url, out, recordings, python, env, simulator = json.loads(sys.argv[1])
run_benchmark(BenchConfig("replay"), url, out, recordings=recordings, worker=(python, env, simulator, {}), progress=False)
"""


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_killed_at_any_moment_it_goes_on(url, recordings, tmp_path, odd, rows):
    "SIGKILL before the first row and after one and two; the simulator's process goes with its parent, and the result is that of an undisturbed run."
    python, env, simulator, _ = odd("Slow")
    out = tmp_path/"killed"
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps([url, str(out), recordings, python, env, simulator])], env=env, cwd=ROOT)
    journal, deadline = out/"episodes.jsonl", time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.is_file() and len(journal.read_text().splitlines()) > rows): time.sleep(.01)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.kill()
    process.wait()
    assert workers, "there was a simulator's process"
    while time.monotonic() < deadline and any(alive(int(pid)) for pid in workers): time.sleep(.05)
    assert not any(alive(int(pid)) for pid in workers)
    before = journal.read_text().splitlines()[1:]
    assert rows <= len(before) < len(recordings)
    found = play(url, out, recordings, odd("Slow"))
    assert timeless(found) == timeless(play(url, tmp_path/"undisturbed", recordings, odd("Slow")))
    assert journal.read_text().splitlines()[1:1 + len(before)] == before # what was finished was not played again


def alive(pid): # and not a zombie
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError): return False


def test_a_hung_simulator_is_killed_with_its_children_and_played_again(url, recordings, tmp_path, odd):
    found = play(url, tmp_path/"hung", recordings, odd("Hangs"))
    assert timeless(found) == timeless(play(url, tmp_path/"fine", recordings))
    assert not alive(int((tmp_path/"child").read_text()))


def test_a_simulator_that_always_hangs_is_named_and_what_was_finished_is_kept(url, recordings, tmp_path, odd):
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"episode 0 \(square0, base\) failed 2 times: nothing was heard for 1 s in stage 'step'"):
        play(url, tmp_path/"stuck", recordings, odd("Stuck"), patience=Patience(30, 1, 2))
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("fault,said", [("Crashes", "words of a simulator"), ("Raises", "")])
def test_a_simulator_that_crashes_or_raises_is_played_again(url, recordings, tmp_path, odd, fault, said):
    "A segmentation fault, an exception; and what a simulator prints never reaches the messages."
    found = play(url, tmp_path/"odd", recordings, odd(fault))
    assert timeless(found) == timeless(play(url, tmp_path/"fine", recordings))
    assert said in (tmp_path/"odd/worker.log").read_text()


def test_a_policy_that_needs_a_camera_that_is_not_there_is_not_judged(recordings, tmp_path, odd):
    both = Contract("two cameras", views=("static", "gripper"))
    with serving(PolicyServer(NoOpPolicy(), both)) as url, pytest.raises(RuntimeError, match="observation/wrist_image"):
        play(url, tmp_path/"one_eye", recordings, odd("OneEyed"))


def test_rows_of_another_policy_protocol_or_simulator_are_refused(url, recordings, tmp_path, odd):
    out = tmp_path/"run"
    play(url, out, recordings[:1], config=BenchConfig("replay"))
    with pytest.raises(ValueError, match="episodes of another evaluation .*mode|episodes of another evaluation .*success"): play(url, out, recordings[:1], config=BenchConfig("replay", mode="early_stop"))
    with serving(PolicyServer(NoOpPolicy(), Contract("other", horizon=4))) as other, pytest.raises(ValueError, match="policy"): play(other, out, recordings[:1])
    lines = (out/"episodes.jsonl").read_text().splitlines()
    (out/"episodes.jsonl").write_text(lines[0] + "\n") # as if nothing were finished
    with pytest.raises(ValueError, match="another simulator .*a newer one"): play(url, out, recordings[:1], odd("Newer"))


def test_setup_says_which_command_failed(tmp_path, capsys, monkeypatch):
    "Without a package index: the environment is made, pip fails, and nothing pretends to be finished."
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert main(["setup", "libero", "--where", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "pip install --quiet --disable-pip-version-check torch==2.13.0` ended with code 1" in said and "No matching distribution found for torch==2.13.0" in said
    assert main(["check", "libero", "--where", str(tmp_path)]) == 2 and "make one with `defi-nb bench setup simpler`" in capsys.readouterr().err


def test_check_says_what_is_missing_and_what_to_do(tmp_path, capsys):
    "An environment whose interpreter has none of the packages."
    folder = tmp_path/"maniskill3"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (folder/"defi_nb.json").write_text(json.dumps({"simulator": "maniskill3", "assets": str(tmp_path), "environment": {}}))
    assert main(["check", "simpler", "--where", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert "No module named 'torch'" in said and "bookworm-backports" in said and "mani_skill.utils.download_asset bridge_v2_real2sim" in said
    assert said.count("NO ") == 4 and said.count("->") == 4 # all but the room on the disk
    assert set(ASSETS) == set(PROBES)


def test_a_wrong_command_line_says_so(tmp_path, capsys):
    for argv, said in ((["run", "libero", "noop", "--where", str(tmp_path)], "make one with"), (["setup", "simpler", "--simulator", "libero"], "does not play simpler"),
                       (["setup", "simpler", "--checkout", str(tmp_path)], "Python" if sys.version_info >= (3, 12) else "git clone --recurse-submodules")):
        assert main(argv) == 2
        assert said in last_line(capsys.readouterr().err)


def test_a_simulators_process_sees_this_package_and_nothing_else_of_ours(tmp_path):
    "A link to the package alone is on the path: with its folder, an installed PyTorch and NumPy would come along."
    (tmp_path/"defi_nb.json").write_text("{}")
    env = environment_of(tmp_path)
    assert [p.name for p in Path(env["PYTHONPATH"]).iterdir()] == ["defi_nb"]
    code = "import sys, defi_nb.benchmarks.worker; print(*sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'scipy', 'fastcore', 'mujoco', 'matplotlib'}))"
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stderr


INSTALLED = Path(os.environ.get("DEFI_NB_SIMULATORS", ROOT/"data/simulators"))


@pytest.mark.parametrize("benchmark,name,tasks", [("simpler", "maniskill3", ("carrot_on_plate",)), ("libero", "libero", ("open_the_middle_drawer_of_the_cabinet",))])
def test_a_real_simulator_steps_and_renders(url, tmp_path, benchmark, name, tasks):
    "One episode through the server, where `defi-nb bench setup` was run (DEFI_NB_SIMULATORS names another folder than data/simulators)."
    folder = INSTALLED/name
    if not python_of(folder).exists(): pytest.skip(f"no {name} in {INSTALLED}: defi-nb bench setup {benchmark}")
    assert all(f["ok"] for f in check_environment(folder)), check_environment(folder)
    found = run_benchmark(BenchConfig(benchmark, tasks=tasks, episodes=1), url, tmp_path/"out", folder, record=True, progress=False)
    row = found["episodes"][0]
    assert not found["stand_in"] and row["steps"] == found["protocol"]["step_caps"][tasks[0]] and not row["success"]
    with np.load(next((tmp_path/"out/frames").glob("*.npz"))) as file: frames = file["image"]
    assert len(frames) == row["queries"] and all(frame.std() > 10 for frame in frames) and np.abs(frames[-1].astype(int) - frames[0]).max() > 50 # pictures, and the arm moved


def test_interrupt_ends_the_simulators(url, recordings, tmp_path, odd):
    python, env, simulator, _ = odd("Slow")
    process = subprocess.Popen([sys.executable, "-c", RUN, json.dumps([url, str(tmp_path/"out"), recordings, python, env, simulator])], env=env, cwd=ROOT, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (tmp_path/"out/episodes.jsonl").is_file(): time.sleep(.02)
    workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0 and workers
    assert not any(alive(int(pid)) for pid in workers)
