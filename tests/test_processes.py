"Two processes with gloo: the same losses as one at the same global batch, uneven shares, sharded or not, killed and resumed."
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ENV, ROOT
from distributed import run_jobs
from safetensors.torch import load_file
from warm import forked

from defi_nb.weights.checkpoint import read_config
from defi_nb.train.metrics import CLOCK, read_metrics

SCRIPT = ROOT/"tests/distributed.py"
CFG = {"steps": 12, "batch_size": 8, "warmup": 2, "lr": 1e-3, "log_every": 1, "save_every": 4, "ema_decay": .9, "val_every": 6}
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def environment(): return ENV | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}


def a_job(out, cfg, model="net", **more): return {"model": model, "cfg": CFG | cfg, "out": str(out), **more}


def launch(*jobs, fails=False):
    "Each job on two processes, one after the other; what each process ended a job with lies in the job's folder."
    done = subprocess.run([*TWO, str(SCRIPT), json.dumps(jobs)], env=environment(), capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert (done.returncode != 0) == fails, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stderr


def alone(*jobs, status=0):
    "The same on one process."
    done = forked(run_jobs, jobs, cwd=ROOT)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]


def ended(out): return [json.loads(p.read_text()) for p in sorted(out.glob("rank*.json"))]


SHORT = {"steps": 3, "batch_size": 2, "save_every": 3, "val_every": 0, "val_batches": 1}
ALIKE = {"even": {}, "uneven parts": {"batch_size": 7, "accumulate": 3}, "sharded uneven parts": {"batch_size": 7, "sharded": True, "accumulate": 2, "recompute": True}}
STAGES = {"gfdm": {"sharded": True}, "gidm": {}, "plain": {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What two processes made of all jobs that need no kill, and one process of the same."
    folder = tmp_path_factory.mktemp("processes")
    alone(*[a_job(folder/f"one{n}", {"batch_size": n}) for n in (7, 8)], a_job(folder/"begun", {}, die_at=6), status=-signal.SIGKILL)
    said = launch(*[a_job(folder/name, cfg) for name, cfg in ALIKE.items()], *[a_job(folder/name, SHORT | cfg, name) for name, cfg in STAGES.items()],
                  a_job(folder/"whole", {"steps": 30}, "coded"), a_job(folder/"begun", {"sharded": True}),
                  a_job(folder/"refused", {"sharded": True}, "coded"), fails=True)
    (folder/"refused.txt").write_text(said)
    return folder


def test_a_codebook_is_not_sharded(folder):
    assert "this model has a codebook that restarts dead codes, which a sharded one cannot" in (folder/"refused.txt").read_text()


def timeless(rows): return [{k: v for k, v in r.items() if k not in CLOCK} for r in rows]


def agree(folder, one, two):
    "Losses, logs, learning rates, validation and averaged weights as one process has them."
    [alone], ranks = ended(folder/one), ended(folder/two)
    assert len(ranks) == 2 and len({r["digest"] for r in ranks}) == 1, "the processes ended with different weights"
    for rank in ranks:
        for a, b in zip(timeless(alone["history"]), timeless(rank["history"]), strict=True): assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    same_weights(folder/one, folder/two)


def same_weights(one, two):
    here, there = (load_file(out/"ckpt/model.safetensors") for out in (one, two))
    for k, t in there.items(): torch.testing.assert_close(here[k], t, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ALIKE)
def test_two_are_as_one(folder, name): agree(folder, f"one{ALIKE[name].get('batch_size', 8)}", name)


def test_begun_with_one_finished_with_two_sharded(folder):
    "A checkpoint has no number of processes in it."
    assert len(ended(folder/"begun")) == 2 # the one that had begun it was killed at step 6
    agree(folder, "one8", "begun")


@pytest.mark.parametrize("name", STAGES)
def test_our_stages(folder, name):
    "No parameter of them is unused, which data parallelism would complain of, and the processes agree on the weights."
    ranks = ended(folder/name)
    assert len(ranks) == 2 and ranks[0]["digest"] == ranks[1]["digest"]


def killed(job):
    "Two processes and their launcher, killed at once after some logged steps."
    process = subprocess.Popen([*TWO, str(SCRIPT), json.dumps([job])], env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    end, ckpt = time.monotonic() + 120, Path(job["out"])/"ckpt"
    while len(read_metrics(ckpt)) < 6 and time.monotonic() < end: time.sleep(.002)
    for child in psutil.Process(process.pid).children(recursive=True): child.kill()
    process.kill()
    process.wait()
    return read_config(ckpt)["step"]


def test_killed_and_resumed(folder, tmp_path):
    "Started again with two, they end bit for bit where undisturbed ones end; finished by one, a sharded run has the weights that one has."
    sharded = a_job(tmp_path/"sharded", {"sharded": True, "steps": 12}, pause=.05)
    assert killed(cut := a_job(tmp_path/"cut", {"steps": 30}, "coded")) < 30 and killed(sharded) < 12
    launch(cut)
    whole, resumed = ended(folder/"whole"), ended(tmp_path/"cut")
    assert {r["digest"] for r in whole + resumed} == {whole[0]["digest"]}
    assert timeless(whole[0]["history"]) == timeless(resumed[0]["history"])
    alone(sharded)
    same_weights(folder/"one8", tmp_path/"sharded")


@pytest.mark.slow
def test_one_of_two_dies(folder, tmp_path):
    "Its launcher ends the other, and started again they end as if nothing had happened."
    launch(a_job(tmp_path, {"steps": 30}, "coded", die_at=6), fails=True)
    launch(a_job(tmp_path, {"steps": 30}, "coded"))
    assert ended(folder/"whole")[0]["digest"] == ended(tmp_path)[0]["digest"]


ENCODE = """
import os, torch
from defi_nb.data.cache import _in_threads
conv, x, count = torch.nn.Conv2d(32, 64, 3, padding=1), torch.randn(32, 32, 32, 32), lambda: len(os.listdir("/proc/self/task"))
before, done = count(), []
with torch.inference_mode():
    for _ in _in_threads(lambda lo, hi: done.append((conv(x), count())), [(i, i + 1) for i in range(4)], 2): pass
print(max(n for _, n in done) - before)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="the system does not list a process's threads")
def test_encoding_in_two_threads_starts_no_others():
    "A thread of ours that let OpenMP start its own would have the machine compute on twice as many threads as it has cores."
    run = subprocess.run([sys.executable, "-c", ENCODE], env=os.environ | {"OMP_NUM_THREADS": "2"}, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "2", run.stderr
