"""Make README.md from nbs/index.ipynb (or, with --check, say whether it is up to date).

Markdown cells are taken as they are, code cells as Python blocks followed by what they printed. Four lines are filled in:
`<!-- library -->` by a table of the floors of the library, `<!-- runs -->` by one of the run notebooks, `<!-- demo -->` and
`<!-- coupling -->` by what is measured and kept in results/.
"""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/"nbs"


def load(path): return json.loads(path.read_text(encoding="utf-8"))


def about(path):
    "A notebook's module (its name, for a run notebook) and the line under its title."
    cells = load(path)["cells"]
    module = next((m[1] for c in cells if (m := re.search(r"^#\| default_exp (\S+)", "".join(c["source"]), re.M))), path.stem)
    line = re.search(r"^> (.+)", "".join(cells[0]["source"]), re.M)
    return module, line[1].strip() if line else ""


def table(paths, columns):
    rows = [(f"[`{about(p)[0]}`]({p.relative_to(ROOT).as_posix()})", about(p)[1]) for p in paths]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, ["---"]*len(columns), *rows))


def floors():
    "A row a floor: its folder, what its package's docstring says, and its rooms."
    rows = [("floor", "what a line there knows about", "rooms"), ("---",)*3]
    for folder in sorted(NBS.glob("[0-9]*/")):
        about_floor = ast.get_docstring(ast.parse((ROOT/"defi_nb"/folder.name[3:]/"__init__.py").read_text(encoding="utf-8")))
        rooms = (f"[{p.stem[3:]}]({p.relative_to(ROOT).as_posix()})" for p in sorted(folder.glob("[0-9]*.ipynb")))
        rows.append((f"`{folder.name[3:]}`", about_floor.rstrip("."), ", ".join(rooms)))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def tables():
    runs = [p for p in sorted(NBS.glob("[a-z]*.ipynb")) if p.stem != "index"]
    return {"library": floors(), "runs": table(runs, ["notebook", "what it does"])}


POLICIES = {"coupled_all": "coupled, all labels", "plain_all": "plain: the present frames alone, all labels",
            "coupled_few": "coupled, a tenth of the labels", "no_gidm_few": "without GIDM (VPP), a tenth",
            "plain_few": "plain, a tenth", "blind_few": "blind: no image at all, a tenth"}


def solved(counts): return f"{counts['successes']}/{counts['attempts']}"



def demo():
    from defi_nb.eval.results import EvalResult
    rows = [("policy", "average length of 5", "1 to 5 in a row, %", "with blocks", "with fixtures"), (":--", "--:", "--:", "--:", "--:")]
    for name, said in POLICIES.items():
        r = EvalResult.load(ROOT/"results"/"demo"/f"{name}.json")
        low, high = r.interval
        tasks = (solved(r.families()[name]) for name in ("needs images", "fixtures"))
        rows.append((said, f"**{r.average_length:.2f}** ({low:.2f}–{high:.2f})", ", ".join(f"{100*x:.0f}" for x in r.rates), *tasks))
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def results():
    return {"demo": demo(), "coupling": (ROOT/"results"/"coupling"/"table.md").read_text(encoding="utf-8").strip()}


def printed(cell):
    text = "".join("".join(o.get("text") or o.get("data", {}).get("text/plain", "")) for o in cell["outputs"])
    return f"\n\n```\n{text.rstrip()}\n```" if text.strip() else ""


def block(cell):
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown": return source
    if re.match(r"#\| *hide\b", source): return ""
    return f"```python\n{source}\n```" + printed(cell)


def render():
    body = "\n\n".join(filter(None, map(block, load(NBS/"index.ipynb")["cells"])))
    for name, filled in (tables() | results()).items(): body = body.replace(f"<!-- {name} -->", filled)
    return body.rstrip() + "\n"


def main(args):
    readme = ROOT/"README.md"
    if args == ["--check"]:
        same = readme.exists() and readme.read_text(encoding="utf-8") == render()
        if not same: print("README.md differs from nbs/index.ipynb: run python tools/readme.py")
        return 0 if same else 1
    readme.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
