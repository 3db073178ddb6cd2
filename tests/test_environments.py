"""The embedded simulator and the real CALVIN have the same interface.

The real one is tested where PyBullet and a checkout of calvin_env are found: pip install "defi_nb[calvin]",
CALVIN_ENV_ROOT=path/to/calvin_env pytest tests/test_environments.py
The scripted expert on the first 60 chains of both: the same with -m slow -s (minutes).
"""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from odd_environments import Hanging, mortal_env

from defi_nb.benchmarks import calvin_install, calvin_env
from defi_nb.sim.calvin_tasks import (
    COLOURS, ROBOT_START, TASKS, first_sequences, initial_obs, initial_states, solved_tasks)
from defi_nb.benchmarks.calvin_install import calvin_missing, calvin_oracle, calvin_root
from defi_nb.benchmarks.subprocess_env import EnvProcess
from defi_nb.eval.evaluate import evaluate, read_records
from defi_nb.sim.experts import Expert, start_for, start_of
from defi_nb.sim.render import euler_to_quat
from defi_nb.sim.playtable import PlayTable, waving_action
from defi_nb.benchmarks.calvin_env import RealCalvin, real_env, real_env_here, rollout_digest
from defi_nb.eval.rollout import EvalConfig, RandomPolicy, play_expert, playtable_env
from defi_nb.run import players
from defi_nb.run.cli import main
from defi_nb.run.datasets import recorded_frames
from defi_nb.run.players import eval_config, find_chains, find_env, find_player

MISSING = calvin_missing()
needs_calvin = pytest.mark.skipif(bool(MISSING), reason=MISSING)
KINDS = ["embedded", pytest.param("real", marks=needs_calvin)]
START = initial_obs(first_sequences(1)[0][0])


def maker(kind, scene="D", sizes=(64, 48)):
    return partial(PlayTable, scene, *sizes) if kind == "embedded" else partial(RealCalvin, scene, *sizes, renderer="tiny")


@pytest.fixture(scope="module", params=KINDS)
def env(request):
    env = maker(request.param)()
    env.kind = request.param
    yield env
    env.close()


@pytest.fixture(scope="module")
def real():
    if MISSING: pytest.skip(MISSING)
    env = EnvProcess(maker("real"))
    yield env
    env.close()


def check_observation(obs, sizes=(64, 48)):
    static, gripper = sizes
    assert {k: (v.shape, v.dtype.name, v.flags.c_contiguous) for k, v in obs["rgb_obs"].items()} == {
        "rgb_static": ((static, static, 3), "uint8", True), "rgb_gripper": ((gripper, gripper, 3), "uint8", True)}
    assert {k: (v.shape, v.dtype.name) for k, v in obs["depth_obs"].items()} == {
        "depth_static": ((static, static), "float32"), "depth_gripper": ((gripper, gripper), "float32")}
    assert all(np.ptp(picture) > 100 for picture in obs["rgb_obs"].values()) # something is to be seen
    assert all(np.isfinite(d).all() and d.min() > 0 for d in obs["depth_obs"].values())
    assert 2.5 < np.median(obs["depth_obs"]["depth_static"]) < 6 # metres: the camera stands 4.2 m away
    robot, scene = obs["robot_obs"], obs["scene_obs"]
    assert (robot.shape, scene.shape, robot.dtype, scene.dtype) == ((15,), (24,), np.float64, np.float64)
    assert np.isfinite(robot).all() and np.isfinite(scene).all()
    assert -1e-3 < robot[6] < .081 and robot[14] in (-1, 1) and set(scene[4:6]) <= {0, 1}


def test_observations(env):
    check_observation(env.reset(*START))
    for k in range(20): obs, reward, done, info = env.step(waving_action(k))
    check_observation(obs)
    assert reward == 0 and done is False
    again = env.get_obs()
    np.testing.assert_array_equal(obs["robot_obs"], again["robot_obs"])
    for kind in ("rgb_obs", "depth_obs"):
        for name, picture in obs[kind].items(): np.testing.assert_array_equal(picture, again[kind][name])


