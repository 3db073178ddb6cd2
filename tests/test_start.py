"The start page in a real JupyterLab: every link leads somewhere, every image is seen, and a click opens a notebook."
import shutil

import lab
import pytest
from conftest import ROOT

pytestmark = lab.needs_browser
IMAGES = "return [...document.querySelectorAll('.jp-Notebook .jp-MarkdownOutput img')]"
LINKS = "return [...document.querySelectorAll('.jp-Notebook .jp-MarkdownOutput a[href]')].map(a => a.href)"
MISSING = """const [links, done] = arguments;
Promise.all(links.map(async link => [link, (await fetch(link)).status]))
  .then(all => done(all.filter(([_, status]) => status != 200)));"""
FIRST_TAB = "const shell = window.jupyterapp.shell; shell.activateById(shell.widgets('main').next().value.id)"
CLICK = """const links = [...document.querySelectorAll('.jp-Notebook .jp-MarkdownOutput a')];
links.find(a => a.innerText == arguments[0]).click()"""
TITLE = "return window.jupyterapp.shell.currentWidget.title.label"


@pytest.fixture
def page(tmp_path):
    "The browser with the start page open, in a copy of what it links to."
    for folder in ("nbs", "docs"): shutil.copytree(ROOT/folder, tmp_path/"project"/folder)
    with lab.jupyterlab(tmp_path/"project", tmp_path, 90) as url:
        driver = lab.chrome(tmp_path/"chrome", 60, "--disable-gpu", "--window-size=1280,1400")
        try:
            driver.get(f"{url}/lab/tree/nbs/index.ipynb?reset") # as `make lab` opens it
            lab.until(lambda: driver.execute_script(lab.NOTEBOOK_IS_THERE), 90)
            lab.until(lambda: len(driver.execute_script(LINKS)) > 40, 90)
            yield driver, url
        finally: driver.quit()


def test_start_page(page):
    driver, url = page
    lab.until(lambda: driver.execute_script(IMAGES + ".every(i => i.complete)"), 60)
    widths = driver.execute_script(IMAGES + ".map(i => [i.getAttribute('src'), i.naturalWidth])")
    assert len(widths) >= 10 and all(width for _, width in widths), widths
    links = {link.split("#")[0] for link in driver.execute_script(LINKS)}
    local = {link for link in links if link.startswith(url)}
    assert len(local) > 40 and driver.execute_async_script(MISSING, [*local]) == []
    assert all(link.startswith("https://arxiv.org/") for link in links - local)
    for text, opened in (("ladder", "ladder.ipynb"), ("CALVIN", "calvin.md")):
        driver.execute_script(FIRST_TAB)
        lab.until(lambda: driver.execute_script(TITLE) == "index.ipynb", 30)
        driver.execute_script(CLICK, text)
        lab.until(lambda title=opened: driver.execute_script(TITLE) == title, 60)
