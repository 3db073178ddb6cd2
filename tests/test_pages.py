"The page of a run in a headless browser, wide and as narrow as a phone: nothing is fetched, nothing is missing, nothing is wider than the screen."
import nbformat
import pytest
from lab import chrome, needs_browser
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from defi_nb.core.page import write_html
from defi_nb.core.plot import new_axes
from defi_nb.core.video import fake_video, show_video

pytestmark = needs_browser
OUTSIDE = "return performance.getEntriesByType('resource').map(r => r.name).filter(n => !/^(data|blob):/.test(n))"


def figure():
    "A figure of twice the dots that it was drawn for, as a kernel stores it."
    import base64
    import io
    ax, file = new_axes(7, 3), io.BytesIO()
    ax.plot([1, 2, 3])
    ax.figure.savefig(file, dpi=144)
    size = dict(width=504, height=216)
    return new_output("display_data", {"image/png": base64.b64encode(file.getvalue()).decode()}, metadata={"image/png": size})


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    "A page with all that runs show: a wide table, a figure, a film, printed lines, a widget, and a script that would be fetched."
    table = "\n".join("| " + " | ".join([text]*14) + " |" for text in ("column", ":--", "0.123 (0.1 to 0.2)"))
    film = show_video({"a film": fake_video(12)}, width=1040).data
    outputs = [figure(), new_output("display_data", {"text/html": film}), new_output("stream", name="stdout", text="20 samples\n" + "x"*400),
               new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "IntSlider"}),
               new_output("display_data", {"text/html": '<script src="https://unpkg.com/x.js"></script><img src="https://example.org/x.png" hidden>'})]
    cells = [new_markdown_cell("# Title\n\n> what it is"), new_code_cell("x: int = 1  # a number", metadata=dict(tags=["parameters"])),
             new_markdown_cell("## Results\n\n" + table, metadata=dict(tags=["results"])), new_code_cell("show()", outputs=outputs, metadata=dict(tags=["results"]))]
    path = tmp_path_factory.mktemp("page")/"run.ipynb"
    nbformat.write(new_notebook(cells=cells), path)
    return write_html(path, "It solves 2 of 5 tasks (1.5 to 2.5).", "3 min; 1 GB")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chrome(tmp_path_factory.mktemp("browser"), 60)
    yield found
    found.quit()


@pytest.mark.parametrize("width", [1280, 400])
def test_page(page, browser, width):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
    browser.get(page.as_uri())
    text = browser.find_element("css selector", "body").text
    assert text.index("It solves 2 of 5") < text.index("Results") < text.index("20 samples") < text.index("a number") < text.index("3 min; 1 GB")
    assert "IntSlider" not in text
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    images = browser.execute_script("return [...document.images].filter(i => !i.hidden).map(i => [i.naturalWidth, i.clientWidth])")
    assert [natural for natural, _ in images] == [1008] and images[0][1] == min(756, images[0][1]) and images[0][1] > .85*min(756, width)
    video = browser.find_element("css selector", "video")
    browser.execute_script("arguments[0].scrollIntoView()", video)
    browser.execute_async_script("const [v, done] = arguments; v.readyState > 2 ? done() : v.addEventListener('playing', () => done(), {once: true})", video)
    assert browser.execute_script("return [arguments[0].videoWidth, arguments[0].clientWidth > .85*Math.min(1040, arguments[1])]", video, width) == [64, True]
    severe = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"]
    assert all("Content Security Policy" in message for message in severe), "only what the page forbids"
    assert not [name for name in browser.execute_script(OUTSIDE) if "unpkg" not in name and "example.org" not in name]
