"What is imported is declared, what is optional says which extra brings it, and the wheel holds the run notebooks."
import ast
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module

import pytest
import yaml
from conftest import ENV, ROOT, RUNS

from defi_nb.run.cli import main

MODULES = {"PIL": "pillow", "sklearn": "scikit-learn", "google_crc32c": "google-crc32c", "vector_quantize_pytorch": "vector-quantize-pytorch",
           "IPython": "ipython", "matplotlib_inline": "matplotlib-inline", "vla_eval": "vla-eval", "rerun": "rerun-sdk"} # module -> distribution
GUESTS = {"lerobot", "libero", "mani_skill", "mani_skill2_real2sim", "robosuite", "sapien"} # of environments of their own
OPTIONAL = {"torchcodec"} # used where it is there


def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini")
    return config["DEFAULT"]


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import): yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level: yield node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "needed": yield node.args[0].value


def test_every_imported_package_is_declared():
    cfg = settings()
    declared = {r.split(">=")[0] for key in cfg if key.endswith("requirements") for r in cfg[key].split()}
    found = {m.split(".")[0] for path in (ROOT/"defi_nb").rglob("*.py") for m in imported(path)} - {*sys.stdlib_module_names, "defi_nb"}
    assert {MODULES.get(m, m) for m in found - GUESTS - OPTIONAL} <= declared
    core = {r.split(">=")[0] for r in cfg["requirements"].split()}
    assert not core & {"jupyterlab", "nbdev", "papermill", "plotly", "scikit-learn", "mujoco", "pyarrow"}


@pytest.mark.parametrize("module,extra,what", [
    ("papermill", "lab", lambda: main(["run", "doctor"])),
    ("pyarrow.parquet", "lerobot", lambda: import_module("defi_nb.data.lerobot")._arrow()),
    ("peft", "lora", lambda: import_module("defi_nb.weights.lora")._peft()),
    ("nbconvert", "lab", lambda: import_module("defi_nb.core.page").write_html(RUNS[0]))])
def test_a_missing_extra_is_named_in_one_line(module, extra, what, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None) # as if it were not installed
    try: what()
    except ImportError as error: said = str(error)
    else: said = capsys.readouterr().err.strip()
    assert f"pip install 'defi_nb[{extra}]'" in said and module in said and len(said.splitlines()) == 1


CLIENT = """
import sys
class Only: # what a robot's computer has
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {*sys.stdlib_module_names, "numpy", "msgpack", "websockets", "defi_nb"}: raise ImportError(name)
sys.meta_path.insert(0, Only())
from defi_nb.serve.protocol import Client, pack, unpack
import numpy as np
print((unpack(pack({"image": np.ones((2, 2, 3), np.uint8)}))["image"] == 1).all(), "torch" in sys.modules)
"""


def test_the_client_needs_three_packages():
    done = subprocess.run([sys.executable, "-c", CLIENT], env=ENV, capture_output=True, text=True)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_the_wheel_holds_the_run_notebooks(tmp_path):
    built = subprocess.run([sys.executable, "setup.py", "-q", "egg_info", "-e", tmp_path, "build_py", "-d", tmp_path/"lib"],
                           cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert sorted(p.name for p in (tmp_path/"lib/defi_nb/nbs").iterdir()) == [p.name for p in RUNS]
    (tmp_path/"empty").mkdir()
    code = "from defi_nb.run.cli import main; main(['params', 'eval_calvin']); import defi_nb; print(defi_nb.__file__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path/"empty", env=ENV | {"PYTHONPATH": str(tmp_path/"lib")}, capture_output=True, text=True)
    assert "policy: str" in done.stdout and str(tmp_path) in done.stdout.splitlines()[-1], done.stderr


def test_the_workflow_and_the_citation_say_what_they_should():
    job = yaml.safe_load((ROOT/".github/workflows/test.yml").read_text())["jobs"]["test"]
    assert len(job["strategy"]["matrix"]["python"]) == 2 and job["steps"][-1]["run"] == "bash .ci/run"
    cited = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    papers = [cited["preferred-citation"], *cited["references"]]
    assert [p["identifiers"][0]["value"] for p in papers] == ["arXiv:2604.16391", "arXiv:2605.29577"]
    assert cited["version"] == settings()["version"] and all(p["title"] and p["authors"] for p in papers)


def test_checkpoints_to_and_from_a_hub_that_is_a_folder(tmp_path, monkeypatch, capsys):
    "`defi-nb ckpts --push` and `--get` against a stand-in for the hub; and in one line without a network."
    import shutil

    from huggingface_hub import HfApi
    remote = tmp_path/"remote"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, **kw: (remote/repo).mkdir(parents=True))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, repo_id, folder_path, **kw: shutil.copytree(folder_path, remote/repo_id, dirs_exist_ok=True))
    monkeypatch.setattr(HfApi, "snapshot_download", lambda self, repo, local_dir, **kw: shutil.copytree(remote/repo, local_dir))
    shipped = ROOT/"defi_nb/assets/zoo/gidm"
    assert main(["ckpts", "--push", str(shipped), "org/gidm", "--results", str(ROOT/"results/demo_fresh/coupled_all.json")]) == 0
    assert "4.17 | 3.59 to 4.43; 30 chains" in (remote/"org/gidm/README.md").read_text()
    assert main(["ckpts", "--get", "org/gidm"]) == 0 and (tmp_path/"ckpts/hub/org--gidm/model.safetensors").is_file()
    assert "https://huggingface.co/org/gidm" in capsys.readouterr().out
    def offline(self, *args, **kw): raise ConnectionError("no route to host")
    for name in ("create_repo", "snapshot_download"): monkeypatch.setattr(HfApi, name, offline)
    for words, done in ((["--get", "org/other"], "fetched"), (["--push", str(shipped), "org/other"], "pushed")):
        assert main(["ckpts", *words]) == 1
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and f"org/other could not be {done} (ConnectionError: no route to host): check the network" in said
