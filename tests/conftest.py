"What the tests share: the project's root, its commands, and a small project to run things in."
import os
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

# a shell that starts this in the background lets it ignore Ctrl-C, and children would inherit that
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
ENV = os.environ | {"OMP_NUM_THREADS": "1"}
LIBRARY = sorted((ROOT/"nbs").glob("[0-9]*/[0-9]*.ipynb"))
RUNS = [p for p in sorted((ROOT/"nbs").glob("[a-z]*.ipynb")) if p.stem != "index"]


def module(path):
    "The module that a library notebook exports, such as eval.rollout; a run notebook's name."
    return f"{path.parent.name[3:]}.{path.stem[3:]}" if path in LIBRARY else path.stem


def pytest_collection_modifyitems(items):
    "The longest first, each in one process: the run notebooks, which build on one another, and the library's; the rest fills up."
    longest = ["test_runs", "test_notebooks"]
    items.sort(key=lambda item: longest.index(item.path.stem) if item.path.stem in longest else len(longest))


def command(*args, cwd=ROOT, timeout=600, **kwargs):
    "Run a command of this environment to its end, with no terminal; returns the finished process."
    return subprocess.run([str(BIN/args[0]), *map(str, args[1:])], cwd=cwd, env=ENV, timeout=timeout, text=True,
                          stdin=subprocess.DEVNULL, **({"capture_output": True} | kwargs))


def last_line(text): return (text.strip().splitlines() or [""])[-1]


def write_notebook(path, title, parameters, *code):
    "A run notebook: title cell, parameters cell, code cells."
    kernel = {"name": "python3", "display_name": "python3", "language": "python"}
    cells = [nbformat.v4.new_markdown_cell(title), *map(nbformat.v4.new_code_cell, (parameters, *code))]
    cells[1].metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)


@pytest.fixture
def toy(tmp_path):
    "A project with two run notebooks: `count` counts up slowly, `chain` runs two of it side by side."
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").write_text("[DEFAULT]\n")
    parameters = 'n: int = 1  # how far\npause: float = 0.0  # seconds a step\nout: str = ""  # folder of the run'
    start = "from defi_nb.run import cli\nparams = cli.check_injected(globals())\nfolder = cli.run_folder({!r}, params)"
    write_notebook(tmp_path/"nbs/count.ipynb", "# Count\n\n> counts", parameters, start.format("count"),
                   "import time\nfor i in range(n):\n    print('step', i, flush=True)\n    time.sleep(pause)",
                   "cli.write_metrics(folder, {'n': n})")
    write_notebook(tmp_path/"nbs/chain.ipynb", "# Chain\n\n> counts twice", parameters, start.format("chain"),
                   "jobs = {name: ('count', {'n': n, 'pause': pause}, folder/name) for name in ('one', 'two')}",
                   "cli.write_metrics(folder, {'both': [*cli.run_notebooks(jobs)[0].values()]})")
    return tmp_path


TRAIN = '''
import time
import torch
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
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
history = fit(model, WindowDataset(frames, frames.windows, chunk=10), cfg, cli.project_root()/ckpt, record=folder)
'''


@pytest.fixture
def learn(tmp_path):
    "A project with one run notebook that trains."
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").write_text("[DEFAULT]\n")
    parameters = 'steps: int = 12  # of training\npause: float = 0.0  # seconds a step\nckpt: str = "ckpts/net"  # checkpoint\nout: str = ""  # folder of the run'
    start = "from defi_nb.run import cli\nparams = cli.check_injected(globals())\nfolder = cli.run_folder('learn', params)"
    write_notebook(tmp_path/"nbs/learn.ipynb", "# Learn\n\n> learns", parameters, start, TRAIN, "cli.write_metrics(folder, {'loss': history[-1]['loss']})")
    return tmp_path
