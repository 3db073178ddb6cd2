"""The docs site's pages from the repository as it is: a hook of mkdocs, see mkdocs.yml.

A page's source path is its path in the repository, so links are the same everywhere, and
`mkdocs build --strict` checks them. Notebooks become Markdown with their stored outputs; of a run notebook
the newest executed copy in runs/ is shown, where there is one. LOG.md becomes a page for each finding.
Formulas become MathML, so that nothing is fetched when a page is opened.
"""
import html
import json
import re
import sys
from functools import cache
from pathlib import Path

import nbformat
import ziamath
from latex2mathml.converter import convert as to_mathml
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

from defi_nb.core.page import page_notebook

sys.path.insert(0, str(Path(__file__).parent))
from readme import FLOORS, NBS, ROOT, RUNS, about, rooms  # noqa: E402

MODULES = {about(path)[0]: path for floor in FLOORS for path in rooms(floor)}
GUIDES, TABLES = sorted((ROOT/"docs").rglob("*.md")), sorted((ROOT/"results").glob("*/table.md"))
FIXED = {"nbs/index.ipynb": "index.html", "LOG.md": "findings/index.html"}
SECTIONS = "docs/experiments.md", "docs/reference.md", "LOG.md"  # pages that head a part of the navigation
EXPORTER = MarkdownExporter()


def name_of(path): return path.relative_to(ROOT).as_posix()


def place(name):
    "Where the page of a source goes in the site."
    if name in FIXED: return FIXED[name]
    if m := re.fullmatch(r"nbs/\d+_(\w+)/\d+_(\w+)\.ipynb", name): return f"reference/{m[1]}/{m[2]}.html"
    if m := re.fullmatch(r"nbs/(\w+)\.ipynb", name): return f"experiments/{m[1]}.html"
    return re.sub(r"\.md$", ".html", name.removeprefix("docs/"))


class Page(File):
    "A page with a text of its own, whatever its source's suffix."
    def __init__(self, config, name, text):
        super().__init__(name, None, config.site_dir, False, dest_uri=place(name))
        self.generated_by, self.abs_src_path, self._content = "docs", None, text
        if name in SECTIONS: self.name = "index"

    def is_documentation_page(self): return True


def media(config, name, content=None):
    "A file that is copied; from the repository, or from memory."
    file = File(name, None if content else str(ROOT), config.site_dir, False, dest_uri=name)
    if content: file.abs_src_path, file._content = None, content
    return file


@cache
def executed():
    "Run notebook -> its newest executed copy that came to its end."
    copies = {}
    for path in sorted((ROOT/"runs").rglob("*.ipynb"), key=lambda p: p.stat().st_mtime):
        if not (NBS/path.name).exists(): continue
        record = json.loads(path.read_text(encoding="utf-8"))["metadata"].get("papermill", {})
        if not record.get("exception", True): copies[path.stem] = path
    return copies


def run_notebook(path):
    "A run notebook: its newest executed copy as a page, results first, or as it is."
    copy, nb = executed().get(path.stem), nbformat.read(path, 4)
    command = f"`defi-nb run {path.stem}`, then `make docs` again"
    state = f"Not executed in this checkout: {command}, shows its results here."
    if copy:
        state = f"Executed: `{name_of(copy)}`."
        metrics = json.loads((copy.parent/"metrics.json").read_text(encoding="utf-8"))
        nb = page_notebook(nbformat.read(copy, 4), metrics.get("conclusion", ""), root=str(ROOT))
    nb.cells[0].source += f"\n\n*{state}*\n"
    return nb


def notebook_page(config, path):
    "A notebook as Markdown, and the images of its outputs."
    nb = run_notebook(path) if path in RUNS else nbformat.read(path, 4)
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
    nb.cells, nb.metadata.language_info = [c for c in nb.cells if c.source], {"name": "python"}
    where = {"output_files_dir": f"{path.stem}_files", "unique_key": "output"}
    text, resources = EXPORTER.from_notebook_node(nb, resources=where)
    images = [media(config, f"{name_of(path.parent)}/{file}", data) for file, data in resources["outputs"].items()]
    return [Page(config, name_of(path), text), *images]


FINDING = re.compile(r"^- (~~)?\*\*(.+?)\*\*(?:~~)?")
COMMAND = re.compile(r"`((?:defi-nb|pytest|python|make|[A-Z_]+=\S+) [^`]+)`")


