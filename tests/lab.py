"A JupyterLab of its own and a headless browser, for the tests that look at notebooks as a person does."
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

import pytest
from conftest import ENV

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("chromium-browser"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no Chromium with its driver here")
FLAGS = ["--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"]
SETTINGS = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False}, "notebook-extension/tracker": {"windowingMode": "none"}}
NOTEBOOK_IS_THERE = "return !!(window.jupyterapp && document.querySelector('.jp-Notebook .jp-Cell'))"


@contextmanager
def jupyterlab(root, home, seconds):
    "JupyterLab on a folder, its own files in another one; yields its address once it answers."
    for name, values in SETTINGS.items():
        path = home/"settings/@jupyterlab"/f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in ENV.items() if k != "DEFI_NB_PROGRESS"} | {f"JUPYTER_{kind}_DIR": str(home/kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    options = ["--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={root}",
               "--LabApp.expose_app_in_browser=True", f"--LabApp.user_settings_dir={home/'settings'}", f"--LabApp.workspaces_dir={home/'workspaces'}",
               "--LabApp.extension_manager=readonly", *(["--allow-root"] if os.getuid() == 0 else [])]
    with open(home/"lab.log", "w") as log: server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], cwd=root, env=env, stdout=log, stderr=log)
    try:
        for _ in range(4*seconds):
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api/status", timeout=2); break
            except OSError: time.sleep(.25)
        else: pytest.fail((home/"lab.log").read_text())
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(seconds/2)


def chrome(folder, seconds, *flags):
    "A headless browser with its files in a folder; a script in it may take some seconds."
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, *flags, f"--user-data-dir={folder}"): options.add_argument(flag)
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.set_script_timeout(seconds)
    return found


def until(check, seconds):
    "What `check` gives, once it gives something."
    end = time.monotonic() + seconds
    while not (found := check()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.1)
    return found


def assert_no_errors(driver):
    "No cell of the notebook shows an error, or anything on its error stream."
    errors = driver.find_elements("css selector", "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']")
    assert not errors, [e.text for e in errors]
