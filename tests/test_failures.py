"Failure analysis where nobody can put the simulator back, as in the real CALVIN; and a study that is killed."
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from defi_nb.sim.calvin_tasks import get_sequences
from defi_nb.models.encoders import load_encoders
from defi_nb.eval.failures import relative_error, study_failures, watch
from defi_nb.eval.film import film_chain
from defi_nb.models.policy import fake_policies
from defi_nb.eval.evaluate import evaluate, read_records
from defi_nb.eval.rollout import EvalConfig, RandomPolicy

SEQUENCES = get_sequences(2, tasks=["open_drawer", "close_drawer", "move_slider_left", "move_slider_right"], length=2)
CONFIG = EvalConfig(scene="toy", steps=24, execute=10, group=1, sequences="2 of a toy")


class ToyEnv:
    "A drawer and a door that go where x and y go; it cannot be put back, and what is drawn late shows a later moment."

    def reset(self, robot_obs, scene_obs):
        self.doors = np.array(scene_obs[:2])
        return self.get_obs()

    def step(self, action):
        self.doors = np.clip(self.doors + .02*action[:2], 0, (.28, .22))
        return self.get_obs(), 0., False, self.get_info()

    def get_obs(self): return {"rgb_obs": Late(self), "robot_obs": np.zeros(15)}

    def get_info(self):
        slide, drawer = self.doors
        return {"scene_info": {"doors": {"base__slide": {"current_state": slide}, "base__drawer": {"current_state": drawer}}}}

    def close(self): pass


class Late:
    "Pictures that are drawn when they are read, as the simulator is then."
    def __init__(self, env): self.env, self.at = env, env.doors.copy()

    def __getitem__(self, name):
        assert np.array_equal(self.at, self.env.doors), "a picture was read after the simulator had moved on"
        picture = np.arange(64*64).reshape(64, 64, 1)*.02 + np.array([*self.doors_seen(), .1])*700
        return np.clip(picture, 0, 255).astype(np.uint8)

    def doors_seen(self): return self.env.doors


def toy_env(config): return ToyEnv()


@pytest.fixture(scope="module")
def policy():
    torch.manual_seed(0)
    encoders = load_encoders("tiny")
    return fake_policies(encoders)[0]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval")
    evaluate(RandomPolicy(), SEQUENCES, CONFIG, "random", out, make_env=toy_env, keep=range(2), n_workers=0, progress=False)
    return read_records(out)


def test_watched_and_filmed_without_putting_back(policy, records):
    rows = watch(policy, records[0], SEQUENCES[0], CONFIG, toy_env, steps=2)
    assert len(rows) == sum(-(-n//10) for n in records[0]["steps"])
    assert relative_error(rows) > 0 and relative_error(rows, "expert") is None
    frames = film_chain(records[0], SEQUENCES[0], CONFIG, make_env=toy_env, queries=[r["query"] for r in rows])
    assert frames[0].shape == (382, 870, 3)


def test_only_a_simulator_that_can_be_put_back_is_studied(policy, records):
    with pytest.raises(ValueError, match="a ToyEnv can't be put back exactly"):
        study_failures(policy, records, SEQUENCES, CONFIG, make_env=toy_env, progress=False)


STUDY = """
import torch
from pathlib import Path
from test_failures import CONFIG, SEQUENCES
from defi_nb.sim.calvin_tasks import get_sequences
from defi_nb.eval.failures import study_failures
from defi_nb.sim.playtable import PlayTable
from defi_nb.eval.evaluate import evaluate, read_records
from defi_nb.eval.rollout import EvalConfig, NoOpPolicy
out = Path({out!r})
config = EvalConfig(steps={steps}, execute=10, group=2, sequences="3 of one task")
sequences = get_sequences(3, tasks=["open_drawer", "close_drawer"], length=1)
class Blind(NoOpPolicy): pass
class Drawn(PlayTable):
    def _draw(self, state, name):
        import numpy as np
        return np.zeros((64, 64, 3), np.uint8) # no pictures are needed
make = lambda config: Drawn(config.scene)
if not (out/"chains.jsonl").exists():
    evaluate(Blind(), sequences, config, "blind", out, make_env=make, keep=range(3), n_workers=0, progress=False)
report = study_failures(Blind(), read_records(out), sequences, config, Blind(), offsets=(5,), failures=3, control=0, draws=1, make_env=make, out=out/{name!r}, progress=False)
print([r["verdict"] for r in report.rows])
"""


def test_killed_study_goes_on(tmp_path):
    "Killed after its first row, a study ends with the same rows as one that was left alone."
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    start = lambda name: subprocess.Popen([sys.executable, "-c", STUDY.format(out=str(tmp_path), name=name, steps=360)], env=environment, stdout=subprocess.PIPE, text=True)
    whole = start("whole")
    assert whole.communicate(timeout=300)[0].strip() == "['action', 'action', 'action']"
    killed, path = start("killed"), tmp_path/"killed"/"failures.jsonl"
    while killed.poll() is None and not (path.is_file() and len(path.read_text().splitlines()) >= 2): time.sleep(.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    before = path.read_text().splitlines()
    assert 2 <= len(before) <= 4
    again = start("killed")
    again.communicate(timeout=300)
    assert path.read_text() == (tmp_path/"whole"/"failures.jsonl").read_text() and path.read_text().splitlines()[:2] == before[:2]
