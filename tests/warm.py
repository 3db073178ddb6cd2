"""Processes that begin with everything imported: forks of one server per process of pytest, in place of interpreters that import for seconds.

`defi_nb` is the command in such a fork, with an IPython shell of that fork in place of a kernel. All else is the command's own: what papermill
does, the executed copy and its page, runs that start runs, exit status and error. `command` of conftest.py is the real one.
"""
import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context, set_start_method
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from conftest import ENV

# the server imports torch and never computes, so that its forks inherit no threads; torch's optimisers import torch._dynamo, which takes seconds
processes = get_context("forkserver")
processes.set_forkserver_preload([
    "pytest", "nbformat", "nbdev.test", "papermill", "nbconvert", "scipy.stats", "matplotlib.pyplot", "accelerate", "vector_quantize_pytorch", "torch._dynamo",
    "diffusers.models.unets.unet_spatio_temporal_condition", "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder",
    "transformers.models.dinov2_with_registers.modeling_dinov2_with_registers", "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
    "defi_nb.train.fit", "defi_nb.weights.load", "defi_nb.run.datasets"])


def _begin(target, args, cwd, folder):
    for stream in (sys.stdout, sys.stderr):
        with open(Path(folder)/stream.name.strip("<>"), "w") as file: os.dup2(file.fileno(), stream.fileno())
    set_start_method("fork", force=True) # as in a process that was started by hand
    gc.freeze() # what is there already is not looked through again
    sys.stdin = open(os.devnull)
    os.environ.update(ENV)
    os.chdir(cwd)
    sys.exit(target(*args))


def forked(target, *args, cwd, timeout=600):
    "Call a function in a fork, to its end; its result is the exit status. Returns the finished process."
    with TemporaryDirectory() as folder:
        process = processes.Process(target=_begin, args=(target, args, cwd, folder))
        process.start()
        process.join(timeout)
        if process.is_alive(): process.kill()
        process.join()
        return CompletedProcess(args, process.exitcode, *((Path(folder)/name).read_text() for name in ("stdout", "stderr")))


def _in_this_process():
    "Let papermill execute notebooks in this process; runs that start runs, and evaluations that start workers, fork it."
    from execnb.shell import CaptureShell
    from papermill.engines import Engine, papermill_engines

    from defi_nb.core import utils
    from defi_nb.eval import workers
    from defi_nb.run import cli

    class Shell(Engine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, **kwargs):
            from nbformat import from_dict
            shell = CaptureShell(mpl_format="png")
            for i, cell in enumerate(nb_man.nb.cells):
                nb_man.cell_start(cell, i)
                if cell.cell_type == "code":
                    cell.outputs = [from_dict(o | {"text": "".join(o["text"])} if "text" in o else o) for o in shell.run(cell.source)]
                    cell.execution_count = shell.execution_count - 1
                    for o in cell.outputs: print(o.get("text", ""), end="", flush=True)
                    if shell.exc is not None: return nb_man.cell_exception(cell, i)
                nb_man.cell_complete(cell, i)

    class Child: # what `cli.run_notebook` needs of a subprocess.Popen
        def __init__(self, command, env, **kwargs):
            (self.here, there), (given, self.stdin) = os.pipe(), os.pipe()
            self.pid = os.fork()
            if not self.pid: _as_child(command[3:], env, given, there, self.stdin)
            os.close(there)
            os.close(given)

        def __enter__(self):
            self.stdout = open(self.here)
            return self

        def __exit__(self, *error):
            self.stdout.close()
            os.close(self.stdin)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _as_child(argv, env, given, there, parents):
        os.close(parents)
        for old, new in ((given, 0), (there, 1), (there, 2)): os.dup2(old, new)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        os.environ.clear()
        os.environ.update(env)
        try: status = cli.main(argv)
        except BaseException as e: status = print(f"{type(e).__name__}: {e}", file=sys.stderr) or 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    class Forked: # what `eval.workers` needs of a subprocess.Popen
        def __init__(self, pid): self.pid, self.returncode = pid, None

        def wait(self): self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def forked_python(target, **streams): # in place of `core.utils.start_python`
        ours, theirs = Pipe()
        pid = os.fork()
        if not pid:
            os.setsid()
            ours.close()
            for number, name in ((1, "stdout"), (2, "stderr")):
                if name in streams: os.dup2(streams[name].fileno(), number)
            try: utils.resolve_name(target)(theirs)
            finally: os._exit(0)
        theirs.close()
        return Forked(pid), ours

    papermill_engines.register(None, Shell)
    workers.start_python = forked_python
    cli.subprocess = type("Forking", (), {"Popen": Child, "PIPE": None, "STDOUT": None})
    cli.ThreadPoolExecutor = lambda workers: ThreadPoolExecutor(1) # one run after the other: what is forked while another thread imports waits for ever


def _defi_nb(argv):
    _in_this_process()
    from defi_nb.run import cli
    return cli.main(argv)


def defi_nb(*args, cwd):
    "The `defi-nb` command in a fork."
    return forked(_defi_nb, [str(a) for a in args], cwd=cwd)
