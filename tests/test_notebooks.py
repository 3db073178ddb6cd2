"Every library notebook runs from top to bottom in a process of its own, with nothing downloaded."
import gc
import os
import sys
from multiprocessing import get_context, set_start_method

import pytest
from conftest import ENV, LIBRARY, ROOT, module

# what most notebooks import first, and takes seconds: imported once, in a process from which each notebook's is forked
WARM = ["pytest", "nbformat", "nbdev.test", "scipy.stats", "matplotlib.pyplot", "accelerate", "vector_quantize_pytorch", "diffusers.models.unets.unet_spatio_temporal_condition",
        "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder", "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers",
        "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5"]
SKIPPED = ["gpu", "data", "slow"] # as in pyproject.toml


@pytest.fixture(scope="module")
def warm():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENV.items(): patch.setenv(name, value)
        context = get_context("forkserver")
        context.set_forkserver_preload(WARM)
        yield context


def run_notebook(path, said):
    "In the notebook's process: what `nbdev-test` does with one notebook, its output in a file."
    with open(said, "w") as file:
        for stream in (sys.stdout, sys.stderr): os.dup2(file.fileno(), stream.fileno())
    set_start_method("fork", force=True) # as in a process that was started by hand
    gc.freeze() # what is there already is not looked through again
    sys.stdin = open(os.devnull)
    os.chdir(path.parent)
    from nbdev.test import test_nb
    ran, _ = test_nb(path, skip_flags=SKIPPED, basepath=ROOT)
    sys.exit(0 if ran else 1)


@pytest.mark.parametrize("path", [*LIBRARY, ROOT/"nbs/index.ipynb"], ids=module)
def test_notebook_runs(path, warm, tmp_path):
    process = warm.Process(target=run_notebook, args=(path, tmp_path/"said"))
    process.start()
    process.join(600)
    if process.is_alive(): process.kill()
    assert process.exitcode == 0, (tmp_path/"said").read_text()