def test_infos_have_one_form(env):
    env.reset(*START)
    info = env.step(waving_action(0))[3]
    scene, robot = info["scene_info"], info["robot_info"]
    assert {*robot} == {"tcp_pos", "tcp_orn", "gripper_opening_width", "arm_joint_states", "gripper_action", "contacts"}
    assert {*scene["movable_objects"]} == {f"block_{c}" for c in COLOURS}
    for block in scene["movable_objects"].values():
        assert {k: np.shape(v) for k, v in block.items() if k != "contacts"} == {
            "current_pos": (3,), "current_orn": (4,), "current_lin_vel": (3,), "current_ang_vel": (3,)}
    assert {*scene["doors"]} == {"base__slide", "base__drawer"} and {*scene["lights"]} == {"lightbulb", "led"}
    for _ in range(15): info = env.step([0, 0, 0, 0, 0, 0, 1])[3]
    state = first_sequences(1)[0][0] # red and pink lie in the cabinet, blue on the table
    touched = {c: info["scene_info"]["movable_objects"][f"block_{c}"]["contacts"] for c in COLOURS}
    assert touched == {c: {"base_link" if state[f"{c}_block"] == "table" else "plank_link"} for c in COLOURS}
    assert info["robot_info"]["contacts"] == set()
    assert env.joint("base__drawer") == pytest.approx(.22, abs=.01)
    assert env.body_pos("block_red") == pytest.approx(info["scene_info"]["movable_objects"]["block_red"]["current_pos"])


def test_pictures_are_drawn_when_they_are_read_and_once(env):
    obs = env.reset(*START)
    with mock.patch.object(type(env), "_draw", autospec=True, side_effect=type(env)._draw) as draw:
        for k in range(5): obs = env.step(waving_action(k))[0]
        assert draw.call_count == 0
        first = obs["rgb_obs"]["rgb_static"]
        assert obs["rgb_obs"]["rgb_static"] is first and draw.call_count == 1
        obs["rgb_obs"]["rgb_gripper"], obs["depth_obs"]["depth_static"]
        assert draw.call_count == 3
    with pytest.raises(KeyError): obs["rgb_obs"]["rgb_tactile"]


def test_a_picture_is_of_its_moment_or_refused(env):
    env.reset(*START)
    before, kept = env.step(waving_action(0))[0], env.get_obs()
    true = kept["rgb_obs"]["rgb_gripper"].copy()
    for k in range(15): obs = env.step(waving_action(k))[0]
    assert (obs["rgb_obs"]["rgb_gripper"] != true).any() # the hand has moved
    np.testing.assert_array_equal(kept["rgb_obs"]["rgb_gripper"], true) # was drawn in time
    if env.kind == "embedded": np.testing.assert_array_equal(before["rgb_obs"]["rgb_gripper"], true)
    else:
        with pytest.raises(RuntimeError, match="of a moment that is over"): before["rgb_obs"]["rgb_gripper"]


def test_reset_is_exact_whatever_came_before(env):
    first = rollout_digest(env, *START, look=10)
    other = initial_obs(initial_states()[100])
    rollout_digest(env, *other)
    env.reset()
    for k in range(30): env.step(-waving_action(k))
    assert rollout_digest(env, *START, look=10) == first != rollout_digest(env, *other, look=10)
    unseen = rollout_digest(env, *START)
    [*env.reset(*other)["rgb_obs"].values()]
    assert rollout_digest(env, *START) == unseen
    states = []
    for look in (False, True): # drawing changes nothing
        obs = env.reset(*START)
        for k in range(30):
            obs = env.step(waving_action(k))[0]
            if look: [*obs["rgb_obs"].values()]
        states.append(np.append(obs["robot_obs"], obs["scene_obs"]))
    np.testing.assert_array_equal(*states)


