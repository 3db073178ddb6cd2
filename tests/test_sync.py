"Notebooks, package, README and docs say the same thing, and the notebooks are clean (checked in a scratch copy)."
import ast
import filecmp
import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import LIBRARY, ROOT, RUNS, command, module

from defi_nb.core.page import stripped_notebook

PAGES = [ROOT/"README.md", *sorted((ROOT/"docs").rglob("*.md"))]
IGNORE = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    "The project with its package made again from the notebooks, from nothing, so that no stale module can survive."
    copy = tmp_path_factory.mktemp("sync")/"defi-nb"
    copy.mkdir()
    for name in ("settings.ini", "setup.py", "pyproject.toml"): shutil.copy(ROOT/name, copy/name)
    for name in ("nbs", "defi_nb"): shutil.copytree(ROOT/name, copy/name, ignore=IGNORE)
    for path in (copy/"defi_nb").rglob("*.py"):
        if path.name not in ("__init__.py", "__main__.py"): path.unlink() # these two are written by hand
    for name in ("nbdev-clean", "nbdev-export"):
        done = command(name, cwd=copy)
        assert done.returncode == 0, done.stdout + done.stderr
    return copy


def files(folder, pattern):
    return {p.relative_to(folder).as_posix() for p in folder.rglob(pattern) if not {"__pycache__", ".ipynb_checkpoints"} & {*p.parts}}


@pytest.mark.parametrize("folder,pattern", [("defi_nb", "*.py"), ("nbs", "*.ipynb")])
def test_package_and_notebooks_are_in_sync_and_clean(fresh, folder, pattern):
    here, there = ROOT/folder, fresh/folder
    assert files(here, pattern) == files(there, pattern)
    different = [f for f in sorted(files(here, pattern)) if not filecmp.cmp(here/f, there/f, shallow=False)]
    assert not different, f"run nbdev-export and nbdev-clean, then commit: {different}"


