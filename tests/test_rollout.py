"An evaluation in processes and parts: the same result from any number of them, and nothing lost when they are killed, die or hang."
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_nb.sim.calvin_tasks import get_sequences
from defi_nb.eval.evaluate import evaluate, read_records
from defi_nb.eval.rollout import EvalConfig
from defi_nb.core.spec import ACTION_DIM

TASKS = ["open_drawer", "close_drawer", "move_slider_left", "move_slider_right"]
SEQUENCES = get_sequences(11, tasks=TASKS, length=2) # six groups, of which the last is not whole
CONFIG = EvalConfig(scene="toy", image_size=12, steps=24, group=2, sequences="11 of a toy")


class ToyEnv:
    "A drawer and a door that go where x and y go, and pictures that show them; CALVIN's interface."

    def __init__(self, nap=0., log=None, hang=None):
        self.nap, self.log, self.hang = nap, log, hang # seconds a step takes; file that notes each chain and its process; file that is made by the one step that never ends

    def reset(self, robot_obs, scene_obs):
        if self.log:
            with open(self.log, "a") as file: file.write(f"{os.getpid()}\n")
        self.doors = np.array(scene_obs[:2])
        return self.get_obs()

    def step(self, action):
        time.sleep(self.nap)
        if self.hang and not Path(self.hang).exists():
            Path(self.hang).touch()
            while True: time.sleep(1)
        self.doors = np.clip(self.doors + .02*action[:2], 0, (.28, .22))
        return self.get_obs(), 0., False, self.get_info()

    def get_obs(self):
        level = np.array([*self.doors, .1])*700
        picture = np.clip(np.arange(144).reshape(12, 12, 1)*.3 + level, 0, 255).astype(np.uint8)
        return {"rgb_obs": {"rgb_static": picture, "rgb_gripper": picture[::-1]}, "robot_obs": np.zeros(15)}

    def get_info(self):
        slide, drawer = self.doors
        return {"scene_info": {"doors": {"base__slide": {"current_state": slide}, "base__drawer": {"current_state": drawer}}}}

    def close(self): pass


def toy_env(config, nap=0., log=None, hang=None): return ToyEnv(nap, log, hang)


class Net(torch.nn.Module):
    "A network that has learned nothing; wide, so that the order of its sums depends on the batch."

    def __init__(self, die_at=None, once=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(2*3*12*12, 512), torch.nn.Tanh(), torch.nn.Linear(512, 10*ACTION_DIM))
        self.die_at, self.once, self.calls = die_at, once, 0 # once: file that is made when it dies, and keeps it from dying again

    def act(self, batch, noise):
        self.calls += 1
        if self.calls == self.die_at and not (self.once and Path(self.once).exists()):
            if self.once: Path(self.once).touch()
            os._exit(9)
        if self.die_at == 0: raise ValueError("the weights are of another preset")
        side = torch.tensor([1. if "open" in t or "left" in t else -1. for t in batch.text])[:, None, None]
        return .3*self.layers(batch.video.float().flatten(1)/255).reshape_as(noise) + .4*side + .5*noise


def run(out, n_workers=2, nap=0., log=None, hang=None, **kw):
    return evaluate(Net(), SEQUENCES, kw.pop("config", CONFIG), "net", out, n_workers=n_workers, make_env=partial(toy_env, nap=nap, log=log, hang=hang),
                    keep=range(len(SEQUENCES)), progress=False, **kw)


def without_time(records): return [{k: v for k, v in r.items() if k != "seconds"} for r in records]


def same(result, other, notes=True):
    "Whether two results are the same but for the time they took, and for what happened on the way."
    drop = {"seconds": 0} | ({} if notes else {"notes": 0})
    return (result.row() | drop) == (other.row() | drop)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An evaluation in this process, not interrupted."
    out = tmp_path_factory.mktemp("whole")
    return run(out, n_workers=0), without_time(read_records(out))


def test_same_result_from_1_2_3_processes(whole, tmp_path):
    result, records = whole
    assert 0 < sum(result.solved) < 2*len(SEQUENCES) # some succeed and some fail, or equality would say little
    for n in (1, 2, 3):
        assert same(run(tmp_path/f"{n}", n_workers=n), result)
        assert without_time(read_records(tmp_path/f"{n}")) == records # every action of every chain


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_same_result_from_parts(whole, tmp_path, parts):
    result, records = whole
    found = [run(tmp_path, n_workers=0, shard=(i, parts)) for i in reversed(range(parts))]
    assert found[:-1] == [None]*(parts - 1) and same(found[-1], result) # the last one finds all chains
    assert without_time(read_records(tmp_path)) == records
    assert same(run(tmp_path, n_workers=0), result) # and so does one that plays nothing itself
    shares = [len(path.read_text().splitlines()) - 1 for path in sorted(tmp_path.glob("chains.*-of-*.jsonl"))]
    assert sum(shares) == len(SEQUENCES) and len(set(shares)) > 1 # uneven


