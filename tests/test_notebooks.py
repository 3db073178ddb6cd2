"Every library notebook runs from top to bottom in a fresh process, with nothing downloaded."
import pytest
from conftest import LIBRARY, ROOT, command


@pytest.mark.parametrize("path", [*LIBRARY, ROOT/"nbs/index.ipynb"], ids=lambda p: p.stem)
def test_notebook_runs(path):
    done = command("nbdev-test", path, "--n-workers", 0)
    assert done.returncode == 0, done.stdout + done.stderr