def test_tables_of_readme_start_page_and_docs_are_up_to_date():
    done = subprocess.run([sys.executable, ROOT/"tools/readme.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def cells(path, kind): return [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == kind]


def source(cell): return "".join(cell["source"])


@pytest.mark.parametrize("path", LIBRARY, ids=module)
def test_library_notebook(path):
    assert re.match(r"# .+\n+> .+", source(cells(path, "markdown")[0])), "opens with `# Title` and `> one line`"
    code = [source(c) for c in cells(path, "code")]
    assert [s.split()[2] for s in code if s.startswith("#| default_exp ")] == [module(path)]
    widgets = "widgets" in json.loads(path.read_text())["metadata"] or any("vnd.jupyter.widget" in mime for c in cells(path, "code") for o in c["outputs"] for mime in o.get("data", {}))
    assert not widgets, "progress bars stored as dead widgets: execute it with DEFI_NB_PROGRESS=60 in the environment"
    assert len(json.dumps([c["outputs"] for c in cells(path, "code")])) < 500_000, "outputs of more than 500 KB"
    earlier = {module(p) for p in LIBRARY[:LIBRARY.index(path)]}
    for node in (n for s in code if re.match(r"#\| exports?\b", s) for n in ast.walk(ast.parse(s))):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "defi_nb": continue
        if node.module == "defi_nb": continue # its version
        names = [node.module] if node.module.count(".") == 2 else [f"{node.module}.{a.name}" for a in node.names]
        assert {name.removeprefix("defi_nb.") for name in names} <= earlier, f"imports upward: {ast.unparse(node)}"


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_run_notebook(path):
    assert re.match(r"# .+\n+> .+", source(cells(path, "markdown")[0])), "opens with `# Title` and `> one line`"
    nb, code = json.loads(path.read_text()), cells(path, "code")
    assert sum("parameters" in c["metadata"].get("tags", []) for c in code) == 1, "exactly one parameters cell"
    assert len(nb["cells"]) <= 15, f"{len(nb['cells'])} cells"
    assert nb["metadata"]["kernelspec"]["language"] == "python", "papermill needs the kernel's language"
    assert nb["metadata"]["nbdev"] == {"skip_exec": "true"}, "left out by nbdev-test: tests/test_runs.py runs it"
    for cell in code:
        lines, given = source(cell).splitlines(), "parameters" in cell["metadata"].get("tags", [])
        declared = [line for line in lines if re.match(r"\w+ *:", line)]
        assert len(declared) <= 18 if given else len(lines) <= 12, f"{len(lines)} lines: what branches or is long belongs in the library"
        assert max(map(len, lines), default=0) <= (120 if given else 100), f"too long: {max(lines, key=len)}"
        assert not cell["outputs"] and cell["execution_count"] is None, "run notebooks have no outputs in git"
        defined = [n for n in ast.walk(ast.parse(source(cell))) if isinstance(n, ast.FunctionDef | ast.ClassDef)]
        assert not defined and not re.match(r"#\| exports?\b", source(cell)), "definitions belong in the library"
    assert stripped_notebook(path.read_text()) == path.read_text(), "not as git's filter leaves it: run defi-nb strip on it"
    assert any("results" in c["metadata"].get("tags", []) for c in nb["cells"]), "no cell is tagged results, with which its page begins"


FLOORS = {p.parent.name[3:] for p in LIBRARY}
NAMED = re.compile(rf"`(?:defi_nb\.)?((?:{'|'.join(FLOORS)})\.[a-z_]+)(?:\.(\w+))?(?!\w)")


def test_names_in_text_exist():
    "What prose and comments call `floor.room` or `floor.room.name` is there, and no notebook is called by a number."
    defined = {module(p): (ROOT/"defi_nb"/f"{module(p).replace('.', '/')}.py").read_text() for p in LIBRARY}
    texts = {(p.name, i): source(c) for p in [*LIBRARY, *RUNS, ROOT/"nbs/index.ipynb"] for i, c in enumerate(json.loads(p.read_text())["cells"])}
    others = (ROOT/name for name in ("LOG.md", "NOTICE", "data/README.md", "ckpts/README.md"))
    texts |= {(p.name, 0): p.read_text() for p in [*PAGES, *others]}
    stale = []
    for where, text in texts.items():
        named = [m for m in NAMED.finditer(text) if not re.search(r"\.(pkl|json)$", m[1])] # a file's name
        stale += [(where, m[0]) for m in named if m[1] not in defined or (m[2] and not re.search(rf"\b{m[2]}\b", defined[m[1]]))]
        stale += [(where, m) for m in re.findall(r"`\d\d_[a-z_]+`", text)]
    assert not stale


@pytest.mark.parametrize("path", [*LIBRARY, ROOT/"nbs/index.ipynb", *PAGES], ids=module)
def test_links_lead_somewhere(path):
    "As a code host and JupyterLab follow them, images included."
    text = path.read_text() if path.suffix == ".md" else "\n".join(source(c) for c in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```|\$\$.*?\$\$|`[^`\n]*`", "", text, flags=re.S))
    assert not [link for link in links if "://" not in link and not (path.parent/link).is_file()]
    if path not in LIBRARY: return
    at = LIBRARY.index(path)
    neighbours = [p for p in (LIBRARY[at - 1] if at else None, *LIBRARY[at + 1:at + 2]) if p]
    last = re.findall(r"\]\(([^)]+)\)", source(json.loads(path.read_text())["cells"][-1]))
    assert [(path.parent/link).resolve() for link in last] == neighbours, "ends with links to the previous and the next notebook"


def test_house_style_is_not_departed_from_more_than_before():
    "What is left is counted in tools/style.json; `python tools/style.py` says where."
    done = command("python", "tools/style.py", "--check", cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_departures_from_the_house_style_are_seen(monkeypatch):
    monkeypatch.syspath_prepend(ROOT/"tools")
    from style import departures
    cell = lambda kind, text: dict(cell_type=kind, source=text)
    long = "def f(x): # " + "x"*100
    notebook = dict(cells=[
        cell("markdown", "# Title"), cell("code", f"#| export\n{long}\n    return x"), cell("code", "test_eq((f(1), f(2)), (1, 2))"),
        cell("code", "#| export\nclass A: pass\nclass B: pass\nclass C: 'A picture.'"), cell("markdown", "What we foresee."),
        cell("code", "#| export\n" + "\n".join(f"a{i} = {i}" for i in range(36))), cell("code", "\n".join(f"test_eq(a{i}, {i})" for i in range(36)))])
    kinds = [kind for kind, _ in departures(notebook)]
    for kind in ("lines over 100 columns", "comparisons of tuples of facts", "cells of more than 2 public definitions", "exported cells over 35 lines",
                 "test cells over 15 lines", "public definitions without prose before"):
        assert kinds.count(kind) == 1, kind
    assert kinds.count("public names never shown") == 3
    assert [kind.rsplit(" ", 1)[1] for kind in kinds if kind.startswith("words")] == ["code", "prose"]


def test_no_path_of_one_machine_is_written_anywhere():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    machine = re.compile(r"/(?:work|root|home|tmp/[a-z]{1,2})/[a-z]")
    paths = [ROOT/name for name in listed.stdout.split("\0") if name and (ROOT/name).is_file()]
    found = [p.relative_to(ROOT).as_posix() for p in paths if machine.search(p.read_bytes().decode("utf-8", "ignore"))]
    assert not found


def test_ruff():
    pytest.importorskip("ruff")
    done = command("python", "-m", "ruff", "check", "--no-cache", "defi_nb", "tests", "tools", "setup.py")
    assert done.returncode == 0, done.stdout
