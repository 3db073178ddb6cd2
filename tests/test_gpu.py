"""What a GPU computes, against a CPU: `make gpu` where there is one.

Each test's body takes a device. On CUDA it is marked `gpu`; in `make test` the same body runs on the CPU, as far as that is cheap. What a
model computes runs on the meta device, too, which holds no numbers: there nothing may mix devices or wait for a result.
"""
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields, replace
from functools import cache
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ENV, ROOT, command
from torch.distributed._tools.mem_tracker import MemTracker
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from defi_nb.core.spec import Batch, DataSpec, fake_batch
from defi_nb.models.aligned_gidm import AlignConfig, AlignedGIDM
from defi_nb.models.direct_policy import DirectConfig, DirectPolicy
from defi_nb.models.encoders import load_encoders
from defi_nb.models.policy import BlindConfig, BlindPolicy, CoupledPolicy, PolicyConfig, fake_policies
from defi_nb.run.bench_inference import PARTS, bench_parts, ways
from defi_nb.run.pretrained import fresh_model
from defi_nb.train.config import TrainConfig, trainable
from defi_nb.train.engine import Engine, blocks, compiled, memory_needed
from defi_nb.weights.lora import adapt

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
CUDA = pytest.param("cuda", marks=GPU)
WORKSPACE = 64e6 # bytes, of cuBLAS and cuDNN
SPEC = DataSpec.tiny()
POLICIES = "coupled", "no_gidm", "plain", "blind", "direct"
STAGES = "gfdm", "dino", "gidm", "aligned", *POLICIES, *["lora"]*bool(find_spec("peft"))
CHEAP = "gfdm", "gidm", "aligned", "coupled", "plain" # that the CPU computes in each test run
aten = torch.ops.aten


class CpuDraws(TorchFunctionMode):
    "Random numbers come from the CPU's generator, so that two devices draw the same."
    LIKE, MAKE = (torch.rand_like, torch.randn_like, torch.bernoulli), (torch.rand, torch.randn, torch.randint, torch.randperm)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in self.LIKE and args[0].is_cuda: return func(args[0].cpu(), *args[1:], **kwargs).to(args[0].device)
        if func in self.MAKE and "generator" not in kwargs and "device" in kwargs:
            device = kwargs.pop("device")
            return func(*args, **kwargs, device="cpu").to(device)
        return func(*args, **kwargs)


class OneDevice(TorchDispatchMode):
    "Refuse what CUDA would refuse, and the meta device lets pass: two tensors on different devices."
    FREE = aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        devices = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim}
        if len(devices) > 1 and func not in self.FREE: raise RuntimeError(f"{func} mixes {', '.join(sorted(devices))}")
        if func is aten.bincount.default and args[0].is_meta: return args[0].new_empty(args[2]) # it has none
        return func(*args, **(kwargs or {}))


@cache
def encoders(device): return load_encoders("tiny").to(device if device != "meta" else "cpu") # those of text look at their numbers


