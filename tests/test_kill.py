"""Kill a training run with SIGKILL at random moments, also in the middle of a save; every run must end as if nothing had happened.

20 kill points by default, 200 with `pytest -m slow`. Two saves that are not atomic are tried as well: the same check must find out.
"""
import os
import random
import shutil
import signal
import time

import pytest
import torch
from torch import nn
from warm import processes

from defi_nb.weights import checkpoint
from defi_nb.weights.checkpoint import has_checkpoint, load_state, read_config
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
from defi_nb.train.metrics import CLOCK, read_metrics
from defi_nb.models.vq import VectorQuantizer

CFG = TrainConfig(steps=40, batch_size=8, warmup=5, log_every=2, save_every=4, ema_decay=.95, num_threads=1, accumulate=2, keep=2, val_every=8, device="cpu")
CALLS = "rename", "replace", "rmdir", "fsync", "link", "unlink" # of the disk, that a save consists of


class Net(nn.Module):
    "Dropout and a codebook that restarts its codes: what a step draws matters."
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.net = nn.Sequential(nn.Linear(15, 64), nn.LayerNorm(64), nn.SiLU(), nn.Dropout(.2))
        self.vq, self.out = VectorQuantizer(8, 64, restart_below=.5), nn.Linear(64, 70)

    def loss(self, batch):
        if self.training: time.sleep(.001)
        q = self.vq(self.net(batch.proprio)[:, None])
        return (self.out(q.z_q[:, 0]) - batch.action.flatten(1)).square().mean() + q.loss, {"noise": torch.rand(())}


def train(out, seed=0):
    frames = fake_frames({"open_drawer": 3})
    data = WindowDataset(frames, frames.windows, chunk=10)
    model = Net(seed)
    return model, fit(model, data, CFG, out, val_data=data.select(frames.windows[:1]))


def deadly(at, calls=None):
    "Let this process die by its own hand at the `at`-th call that touches the disk; counts them where `calls` is a list."
    done = [0]
    def wrap(f):
        def g(*args, **kw):
            done[0] += 1
            if calls is not None: calls.append(f.__name__)
            if done[0] == at: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kw)
        return g
    for name in CALLS: setattr(os, name, wrap(getattr(os, name)))
    checkpoint.save_file = wrap(checkpoint.save_file)


def in_place(folder, files):
    "A save that is not atomic: each file is written where it belongs."
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        target = folder/name
        if callable(content):
            target.unlink(missing_ok=True)
            content(target)
        else: target.write_bytes(content)
        with open(target, "rb") as f: os.fsync(f.fileno())


def one_by_one(folder, files):
    "A save that writes all files aside, but moves them up without the rename that makes them valid together."
    new = folder/".new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name, content in files.items():
        if callable(content): content(new/name)
        else: (new/name).write_bytes(content)
    for name in files: os.replace(new/name, folder/name)
    os.rmdir(new)


PROPER = checkpoint._write_all


def run(out, at, save):
    "A run that dies at the `at`-th call that touches the disk, and saves as `save` does."
    checkpoint._write_all = save
    deadly(at)
    train(out)


def killed(out, at=None, after=None, save=PROPER):
    "Run until it is killed, at a call of the disk or some seconds after its first logged row; whether it was."
    process = processes.Process(target=run, args=(out, at, save))
    process.start()
    end, since = time.monotonic() + 60, None
    while process.is_alive() and time.monotonic() < end:
        if after is not None and since is None and read_metrics(out): since = time.monotonic()
        if since is not None and time.monotonic() - since > after: process.kill()
        time.sleep(.0005)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def timeless(rows): return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def flat(tree): return [x for v in (tree.values() if isinstance(tree, dict) else tree) for x in flat(v)] if isinstance(tree, (dict, list)) else [tree]


