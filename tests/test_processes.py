"Two processes with gloo: the same losses as one at the same global batch, uneven shares, sharded or not, killed and resumed."
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ENV, ROOT
from safetensors.torch import load_file

from defi_nb.train import CLOCK

SCRIPT = ROOT/"tests/distributed.py"
CFG = {"steps": 12, "batch_size": 8, "warmup": 2, "lr": 1e-3, "log_every": 1, "save_every": 4, "ema_decay": .9, "val_every": 6}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def launch(out, launcher, cfg, model="net", fails=False, **job):
    "What each process ended with; the checkpoint's folder is OUT/ckpt."
    out.mkdir(exist_ok=True)
    job = json.dumps({"model": model, "cfg": CFG | cfg, "out": str(out), **job})
    env = {k: v for k, v in ENV.items() if not k.startswith("ACCELERATE")} | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([*launcher, str(SCRIPT), job], env=env, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr if fails else [json.loads(p.read_text()) for p in sorted(out.glob("rank*.json"))]


def two(out, cfg, **job): return launch(out, TORCHRUN, cfg, **job)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    "The run of one process at a global batch of n, made once."
    made = {}
    def at(n):
        if n not in made:
            out = tmp_path_factory.mktemp(f"one{n}")
            made[n] = launch(out, [sys.executable], {"batch_size": n})[0], load_file(out/"ckpt/model.safetensors"), out
        return made[n]
    return at


def timeless(rows): return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def agree(one, out, ranks):
    "Losses, logs, learning rates, validation and averaged weights as one process has them."
    alone, weights, _ = one
    assert len({r["digest"] for r in ranks}) == 1, "the processes ended with different weights"
    for rank in ranks:
        for a, b in zip(timeless(alone["history"]), timeless(rank["history"]), strict=True):
            assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    for k, t in load_file(out/"ckpt/model.safetensors").items(): torch.testing.assert_close(weights[k], t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("batch,changes", [(8, {}), (7, {}), (7, {"accumulate": 3}), (8, {"sharded": True}), (7, {"sharded": True, "accumulate": 2, "recompute": True})],
                         ids=["even", "uneven", "uneven parts", "sharded", "sharded uneven parts"])
def test_two_are_as_one(one, tmp_path, batch, changes):
    ranks = two(tmp_path, {"batch_size": batch} | changes)
    assert len(ranks) == 2
    agree(one(batch), tmp_path, ranks)


def test_killed_and_resumed_with_two(tmp_path):
    "One of two processes dies; the launcher ends the other; started again, they end bit for bit where undisturbed ones end."
    whole = two(tmp_path/"whole", {}, model="coded")
    cut = tmp_path/"cut"
    two(cut, {}, model="coded", die_at=6, fails=True)
    resumed = two(cut, {}, model="coded")
    assert {r["digest"] for r in whole + resumed} == {whole[0]["digest"]}
    assert timeless(whole[0]["history"]) == timeless(resumed[0]["history"])


def test_begun_with_one_finished_with_two_sharded(one, tmp_path):
    "A checkpoint has no number of processes in it."
    launch(tmp_path, [sys.executable], {"batch_size": 8}, die_at=6, fails=True)
    agree(one(8), tmp_path, two(tmp_path, {"sharded": True}))
    shutil.rmtree(tmp_path/"ckpt")
    two(tmp_path, {"sharded": True}, die_at=6, fails=True)
    launch(tmp_path, [sys.executable], {"batch_size": 8})
    weights = load_file(tmp_path/"ckpt/model.safetensors")
    for k, t in one(8)[1].items(): torch.testing.assert_close(weights[k], t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("model,changes", [("gfdm", {}), ("gfdm", {"sharded": True}), ("gidm", {}), ("plain", {})], ids=["gfdm", "gfdm sharded", "gidm", "plain"])
def test_our_stages(tmp_path, model, changes):
    "No parameter of them is unused, which data parallelism would complain of, and the processes agree on the weights."
    ranks = two(tmp_path, {"steps": 3, "batch_size": 2, "save_every": 3, "val_every": 0, "val_batches": 1} | changes, model=model)
    assert len(ranks) == 2 and ranks[0]["digest"] == ranks[1]["digest"]


def test_what_cannot_be(tmp_path):
    said = two(tmp_path/"few", {"batch_size": 1}, fails=True)
    assert "batch_size 1 is less than one sample for each of 2 processes" in said
    said = two(tmp_path/"codes", {"sharded": True}, model="coded", fails=True)
    assert "this model has a codebook that restarts dead codes, which a sharded one cannot" in said