def build(stage, device):
    "A tiny stage with the same random weights on every device, in evaluation mode."
    found, (coupled, plain) = encoders(device), policies(device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if stage == "no_gidm": model = CoupledPolicy(PolicyConfig(feature_dim=coupled.cfg.feature_dim).without_gidm(), found, coupled.gfdm)
        elif stage == "blind": model = BlindPolicy(BlindConfig.tiny(), found)
        elif stage == "direct": model = DirectPolicy(DirectConfig.tiny(), found)
        elif stage == "aligned": model = aligned(found, coupled.cfg)
        elif stage == "lora": model = adapt(fresh_model("gfdm", found), "ckpts/pretrained", targets="attention,convolutions")
        elif stage in ("coupled", "plain"): model = dict(coupled=coupled, plain=plain)[stage]
        else: model = fresh_model("gidm" if stage == "gidm" else "gfdm", found, **dict(forward="dino") if stage == "dino" else {})
        if hasattr(model, "adapter"): torch.nn.init.normal_(model.adapter.action_pred.weight, std=.05)
    return model.to(device).eval()


def policies(device):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return fake_policies(encoders(device), .05)


def aligned(found, like):
    given = {n: getattr(like, n) for n in ("feature_dim", "project_hidden", "feature_norm")}
    gidm = fresh_model("gidm", found)
    return AlignedGIDM(AlignConfig(replace(gidm.cfg, dec_blocks=0), **given), found.t5).start_from(gidm)


@cache
def encoded(rows):
    "Clips with what each stage reads, made on the CPU."
    clip, own = fake_batch(SPEC, rows, frames=SPEC.frames), encoders("cpu")
    clip = replace(clip, latent=own.vae.encode(clip.video), dino=own.dino(clip.video), steps_left=torch.full((rows,), 20))
    coupled, _ = policies("cpu")
    with torch.no_grad(): feature = coupled.features(replace(clip, video=None, latent=clip.latent[:, :, :1]))
    return replace(clip, feature=feature[:, :1])


def batch_of(stage, rows=2):
    "What a stage's `loss` takes."
    clip = encoded(rows)
    if stage in ("gfdm", "lora", "dino"): return replace(clip, video=None, feature=None)
    if stage in ("gidm", "aligned"): return replace(clip, video=None, dino=clip.dino[:, :, [0, 3]])
    if stage == "direct": return replace(clip, video=clip.video[:, :, :2])
    return replace(clip, video=None, dino=None, feature=None, latent=clip.latent[:, :, :1])


def computed(stage, device, dtype, backward=False):
    "A stage's loss, what acting gives where it acts, and the gradient's norm where it is wanted."
    model, batch = build(stage, device), batch_of(stage).to(device)
    cast = nullcontext() if dtype == torch.float32 or device == "meta" else torch.autocast(device, dtype)
    with CpuDraws(), torch.random.fork_rng(), cast, torch.set_grad_enabled(backward):
        torch.manual_seed(1)
        found = [model.loss(batch)[0]]
        if hasattr(model, "act"):
            noise = torch.randn(len(batch), SPEC.chunk, 7, generator=torch.Generator().manual_seed(2)).to(device)
            found.append(model.act(replace(batch, action=None), noise))
    if backward:
        found[0].backward()
        found.append(torch.stack([p.grad.norm() for p in trainable(model).values() if p.grad is not None]).norm())
    return [x.detach() for x in found]


@cache
def expected(stage, backward): return computed(stage, "cpu", torch.float32, backward)


def agree(stage, device, dtype, most): # the largest difference, as a part of the largest result
    backward = dtype == torch.float32
    for want, got in zip(expected(stage, backward), computed(stage, device, dtype, backward), strict=True):
        assert got.device.type == device and got.isfinite().all()
        error = float((got.cpu().float() - want).abs().max()/want.abs().max())
        assert error < most, f"{stage} on {device} in {dtype}: {error:.1e}"


@pytest.mark.parametrize("stage,device", [*((s, "cpu") for s in CHEAP), *(pytest.param(s, "cuda", marks=GPU) for s in STAGES)])
def test_loss_and_act_in_bf16(stage, device): agree(stage, device, torch.bfloat16, .05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("stage", STAGES)
def test_loss_gradient_and_act_in_float32(stage): agree(stage, "cuda", torch.float32, 1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_mixes_devices(stage):
    with OneDevice(): found = computed(stage, "meta", torch.float32)
    assert {x.device.type for x in found} == {"meta"}


def test_what_these_tests_see():
    "That draws are the CPU's, and that one tensor elsewhere is noticed."
    with CpuDraws():
        assert torch.rand(3, device="meta").is_meta
        torch.manual_seed(0)
        drawn = torch.randn(2, 3, device="cpu"), torch.randn_like(torch.zeros(3))
    torch.manual_seed(0)
    assert torch.equal(drawn[0], torch.randn(2, 3)) and torch.equal(drawn[1], torch.randn(3))
    x, layer = torch.zeros(2, 3, device="meta"), torch.nn.Linear(3, 3)
    with OneDevice(), pytest.raises(RuntimeError, match="mixes cpu, meta"): layer(x)


@pytest.mark.parametrize("device,backend", [pytest.param("cpu", "aot_eager", marks=pytest.mark.slow), pytest.param("cuda", "inductor", marks=GPU)])
def test_compiled_blocks_are_the_eager_ones(device, backend):
    for stage in ("gidm",) if device == "cpu" else ("gfdm", "gidm", "coupled"):
        model, batch, found = build(stage, device), batch_of(stage).to(device), []
        for way in (nullcontext(), compiled(blocks(model), backend)):
            with way, CpuDraws(), torch.no_grad(), torch.random.fork_rng():
                torch.manual_seed(1)
                found.append(model.loss(batch)[0])
        assert torch.allclose(*found, rtol=1e-3), f"{stage}: {found}"


@pytest.mark.parametrize("device,names", [("cpu", ("adapter",)), pytest.param("cuda", [n for n in PARTS if n != "text"], marks=GPU)])
def test_each_way_to_compute_a_part_is_the_plain_one(device, names):
    "On CUDA compiled ones and recorded graphs are among the ways, and a graph is replayed."
    found = encoders(device)
    for part in bench_parts("tiny", names, found, device):
        plain = part.plain().float()
        for way, f in ways(part, device).items():
            for _ in range(2): assert torch.allclose(f().float(), plain, atol=1e-3*float(plain.abs().max())), f"{part.name}, {way}"
        assert device == "cpu" or {"compiled", "graph"} <= ways(part, device).keys()


class Rows:
    "A batch as a dataset."
    def __init__(self, batch): self.batch = batch
    def __len__(self): return len(self.batch)
    def __getitem__(self, i):
        take = lambda v: [v[int(k)] for k in i] if isinstance(v, list) else v[torch.as_tensor(np.asarray(i))]
        return Batch(**{f.name: take(v) for f in fields(Batch) if (v := getattr(self.batch, f.name)) is not None})


def step_bytes(engine, batch, device): # at the peak of a training step, weights included
    def step():
        loss, _ = engine.loss(batch)
        engine.backward(loss, 1.)
        engine.optimizer.step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with (tracker := MemTracker()):
        tracker.track_external(engine.model)
        step()
    return sum(x["Total"] for x in tracker.get_tracker_snapshot("peak").values())


@pytest.mark.parametrize("stage,device", [("gidm", "cpu"), *(pytest.param(s, "cuda", marks=GPU) for s in STAGES)])
def test_memory_estimate(stage, device):
    "What a step is said to need and what it takes, within a third; on CUDA its libraries' workspace comes on top."
    rows = Rows(batch_of(stage, 8))
    cfg = TrainConfig(batch_size=8, device=device, precision="float32", warmup=0)
    engine = Engine(build(stage, device).train(), cfg)
    before = torch.cuda.memory_allocated() if device == "cuda" else sum(p.nbytes for p in engine.model.parameters())
    need = memory_needed(engine.given, rows, cfg)
    used = step_bytes(engine, rows[np.arange(8)].to(device), device) - before
    engine.close()
    assert .67 < need.total/used < 1.5 or device == "cuda" and abs(need.total - used) < WORKSPACE, f"{stage}: {need}, {used/1e6:.1f} MB were used"


ONE = """
import json, torch, torch.distributed as dist
from torch import nn
from defi_nb.train.config import TrainConfig
from defi_nb.train.engine import Engine
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)
    def loss(self, batch): return self.layer(batch).square().mean(), {{}}
engine = Engine(Net(), TrainConfig(device="{device}", warmup=0))
loss, _ = engine.loss(torch.ones(2, 4))
engine.backward(loss, 1.)
norm = float(engine.clip(1.))
engine.optimizer.step()
print(json.dumps(dict(backend=dist.get_backend(), total=engine.total([2.]), norm=norm)))
dist.destroy_process_group()
"""


@pytest.mark.parametrize("device,backend", [pytest.param("cpu", "gloo", marks=pytest.mark.slow), pytest.param("cuda", "nccl", marks=GPU)])
def test_one_process_of_a_group(tmp_path, device, backend):
    "A step and a sum through the library with which several processes talk."
    (tmp_path/"one.py").write_text(ONE.format(device=device))
    one = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", tmp_path/"one.py"
    done = subprocess.run([sys.executable, *map(str, one)], env=ENV | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
                          capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert backend in found["backend"] and found["total"] == [2.] and found["norm"] > 0


DRAW = """
import sys, numpy as np
from defi_nb.sim.playtable import PlayTable
from defi_nb.sim.render import gl_backend
env = PlayTable()
np.save(sys.argv[1], np.asarray(env.get_obs()["rgb_obs"]["rgb_static"]))
print(gl_backend())
"""
MESA = "/usr/share/glvnd/egl_vendor.d/50_mesa.json"


def drawn(folder, name, **variables):
    "The simulator's first image, from a process with these variables."
    env = ENV | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}", "MUJOCO_GL": "egl"} | variables
    done = subprocess.run([sys.executable, "-c", DRAW, str(folder/name)], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["egl"], done.stderr[-2000:]
    return np.load(folder/f"{name}.npy").astype(float)


@pytest.mark.skipif(not os.path.exists(MESA), reason="Mesa's EGL, which is compared with, is not installed")
@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_egl_draws_as_software_does(tmp_path, device):
    "With whatever EGL chooses, a GPU where there is one, and with Mesa in software."
    software = drawn(tmp_path, "software", __EGL_VENDOR_LIBRARY_FILENAMES=MESA, LIBGL_ALWAYS_SOFTWARE="1")
    image = drawn(tmp_path, "here")
    assert image.shape == (200, 200, 3) and image.std() > 20
    assert np.abs(image - software).mean() < 2


@pytest.mark.parametrize("device,preset,dtype,names", [pytest.param("cpu", "tiny", "float32", "adapter", marks=pytest.mark.slow),
                                                       pytest.param("cuda", "paper", "bfloat16", "all", marks=GPU)])
def test_benchmark(tmp_path, device, preset, dtype, names):
    "What acting costs at full size, in `runs/gpu/table.md`: eager, compiled and recorded, median, 90 %, memory."
    given = dict(preset=preset, device=device, dtype=dtype, parts=names, repeats=20)
    pairs = [x for name, value in given.items() for x in ("-p", name, value)]
    folder = ROOT/"runs/gpu" if device == "cuda" else tmp_path/"gpu"
    done = command("defi-nb", "run", "bench_inference", "--out", folder, *pairs, timeout=540)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = json.loads((folder/"metrics.json").read_text())["rows"]
    wanted = {"plain", "fast"} | ({"compiled", "graph"} if device == "cuda" else set())
    assert {r["way"] for r in rows} == wanted and len({r["part"] for r in rows}) == (5 if names == "all" else 1)
    assert all(0 < r["median"] <= r["p90"] and r["peak"] > 0 and r["difference"] < .2*r["scale"] for r in rows)
    print((folder/"table.md").read_text())
