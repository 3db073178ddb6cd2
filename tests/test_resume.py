"Kill processes with SIGKILL in the middle of their work; what they leave must be usable, and resuming must be exact."
import os
import random
import signal
import time

import torch
from torch import nn
from warm import processes

from defi_nb.weights import checkpoint
from defi_nb.weights.checkpoint import load_checkpoint, load_state, save_checkpoint
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
from defi_nb.train.metrics import CLOCK, read_metrics

CFG = TrainConfig(steps=60, batch_size=8, warmup=5, log_every=2, save_every=5, ema_decay=.95, num_threads=1)


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(15, 64), nn.LayerNorm(64), nn.SiLU(), nn.Dropout(.2), nn.Linear(64, 70))

    def loss(self, batch):
        time.sleep(.005) # a step long enough to be hit
        loss = (self.net(batch.proprio) - batch.action.flatten(1)).square().mean()
        return loss, {"noise": torch.rand(())}


def train(out, seed=0):
    frames = fake_frames({"open_drawer": 3})
    model = Net(seed)
    return model, fit(model, WindowDataset(frames, frames.windows, chunk=10), CFG, out)


def kill_when(target, args, due, seconds=60):
    "Run `target(*args)` in a process and kill it -9 once `due()`; whether it ended by itself first."
    process = processes.Process(target=target, args=args)
    process.start()
    end = time.monotonic() + seconds
    while process.is_alive() and not due() and time.monotonic() < end: time.sleep(.002)
    process.kill()
    process.join()
    assert time.monotonic() < end, "the process did not come to the point where it is killed"
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode == 0


def soon_after(happened, delay):
    "A function that is true from `delay` seconds after `happened()` was true for the first time."
    since = []
    def due():
        if not since and happened(): since.append(time.monotonic())
        return bool(since) and time.monotonic() > since[0] + delay
    return due


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_fit_killed_again_and_again(tmp_path):
    "However often and wherever a run is killed, it ends with the weights and the record of one that was not."
    whole, rows = train(tmp_path/"whole")
    cut, rng, kills = tmp_path/"cut", random.Random(0), 0
    for goal in range(6, CFG.steps, 9):
        there = lambda goal=goal: any(row["step"] >= goal for row in read_metrics(cut))
        kills += not kill_when(train, (cut,), soon_after(there, rng.uniform(0, .02)))
    assert kills >= 5
    resumed, again = train(cut, seed=1)
    assert same(whole.state_dict(), resumed.state_dict())
    assert same(load_state(tmp_path/"whole")["optimizer"]["state"][0], load_state(cut)["optimizer"]["state"][0])
    strip = lambda rows: [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]
    assert strip(rows) == strip(again) == strip(read_metrics(cut))


def save_and_die(folder, at):
    "Save a second checkpoint, killed by its own hand at the `at`-th call that touches the disk."
    calls = 0
    def deadly(f):
        def g(*args, **kw):
            nonlocal calls
            calls += 1
            if calls == at: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kw)
        return g
    for name in ("rename", "replace", "rmdir", "fsync"): setattr(checkpoint.os, name, deadly(getattr(os, name)))
    checkpoint.save_file = deadly(checkpoint.save_file)
    save_checkpoint(folder, Net(seed=2), step=2, state={"t": torch.full((3,), 2.)})


def test_save_killed_at_each_call(tmp_path):
    "A reader finds the old checkpoint or the new one, whole."
    states, found = {1: Net(seed=1).state_dict(), 2: Net(seed=2).state_dict()}, []
    for at in range(1, 30):
        folder = tmp_path/str(at)
        save_checkpoint(folder, Net(seed=1), step=1, state={"t": torch.full((3,), 1.)})
        survived = kill_when(save_and_die, (folder, at), lambda: False)
        model = Net(seed=3)
        step = load_checkpoint(folder, model)["step"]
        assert same(model.state_dict(), states[step]) and (load_state(folder)["t"] == step).all()
        found.append(step)
        if survived: break
    assert survived and found == sorted(found) and {1, 2} == set(found) and len(found) > 8
