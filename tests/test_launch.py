"Run notebooks on several processes: accelerate launch, notebook_launcher, a SLURM job on two pretended nodes that is told to stop and goes on."
import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import BIN, ENV, ROOT, command, write_notebook

from defi_nb.train import CLOCK, read_metrics

TRAIN = '''
import time
import torch
from defi_nb.episodes import WindowDataset, fake_frames
from defi_nb.recipe import TrainConfig
from defi_nb.train import fit
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Linear(15, 32), torch.nn.Dropout(.1), torch.nn.Linear(32, 70))
    def loss(self, batch):
        time.sleep(pause)
        return (self.net(batch.proprio) - batch.action.flatten(1)).square().mean(), {}
frames = fake_frames({"open_drawer": 3})
cfg = TrainConfig(steps=steps, batch_size=6, warmup=2, log_every=1, save_every=1000, device="cpu", num_threads=1)
model = Net()
history = fit(model, WindowDataset(frames, frames.windows, chunk=10), cfg, run.project_root()/ckpt, record=folder)
'''


@pytest.fixture
def project(tmp_path):
    "A project with one run notebook that trains."
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").write_text("[DEFAULT]\n")
    parameters = 'steps: int = 12  # of training\npause: float = 0.0  # seconds a step\nckpt: str = "ckpts/net"  # checkpoint\nout: str = ""  # folder of the run'
    start = "from defi_nb import run\nparams = run.check_injected(globals())\nfolder = run.run_folder('learn', params)"
    write_notebook(tmp_path/"nbs/learn.ipynb", "# Learn\n\n> learns", parameters, start, TRAIN, "run.write_metrics(folder, {'loss': history[-1]['loss']})")
    return tmp_path


def losses(folder): return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(folder)]


def test_two_processes_run_a_notebook(project):
    "One record, one checkpoint; a second start finds it finished."
    given = ["--standalone", "--nproc-per-node", "2", "-m", "defi_nb.train", "learn", "--out", "runs/two"]
    done = command("torchrun", *given, cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running on 2 processes" in done.stdout and len(losses(project/"ckpts/net")) == 12
    assert json.loads((project/"runs/two/metrics.json").read_text()) == json.loads((project/"runs/two/rank1/metrics.json").read_text())
    assert "finished already" in command("torchrun", *given, cwd=project).stdout
    wrong = command("torchrun", *given[:-2], "-p", "step", "3", cwd=project)
    assert wrong.returncode != 0 and "unknown parameter 'step': did you mean 'steps'?" in wrong.stderr


def test_accelerate_launch(project):
    "On a machine without GPUs accelerate starts one process; its launcher and ours get on."
    done = command("accelerate", "launch", "--cpu", "--num_processes", "1", "-m", "defi_nb.train", "learn", "--out", "runs/one", "-p", "steps", "5", cwd=project)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "running on 1 processes" in done.stdout and len(losses(project/"ckpts/net")) == 5


def test_notebook_launcher(project):
    "accelerate's debug_launcher starts processes on a CPU as notebook_launcher does on GPUs."
    (project/"work.py").write_text("pause, steps, ckpt, folder = 0., 12, 'ckpts/net', None\nfrom defi_nb import run\ndef work():\n" +
                                   "".join(f"    {line}\n" for line in TRAIN.replace("time.sleep(pause)", "pass").splitlines()) +
                                   "if __name__ == '__main__':\n    from accelerate import debug_launcher\n    debug_launcher(work, num_processes=2)\n")
    done = subprocess.run([sys.executable, "work.py"], cwd=project, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(project/"ckpts/net")) == 12


FAKE = {"srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nSLURM_NODEID=0 "$@" & a=$!\nSLURM_NODEID=1 "$@" & b=$!\nwait $a; x=$?\nwait $b; y=$?\nexit $(( x > y ? x : y ))',
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; echo 127.0.0.2; else echo "$@" >> requeued; fi'}


def test_slurm(project):
    "SLURM's word that time is up saves and stops both nodes; the job goes back into the queue, and ends as one that was not disturbed."
    fake = project/"fake"
    fake.mkdir()
    for name, text in FAKE.items():
        (fake/name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (fake/name).chmod(0o755)
    env = ENV | {"PATH": f"{fake}:{ENV['PATH']}", "VENV": str(BIN.parent), "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1",
                 "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "two"}
    job = lambda *given: [ROOT/"tools/slurm.sh", "learn", *given, "-p", "steps", "40"]
    whole = subprocess.run(job("--out", "runs/whole", "-p", "ckpt", "ckpts/whole"), cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    slow = job("--out", "runs/cut", "-p", "pause", "0.1")
    first = subprocess.Popen(slow, cwd=project, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while len(losses(project/"ckpts/net")) < 3 and time.monotonic() < end: time.sleep(.05)
    for child in psutil.Process(first.pid).children(recursive=True):
        if "python" in child.name(): child.terminate() # srun passes the signal to all processes of the step, but not to the job's script
    said = first.communicate(timeout=120)[0]
    assert first.returncode == 0 and (project/"requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n", said
    stopped = json.loads((project/"ckpts/net/config.json").read_text())["step"]
    assert 3 <= stopped < 40 and losses(project/"ckpts/net")[-1]["step"] == stopped
    again = subprocess.run(slow, cwd=project, env=env, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"going on after step {stopped}" in again.stdout and losses(project/"ckpts/net") == losses(project/"ckpts/whole")
    refused = subprocess.run([ROOT/"tools/slurm.sh", "learn"], cwd=project, env=env, capture_output=True, text=True)
    assert refused.returncode == 2 and "give --out FOLDER" in refused.stderr
