"JupyterLab in a headless browser opens the workbench, moves it, queries it with another instruction, and takes steps in the simulator."
import base64
import json
import os
import shutil
from functools import partial

import lab
import nbformat
import numpy as np
import pytest
from conftest import ROOT
from lab import assert_no_errors, chrome, jupyterlab

pytestmark = lab.needs_browser
until = partial(lab.until, seconds=300)
FLAGS = ["--window-size=1600,2200", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"] # WebGL without a graphics card
PARAMETERS = {"attention": "latent action x patch", "policy": "ckpts/coupled", "second": "ckpts/plain", "split": "data/waves_D_D", "at": 2, "steps": 1}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A project with two untrained policies, a recording of half a second, and the notebook that is to open them."
    if given := os.environ.get("DEFI_NB_EXPLORE"): return given # a project with trained ones, to look at
    import torch

    from defi_nb.data.record import finish_split, write_segment
    from defi_nb.weights.checkpoint import save_checkpoint
    from defi_nb.models.encoders import load_encoders
    from defi_nb.data.episodes import Window
    from defi_nb.models.gfdm import GFDM, GFDMConfig, fit_encoders
    from defi_nb.weights.load import model_info
    from defi_nb.sim.playtable import PlayTable, waving_action
    from defi_nb.models.policy import CoupledPolicy, PlainConfig, PlainPolicy, PolicyConfig
    from defi_nb.core.spec import DataSpec
    root, env = tmp_path_factory.mktemp("project"), PlayTable("D", 64, 64)
    shutil.copy(ROOT/"settings.ini", root)
    (root/"nbs").mkdir()
    obs, rows = env.reset(), []
    for k in range(14):
        images = {f"rgb_{v}": obs["rgb_obs"][f"rgb_{v}"] for v in ("static", "gripper")}
        rows.append(images | dict(rel_actions=waving_action(k), robot_obs=obs["robot_obs"], scene_obs=obs["scene_obs"]))
        obs = env.step(waving_action(k))[0]
    write_segment(root/"data/waves_D_D/training", 0, {k: np.stack([row[k] for row in rows]) for k in rows[0]}, "D", [Window(0, 13, "open_drawer", "open the drawer")])
    finish_split(root/"data/waves_D_D/training")
    torch.manual_seed(0)
    encoders = load_encoders("tiny")
    forward = GFDM(fit_encoders(GFDMConfig.tiny(), encoders, DataSpec()), encoders.clip)
    for name, model in (("coupled", CoupledPolicy(PolicyConfig.tiny(), encoders, forward)), ("plain", PlainPolicy(PlainConfig(), encoders))):
        torch.nn.init.normal_(model.adapter.action_pred.weight, std=.05) # so that an untrained policy moves
        save_checkpoint(root/"ckpts"/name, model, state={}, info=model_info(model, encoders, preset="tiny"))
    notebook = nbformat.read(ROOT/"nbs/explore.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in PARAMETERS.items())
    nbformat.write(notebook, root/"explore.ipynb")
    return root


@pytest.fixture(scope="module")
def url(project, tmp_path_factory):
    "A JupyterLab of its own."
    with jupyterlab(project, tmp_path_factory.mktemp("lab"), 120) as address: yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chrome(tmp_path_factory.mktemp("browser"), 300, *FLAGS)
    yield found
    found.quit()


RUN_ALL = """
const app = window.jupyterapp; window.ran = '';
(async () => { await app.restored; const panel = app.shell.currentWidget; await panel.context.ready; await panel.sessionContext.ready;
  await app.commands.execute('notebook:run-all-cells'); window.ran = 'ran'; })().catch(e => { window.ran = String(e); });"""
IN_KERNEL = """
const code = arguments[0]; let out = ''; window.answer = null;
const future = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code, store_history: false});
future.onIOPub = m => { if (m.header.msg_type === 'stream') out += m.content.text; if (m.header.msg_type === 'error') out += m.content.evalue; };
future.done.then(() => { window.answer = [out]; });"""
IMAGE = """
const [n, done] = arguments, image = document.querySelectorAll('.defi-explorer .widget-image')[n];
fetch(image.src).then(r => r.arrayBuffer()).then(b => { let s = ''; for (const x of new Uint8Array(b)) s += String.fromCharCode(x); done(btoa(s)); });"""
LATENCY = """
const [pause, done] = arguments, image = document.querySelector('.defi-explorer .widget-image'), handle = document.querySelector('.defi-explorer .noUi-handle'), took = [];
function move(i) {
  if (i == 12) return done(took);
  const began = performance.now();
  image.addEventListener('load', () => { took.push(performance.now() - began); setTimeout(() => move(i + 1), pause); }, {once: true});
  handle.dispatchEvent(new KeyboardEvent('keydown', {key: i % 2 ? 'ArrowRight' : 'ArrowLeft', bubbles: true}));
}
move(0);"""


class Page:
    "The notebook in the browser."
    def __init__(self, driver): self.driver = driver

    def kernel(self, code):
        self.driver.execute_script(IN_KERNEL, code)
        return until(lambda: self.driver.execute_script("return window.answer"))[0].strip()

    def image(self, n=0): return base64.b64decode(self.driver.execute_async_script(IMAGE, n))
    def trace(self, name, axis): return self.driver.execute_script("return Array.from(document.querySelector('.defi-explorer .js-plotly-plot').data.find(t => t.name == arguments[0])[arguments[1]])", name, axis)
    def text(self): return self.driver.execute_script("return document.querySelector('.defi-explorer').innerText")
    def all(self, selector): return self.driver.find_elements("css selector", f".defi-explorer {selector}")
    def button(self, text): return next(b for b in self.all("button") if b.text == text)

    def select(self, label, option):
        "Choose in the selector with a label."
        from selenium.webdriver.support.ui import Select
        box = next(b for b in self.all(".widget-dropdown") if b.find_element("css selector", "label").text == label)
        Select(box.find_element("css selector", "select")).select_by_visible_text(option)

    def settled(self):
        "Wait until the kernel is done and the browser shows the kernel's image; returns that image."
        shown = base64.b64decode(self.kernel("explorer.wait(); import base64; print(base64.b64encode(explorer.strip.value).decode())"))
        until(lambda: self.image() == shown)
        return shown


def test_workbench(url, browser):
    from selenium.webdriver.common.keys import Keys
    page = Page(browser)
    browser.get(f"{url}/lab/tree/explore.ipynb?reset")
    until(lambda: browser.execute_script(lab.NOTEBOOK_IS_THERE))
    browser.execute_script(RUN_ALL)
    assert until(lambda: browser.execute_script("return window.ran")) == "ran"
    assert_no_errors(browser)
    until(lambda: page.all(".js-plotly-plot .main-svg") and page.all(".widget-image[src^='blob:']"))
    cells = len(browser.find_elements("css selector", ".jp-Notebook .jp-Cell"))
    before = page.settled()
    assert page.trace("cursor 0", "x") == [2, 2] and np.allclose(page.trace("cursor 0", "y"), [-2.2, 2.2], atol=1e-3)

    # the scrubber
    handle, numbers = page.all(".noUi-handle")[0], page.text()
    codes = page.image(2)
    handle.click()
    handle.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    until(lambda: page.trace("cursor 0", "x") == [5, 5])
    assert np.allclose(page.trace("cursor 0", "y"), [-2.2, 2.2], atol=1e-3)
    after = page.settled()
    assert after != before and page.image(2) != codes and page.text() != numbers and "0.17 s of 0.43 s" in page.text()
    chunk = json.loads(page.kernel("import json; print(json.dumps((2*explorer.sessions[0].cached(explorer.query)['chunk'][-1, :, 0]).tolist()))"))
    assert np.allclose(page.trace("x 0", "y")[:10], chunk, atol=1e-4) and page.trace("x 0", "x")[0] == 5
    place = json.loads(page.kernel("print(json.dumps(explorer.episode.robot_obs[5, :3].tolist()))"))
    assert np.allclose([page.trace("now", a)[0] for a in "xyz"], place, atol=1e-6)

    # two selectors and a button: the strip changes, the motion does not
    motion = page.trace("coupled's chunk", "z")
    page.select("layer", "block 1")
    until(lambda: page.image() != after)
    layer = page.settled()
    page.select("head", "2")
    until(lambda: page.image() != layer)
    head = page.settled()
    assert "layer block 1, head 2" in page.text() and page.trace("coupled's chunk", "z") == motion
    page.button("gripper").click()
    until(lambda: page.image() != head)
    assert "of the static camera" in until(lambda: "of the static camera" in page.text() and page.text())
    page.button("static").click()
    until(lambda: page.image() == head)

    # another instruction
    field = next(b for b in page.all(".widget-text") if b.find_element("css selector", "label").text == "instruction").find_element("css selector", "input")
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("push the blue block", Keys.ENTER)
    until(lambda: "push the blue block" in page.kernel("print(explorer.query.text)"))
    other = page.settled()
    assert other != head and "asked for 'push the blue block'" in page.text() and page.trace("coupled's chunk", "z") != motion

    # the simulator: the policy once, and keys that are not the notebook's
    page.button("go on from here").click()
    until(lambda: "0 control steps" in page.text())
    page.button("policy: one plan").click()
    until(lambda: "10 control steps (10 by coupled, 0 by hand)" in page.text())
    keys = page.all("input.defi-keys")[0]
    for n, key in enumerate("dda ", 1):
        keys.send_keys(key)
        until(lambda n=n: f"by coupled, {n} by hand" in page.text())
    assert "gripper closed" in page.text() and len(browser.find_elements("css selector", ".jp-Notebook .jp-Cell")) == cells
    path = json.loads(page.kernel("print(json.dumps(explorer.teleop.path()[:, 2].tolist()))"))
    until(lambda: len(page.trace("live", "z")) == 15)
    assert np.allclose(page.trace("live", "z"), path, atol=1e-6)
    page.button("open this run").click()
    until(lambda: page.kernel("print(len(explorer.episode))") == "15")
    page.settled()

    moves = page.kernel("from defi_nb.explore.app import time_moves; print(time_moves(explorer))")
    page.settled()
    print(f"\nin the kernel, ms: {moves}")
    for pause in (600, 60): # milliseconds between an image and the next key
        took = browser.execute_async_script(LATENCY, pause)
        print(f"from key to image in the browser, {pause} ms apart: median {np.median(took):.0f} ms, 95th percentile {np.percentile(took, 95):.0f} ms")
    if shot := os.environ.get("DEFI_NB_SCREENSHOT"): browser.save_screenshot(shot)
    severe = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe
