"Importing a module only imports: no files, threads, settings or heavy optional packages."
import json
import subprocess
import sys

import pytest

import defi_nb
from conftest import ENV, LIBRARY, module

MODULES = ["defi_nb", *(f"defi_nb.{module(p)}" for p in LIBRARY)]
NEVER = {"papermill", "jupyterlab", "jupyter_server", "notebook", "plotly", "ipywidgets", "nbconvert", "pytest", "torchvision", "tensorflow"}
MODELS = {"diffusers", "transformers", "accelerate"}
LIGHT = {"core.spec", "core.plot", "models.layers", "models.diffusion", "models.vq", "data.episodes", "sim.calvin_tasks", "run.cli"} # neither models nor simulator

# each import in a fork of a process that has the slowest libraries already, which saves three seconds a module
PROBE = """
import importlib, json, os, sys, threading
import scipy.stats, torch, torch.distributed.fsdp
for name in sys.argv[1:]:
    if pid := os.fork():
        os.waitpid(pid, 0)
        continue
    env, threads = dict(os.environ), threading.active_count()
    try: importlib.import_module(name); error = ""
    except BaseException as e: error = repr(e)
    changed = sorted(k for k in env.keys() | os.environ.keys() if env.get(k) != os.environ.get(k))
    print(json.dumps(dict(name=name, error=error, env=changed, threads=threading.active_count() - threads, files=os.listdir("."),
                          seed=torch.initial_seed(), grad=torch.is_grad_enabled(), modules=sorted({m.split(".")[0] for m in sys.modules}))), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    "Module -> what its import did, found in an empty folder."
    empty = tmp_path_factory.mktemp("empty")
    env = {k: v for k, v in ENV.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")} # with the first, mujoco sets the second
    done = subprocess.run([sys.executable, "-c", PROBE, *MODULES], cwd=empty, env=env, capture_output=True, text=True, timeout=600)
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(reports) == len(MODULES), done.stdout + done.stderr
    noise = [line for line in done.stdout.splitlines() if not line.startswith("{")]
    assert not noise, f"an import prints: {noise}"
    return {r["name"]: r for r in reports}


@pytest.mark.parametrize("name", MODULES)
def test_import_has_no_side_effects(imported, name):
    report = imported[name]
    assert not report["error"]
    assert not report["files"], "wrote files"
    assert not report["env"], "changed environment variables"
    assert not report["threads"], "started threads"
    assert report["grad"] and report["seed"] == imported["defi_nb"]["seed"], "changed torch's global state"
    assert not NEVER & {*report["modules"]}
    if name.removeprefix("defi_nb.") in {"defi_nb", *LIGHT}:
        assert not (MODELS | {"mujoco", "matplotlib.pyplot"}) & {*report["modules"]}


def test_the_package_is_light_and_gives_its_main_names_when_they_are_used():
    code = "import sys, defi_nb; print(json.dumps([sorted({'torch', 'numpy', 'mujoco'} & {*sys.modules}), defi_nb.__all__, dir(defi_nb)]))"
    done = subprocess.run([sys.executable, "-c", "import json; " + code], env=ENV, capture_output=True, text=True)
    loaded, names, listed = json.loads(done.stdout)
    assert not loaded and {*names} <= {*listed}
    assert all(getattr(defi_nb, name).__module__.startswith("defi_nb.") for name in names)
    assert not hasattr(defi_nb, "GFDN")


def test_help_is_answered_without_what_takes_seconds_to_import():
    code = """import sys
from defi_nb.run.cli import main
for command in ("serve", "vla-eval", "export", "record", "bench", "run", "ckpts", "doctor"):
    sys.argv = ["defi-nb", command, "--help"]
    try: main()
    except SystemExit: print("torch" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True)
    assert done.stdout.count("usage: defi-nb") == done.stdout.splitlines().count("False") == 8, done.stderr