def test_the_same_bits_in_another_process(env):
    here = rollout_digest(env, *START, look=10)
    pair = [EnvProcess(maker(env.kind)) for _ in range(2)] # side by side
    rollout_digest(pair[1], *initial_obs(initial_states()[7]))
    assert [rollout_digest(there, *START, look=10) for there in pair] == [here, here]
    assert pair[0].layout == env.layout and pair[0].name == getattr(env, "name", "PlayTable")
    for there in pair: there.close()


def test_states_round_trip(env):
    robot, scene = START
    obs = env.reset(robot, scene)
    np.testing.assert_allclose(obs["robot_obs"], robot, atol=2e-3)
    np.testing.assert_allclose(obs["scene_obs"], scene, atol=6e-3) # blocks settle
    for k in range(60): obs = env.step(waving_action(k) * [1, 1, 1, 1, 1, 1, -1])[0]
    assert obs["robot_obs"][14] == env.gripper_action
    again = env.reset(obs["robot_obs"], obs["scene_obs"])
    np.testing.assert_allclose(again["robot_obs"][7:14], obs["robot_obs"][7:14], atol=2e-2) # the arm was moving
    np.testing.assert_allclose(again["scene_obs"], obs["scene_obs"], atol=2e-2)
    for grip in (-1, 1):
        wanted = np.append(robot[:14], grip)
        assert env.reset(wanted, scene)["robot_obs"][14] == grip == env.gripper_action
    for bulb in (0, 1):
        for led in (0, 1):
            scene[3:6] = .088*bulb, bulb, led
            for _ in range(3): obs = env.step(np.zeros(7))[0]
            obs = env.reset(robot, scene)
            for _ in range(5): info = env.step([0, 0, 0, 0, 0, 0, 1])[3]
            assert [info["scene_info"]["lights"][k]["logical_state"] for k in ("lightbulb", "led")] == [bulb, led]
            np.testing.assert_array_equal(env.get_obs()["scene_obs"][4:6], [bulb, led])


def test_kinds_of_action(env):
    pose = np.array(ROBOT_START[:6])
    goal, quat = pose[:3] + [.03, 0, .04], np.roll(euler_to_quat(pose[3:]), -1)
    reached = []
    for action in ((goal, pose[3:], 1), (goal, quat, 1), {"type": "cartesian_abs", "action": [*goal, *pose[3:], 1]},
                   {"type": "cartesian_abs", "action": [*goal, *quat, 1]}):
        env.reset(*START)
        for _ in range(30): obs = env.step(action)[0]
        reached.append(obs["robot_obs"])
        np.testing.assert_allclose(obs["robot_obs"][:3], goal, atol=.01)
    for other in reached[1:]: np.testing.assert_allclose(other, reached[0], atol=1e-3)
    for action in ([.5, 0, 0, 0, 0, 0, 1], {"type": "cartesian_rel", "action": [.5, 0, 0, 0, 0, 0, 1]}):
        env.reset(*START)
        target = env.target_pos
        for _ in range(4): env.step(action)
        np.testing.assert_allclose(env.target_pos - target, [.04, 0, 0], atol=1e-9)
    joints = np.array(ROBOT_START[7:14]) + [.1, 0, 0, 0, 0, 0, -.1]
    env.reset(*START)
    for _ in range(30): obs = env.step({"type": "joint_abs", "action": [*joints, -1]})[0]
    np.testing.assert_allclose(obs["robot_obs"][7:14], joints, atol=.02)
    assert obs["robot_obs"][6] < .02 # and the gripper has closed
    for _ in range(5): obs = env.step({"type": "joint_rel", "action": [0, 0, 0, 0, 0, 0, .02, -1]})[0]
    assert obs["robot_obs"][13] > joints[6] + .02


