"JupyterLab in a headless browser starts a run, watches it, is closed, and finds it again."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from conftest import ENV, ROOT

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--window-size=1400,1600"]
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "notebook-extension/tracker": {"windowingMode": "none"}}


@pytest.fixture
def lab(learn):
    "A JupyterLab of its own over a project whose monitor starts a slow training."
    notebook = nbformat.read(ROOT/"nbs/monitor.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += '\nstart, given, run, every = "learn", {"steps": 400, "pause": 0.2}, "runs/learn/live", 0.5'
    nbformat.write(notebook, learn/"monitor.ipynb")
    for name, values in SETTINGS.items():
        path = learn/"settings/@jupyterlab"/f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = ENV | {f"JUPYTER_{kind}_DIR": str(learn/kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={learn}",
               "--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={learn/'settings'}", f"--LabApp.workspaces_dir={learn/'workspaces'}",
               "--LabApp.extension_manager=readonly", *(["--allow-root"] if os.getuid() == 0 else [])]
    with open(learn/"lab.log", "w") as log: server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=learn, env=env, stdout=log, stderr=log)
    try:
        for _ in range(240):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2); break
            except OSError: time.sleep(.25)
        else: pytest.fail((learn/"lab.log").read_text())
        yield f"http://127.0.0.1:{port}", learn
    finally:
        server.terminate()
        server.wait(30)


def browser(tmp_path):
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path}"]: options.add_argument(flag)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.set_script_timeout(120)
    return found


RUN_ALL = """
const done = arguments[0], app = window.jupyterapp;
(async () => { await app.restored; const panel = app.shell.currentWidget; await panel.context.ready; await panel.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells'); done('ran'); })().catch(e => done(String(e)));"""


def until(check, seconds=60):
    "What `check` gives, once it gives something."
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.2)
    return found


def opened(driver, url):
    "The notebook after all its cells have been run, without errors."
    driver.get(f"{url}/lab/tree/monitor.ipynb?reset")
    until(lambda: driver.execute_script("return !!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell'))"))
    assert driver.execute_async_script(RUN_ALL) == "ran"
    errors = driver.find_elements("css selector", "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']")
    assert not errors, [e.text for e in errors]


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
