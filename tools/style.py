"""Where the notebooks depart from the house style: `python tools/style.py`, with the name of a floor (`04_models`) or of a part of a path for every single place.

`tools/style.json` holds how many departures of each kind are allowed. They are those that are left, and may only become fewer: `--check` fails
when there are more, `--tighten` writes the present numbers where they are lower.
"""
import ast
import json
import re
import sys
from collections import Counter
from pathlib import Path

from house import exported, lines_of, public_names, source

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = Path(__file__).with_suffix(".json")
COLUMNS, MOST_COLUMNS = 100, 120 # of a line of code; the second for tables of data
CELL, DEFINITIONS, TEST, NOTEBOOK = 35, 2, 15, 400 # lines of an exported cell, public names in it, lines of a test cell, exported lines of a notebook
WORD = re.compile(r"(?<![a-z])(?:(?<!groups of )pictures?|books?|foresee[ns]?|foresaw|foresight|told|said|pieces?|judge[sd]?|twins?|beside|pilots?)(?![a-z])", re.I)


def is_export(text): return re.match(r"#\| *exports?\b", text) is not None


def is_test(cell):
    "A code cell that neither exports nor only imports behind a directive such as hide."
    return cell["cell_type"] == "code" and not source(cell).lstrip().startswith("#|")


def several_facts(text):
    "Comparisons of two tuples written out, of which nobody knows which part failed."
    try: tree = ast.parse(text)
    except SyntaxError: return # a magic
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or getattr(node.func, "id", "") not in ("test_eq", "test_close"): continue
        sides = node.args[:2]
        if len(sides) == 2 and all(isinstance(s, ast.Tuple) and len(s.elts) > 1 for s in sides): yield ast.unparse(node)


def departures(notebook):
    "(kind, what and where) of a library notebook."
    cells = notebook["cells"]
    export, tests = exported(notebook), [source(c) for c in cells if is_test(c)]
    shown = "\n".join(source(c) for c in cells if c["cell_type"] == "code" and not is_export(source(c)))
    if (lines := sum(len(lines_of(s)) for s in export)) > NOTEBOOK: yield "notebooks over 400 exported lines", f"{lines} lines"
    for text in export + tests:
        for line in text.splitlines():
            if len(line) > COLUMNS: yield f"lines over {COLUMNS} columns", line.strip()[:60]
            if len(line) > MOST_COLUMNS: yield f"lines over {MOST_COLUMNS} columns", line.strip()[:60]
    for text in tests:
        if (lines := len(lines_of(text))) > TEST: yield f"test cells over {TEST} lines", f"{lines} lines: {text.strip().splitlines()[0][:60]}"
        for call in several_facts(text): yield "comparisons of tuples of facts", call[:60]
    for text in export:
        if (lines := len(lines_of(text))) > CELL: yield f"exported cells over {CELL} lines", f"{lines} lines: {lines_of(text)[0][:60]}"
        names = [n for n in public_names(ast.parse(text)) if n[0].isalpha()]
        defined = [n.name for n in ast.parse(text).body if getattr(n, "name", "_")[0] != "_"]
        if len(defined) > DEFINITIONS: yield f"cells of more than {DEFINITIONS} public definitions", ", ".join(defined)
        for name in names:
            if not re.search(rf"\b{name}\b", shown): yield "public names never shown", name
        for word in sorted({w.lower() for w in WORD.findall(re.sub(r"_", " ", text))}): yield "words of the glossary's right column, in code", word
    for before, cell in zip(cells, cells[1:]):
        if cell["cell_type"] == "code" and is_export(source(cell)) and before["cell_type"] != "markdown":
            defined = [n.name for n in ast.parse(source(cell)).body if getattr(n, "name", "_")[0] != "_"]
            if defined: yield "public definitions without prose before", ", ".join(defined)
    for cell in cells:
        if cell["cell_type"] == "markdown":
            for word in sorted({w.lower() for w in WORD.findall(source(cell))}): yield "words of the glossary's right column, in prose", word


def all_departures(root=ROOT):
    "(notebook, kind, what and where) of the whole house."
    for path in sorted((root/"nbs").glob("*/[0-9]*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for kind, what in departures(notebook): yield f"{path.parent.name}/{path.stem}", kind, what


def main(argv):
    found = [*all_departures()]
    count, allowed = Counter(kind for _, kind, _ in found), json.loads(ALLOWED.read_text()) if ALLOWED.exists() else {}
    if "--tighten" in argv:
        fewer = {kind: min(n, allowed.get(kind, n)) for kind, n in count.items()}
        ALLOWED.write_text(json.dumps({kind: n for kind, n in sorted(fewer.items()) if n}, indent=1) + "\n")
    part = next((a for a in argv if not a.startswith("-")), None)
    for where, kind, what in found:
        if part and part in where: print(f"{where}: {kind}: {what}")
    for kind, n in sorted(count.items()): print(f"{n:5} {kind}" + (f", {allowed[kind]} allowed" if n < allowed.get(kind, 0) else ""))
    worse = {kind: (n, allowed.get(kind, 0)) for kind, n in count.items() if n > allowed.get(kind, 0)}
    if "--check" not in argv or not worse: return 0
    for kind, (n, most) in worse.items():
        print(f"{kind}: {n}, and {most} are allowed (tools/style.json); new ones may be among:", file=sys.stderr)
        for where, k, what in found:
            if k == kind: print(f"  {where}: {what}", file=sys.stderr)
    return 1


if __name__ == "__main__": raise SystemExit(main(sys.argv[1:]))
