"A recording is the same for any number of processes, and goes on after kill -9."
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest

SCRIPT = """
import sys
from defi_nb.data.record import RecordConfig, record_demonstrations
if __name__ == "__main__":
    config = RecordConfig(tasks=("turn_on_led", "open_drawer"), per_kind=4, chain=2, static_size=32, gripper_size=32)
    record_demonstrations(sys.argv[1], config, n_workers=int(sys.argv[2]))
"""


def command(tmp_path, folder, n_workers):
    script = tmp_path/"record.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script), str(folder), str(n_workers)]


def digest(path):
    "Of what a file holds; a zip's time stamps do not count."
    if path.suffix != ".npz": return hashlib.sha256(path.read_bytes()).hexdigest()
    with zipfile.ZipFile(path) as z: return {name: hashlib.sha256(z.read(name)).hexdigest() for name in z.namelist()}


def contents(folder):
    "Every file of a recording, half-written ones excepted."
    return {path.relative_to(folder).as_posix(): digest(path) for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".tmp"}


def segments(folder): return sorted((folder/"training/segments").glob("*.json"))


def alive(group):
    try: os.killpg(group, 0)
    except ProcessLookupError: return False
    return True


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "A recording by one process."
    tmp = tmp_path_factory.mktemp("recorder")
    subprocess.run(command(tmp, tmp/"one", 1), check=True)
    return tmp/"one"


def test_two_processes_record_the_same(tmp_path, whole):
    subprocess.run(command(tmp_path, tmp_path/"two", 2), check=True)
    assert contents(tmp_path/"two") == contents(whole)


def test_two_recorders_at_once_do_the_work_once(tmp_path, whole):
    both = [subprocess.Popen(command(tmp_path, tmp_path/"both", 1), stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate()[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and sorted("using the" in s for s in said) == [False, True]
    assert contents(tmp_path/"both") == contents(whole)


def test_goes_on_after_kill(tmp_path, whole):
    folder = tmp_path/"killed"
    process = subprocess.Popen(command(tmp_path, folder, 2), process_group=0)
    deadline = time.time() + 120
    while not segments(folder) and time.time() < deadline: time.sleep(.02)
    process.send_signal(signal.SIGKILL) # its helpers must notice
    process.wait()
    while alive(process.pid) and time.time() < deadline: time.sleep(.1)
    assert not alive(process.pid), "helpers outlive a killed recording"
    kept = {path: path.stat().st_mtime_ns for path in segments(folder)}
    assert kept and not (folder/"training/ep_start_end_ids.npy").exists()
    subprocess.run(command(tmp_path, folder, 2), check=True)
    assert contents(folder) == contents(whole)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept # what was complete is not made again