def test_actions_are_copied_cast_and_their_gripper_rounded(env):
    env.reset(*START)
    action = np.full(7, .5)
    env.step(action)
    np.testing.assert_array_equal(action, np.full(7, .5))
    for action, grip in ((np.array([1, 0, 0, 0, 0, 0, -1]), -1), (np.full(7, .25, np.float32), 1), ([0]*6 + [-.2], -1)):
        assert env.step(action)[0]["robot_obs"][14] == grip


@pytest.mark.parametrize("action,said", [
    ([0]*6, "a cartesian_rel action has 7 numbers, this one has 6"), ([np.nan]*7, "is not finite"),
    ({"type": "joint_rel", "action": [0]*7}, "a joint_rel action has 8 numbers"), ({"type": "wish", "action": [0]*7}, "no action type 'wish'")])
def test_wrong_actions_are_named_and_harmless(env, action, said):
    before = env.reset(*START)
    with pytest.raises(ValueError, match=said): env.step(action)
    np.testing.assert_array_equal(env.get_obs()["robot_obs"], before["robot_obs"])


def test_wrong_states_are_named(env):
    robot, scene = START
    with pytest.raises(ValueError, match=r"robot_obs of shape \(14,\)"): env.reset(robot[:14], scene)
    with pytest.raises(ValueError, match=r"scene_obs of shape \(24,\) with 23 finite"): env.reset(robot, np.append(scene[:23], np.inf))
    with pytest.raises(ValueError, match="there is no scene 'E'"): EnvProcess(maker(env.kind, "E"))


def test_no_initial_state_moves_or_solves_anything_by_itself(env):
    for state in initial_states():
        env.reset(*initial_obs(state, env.layout))
        start = env.get_info()
        before = env.get_obs()["scene_obs"]
        for _ in range(10):
            info = env.step([0, 0, 0, 0, 0, 0, 1])[3]
            assert not solved_tasks(start, info), state
        np.testing.assert_allclose(env.get_obs()["scene_obs"], before, atol=.012, err_msg=str(state))


@pytest.mark.parametrize("scene", "ABC")
@pytest.mark.parametrize("kind", KINDS)
def test_other_scenes(kind, scene):
    env = maker(kind, scene)() if kind == "embedded" else EnvProcess(maker(kind, scene))
    assert env.layout.blocks[0][0] == {"A": "pink", "B": "red", "C": "blue"}[scene]
    for state in initial_states()[::24]:
        check_observation(env.reset(*initial_obs(state, env.layout)))
        start = env.get_info()
        for _ in range(10): info = env.step([0, 0, 0, 0, 0, 0, 1])[3]
        assert not solved_tasks(start, info), state
        for c in COLOURS: # the order of scene_obs is the layout's
            i = 6 + 6*[colour for colour, _ in env.layout.blocks].index(c)
            np.testing.assert_array_equal(env.get_obs()["scene_obs"][i:i + 3], info["scene_info"]["movable_objects"][f"block_{c}"]["current_pos"])
    env.close()


@needs_calvin
def test_our_oracle_agrees_with_calvins_on_the_expert():
    "All 34 verdicts after every step while the expert does each task, and what has to come before it."
    code = "import test_environments as t; t.compare_oracles()"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    verdicts, disagreements, solved = map(int, done.stdout.split()[-3:])
    assert disagreements == 0 and verdicts > 34*34*20 and solved == 34 # each was seen to be solved


def compare_oracles():
    "Print how many verdicts were compared, how many differ, and how many tasks were solved."
    env, oracle, rng, done, differ = maker("real")(), calvin_oracle(), np.random.default_rng(0), set(), []
    for task in sorted([*TASKS]*4, key=TASKS.index): # from up to four starts, until it is solved
        if task in done: continue
        state, lift = start_for(task, rng)
        env.reset(scene_obs=start_of(state, "D", rng))
        for part in filter(None, (lift, task)):
            start, theirs = env.get_info(), env.env.get_info()

            def compare(*_, start=start, theirs=theirs):
                differ.append(len(solved_tasks(start, env.get_info()) ^ oracle.get_task_info(theirs, env.env.get_info())))
            success = Expert(env, on_step=compare).run(part)[0]
            compare()
            if success: done.add(part)
    print("\n", len(differ)*len(TASKS), sum(differ), len(done))