def differs(whole, out):
    "What of a resumed run is not as in one that was never disturbed; empty if all is."
    model, rows = train(out, seed=int(has_checkpoint(out))) # other weights, where there is something to go on from
    there, here = load_state(whole["out"]), load_state(out)
    same = {"weights": all(torch.equal(a, b) for a, b in zip(whole["model"].state_dict().values(), model.state_dict().values(), strict=True)),
            "record": timeless(whole["rows"]) == timeless(rows) == timeless(read_metrics(out)),
            "optimiser": all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(flat(there), flat(here), strict=True)),
            "best": read_config(whole["out"]/"best")["step"] == read_config(out/"best")["step"],
            "kept": [p.name for p in sorted(out.glob("step-*"))] == ["step-0000036", "step-0000040"] and all(read_config(p) for p in out.glob("step-*")),
            "files": not [p for p in out.rglob("*") if p.name in (".new", ".commit")]}
    return [k for k, ok in same.items() if not ok]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "An undisturbed run, its time, and the disk's calls that it made."
    out, calls = tmp_path_factory.mktemp("whole")/"run", []
    real = {name: getattr(os, name) for name in CALLS} | {"save_file": checkpoint.save_file}
    deadly(0, calls)
    try: model, rows = train(out)
    finally:
        checkpoint.save_file = real.pop("save_file")
        for name, f in real.items(): setattr(os, name, f)
    assert len(calls) > 150 and {"link", "save_file", "rename"} <= {*calls}
    return {"out": out, "model": model, "rows": rows, "calls": len(calls), "seconds": rows[-1]["seconds"]}


def points(whole, n, seed):
    "Kill points: half at a call of the disk, most of them inside a save, half at a random moment."
    rng = random.Random(seed)
    return [{"at": rng.randrange(1, whole["calls"] + 1)} if i % 2 else {"after": rng.uniform(0, whole["seconds"])} for i in range(n)]


def check(whole, folder, n, seed):
    for i, point in enumerate(points(whole, n, seed)):
        out = folder/str(i)
        while not killed(out, **point): # it had ended before: the undisturbed run was slower
            shutil.rmtree(out)
            point = dict(after=point["after"]/2)
        assert not differs(whole, out), (point, differs(whole, out))
        shutil.rmtree(out)


def test_resumes_after_any_of_20_kills(whole, tmp_path):
    check(whole, tmp_path, 20, seed=0)


@pytest.mark.slow
def test_resumes_after_any_of_200_kills(whole, tmp_path):
    check(whole, tmp_path, 200, seed=1)


def test_every_call_of_one_save(whole, tmp_path):
    "Killed at each call of the disk of the run's third save, links to the kept ones included."
    first = whole["calls"]//4
    for at in range(first, first + 24, 2):
        out = tmp_path/str(at)
        assert killed(out, at=at)
        assert not differs(whole, out), at


@pytest.mark.parametrize("save", [in_place, one_by_one], ids=lambda f: f.__name__)
def test_a_broken_save_is_found(whole, tmp_path, save):
    "The same check fails when the save is not atomic."
    for at in range(20, 80):
        out = tmp_path/str(at)
        killed(out, at=at, save=save)
        try: found = differs(whole, out)
        except (ValueError, FileNotFoundError) as e: found = str(e)
        if found: return
        shutil.rmtree(out)
    pytest.fail(f"{save.__name__} went unnoticed")


def told(out):
    train(out)


def test_sigterm_saves_and_stops(whole, tmp_path):
    "As a cluster does before it kills."
    out = tmp_path/"told"
    process = processes.Process(target=told, args=(out,))
    process.start()
    end = time.monotonic() + 60
    while not read_metrics(out) and time.monotonic() < end: time.sleep(.001)
    process.terminate()
    process.join(60)
    assert process.exitcode == 1 # a KeyboardInterrupt that says where it stopped
    assert read_config(out)["step"] >= read_metrics(out)[-1]["step"] # saved at the step where it stopped, not at the last save
    assert not differs(whole, out)
