"README's and the guides' code runs; the docs site has no broken link, fetches nothing, and fits a phone."
import json
import re
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import lab
import pytest
from conftest import LIBRARY, ROOT, RUNS, command

from defi_nb.models.encoders import load_encoders
from defi_nb.models.policy import fake_policies
from defi_nb.weights.checkpoint import save_checkpoint
from defi_nb.weights.load import model_info


def test_readme_is_two_screens():
    assert (ROOT/"README.md").stat().st_size < 10_000
    assert (ROOT/"nbs/images/rollout.gif").stat().st_size < 1_000_000


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    "A folder with an untrained policy where `make demo` leaves a trained one."
    folder, encoders = tmp_path_factory.mktemp("docs"), load_encoders("tiny")
    policy = fake_policies(encoders)[0]
    save_checkpoint(folder/"ckpts/coupled-tiny-D_D", policy, info=model_info(policy, encoders))
    return folder


@pytest.mark.parametrize("page,prints", [
    ("README.md", r"drawer: -?[\d.e-]+ m open\n"),
    ("docs/guides/inside.md", r"gidm\.encoder\.\S+ \(\d+, 4, \d+, \d+\) batch, head, query, key\n"),
    ("docs/first_run.md", None)], ids=["readme", "inside", "first_run"]) # None: what the page's next block shows
def test_lines_of_python_run(page, prints, workplace):
    text = (ROOT/page).read_text()
    code, after = re.search(r"```python\n(.+?)```\n(.*)", text, re.S).groups()
    done = command("python", "-c", code, cwd=workplace)
    shown = prints or re.escape(re.search(r"```\n(.+?)```", after, re.S)[1])
    assert done.returncode == 0 and re.fullmatch(shown, done.stdout), done.stdout + done.stderr


@pytest.fixture(scope="module")
def site():
    "The site, built from this checkout into a folder of its own; a broken link is an error."
    for name in ("mkdocs", "material", "latex2mathml", "ziamath"): pytest.importorskip(name)
    with tempfile.TemporaryDirectory() as folder:
        done = command("python", "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder)
        assert done.returncode == 0, done.stdout + done.stderr
        yield Path(folder)


def test_site_is_complete(site):
    rooms = {f"reference/{p.parent.name[3:]}/{p.stem[3:]}.html" for p in LIBRARY}
    pages = rooms | {f"experiments/{p.stem}.html" for p in RUNS} | {"learn/1_diffusion.html", "learn/6_evaluation.html"}
    assert not {page for page in pages if not (site/page).is_file()}
    entries = len(re.findall(r"^- (?:~~)?\*\*", (ROOT/"LOG.md").read_text(), re.M))
    assert len(list((site/"findings").glob("*.html"))) == entries + 1, "a page for each finding, and their list"
    text = (site/"reference/models/diffusion.html").read_text()
    assert "<msub>" in text and "arithmatex" not in text, "formulas are MathML"
    listed = json.loads((site/"search/search_index.json").read_text())["docs"]
    assert {"index.html", "LOG.md", "guides/serving.html"} - {d["location"].split("#")[0] for d in listed} == {"LOG.md"}


def test_site_fetches_nothing(site):
    outside = re.compile(r"""<(?:script|link|img|iframe|video|source)\b[^>]*\b(?:src|href)=["']?https?://""")
    assert not {page.name for page in site.rglob("*.html") if outside.search(page.read_text())}


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@pytest.fixture
def address(site):
    "The site behind a server, as its search needs it."
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


PAGES = ("index.html", "learn/2_gfdm.html", "reference/eval/film.html", "experiments/eval_calvin.html",
         "findings/index.html", "results.html")
LOADED = "return document.readyState == 'complete' && [...document.images].every(i => i.complete)"
STATE = """const page = document.documentElement, names = performance.getEntriesByType('resource').map(r => r.name);
return {outside: names.filter(n => !n.startsWith(location.origin) && !n.startsWith('data:')),
        empty: [...document.images].filter(i => !i.naturalWidth).map(i => i.src),
        wide: page.scrollWidth - page.clientWidth};"""


@lab.needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_site_in_a_browser(address, tmp_path, width):
    driver = lab.chrome(tmp_path, 60, "--disable-gpu", "--window-size=1280,1200")
    try:
        screen = {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": width < 800}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        for page in PAGES:
            driver.get(f"{address}/{page}")
            lab.until(lambda: driver.execute_script(LOADED), 60)
            assert driver.execute_script(STATE) == {"outside": [], "empty": [], "wide": 0}, page
        severe = [entry["message"] for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
        assert not [message for message in severe if "favicon" not in message]
        driver.get(f"{address}/index.html?q=codebook") # a search, as from the page's field
        lab.until(lambda: driver.find_elements("css selector", ".md-search-result__item"), 60)
    finally: driver.quit()
