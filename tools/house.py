"""The state of the house in figures: `python tools/house.py`, or with the folder of another checkout, also one of the flat layout that was before.

Measured are the library notebooks' exported code cells and the way that they import one another; what each figure counts stands in its label.
"""
import ast
import json
import re
import statistics
import sys
from collections import Counter
from pathlib import Path


def source(cell): return "".join(cell["source"])


def exported(notebook):
    "The source of the exported code cells of a notebook."
    return [source(c) for c in notebook["cells"] if c["cell_type"] == "code" and re.match(r"#\| *exports?\b", source(c))]


def lines_of(text):
    "Lines that are neither blank nor a directive."
    return [line for line in text.splitlines() if line.strip() and not line.startswith("#|")]


def module_of(notebook):
    return next(m[1] for c in notebook["cells"] if (m := re.match(r"#\| *default_exp (\S+)", source(c))))


def imported(tree, package):
    "(module, name) of everything that code imports from the package; module is None for the package itself."
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names: yield node.module.partition(".")[2] or None, alias.name


def edges(trees, package):
    "Module -> the modules that its exported code imports."
    return {me: {module if module in trees else f"{module}.{name}".removeprefix("None.") for module, name in imported(tree, package)} & {*trees}
            for me, tree in trees.items()}


def circles(graph):
    "Modules from which a way of imports leads back to themselves."
    def reach(start):
        seen, todo = set(), [*graph[start]]
        while todo:
            if (node := todo.pop()) not in seen: seen.add(node); todo += graph[node]
        return seen
    return [m for m in graph if m in reach(m)]


def public_names(tree):
    "Public functions, classes and constants that a module defines; no methods."
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any("patch" in ast.dump(d) for d in node.decorator_list): continue
        if isinstance(node, ast.FunctionDef | ast.ClassDef): names = [node.name]
        elif isinstance(node, ast.Assign): names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
        else: names = []
        yield from (n for n in names if not n.startswith("_"))


def used_outside(root, trees, package):
    "(module, name) that another module, a run notebook, a test or a tool names."
    texts = {me: [ast.unparse(tree)] for me, tree in trees.items()}
    others = [p.read_text(encoding="utf-8") for folder in ("tools",) for p in (root/folder).rglob("*.py")]
    others += ["\n".join(map(source, json.loads(p.read_text(encoding="utf-8"))["cells"])) for p in (root/"nbs").glob("[a-z]*.ipynb")]
    words = {me: set(re.findall(r"\w+", "\n".join(text))) for me, text in texts.items()}
    outside = set(re.findall(r"\w+", "\n".join(others)))
    count = Counter(w for ws in words.values() for w in ws)
    return {(me, n) for me, tree in trees.items() for n in public_names(tree) if n in outside or count[n] > 1}


def figures(root):
    "Figure -> value, as text."
    root = Path(root)
    package = next(p.parent.name for p in root.glob("*/__init__.py") if (p.parent/"_modidx.py").exists())
    paths = sorted(p for p in (root/"nbs").rglob("[0-9]*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    notebooks = {p: json.loads(p.read_text(encoding="utf-8")) for p in paths}
    names = {p: module_of(nb) for p, nb in notebooks.items()}
    cells = {names[p]: exported(nb) for p, nb in notebooks.items()}
    trees = {me: ast.parse("\n\n".join(sources)) for me, sources in cells.items()}
    graph, order = edges(trees, package), {m: i for i, m in enumerate(names.values())}
    sizes = sorted(len(lines_of(s)) for sources in cells.values() for s in sources)
    package_lines = [line for p in (root/package).rglob("*.py") if p.name != "_modidx.py" for line in p.read_text(encoding="utf-8").splitlines() if line.strip()]
    lines = [line for sources in cells.values() for s in sources for line in lines_of(s)]
    public = [(me, n) for me, tree in trees.items() for n in public_names(tree)]
    used = used_outside(root, trees, package)
    rooms = Counter(p.parent.name for p in paths)
    defs = [sum(isinstance(n, ast.FunctionDef | ast.ClassDef) for n in ast.parse(s).body) for sources in cells.values() for s in sources]
    share = lambda part, whole: f"{100*part/max(whole, 1):.1f} %"
    return {"rooms": str(len(paths)), "floors": str(len(rooms)), "rooms on the fullest floor": str(max(rooms.values())),
            "modules in an import circle": str(len(circles(graph))),
            "upward imports": str(sum(order[to] >= order[me] for me, to_all in graph.items() for to in to_all)),
            "public names": str(len(public)), "of them used nowhere else": share(sum(x not in used for x in public), len(public)),
            "lines of the package, without blank ones": str(len(package_lines)), "exported cells": str(len(sizes)),
            "lines of an exported cell, median": f"{statistics.median(sizes):g}", "90 % have at most": str(sizes[int(.9*len(sizes))]),
            "definitions a cell": f"{sum(defs)/sum(d > 0 for d in defs):.2f}",
            "exported lines over 100 columns": share(sum(len(line) > 100 for line in lines), len(lines))}


if __name__ == "__main__":
    for label, value in figures(sys.argv[1] if sys.argv[1:] else Path(__file__).resolve().parent.parent).items(): print(f"{label:40} {value:>8}")
