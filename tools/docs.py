"""The docs site's pages from the repository as it is: a hook of mkdocs, see mkdocs.yml.

A page's source path is its path in the repository, so links are the same everywhere and `mkdocs build --strict` checks them. Notebooks
become Markdown with their stored outputs; of a run notebook the newest executed copy in runs/ is shown, where there is one. LOG.md
becomes a page for each finding. Formulas become MathML, so that nothing is fetched when a page is opened.
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

sys.path.insert(0, str(Path(__file__).parent))
from readme import FLOORS, NBS, ROOT, RUNS, about  # noqa: E402

TABLES = sorted((ROOT/"results").glob("*/table.md"))
EXPORTER = MarkdownExporter()
MODULES = {about(p)[0]: p for floor in FLOORS for p in sorted(floor.glob("[0-9]*.ipynb"))}
FIXED = {"nbs/index.ipynb": "index.html", "LOG.md": "findings/index.html"}
SECTIONS = "docs/experiments.md", "docs/reference.md", "LOG.md"  # pages that head a part of the navigation
FINDING = re.compile(r"^- (~~)?\*\*(.+?)\*\*(?:~~)?")


def place(path):
    "Where the page of a source path goes in the site."
    if path in FIXED: return FIXED[path]
    if m := re.fullmatch(r"nbs/\d+_(\w+)/\d+_(\w+)\.ipynb", path): return f"reference/{m[1]}/{m[2]}.html"
    if m := re.fullmatch(r"nbs/(\w+)\.ipynb", path): return f"experiments/{m[1]}.html"
    return re.sub(r"\.md$", ".html", path.removeprefix("docs/"))


class Page(File):
    "A page with a text of its own, whatever its source's suffix."
    def __init__(self, config, path, text):
        super().__init__(path, None, config.site_dir, False, dest_uri=place(path))
        self.generated_by, self.abs_src_path, self._content = "docs", None, text
        if path in SECTIONS: self.name = "index"

    def is_documentation_page(self): return True


def media(config, path, content=None):
    "A file that is copied; from the repository, or from memory."
    file = File(path, None if content else str(ROOT), config.site_dir, False, dest_uri=path)
    if content: file.abs_src_path, file._content = None, content
    return file


@cache
def executed():
    "Run notebook -> its newest executed copy that came to its end."
    copies = {}
    for path in sorted((ROOT/"runs").rglob("*.ipynb"), key=lambda p: p.stat().st_mtime):
        if (NBS/path.name).exists() and not json.loads(path.read_text())["metadata"].get("papermill", {}).get("exception", True):
            copies[path.stem] = path
    return copies


def state_of_run(path):
    "What a run notebook's page says under its title."
    command = f"defi-nb run {path.stem}"
    if not (copy := executed().get(path.stem)):
        return f"*Not executed in this checkout: `{command}`, then `make docs` again, shows its results here.*\n"
    return f"*Executed: `{copy.relative_to(ROOT)}`.*\n"


def notebook_page(config, path):
    "A notebook as Markdown, and the images of its outputs."
    source = executed().get(path.stem, path) if path in RUNS else path
    nb, name = nbformat.read(source, 4), path.relative_to(ROOT).as_posix()
    for cell in nb.cells:
        if cell.cell_type == "code": cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
        else: cell.source = re.sub(r"^- skip_exec: true\n?", "", cell.source, flags=re.M)
    nb.cells, nb.metadata.language_info = [c for c in nb.cells if c.source.strip()], {"name": "python"}
    if path in RUNS: nb.cells[0].source += f"\n\n{state_of_run(path)}"
    folder = path.stem + "_files/"
    text, resources = EXPORTER.from_notebook_node(nb, resources={"output_files_dir": folder.rstrip("/"), "unique_key": "output"})
    images = [(f"{path.parent.relative_to(ROOT).as_posix()}/{file}", data) for file, data in resources["outputs"].items()]
    return [Page(config, name, text), *(media(config, file, data) for file, data in images)]


def findings():
    "(date, headline, whether withdrawn, text) of each entry of LOG.md, newest first."
    date, entries = "", []
    for line in (ROOT/"LOG.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "): date = line[3:]
        elif m := FINDING.match(line): entries.append([date, m[2].rstrip(".:"), bool(m[1]), [line[m.end():].lstrip(" :.")]])
        elif entries: entries[-1][3].append(line.removeprefix("  "))
    return [(date, head, withdrawn, "\n".join(lines).strip()) for date, head, withdrawn, lines in entries]


def slug(headline): return "_".join(re.findall(r"[a-z0-9]+", headline.lower().replace("`", ""))[:8])


def sentences(text):
    "A long paragraph, broken after about every third sentence, outside brackets and code."
    parts, kept = re.split(r"(?<=[.:;]) (?=[A-Z])", text), []
    for part in parts:
        if kept and (len(kept[-1]) < 350 or kept[-1].count("(") > kept[-1].count(")") or kept[-1].count("`") % 2): kept[-1] += " " + part
        else: kept.append(part)
    return "\n\n".join(kept)


def leading_brackets(text):
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
        commands = list(dict.fromkeys(re.findall(r"`((?:defi-nb|pytest|python|make|[A-Z_]+=\S+) [^`]+)`", text)))
        title = headline + " (withdrawn)"*withdrawn
        about, text = leading_brackets(text)
        body = "\n".join(sentences(line) if len(line) > 500 else line for line in text.split("\n"))
        body += "".join(f"\n\n```\n{c}\n```" for c in commands[:1] and ["\n".join(commands)])
        name = f"findings/{slug(headline)}.md"
        pages.append(Page(config, name, f"# {title}\n\n*{day}* {about}\n\n{body}\n"))
        rows += [f"\n## {day}\n"]*(day != date) + [f"- [{title}](findings/{slug(headline)}.md)"]
        date = day
    intro = "# Findings\n\nWhat was tried and what came of it, failures included; newest first. The source is `LOG.md`.\n"
    return [Page(config, "LOG.md", intro + "\n".join(rows) + "\n"), *pages]


def link_modules(text, path):
    "Names of rooms in prose, such as `eval.rollout`, as links to their notebooks."
    up = "../"*path.count("/")
    return re.sub(r"(?<![\[`])`((?:\w+)\.(?:\w+))`(?![\]`])", lambda m: f"[{m[0]}]({up}{MODULES[m[1]].relative_to(ROOT).as_posix()})" if m[1] in MODULES else m[0], text)


def on_config(config):
    "The navigation's parts that follow from the tree."
    name = lambda path: path.relative_to(ROOT).as_posix()
    config.nav[0]["Start"] += map(name, TABLES)
    rooms = [{floor.name[3:]: [name(p) for p in sorted(floor.glob("[0-9]*.ipynb"))]} for floor in FLOORS]
    config.nav += [{"Experiments": ["docs/experiments.md", *map(name, RUNS)]}, {"Reference": ["docs/reference.md", *rooms]},
                   {"Findings": ["LOG.md", *(f"findings/{slug(head)}.md" for _, head, *_ in findings())]}]
    return config


@event_priority(100)
def on_files(files, config):
    "Everything that is a page, under its path in the repository."
    pages = [Page(config, p.relative_to(ROOT).as_posix(), p.read_text(encoding="utf-8")) for p in sorted((ROOT/"docs").rglob("*.md"))]
    pages += [Page(config, p.relative_to(ROOT).as_posix(), f"# Numbers: {p.parent.name}\n\n{p.read_text(encoding='utf-8')}") for p in TABLES]
    for path in [NBS/"index.ipynb", *RUNS, *MODULES.values()]: pages += notebook_page(config, path)
    images = [media(config, p.relative_to(ROOT).as_posix()) for p in sorted((NBS/"images").rglob("*.*"))]
    font = Path(ziamath.__file__).parent/"fonts"/"STIXTwoMath-Regular.ttf" # few systems have a font for formulas
    theirs = [f for f in files if f.src_dir != config.docs_dir]
    return Files([*theirs, media(config, "docs/extra.css"), media(config, "docs/math.ttf", font.read_bytes()), *images, *pages, *finding_pages(config)])


def on_page_markdown(text, page, config, files): return link_modules(text, page.file.src_uri)


def formula(match):
    "A formula of arithmatex as MathML."
    tag, text = match[1], html.unescape(match[2]).strip()
    if tag == "span": return to_mathml(text[2:-2].strip())
    return f'<div class="formula">{to_mathml(text[2:-2].strip(), display="block")}</div>'


def on_page_content(text, page, config, files): return re.sub(r'<(span|div) class="arithmatex">(.+?)</\1>', formula, text, flags=re.S)
