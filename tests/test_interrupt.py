"A run that is killed leaves nothing running and nothing broken, and the same command goes on with it."
import json
import os
import signal
import subprocess
import time

import pytest
from conftest import BIN, ENV, command


def processes_in(folder):
    "Ids of the live processes whose command line or working folder is in this folder."
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd").startswith(str(folder)): found.append(int(pid))
        except OSError: pass # it ended meanwhile, or is another user's
    return found


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition() and time.time() < end: time.sleep(.1)
    return condition()


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="looks at processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_interrupted_chain_stops_and_goes_on(toy, how):
    args = ["run", "chain", "--out", "runs/a", "-p", "n", "3", "-p", "pause"]
    with open(toy/"log.txt", "w") as log:
        parent = subprocess.Popen([BIN/"defi-nb", *args, "30"], cwd=toy, env=ENV, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        assert wait_for(lambda: (toy/"log.txt").read_text().count("step 0") == 2), (toy/"log.txt").read_text()
        parent.send_signal(how)
        assert parent.wait(30) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    assert wait_for(lambda: not processes_in(toy), 20), "something still runs"
    assert not list(toy.glob("runs/a/**/metrics.json"))

    changed = command("defi-nb", *args, "0", cwd=toy)
    assert changed.returncode == 2 and "holds a run with pause=30.0 and not 0.0" in changed.stderr
    for folder in ("a", "a/one", "a/two"): # what the interrupted run wanted, quicker
        path = toy/"runs"/folder/"parameters.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"pause": 0.}))
    again = command("defi-nb", *args, "0", cwd=toy)
    assert again.returncode == 0, again.stderr
    assert json.loads((toy/"runs/a/metrics.json").read_text()) == {"both": [{"n": 3}, {"n": 3}]}
    assert len(list(toy.glob("runs/a/**/*.interrupted1.ipynb"))) == 3, "the interrupted records are kept"


def test_two_processes_share_one_run(toy):
    args = [BIN/"defi-nb", "run", "count", "--out", "runs/a", "-p", "n", "3", "-p", "pause", "1"]
    both = [subprocess.Popen(args, cwd=toy, env=ENV, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sum("running, in" in text for text in said) == 1, "made once"
    assert sum("waiting for it" in text and "finished already" in text for text in said) == 1
