"JupyterLab in a headless browser starts a run, watches it, is closed, and finds it again."
import json
import os
from functools import partial

import lab as jupyter
import nbformat
import pytest
from conftest import ROOT
from lab import assert_no_errors, chrome

pytestmark = jupyter.needs_browser
until = partial(jupyter.until, seconds=60)


@pytest.fixture
def lab(learn):
    "A JupyterLab of its own over a project whose monitor starts a slow training."
    notebook = nbformat.read(ROOT/"nbs/monitor.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += '\nstart, given, run, every = "learn", {"steps": 400, "pause": 0.2}, "runs/learn/live", 0.5'
    nbformat.write(notebook, learn/"monitor.ipynb")
    with jupyter.jupyterlab(learn, learn, 60) as url: yield url, learn


def browser(folder): return chrome(folder, 120, "--disable-gpu", "--window-size=1400,1600")


RUN_ALL = """
const done = arguments[0], app = window.jupyterapp;
(async () => { await app.restored; const panel = app.shell.currentWidget; await panel.context.ready; await panel.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells'); done('ran'); })().catch(e => done(String(e)));"""


def opened(driver, url):
    "The notebook after all its cells have been run, without errors."
    driver.get(f"{url}/lab/tree/monitor.ipynb?reset")
    until(lambda: driver.execute_script(jupyter.NOTEBOOK_IS_THERE))
    assert driver.execute_async_script(RUN_ALL) == "ran"
    assert_no_errors(driver)


def step_shown(driver):
    "The step in the live view, 0 before there is one."
    text = driver.execute_script("return [...document.querySelectorAll('.widget-html')].map(e => e.innerText).join(' ')")
    words = text.split()
    return int(words[words.index("of") - 1]) if "of" in words else 0


def test_closed_and_opened_again(lab, tmp_path):
    url, project = lab
    first = browser(tmp_path/"first")
    try:
        opened(first, url)
        early = until(lambda: step_shown(first))
        assert until(lambda: step_shown(first) > early) # it moves by itself
        until(lambda: first.find_elements("css selector", ".widget-image[src^='blob:']"))
        if shot := os.environ.get("DEFI_NB_SCREENSHOT"): first.save_screenshot(shot)
    finally: first.quit()
    before = len((project/"ckpts/net/metrics.jsonl").read_text().splitlines())
    until(lambda: len((project/"ckpts/net/metrics.jsonl").read_text().splitlines()) > before + 3) # no browser, and it goes on
    second = browser(tmp_path/"second")
    try:
        notebook = nbformat.read(project/"monitor.ipynb", 4)
        for c in notebook.cells: c.source = c.source.replace('start, given, run, every = "learn"', 'start, given, run, every = ""') # only watch
        nbformat.write(notebook, project/"monitor.ipynb")
        opened(second, url)
        assert until(lambda: step_shown(second)) > before
        button = next(b for b in second.find_elements("css selector", "button.jupyter-button") if "stop" in b.text.lower())
        button.click()
        until(lambda: "stopped" in second.execute_script("return document.querySelector('.widget-html').innerText"))
        saved = json.loads((project/"ckpts/net/config.json").read_text())["step"]
        assert before < saved < 400 # saved where it was stopped: it would have saved at the end only
    finally: second.quit()
