"An evaluation in processes: the same result from any number of them, and nothing lost when they are killed."
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_nb.calvin import get_sequences
from defi_nb.rollout import EvalConfig, evaluate, read_records
from defi_nb.spec import ACTION_DIM

TASKS = ["open_drawer", "close_drawer", "move_slider_left", "move_slider_right"]
SEQUENCES = get_sequences(12, tasks=TASKS, length=2)
CONFIG = EvalConfig(scene="toy", image_size=12, steps=24, group=2, sequences="12 of a toy")


class ToyEnv:
    "A drawer and a door that go where x and y go, and pictures that show them; CALVIN's interface."

    def __init__(self, nap=0., log=None):
        self.nap, self.log = nap, log # seconds a step takes; file that notes each chain and its process

    def reset(self, robot_obs, scene_obs):
        if self.log:
            with open(self.log, "a") as file: file.write(f"{os.getpid()}\n")
        self.doors = np.array(scene_obs[:2])
        return self.get_obs()

    def step(self, action):
        time.sleep(self.nap)
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


def toy_env(config, nap=0., log=None): return ToyEnv(nap, log)


class Net(torch.nn.Module):
    "A network that has learned nothing; wide, so that the order of its sums depends on the batch."

    def __init__(self, die_at=None):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(2*3*12*12, 512), torch.nn.Tanh(), torch.nn.Linear(512, 10*ACTION_DIM))
        self.die_at, self.calls = die_at, 0

    def act(self, batch, noise):
        self.calls += 1
        if self.calls == self.die_at: os._exit(9)
        if self.die_at == 0: raise ValueError("the weights are of another preset")
        side = torch.tensor([1. if "open" in t or "left" in t else -1. for t in batch.text])[:, None, None]
        return .3*self.layers(batch.video.float().flatten(1)/255).reshape_as(noise) + .4*side + .5*noise


def run(out, n_workers=2, nap=0., log=None, **kw):
    return evaluate(Net(), SEQUENCES, CONFIG, "net", out, n_workers=n_workers, make_env=partial(toy_env, nap=nap, log=log),
                    keep=range(12), progress=False, **kw)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An evaluation in one process, not interrupted."
    out = tmp_path_factory.mktemp("whole")
    return run(out, n_workers=1), read_records(out)


def test_same_result_from_1_2_3_processes(whole, tmp_path):
    result, records = whole
    assert 0 < sum(result.solved) < 2*len(SEQUENCES) # some succeed and some fail, or equality would say little
    for n in (2, 3):
        again = run(tmp_path/f"{n}", n_workers=n)
        assert (again.row() | {"seconds": 0}) == (result.row() | {"seconds": 0})
        assert read_records(tmp_path/f"{n}") == records # every action of every chain


def _alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError: return False


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks at /proc for left-over processes")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_killed_evaluation_goes_on(whole, tmp_path, how):
    out, log = tmp_path/"out", tmp_path/"log"
    call = f"import test_rollout; test_rollout.run({str(out)!r}, nap=.02, log={str(log)!r})"
    process = subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parent, stderr=subprocess.DEVNULL)
    deadline, journal = time.time() + 120, out/"chains.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= 3): # the header and two groups
        assert process.poll() is None and time.time() < deadline
        time.sleep(.05)
    process.send_signal(how)
    assert process.wait(20) != 0
    pids = {int(pid) for pid in log.read_text().split()}
    while any(map(_alive, pids)): # the workers end too
        assert time.time() < deadline
        time.sleep(.1)
    assert not (out/"result.json").exists()
    done = journal.read_text().count("\n") - 1
    assert 2 <= done < len(SEQUENCES)//CONFIG.group
    journal.write_text(journal.read_text() + '{"group": 5, "secon') # and the disk stopped in the middle of a line

    log.unlink()
    result, records = whole
    again = run(out, n_workers=1, log=log)
    assert len(log.read_text().split()) == len(SEQUENCES) - done*CONFIG.group # what was finished is not played again
    assert again.solved == result.solved and read_records(out) == records


def test_a_process_that_dies_is_named(tmp_path):
    with pytest.raises(RuntimeError, match="ended with code 9"):
        evaluate(Net(die_at=8), SEQUENCES, CONFIG, "net", tmp_path, n_workers=2, make_env=toy_env, progress=False)
    assert len(read_records(tmp_path)) < len(SEQUENCES)


def test_an_error_in_a_process_is_the_error_here(tmp_path):
    with pytest.raises(ValueError, match="the weights are of another preset"):
        evaluate(partial(Net, die_at=0), SEQUENCES, CONFIG, "net", tmp_path, "some weights", n_workers=2, make_env=toy_env, progress=False)