def test_early_stop_is_the_same_from_any_number_of_processes(whole, tmp_path):
    early = replace(CONFIG, precision=.82)
    results = [run(tmp_path/f"{n}", n_workers=n, config=early, nap=.002*(n > 0)) for n in (0, 3)]
    assert same(*results) and 2 <= len(results[0].solved) < len(SEQUENCES)
    low, high = results[0].interval
    assert (high - low)/2 <= .82 and results[0].solved == whole[0].solved[:len(results[0].solved)]


def _alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


def start(out, log, n_workers, **kw):
    call = f"import test_rollout; test_rollout.run({str(out)!r}, n_workers={n_workers}, nap=.01, log={str(log)!r})"
    return subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL, **kw)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc for left-over processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_evaluation_goes_on(whole, tmp_path, how):
    out, log = tmp_path/"out", tmp_path/"log"
    process, deadline, journal = start(out, log, 2), time.time() + 120, out/"chains.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 4): # the header and three chains
        assert process.poll() is None and time.time() < deadline
        time.sleep(.02)
    process.send_signal(how)
    assert process.wait(20) != 0
    pids = {int(pid) for pid in log.read_text().split()}
    while any(map(_alive, pids)): # the workers end too
        assert time.time() < deadline
        time.sleep(.1)
    assert not (out/"result.json").exists()
    done = {json.loads(line)["chain"] for line in journal.read_text().splitlines()[1:]}
    whole_groups = [g for g in range(6) if {2*g, 2*g + 1} & set(range(len(SEQUENCES))) <= done]
    assert 3 <= len(done) < len(SEQUENCES)
    journal.write_text(journal.read_text() + '{"chain": 9, "sol') # and the disk stopped in the middle of a line

    log.unlink()
    result, records = whole
    again = run(out, n_workers=0, log=log)
    left = len(SEQUENCES) - sum(len({2*g, 2*g + 1} & set(range(len(SEQUENCES)))) for g in whole_groups)
    assert len(log.read_text().split()) == left # whole groups are not played again
    assert same(again, result) and without_time(read_records(out)) == records


def test_killed_again_and_again(whole, tmp_path):
    "With -9 at random moments, until it is through."
    rng, out, kills, code = random.Random(0), tmp_path/"out", 0, None
    while code is None:
        process = start(out, tmp_path/"log", 1 + kills % 3)
        try: code = process.wait(timeout=2.5 + 2*rng.random() + kills) # longer each time, so that it gets through on any machine
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert code == 0 and (out/"result.json").exists()
    assert kills >= 1
    assert same(run(out, n_workers=0), whole[0]) and without_time(read_records(out)) == whole[1]


def test_a_hung_environment_is_played_again(whole, tmp_path):
    again = run(tmp_path/"out", n_workers=2, hang=tmp_path/"hung", patience=25, retries=5)
    assert (tmp_path/"hung").exists() and same(again, whole[0], notes=False)
    assert without_time(read_records(tmp_path/"out")) == whole[1]
    assert any("nothing was heard for 25 s in stage 'step'" in e["event"] for e in again.notes["events"])


def test_a_dead_process_is_played_again(whole, tmp_path):
    again = evaluate(Net(die_at=8, once=tmp_path/"died"), SEQUENCES, CONFIG, "net", tmp_path/"out", n_workers=2, make_env=toy_env, progress=False)
    assert again.solved == whole[0].solved and "ended with code 9" in again.notes["events"][0]["event"]


def test_a_process_that_always_dies_is_named(tmp_path):
    with pytest.raises(RuntimeError, match=r"chains \[.*\] failed 2 times: its process ended with code 9"):
        evaluate(Net(die_at=8), SEQUENCES, CONFIG, "net", tmp_path, n_workers=2, make_env=toy_env, progress=False, retries=1)
    assert len(read_records(tmp_path)) < len(SEQUENCES)


def test_an_error_in_a_process_is_the_error_here(tmp_path):
    with pytest.raises(ValueError, match="the weights are of another preset"):
        evaluate(partial(Net, die_at=0), SEQUENCES, CONFIG, "net", tmp_path, "some weights", n_workers=2, make_env=toy_env, progress=False)
