"The whole demo, killed again and again at moments drawn at random, ends with the same models and the same results as an undisturbed one."
import os
import random
import shutil
import signal
import subprocess
import time

import pytest
from conftest import BIN, ENV, ROOT, RUNS
from test_interrupt import processes_in, wait_for
from test_runs import SMALL, arguments

from defi_nb.eval.results import EvalResult
from defi_nb.weights.load import checkpoint_digest

KILLS = 12


def project_in(folder):
    (folder/"nbs").mkdir(parents=True)
    shutil.copy(ROOT/"settings.ini", folder)
    for path in RUNS: shutil.copy(path, folder/"nbs")
    return folder


def start(folder, log):
    args = [BIN/"defi-nb", "run", "pipeline", "--out", "runs/demo", *map(str, arguments(SMALL["pipeline"]))]
    return subprocess.Popen(args, cwd=folder, env=ENV, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)


def outcome(folder):
    "Digest of every checkpoint, and what every evaluation found."
    ckpts = {p.parent.name: checkpoint_digest(p.parent) for p in (folder/"ckpts").rglob("model.safetensors")}
    results = {p.parent.name: EvalResult.load(p).solved for p in (folder/"runs/demo").glob("eval_*/result.json")}
    return ckpts, results


@pytest.mark.slow
def test_killed_demo_ends_as_an_undisturbed_one(tmp_path):
    undisturbed, killed = project_in(tmp_path/"undisturbed"), project_in(tmp_path/"killed")
    began = time.time()
    with open(tmp_path/"undisturbed.txt", "w") as log: assert start(undisturbed, log).wait(1200) == 0, (tmp_path/"undisturbed.txt").read_text()[-3000:]
    whole, drawn = time.time() - began, random.Random(0)
    with open(tmp_path/"killed.txt", "w") as log:
        for i in range(KILLS):
            run = start(killed, log)
            try: run.wait(drawn.uniform(.1, .35)*whole)
            except subprocess.TimeoutExpired: run.send_signal((signal.SIGKILL, signal.SIGINT)[i % 2])
            run.wait(60)
            if run.returncode == 0: break # finished in spite of it all
            assert wait_for(lambda: not processes_in(killed), 30), "something still runs"
        assert run.returncode == 0 or start(killed, log).wait(1200) == 0, (tmp_path/"killed.txt").read_text()[-3000:]
    assert i >= 2, "hardly disturbed"
    expected, found = outcome(undisturbed), outcome(killed)
    assert len(expected[0]) == 7 and len(expected[1]) == 5
    assert found == expected
    assert not [p for p in os.scandir(killed/"data") if ".part" in p.name]
