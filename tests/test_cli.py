"The `defi-nb` command and plain papermill, on a small project: what is typed wrong is said in one line."
import json

import pytest
from conftest import ROOT, RUNS, command, last_line, write_notebook

from defi_nb.run.cli import main


def test_list_and_params(capsys):
    listed = command("defi-nb", "list")
    assert listed.returncode == 0 and [line.split()[0] for line in listed.stdout.splitlines()] == [p.stem for p in RUNS]
    for path in RUNS:
        assert main(["params", path.stem]) == 0
        shown = capsys.readouterr().out
        assert all("#" in line and line.split("#")[1].strip() for line in shown.splitlines()), "a parameter has no comment"
        assert "# None" not in shown, "a key of a dictionary has no comment"
    main(["params", "train_coupled"])
    keys = [line.strip().split(" #")[0] for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert "variant.quantiser: str = 'vq' " in keys and "pretrained.gfdm: str = '' " in keys and "auxiliary.weight: float = 0.3 " in keys
    assert not any(key.startswith("auxiliary.tokens") for key in keys), "the policy's own, not an option"


@pytest.mark.parametrize("form", ["papermill, two paths", "papermill, one path", "defi-nb"])
def test_three_forms_of_running(toy, form):
    (toy/"runs").mkdir()
    given = ("-p", "n", "2", "-p", "out", "runs/a")
    done = {"papermill, two paths": lambda: command("papermill", "nbs/count.ipynb", "runs/x.ipynb", *given, cwd=toy),
            "papermill, one path": lambda: command("papermill", "nbs/count.ipynb", *given, cwd=toy),
            "defi-nb": lambda: command("defi-nb", "run", "count", *given, cwd=toy)}[form]()
    assert done.returncode == 0, done.stderr
    assert json.loads((toy/"runs/a/metrics.json").read_text()) == {"n": 2}
    if form == "papermill, one path": assert json.loads(done.stdout)["cells"][-1]["outputs"]
    if form == "defi-nb": assert (toy/"runs/a/count.ipynb").exists() and (toy/"runs/a/count.html").exists()


def test_a_mistyped_parameter_stops_plain_papermill(toy):
    done = command("papermill", "nbs/count.ipynb", "-p", "nn", "2", cwd=toy)
    assert done.returncode == 1 and last_line(done.stderr) == "ValueError: unknown parameter 'nn': did you mean 'n'? This notebook takes n, pause, out"


@pytest.mark.parametrize("args,said", [
    (["run", "count", "-p", "pauze", "2"], "unknown parameter 'pauze': did you mean 'pause'? This notebook takes n, pause, out"),
    (["run", "count", "-p", "n", "many"], "parameter n is 'many', which is not of type int"),
    (["run", "count", "-p", "n", "0.5"], "parameter n is 0.5, which is not of type int"),
    (["run", "cuont"], "no run notebook 'cuont': did you mean 'count'? There are chain, count"),
], ids=["name", "text", "fraction", "notebook"])
def test_what_is_typed_wrong(toy, args, said):
    done = command("defi-nb", *args, cwd=toy)
    assert (done.returncode, done.stderr.strip()) == (2, f"defi-nb: {said}")
    assert not (toy/"runs").exists()


KINDS = """engine: dict = {}  # numbers of the training (`train.config.TrainConfig`)
names: list = []  # of things
pair: tuple = (1, 2)  # of numbers
quick: bool = False  # whether it is
lr: float = 1.0  # rate
out: str = ""  # folder of the run"""
TYPED = {"engine": "{'keep': 2}", "names": '["a, b", "c"]', "pair": "(3, 4)", "quick": "true", "lr": "-1e-4"}
READ = {"engine": {"keep": 2}, "names": ["a, b", "c"], "pair": [3, 4], "quick": True, "lr": -1e-4}


@pytest.mark.parametrize("form", ["papermill", "defi-nb"])
def test_values_as_they_are_typed(toy, form):
    "A dictionary, a list, a tuple, a switch and a number that begins with a dash are the same run in both forms."
    write_notebook(toy/"nbs/kinds.ipynb", "# Kinds", KINDS, "from defi_nb.run import cli\nparams = cli.check_injected(globals())\nfolder = cli.run_folder('kinds', params)",
                   "cli.write_metrics(folder, dict(engine=engine, names=names, pair=pair, quick=quick, lr=lr))")
    given = [word for key, value in (TYPED | {"out": "runs/a"}).items() for word in ("-p", key, value)]
    (toy/"runs").mkdir()
    done = command("papermill", "nbs/kinds.ipynb", "runs/x.ipynb", *given, cwd=toy) if form == "papermill" else command("defi-nb", "run", "kinds", *given, cwd=toy)
    assert done.returncode == 0, done.stderr
    assert json.loads((toy/"runs/a/metrics.json").read_text()) == READ


def test_places_that_cannot_be_written(toy, capsys, monkeypatch):
    "One line with the place and what to do, whichever command met it."
    monkeypatch.chdir(toy)
    (toy/"taken").touch()
    for argv in (["run", "count", "--out", "taken"], ["run", "count", "--out", "taken/x"], ["run", "count", "--out", "/proc/x"], ["run", "count", "--out", "x"*300]):
        assert main(argv) in (1, 2)
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1 and said.startswith("defi-nb: ") and argv[-1] in said and "choose" in said, said


def test_outside_the_project(tmp_path):
    "Any folder will do: the run notebooks are the package's, and runs go into it."
    done = command("defi-nb", "list", cwd=tmp_path)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(RUNS) and not list(tmp_path.iterdir())
    shown = command("defi-nb", "params", "eval_calvin", cwd=tmp_path)
    assert shown.returncode == 0 and "policy: str" in shown.stdout


def test_compare():
    demo = [str(ROOT/"results/demo_fresh"/f"{name}.json") for name in ("plain_all", "plain_few")]
    said = command("defi-nb", "compare", *demo)
    assert said.returncode == 0 and last_line(said.stdout).endswith("chains, paired): more.")
    refused = command("defi-nb", "compare", *demo, "--varying", "step")
    assert refused.returncode == 2 and "a protocol has no field step" in refused.stderr
    lost = command("defi-nb", "compare", demo[0], "nowhere.json")
    assert lost.returncode == 2 and "there is no result at nowhere.json" in lost.stderr
