"README's code runs, and the docs site is built without a broken link, fetches nothing from outside and is legible on a phone."
import json
import re
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import lab
import pytest
import torch
from conftest import ENV, LIBRARY, ROOT, RUNS

from defi_nb.models.encoders import load_encoders
from defi_nb.models.policy import PlainConfig, PlainPolicy
from defi_nb.weights.checkpoint import save_checkpoint
from defi_nb.weights.load import model_info

README = (ROOT/"README.md").read_text()


def test_readme_is_two_screens():
    assert len(README.encode()) < 10_000
    assert (ROOT/"nbs/images/rollout.gif").stat().st_size < 1_000_000


def test_readme_acts(tmp_path):
    "The lines of Python in README, with an untrained policy where it has a trained one."
    torch.manual_seed(0)
    encoders = load_encoders("tiny")
    policy = PlainPolicy(PlainConfig.tiny(), encoders)
    save_checkpoint(tmp_path/"ckpts/coupled-tiny-D_D", policy, info=model_info(policy, encoders))
    code = re.search(r"```python\n(.+?)```", README, re.S)[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and re.fullmatch(r"drawer: -?[\d.e-]+ m open\n", done.stdout), done.stdout + done.stderr


@pytest.fixture(scope="module")
def site():
    "The site, built from this checkout into a folder of its own; a broken link is an error."
    for name in ("mkdocs", "material", "latex2mathml", "ziamath"): pytest.importorskip(name)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder], cwd=ROOT,
                              env=ENV | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        yield type(ROOT)(folder)


def test_site_is_complete(site):
    rooms = {f"reference/{p.parent.name[3:]}/{p.stem[3:]}.html" for p in LIBRARY}
    pages = rooms | {f"experiments/{p.stem}.html" for p in RUNS} | {f"learn/{n}.html" for n in ("1_diffusion", "6_evaluation")}
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


PAGES = "index.html", "learn/2_gfdm.html", "reference/eval/film.html", "experiments/eval_calvin.html", "findings/index.html", "results.html"
STATE = """const outside = performance.getEntriesByType('resource').map(r => r.name).filter(n => !n.startsWith(location.origin) && !n.startsWith('data:'));
return {outside, empty: [...document.images].filter(i => !i.naturalWidth).map(i => i.src), wide: document.documentElement.scrollWidth - document.documentElement.clientWidth};"""


@lab.needs_browser
@pytest.mark.parametrize("width", [1280, 400])
def test_site_in_a_browser(address, tmp_path, width):
    driver = lab.chrome(tmp_path, 60, "--disable-gpu", "--window-size=1280,1200")
    try:
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": 1200, "deviceScaleFactor": 1, "mobile": width < 800})
        for page in PAGES:
            driver.get(f"{address}/{page}")
            lab.until(lambda: driver.execute_script("return document.readyState == 'complete' && [...document.images].every(i => i.complete)"), 60)
            assert driver.execute_script(STATE) == {"outside": [], "empty": [], "wide": 0}, page
        assert not [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE" and "favicon" not in entry["message"]]
        driver.get(f"{address}/index.html?q=codebook") # a search, as from the page's field
        lab.until(lambda: driver.find_elements("css selector", ".md-search-result__item"), 60)
    finally: driver.quit()