def test_renderer_and_versions(env):
    if env.kind == "embedded":
        embedded = playtable_env(EvalConfig())
        assert embedded.renderer.startswith("MuJoCo ") and embedded.versions["mujoco"] in embedded.renderer
    else:
        assert env.renderer.startswith("TinyRenderer, PyBullet 3.") and env.renderer == env.versions["renderer"]
        assert env.versions["calvin_env"] == calvin_install.commit_of(calvin_root()) and len(env.versions["calvin_env source"]) == 16
        assert all(isinstance(said, str) for said in env.versions.values())


# ---- what only the real one has


@needs_calvin
def test_one_in_a_process(real):
    code = ("from defi_nb.benchmarks.calvin_env import RealCalvin\nimport pybullet\nenv = RealCalvin(renderer='tiny')\n"
            "try: RealCalvin(renderer='tiny')\nexcept RuntimeError as error: print(error)\n"
            "env.close(); env.close(); env = RealCalvin(renderer='tiny'); env.step([0]*7)\ndel env\n" # and again after it is closed
            "pybullet.connect(pybullet.DIRECT)\ntry: RealCalvin(renderer='tiny')\nexcept RuntimeError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("close it first, or use `EnvProcess`") == 2 and "disconnecting" not in done.stdout


@needs_calvin
def test_an_import_leaves_nothing_behind():
    code = ("import sys, warnings; warnings.simplefilter('error'); hook = sys.excepthook; path = [*sys.path]\n"
            "from importlib.util import find_spec\nfrom defi_nb.benchmarks.calvin_install import STAND_INS\nfrom defi_nb.benchmarks.calvin_env import RealCalvin\nenv = RealCalvin(renderer='tiny')\n"
            "from hydra.core.global_hydra import GlobalHydra\nassert not GlobalHydra.instance().is_initialized()\n"
            "assert sys.excepthook is hook and sys.path == path\n"
            "assert all(find_spec(name) for name in STAND_INS if name in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not done.stderr.replace("pybullet build time: ", "").strip()[24:], done.stderr


@needs_calvin
def test_places_without_a_state_follow_the_seed():
    draws = {}
    for seed in (0, 0, 1):
        env = EnvProcess(RealCalvin, "D", 32, 32, None, "tiny", seed)
        places = [env.reset()["scene_obs"] for _ in range(3)]
        assert not np.array_equal(places[1], places[2])
        draws.setdefault(seed, []).append(np.stack(places))
        env.close()
    np.testing.assert_array_equal(*draws[0])
    assert not np.array_equal(draws[0][0], draws[1][0])


@needs_calvin
def test_a_calvin_env_that_forgets_the_led_is_warned_of(tmp_path, real):
    root = calvin_root()
    for part in ("calvin_env", "conf"): shutil.copytree(root/part, tmp_path/part)
    (tmp_path/"data").symlink_to(root/"data")
    button = tmp_path/"calvin_env/scene/objects/button.py"
    was = button.read_text()
    button.write_text(was.replace("self.state = ButtonState(self.light.get_state())", "self.state = ButtonState.OFF")) # as at 1431a46
    with pytest.warns(UserWarning, match="forgets at a reset that the LED is lit"):
        old = EnvProcess(RealCalvin, "D", 32, 32, tmp_path, "tiny")
    assert old.versions["calvin_env"] == "unknown" # no repository there
    assert old.versions["calvin_env source"] != real.versions["calvin_env source"] or button.read_text() == was
    old.close()


@needs_calvin
def test_a_probe_that_fails_leaves_this_process_alive(monkeypatch):
    for name in ("__EGL_VENDOR_LIBRARY_FILENAMES", "__EGL_VENDOR_LIBRARY_DIRS"): monkeypatch.setenv(name, "/nowhere")
    calvin_install.egl_device.cache_clear()
    direct = subprocess.run([sys.executable, "-c", calvin_install._PROBE], capture_output=True)
    assert direct.returncode != 0 # PyBullet has ended it
    assert calvin_install.egl_device() == "" and not calvin_install.renderer_of()[0]
    with pytest.raises(RuntimeError, match="EGL cannot draw here"): calvin_install.renderer_of("egl")
    with pytest.raises(RuntimeError, match="EGL cannot draw here"): EnvProcess(RealCalvin, "D", 32, 32, None, "egl")
    env = EnvProcess(RealCalvin, "D", 32, 32)
    assert env.renderer.startswith("TinyRenderer")
    env.close()
    calvin_install.egl_device.cache_clear()


@needs_calvin
@pytest.mark.skipif(not calvin_install.egl_device(), reason="EGL cannot draw here")
def test_egl_draws_what_tinyrenderer_draws(real):
    env = EnvProcess(RealCalvin, "D", 64, 48, None, "egl")
    assert env.renderer.startswith("EGL, ")
    smooth, hard = env.reset(*START), real.reset(*START)
    check_observation(smooth)
    assert np.abs(smooth["rgb_obs"]["rgb_static"].astype(float) - hard["rgb_obs"]["rgb_static"]).mean() < 40
    assert np.median(np.abs(smooth["depth_obs"]["depth_static"] - hard["depth_obs"]["depth_static"])) < .03
    assert rollout_digest(env, *START) == rollout_digest(real, *START) # the physics is the same
    look, used = rollout_digest(env, *START, look=10), []
    for _ in range(4*calvin_env.FRESH):
        env.reset(*START)
        used.append(megabytes(env.pid))
    assert rollout_digest(env, *START, look=10) == look # EGL was started anew in between
    assert used[-1] < used[calvin_env.FRESH] + 150 # and so keeps no old textures, of 12 MB a reset
    env.close()


def megabytes(pid):
    "Memory that a process holds."
    return next(int(line.split()[1])/1024 for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))


def played(out): # what an evaluation wrote of its chains, without the time they took
    return [{k: v for k, v in record.items() if k != "seconds"} for record in read_records(out)]


@needs_calvin
def test_an_evaluation_is_the_same_in_this_process_and_in_two(tmp_path):
    config = EvalConfig(steps=10, execute=10, group=2, static_size=32, gripper_size=32, image_size=32, sequences="first 4 of get_sequences(1000)")
    results = []
    for n in (0, 2):
        evaluate(RandomPolicy(), first_sequences(4), config, "random", tmp_path/f"{n}", n_workers=n, make_env=partial(real_env, renderer="tiny"),
                 keep=range(4), progress=False)
        results.append(played(tmp_path/f"{n}"))
    assert results[0] == results[1] and len(results[0]) == 4


# ---- processes


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def gone(pid, seconds=20):
    deadline = time.time() + seconds
    while alive(pid) and time.time() < deadline: time.sleep(.05)
    return not alive(pid)


def test_a_hung_environment_is_an_error_and_ended():
    env = EnvProcess(Hanging, timeout=20)
    assert env.get_obs()["rgb_obs"]["rgb_static"].shape == (2, 2, 3)
    pid, env._timeout = env.pid, .5
    with pytest.raises(TimeoutError, match="no answer to `reset` for 0.5 s: the environment hangs"): env.reset()
    assert gone(pid)
    with pytest.raises(RuntimeError, match="make a new one"): env.get_obs()


@pytest.mark.parametrize("then", ["time.sleep(600)", "env.reset()"], ids=["idle", "hung"])
def test_a_process_ends_with_its_killed_parent(then):
    code = f"import time, odd_environments as t\nenv = t.EnvProcess(t.Hanging)\nprint(env.pid, flush=True)\n{then}"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    time.sleep(.5)
    assert alive(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(pid)


def test_a_process_that_is_killed_is_named():
    env = EnvProcess(Hanging)
    os.kill(env.pid, signal.SIGKILL)
    with pytest.raises(ConnectionError, match="ended with code -9 at `get_obs`"): env.get_obs()
    env.close()


def test_an_evaluation_outlives_an_environment(tmp_path):
    config = EvalConfig(steps=20, execute=10, group=2, static_size=32, gripper_size=32, image_size=32, sequences="first 2 of get_sequences(1000)")
    records = []
    for out, n_workers in (("died", 1), ("whole", 0)): # the second time the flag is there
        evaluate(RandomPolicy(), first_sequences(2), config, "random", tmp_path/out, n_workers=n_workers, keep=range(2), progress=False,
                 make_env=partial(mortal_env, flag=tmp_path/"flag"))
        records.append(played(tmp_path/out))
    assert (tmp_path/"flag").exists() and records[0] == records[1]
    assert "ended with code 9 at `step`" in (tmp_path/"died/chains.jsonl").read_text() # and it says so


# ---- demonstrations, and a policy


class Sole(PlayTable):
    "Stands for calvin_env, of which a process can have one."
    open = None
    def __init__(self, *sizes, root, renderer):
        if Sole.open: raise RuntimeError("this process has an environment already")
        super().__init__(*sizes)
        Sole.open = self

    def close(self): Sole.open = None


def recorded(folder, environment):
    "The tasks of a new recording by `defi-nb record`: three chains for two processes."
    given = ["--environment", str(environment), "--tasks", "turn_on_led", "--demos", "3", "--workers", "2"]
    assert main(["record", str(folder), *given]) == 0
    return [window.task for window in recorded_frames(str(folder), "default", 0).windows]


def test_demonstrations_of_an_environment_of_which_a_process_has_one(tmp_path, monkeypatch):
    monkeypatch.setattr(players, "RealCalvin", Sole)
    monkeypatch.setattr(players, "calvin_missing", lambda root: "")
    assert recorded(tmp_path/"there", tmp_path) == ["turn_on_led"]*3
    about = json.loads((tmp_path/"there/training/recording.json").read_text())
    assert about["environment"] == "Sole" and about["renderer"] == "tiny"


def test_recording_without_calvin_env_is_one_line(tmp_path, capsys):
    assert main(["record", str(tmp_path/"there"), "--environment", str(tmp_path/"none")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("defi-nb: ") and len(said.splitlines()) == 1 and not (tmp_path/"there").exists()


@needs_calvin
def test_a_policy_plays_where_demonstrations_are_recorded(tmp_path, capfd):
    assert recorded(tmp_path/"there", calvin_root()) == ["turn_on_led"]*3
    assert "Exception ignored" not in capfd.readouterr().err # workers close what they opened
    player, (chains, source) = find_player("shipped", {}), find_chains("turn_on_led", 1, length=1)
    config = eval_config(player.preset, "D_D", source, steps=20, group=1)
    result = evaluate(player.policy, chains, config, player.name, n_workers=0, progress=False, make_env=find_env(calvin_root(), "tiny"))
    simulator = result.protocol["simulator"]
    assert simulator["simulator"] == "calvin_env" and simulator["renderer"].startswith("TinyRenderer")
    assert len(result.solved) == 1


# ---- the expert


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_expert_solves_the_first_60_chains(kind, tmp_path):
    "4.2 of 5 at least; what was measured is in LOG.md."
    config = EvalConfig(group=1, sequences="first 60 of get_sequences(1000)")
    result = evaluate(Expert, first_sequences(60), config, "expert", tmp_path, n_workers=2, play=play_expert, progress=False,
                      make_env=playtable_env if kind == "embedded" else partial(real_env_here, renderer="tiny"))
    print(f"\n{kind}: {result.average_length:.3f}, rates {' '.join(f'{r:.3f}' for r in result.rates)}, {result.seconds} s")
    assert result.average_length >= 4.2
