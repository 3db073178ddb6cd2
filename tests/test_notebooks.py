"Every library notebook runs from top to bottom in a process of its own, with nothing downloaded."
import pytest
from conftest import LIBRARY, ROOT, module
from warm import forked

SKIPPED = ["gpu", "data", "slow"] # as in pyproject.toml


def run_notebook(path):
    "What `nbdev-test` does with one notebook."
    from nbdev.test import test_nb
    return not test_nb(path, skip_flags=SKIPPED, basepath=ROOT)[0]


@pytest.mark.parametrize("path", [*LIBRARY, ROOT/"nbs/index.ipynb"], ids=module)
def test_notebook_runs(path):
    done = forked(run_notebook, path, cwd=path.parent)
    assert done.returncode == 0, done.stdout + done.stderr
