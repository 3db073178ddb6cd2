"Run notebooks on several processes: accelerate launch, notebook_launcher, a SLURM job on two pretended nodes that is told to stop and goes on."
import json
import os
import subprocess
import sys
import time

import psutil
from conftest import BIN, ENV, ROOT, TRAIN, command
from warm import forked

from defi_nb.run.launch import main
from defi_nb.train.metrics import CLOCK, read_metrics


def losses(folder): return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(folder)]


def test_accelerate_launch(learn):
    "On a machine without GPUs accelerate starts one process; its launcher and ours get on."
    done = command("accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "defi_nb.run.launch", "learn", "--out", "runs/one", "-p", "steps", "5", cwd=learn)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running on 1 processes" in done.stdout and len(losses(learn/"ckpts/net")) == 5
    wrong = forked(main, ["learn", "-p", "step", "3"], cwd=learn)
    assert wrong.returncode == 2 and "unknown parameter 'step': did you mean 'steps'?" in wrong.stderr


def test_notebook_launcher(learn):
    "accelerate's debug_launcher starts processes on a CPU as notebook_launcher does on GPUs."
    (learn/"work.py").write_text("pause, steps, ckpt, folder = 0., 12, 'ckpts/net', None\nfrom defi_nb.run import cli\ndef work():\n" +
                                   "".join(f"    {line}\n" for line in TRAIN.replace("time.sleep(pause)", "pass").splitlines()) +
                                   "if __name__ == '__main__':\n    from accelerate import debug_launcher\n    debug_launcher(work, num_processes=2)\n")
    done = subprocess.run([sys.executable, "work.py"], cwd=learn, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(learn/"ckpts/net")) == 12


FAKE = {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=0 "$@" & a=$!\nSLURM_NODEID=1 "$@" & b=$!\nwait $a; x=$?\nwait $b; y=$?\nexit $(( x > y ? x : y ))',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> requeued; fi'}


def test_slurm(learn):
    "SLURM's word that time is up saves and stops both nodes; the job goes back into the queue, and ends as one that was not disturbed."
    fake = learn/"fake"
    fake.mkdir()
    for name, text in FAKE.items():
        (fake/name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fake/name).chmod(0o755)
    env = ENV | {"PATH": f"{fake}:{ENV['PATH']}", "VENV": str(BIN.parent), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
                 "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "two"}
    job = lambda *given: [ROOT/"tools/slurm.sh", "learn", *given, "-p", "steps", "40"]
    whole = subprocess.run(job("--out", "runs/whole", "-p", "ckpt", "ckpts/whole"), cwd=learn, env=env, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    slow = job("--out", "runs/cut", "-p", "pause", "0.1")
    first = subprocess.Popen(slow, cwd=learn, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while len(losses(learn/"ckpts/net")) < 3 and time.monotonic() < end: time.sleep(.05)
    for child in psutil.Process(first.pid).children(recursive=True):
        if "python" in child.name(): child.terminate() # srun passes the signal to all processes of the step, but not to the job's script
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0 and (learn/"requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n", said
    stopped = json.loads((learn/"ckpts/net/config.json").read_text())["step"]
    assert 3 <= stopped < 40 and losses(learn/"ckpts/net")[-1]["step"] == stopped
    again = subprocess.run(slow, cwd=learn, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"going on after step {stopped}" in again.stdout and losses(learn/"ckpts/net") == losses(learn/"ckpts/whole")
    refused = subprocess.run([ROOT/"tools/slurm.sh", "learn"], cwd=learn, env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "give --out FOLDER" in refused.stderr
