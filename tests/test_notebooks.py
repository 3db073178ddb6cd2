"Every library notebook runs from top to bottom in a fresh process, two at a time, with nothing downloaded."
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import LIBRARY, ROOT, command


@pytest.fixture(scope="module")
def executed(request):
    "Notebook -> future of its finished process, for the notebooks that this session tests."
    chosen = [i.callspec.params["path"] for i in request.session.items if i.module.__name__ == __name__]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(command, "nbdev-test", path, "--n-workers", 0) for path in chosen}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("path", [*LIBRARY, ROOT/"nbs/index.ipynb"], ids=lambda p: p.stem)
def test_notebook_runs(executed, path):
    done = executed[path].result()
    assert done.returncode == 0, done.stdout + done.stderr
