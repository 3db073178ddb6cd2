"""Fill in the tables of README.md, of the start page nbs/index.ipynb and of docs/.

What stands between `<!-- NAME -->` and `<!-- end -->` is made from the notebooks' titles, the packages'
docstrings and results/; `TABLES` has the names. All else in these files is written by hand. With --check,
nothing is written, and files that differ are named.
"""
import ast
import json
import os
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"
FLOORS = sorted(NBS.glob("[0-9]*/"))
RUNS = [p for p in sorted(NBS.glob("[a-z]*.ipynb")) if p.stem != "index"]
REGION = re.compile(r"(<!-- (\w+) -->\n).*?(\n?<!-- end -->)", re.S)
PAPERS = {  # run notebook -> what of DeFI's paper it answers, or of the second one on inverse dynamics (IDL)
    "ablations": "Tables 4 to 9, Figures 5, 7, 8", "adapt_gfdm": "its future work: light adaptation", "attention": "Figure 12",
    "bench_inference": "Table 13", "data_efficiency": "Figure 4, Table 4", "denoising": "Figure 9",
    "eval_calvin": "Table 1", "eval_features": "IDL: Tables 4, 5",
    "eval_frozen": "IDL: Tables 3, 4", "eval_real": "Table 3", "eval_simulators": "Table 2",
    "failures": "Figures 10, 11", "gidm_reversal": "IDL: Table 6, for GIDM",
    "own_data": "Table 3, on your robot", "pipeline": "Table 1, small",
    "pretrain_gfdm": "Section 3.2, Table 11", "pretrain_gidm": "Section 3.3, Tables 7, 12",
    "state_aliasing": "IDL: Figure 1, Tables 4, 5, 11, 12", "train_coupled": "Section 3.4, Table 10"}


def source(cell): return "".join(cell["source"])


def about(path):
    "A notebook's module (its name, for a run notebook) and the line under its title."
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    module = next((m[1] for c in cells if (m := re.search(r"^#\| default_exp (\S+)", source(c), re.M))), path.stem)
    line = re.search(r"^> (.+)", source(cells[0]), re.M)
    return module, line[1].strip() if line else ""


def floor_docstring(floor):
    package = ROOT/"defi_nb"/floor.name[3:]/"__init__.py"
    return ast.get_docstring(ast.parse(package.read_text(encoding="utf-8"))).rstrip(".")


def link(path, text, base): return f"[{text}]({Path(os.path.relpath(path, base)).as_posix()})"


def table(head, rows, align=None):
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align or ["---"]*len(head), *rows))


def rooms(floor): return sorted(floor.glob("[0-9]*.ipynb"))


def floors(base):
    "The map: a line a floor, linked to its first room."
    rows = [(link(rooms(f)[0], f"`{f.name[3:]}`", base), floor_docstring(f)) for f in FLOORS]
    return table(("floor", "what a line there knows about"), rows)


def library(base):
    "The map with all rooms."
    links = lambda floor: ", ".join(link(p, p.stem[3:], base) for p in rooms(floor))
    rows = [(f"`{f.name[3:]}`", floor_docstring(f), links(f)) for f in FLOORS]
    return table(("floor", "what a line there knows about", "rooms"), rows)


def runs(base):
    "The run notebooks, with what they answer."
    rows = [(link(p, f"`{p.stem}`", base), about(p)[1], PAPERS.get(p.stem, "")) for p in RUNS]
    return table(("notebook", "what it does", "in the paper"), rows)


POLICIES = {"shipped": "coupled, shipped with the package, all labels",
            "coupled_all": "coupled, all labels", "plain_all": "plain: the present frames alone, all labels",
            "coupled_few": "coupled, a tenth of the labels", "no_gidm_few": "without GIDM (VPP), a tenth",
            "plain_few": "plain, a tenth", "blind_few": "blind: no image at all, a tenth"}


def demo(name, base):
    "The policies of `make demo`."
    from defi_nb.eval.results import EvalResult
    rows, solved = [], lambda counts: f"{counts['successes']}/{counts['attempts']}"
    for kind, policy in POLICIES.items():
        if not (file := ROOT/"results"/name/f"{kind}.json").exists(): continue
        r = EvalResult.load(file)
        low, high = r.interval
        kinds = (solved(r.families()[kind]) for kind in ("needs images", "fixtures"))
        length = f"**{r.average_length:.2f}** ({low:.2f}–{high:.2f})"
        rows.append((policy, length, ", ".join(f"{100*x:.0f}" for x in r.rates), *kinds))
    head = "policy", "average length of 5", "1 to 5 in a row, %", "with blocks", "with fixtures"
    return table(head, rows, (":--", *["--:"]*4))


def stored(name): return lambda base: (ROOT/"results"/name/"table.md").read_text(encoding="utf-8").strip()


STORED = "coupling", "long", "lora", "data_efficiency", "six_places", "calvin_env", "act", "further_video", "paper_tables", \
    "success_curve", "unlabelled_task"
TABLES = dict(floors=floors, library=library, runs=runs, demo=partial(demo, "demo"), demo_fresh=partial(demo, "demo_fresh"),
              **{name: stored(name) for name in STORED})


def filled(text, base): return REGION.sub(lambda m: m[1] + TABLES[m[2]](base) + "\n<!-- end -->", text)


def render(path):
    "A file's text with its tables made again."
    if path.suffix != ".ipynb": return filled(path.read_text(encoding="utf-8"), path.parent)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown": cell["source"] = filled(source(cell), path.parent).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(args):
    files = [ROOT/"README.md", NBS/"index.ipynb", *sorted((ROOT/"docs").rglob("*.md"))]
    stale = [path for path in files if render(path) != path.read_text(encoding="utf-8")]
    if args != ["--check"]:
        for path in stale: path.write_text(render(path), encoding="utf-8")
    elif stale: print(*(p.relative_to(ROOT) for p in stale), "are not up to date: run python tools/readme.py")
    return 1 if stale and args == ["--check"] else 0


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
