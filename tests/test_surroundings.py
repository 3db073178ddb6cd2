"What a shell, a container and a cluster put around a run: variables of launchers, a small /dev/shm, a place that cannot be written."
import json
import os
import shutil
import subprocess
import sys

import pytest
from conftest import ENV, TRAIN, write_notebook

CODE = "from defi_nb.run.{} import main; raise SystemExit(main())"
START = "from defi_nb.run import cli\nparams = cli.check_injected(globals())\nfolder = cli.run_folder('learn', params)"
CAN_MOUNT = shutil.which("unshare") and subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0


def run(project, *argv, before=(), room="cli", seconds=400, **env):
    "A command in a process of its own; its exit status, and what it said."
    done = subprocess.run([*before, sys.executable, "-c", CODE.format(room), *argv], cwd=project, env=ENV | env, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout, done.stderr


def test_variables_of_a_cluster(learn):
    "Of a job of several processes, of torchrun, of MPI, of accelerate's configuration, and a backend that no one has: one process trains."
    shell = dict(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0", MASTER_ADDR="192.0.2.1", MASTER_PORT="23457", PMI_SIZE="4", ACCELERATE_USE_DEEPSPEED="true",
                 ACCELERATE_MIXED_PRECISION="fp8", MPLBACKEND="TkAgg", PYTHONIOENCODING="ascii")
    status, said, error = run(learn, "run", "learn", "-p", "steps", "2", "--out", "runs/a", **shell)
    assert status == 0, error
    assert "MASTER_PORT, PMI_SIZE, RANK, WORLD_SIZE: set aside, because `defi-nb run` is one process" in said
    assert (learn/"runs/a/metrics.json").exists()


def test_a_peer_that_never_comes(learn, monkeypatch):
    "Several processes are asked for, and there is one: given up, with the address and the variables."
    (learn/"impatient.py").write_text("import sys\nfrom defi_nb.train import engine\nengine.meet_peers.__defaults__ = (3.,)\n" + CODE.format("launch"))
    env = ENV | dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1", PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    done = subprocess.run([sys.executable, "impatient.py", "learn", "--out", "runs/a"], cwd=learn, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert "did not meet at MASTER_ADDR=127.0.0.1, MASTER_PORT=1 within 3 s" in done.stderr and "unset WORLD_SIZE and RANK" in done.stderr


@pytest.mark.skipif(not CAN_MOUNT, reason="no right to mount")
def test_a_small_shared_memory(learn):
    "A container's /dev/shm, smaller still: the run ends with a line that names it, and goes on where there is room."
    write_notebook(learn/"nbs/learn.ipynb", "# Learn\n\n> learns", 'steps: int = 4  # of training\npause: float = 0.0  # seconds a step\nckpt: str = "ckpts/net"  # checkpoint\nout: str = ""  # folder of the run',
                   START, TRAIN.replace("batch_size=6", "batch_size=512, num_workers=2"), "cli.write_metrics(folder, {'loss': history[-1]['loss']})")
    small = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$0" "$@"']
    status, _, error = run(learn, "run", "learn", "--out", "runs/a", before=small)
    said = [line for line in error.splitlines() if line.startswith("defi-nb: ")]
    assert status == 1 and len(said) == 1, error
    assert "batches come through /dev/shm, which has" in said[0] and "num_workers, which is 2, to 0" in said[0]
    status, _, error = run(learn, "run", "learn", "--out", "runs/a")
    assert status == 0 and json.loads((learn/"runs/a/metrics.json").read_text())["loss"] > 0, error


@pytest.mark.skipif(not CAN_MOUNT, reason="no right to mount")
def test_a_checkpoint_on_a_read_only_place(learn):
    "Found while training, in a kernel: one line with the place and what to do."
    (learn/"ckpts").mkdir()
    readonly = ["unshare", "--mount", "sh", "-c", f'mount --bind {learn}/ckpts {learn}/ckpts && mount -o remount,bind,ro {learn}/ckpts && exec "$0" "$@"']
    status, _, error = run(learn, "run", "learn", "-p", "steps", "2", "--out", "runs/a", before=readonly)
    said = [line for line in error.splitlines() if line.startswith("defi-nb: ")]
    assert status == 1 and len(said) == 1 and f"Read-only file system: '{learn}/ckpts/net'" in said[0] and "nothing can be written there: choose another place" in said[0], error