def findings():
    "(date, headline, whether withdrawn, text) of each entry of LOG.md, newest first."
    date, entries = "", []
    for line in (ROOT/"LOG.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "): date = line[3:]
        elif m := FINDING.match(line):
            entries.append([date, m[2].rstrip(".:"), bool(m[1]), [line[m.end():].lstrip(" :.")]])
        elif entries: entries[-1][3].append(line.removeprefix("  "))
    return [(date, head, withdrawn, "\n".join(lines).strip()) for date, head, withdrawn, lines in entries]


def page_of(headline):
    return f"findings/{'_'.join(re.findall(r'[a-z0-9]+', headline.lower())[:8])}.md"


def is_open(text): return text.count("(") > text.count(")") or text.count("`") % 2


def paragraphs(text):
    "A long paragraph, broken after about every third sentence, outside brackets and code."
    kept = []
    for part in re.split(r"(?<=[.:;]) (?=[A-Z])", text):
        if kept and (len(kept[-1]) < 350 or is_open(kept[-1])): kept[-1] += " " + part
        else: kept.append(part)
    return "\n\n".join(kept)


def split_brackets(text):
    "What an entry says in brackets first, how it was measured, and the rest."
    if not text.startswith("("): return "", text
    depth = [0]
    for c in text: depth.append(depth[-1] + (c == "(") - (c == ")"))
    end = depth.index(0, 1)
    rest = text[end:].lstrip(" :.,")
    return text[1:end - 1], rest[:1].upper() + rest[1:]


def finding_pages(config):
    "A page for each finding, and their list."
    pages, rows, date = [], [], None
    for day, headline, withdrawn, text in findings():
        title, commands = headline + " (withdrawn)"*withdrawn, dict.fromkeys(COMMAND.findall(text))
        measured, text = split_brackets(text)
        body = "\n".join(paragraphs(line) if len(line) > 500 else line for line in text.split("\n"))
        if commands: body += "\n\n```bash\n" + "\n".join(commands) + "\n```"
        pages.append(Page(config, page_of(headline), f"# {title}\n\n*{day}* {measured}\n\n{body}\n"))
        rows += [f"\n## {day}\n"]*(day != date) + [f"- [{title}]({page_of(headline)})"]
        date = day
    intro = "What was tried and what came of it, failures included; newest first. The source is `LOG.md`."
    return [Page(config, "LOG.md", f"# Findings\n\n{intro}\n" + "\n".join(rows) + "\n"), *pages]


def on_config(config):
    "The navigation's parts that follow from the tree."
    library = [{floor.name[3:]: [*map(name_of, rooms(floor))]} for floor in FLOORS]
    config.nav[0]["Start"] += map(name_of, TABLES)
    config.nav += [{"Experiments": ["docs/experiments.md", *map(name_of, RUNS)]},
                   {"Reference": ["docs/reference.md", *library]},
                   {"Findings": ["LOG.md", *(page_of(headline) for _, headline, *_ in findings())]}]
    return config


@event_priority(100)
def on_files(files, config):
    "Everything that is a page, under its path in the repository."
    read = lambda path: path.read_text(encoding="utf-8")
    pages = [Page(config, name_of(p), read(p)) for p in GUIDES]
    pages += [Page(config, name_of(p), f"# Numbers: {p.parent.name}\n\n{read(p)}") for p in TABLES]
    for path in [NBS/"index.ipynb", *RUNS, *MODULES.values()]: pages += notebook_page(config, path)
    font = Path(ziamath.__file__).parent/"fonts"/"STIXTwoMath-Regular.ttf"  # few systems have one for formulas
    copied = [media(config, "docs/extra.css"), media(config, "docs/math.ttf", font.read_bytes())]
    copied += [media(config, name_of(p)) for p in sorted((NBS/"images").rglob("*.*"))]
    theme = [f for f in files if f.src_dir != config.docs_dir]
    return Files([*theme, *copied, *pages, *finding_pages(config)])


ROOM = re.compile(r"^```.*?^```|(?<![\[`])`(\w+\.\w+)`(?![\]`])", re.M | re.S)  # code blocks are passed over


def on_page_markdown(text, page, config, files):
    "Names of rooms in prose, such as `eval.rollout`, become links to their notebooks."
    up = "../"*page.file.src_uri.count("/")
    return ROOM.sub(lambda m: f"[{m[0]}]({up}{name_of(MODULES[m[1]])})" if m[1] in MODULES else m[0], text)


def formula(match):
    "A formula of arithmatex as MathML."
    text = html.unescape(match[2]).strip()[2:-2].strip()
    if match[1] == "span": return to_mathml(text)
    return f'<div class="formula">{to_mathml(text, display="block")}</div>'


def on_page_content(text, page, config, files):
    return re.sub(r'<(span|div) class="arithmatex">(.+?)</\1>', formula, text, flags=re.S)
