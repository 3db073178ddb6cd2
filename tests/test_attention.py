"A recorder changes nothing: outputs, gradients, random numbers, hooks; and what it writes down is attention, for each of our models."
import threading
from dataclasses import replace

import pytest
import torch

from defi_nb.models.action_adapter import AdapterConfig
from defi_nb.viz.attention import policy_gradients, policy_maps, policy_occlusion
from defi_nb.models.gfdm_dino import DinoForward, DinoForwardConfig, fit_dino
from defi_nb.models.encoders import load_encoders
from defi_nb.models.gfdm import GFDM, GFDMConfig, fit_encoders, for_features
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.models.policy import CoupledPolicy, PlainConfig, PlainPolicy, PolicyConfig
from defi_nb.viz.attention_recorder import load_records, record, save_records
from defi_nb.core.spec import DataSpec, fake_batch

SPEC = DataSpec.tiny()


@pytest.fixture(scope="module")
def encoders(): return load_encoders("tiny")


@pytest.fixture(scope="module")
def forward(encoders):
    torch.manual_seed(0)
    return GFDM(fit_encoders(GFDMConfig.tiny(), encoders, SPEC), encoders.clip).eval()


@pytest.fixture(scope="module")
def policy(encoders, forward):
    torch.manual_seed(0)
    made = CoupledPolicy(PolicyConfig(feature_dim=forward.feature_shape()[2], adapter=AdapterConfig(steps=3, dropout=(.2, .1, .1))), encoders, forward).eval()
    torch.nn.init.normal_(made.adapter.action_pred.weight) # it starts at zero, which would make all actions equal
    return made


def hooks(model): return sum(len(h) for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks))


def calls(encoders, forward, policy):
    "Name -> a model and a function that runs it."
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g)
    gidm, features, latent, text = GIDM(GIDMConfig.tiny()).eval(), rand(2, 2, 16, 384), rand(2, 16, 8, 8), ["open the drawer", "push"]
    words, mask = encoders.t5(text)
    lean = for_features(GFDM(forward.cfg, encoders.clip).eval())
    lean.load_state_dict({k: v for k, v in forward.state_dict().items() if k in lean.state_dict()})
    fresh = replace(forward.cfg, noise_seed=None, extract_step=2, extract_schedule=4)
    dino = DinoForward(fit_dino(DinoForwardConfig.tiny(), encoders, SPEC), encoders.clip).eval()
    plain, batch = PlainPolicy(PlainConfig.tiny(), encoders).eval(), fake_batch(SPEC)
    former, seen, context = policy.video_former, rand(2, 2, 32, policy.cfg.feature_dim), policy.encode_batch(batch)[0].detach()
    return {"gidm": (gidm, lambda: gidm.reconstruct(features, words, mask)[0]),
            "video former": (former, lambda: former(seen)),
            "adapter": (policy.adapter, lambda: policy.adapter.sample(context)),
            "coupled": (policy, lambda: policy.act(batch)), "plain": (plain, lambda: plain.act(batch)),
            "gfdm, video": (forward, lambda: forward.sample(latent, text, steps=2)), "gfdm, features": (forward, lambda: forward.tokens(latent, text)),
            "gfdm, two steps": (two := GFDM(fresh, encoders.clip).eval(), lambda: two.tokens(latent, text)),
            "gfdm, for features": (lean, lambda: lean.tokens(latent, text)), "dino": (dino, lambda: dino.tokens(features[:, 0], text)),
            "clip": (encoders.clip.model, lambda: encoders.clip.encode("lift the block")[0]), "t5": (encoders.t5.model, lambda: encoders.t5.encode("lift")),
            "dinov2": (encoders.dino.model, lambda: encoders.dino(batch.video))}


def test_outputs_are_equal_to_the_last_bit_and_nothing_remains(encoders, forward, policy):
    for name, (model, call) in calls(encoders, forward, policy).items():
        found = {}
        before = hooks(model)
        for recording in (False, True):
            torch.manual_seed(1)
            with torch.no_grad():
                if recording:
                    with record(model) as seen: out = call()
                else: out = call()
            found[recording] = out, torch.get_rng_state()
        assert torch.equal(found[True][0], found[False][0]), name
        assert torch.equal(found[True][1], found[False][1]), f"{name}: random numbers were used"
        assert (hooks(model), torch._C._len_torch_function_stack()) == (before, 0), name
        n = len(seen.attention)
        with torch.no_grad(): call()
        assert len(seen.attention) == n > 0, name
        paths = dict(model.named_modules())
        for r in seen.attention:
            assert r.name in paths and not r.weights.requires_grad and r.weights.ndim == 4, (name, r.name)
            assert torch.allclose(r.weights.sum(-1), torch.ones(r.weights.shape[:3]), atol=1e-5), (name, r.name)


def test_training_is_the_same_with_a_recorder_open(policy):
    def two_steps(recording):
        torch.manual_seed(0)
        model = CoupledPolicy(policy.cfg, policy.encoders, policy.gfdm)
        model.load_state_dict(policy.state_dict())
        optimiser, batch = torch.optim.AdamW(model.train().parameters(), 1e-3), fake_batch(SPEC)
        def steps():
            for _ in range(2):
                optimiser.zero_grad()
                model.loss(batch)[0].backward()
                optimiser.step()
        if not recording: return steps(), model.state_dict()
        with record(model, ("gidm.*", "adapter.*", "video_former.*"), gradients=True) as seen: steps()
        return seen, model.state_dict()
    (_, plain), (seen, recorded) = two_steps(False), two_steps(True)
    assert all(torch.equal(v, recorded[k]) for k, v in plain.items())
    assert not any(torch.equal(v, policy.state_dict()[k]) for k, v in plain.items() if k == "adapter.tok_emb.weight")
    assert all(r.gradient is not None and r.gradient.shape == r.weights.shape for r in seen.attention)
    assert {r.call for r in seen.attention} == {0, 1} # one of each step


def test_another_thread_acts_undisturbed_and_unseen(policy):
    batch, noise, inside, done = fake_batch(SPEC, 1), torch.randn(1, SPEC.chunk, 7), threading.Event(), threading.Event()
    expected, other = policy.act(batch, noise), []
    def act():
        inside.wait(20)
        other.append(policy.act(batch, noise))
        done.set()
    thread = threading.Thread(target=act)
    thread.start()
    with record(policy) as seen:
        inside.set()
        assert done.wait(60) and not seen.attention
        policy.act(batch, noise)
    thread.join()
    assert torch.equal(other[0], expected)
    assert len({(r.name, r.call) for r in seen.attention}) == len(seen.attention) > 10


def test_an_error_inside_leaves_nothing(policy):
    attention = policy.video_former.layers[1][1]
    handle = attention.register_forward_hook(lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError):
        with record(policy): policy.act(fake_batch(SPEC, 1))
    handle.remove()
    assert hooks(policy) == torch._C._len_torch_function_stack() == 0
    with record(policy, ("video_former.*",)) as seen: policy.act(fake_batch(SPEC, 1))
    assert [r.name for r in seen.attention] == [f"video_former.layers.{i}.{j}" for i in (0, 1) for j in (0, 1)]


def test_records_survive_the_disk(policy, tmp_path):
    with record(policy, ("adapter.*",), activations={"adapter.encoder": ("batch", "token", "width")}) as seen: policy.act(fake_batch(SPEC, 1))
    save_records(tmp_path/"r.safetensors", seen)
    again = load_records(tmp_path/"r.safetensors")
    assert [(r.name, r.call, r.axes) for r in again.attention] == [(r.name, r.call, r.axes) for r in seen.attention]
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(again.attention, seen.attention, strict=True))
    assert torch.equal(again.activations[0].value, seen.activations[0].value) and again.activations[0].axes == ("batch", "token", "width")


def test_maps_leave_the_policy_as_it_was(policy):
    batch, noise = fake_batch(SPEC, 1), torch.randn(1, SPEC.chunk, 7)
    before, weights = policy.act(batch, noise), {k: v.clone() for k, v in policy.state_dict().items()}
    found = policy_maps(policy, batch, noise)
    hidden, pushed = policy_occlusion(policy, batch, noise, at_once=16), policy_gradients(policy, batch, noise)
    assert torch.equal(policy.act(batch, noise), before) and all(torch.equal(v, weights[k]) for k, v in policy.state_dict().items())
    for maps in (hidden, pushed):
        assert maps.weights.max() > 0 and maps.weights.shape[2:] == found["action step x patch"].weights.shape[2:]
        assert (maps.queries, maps.frames, maps.views) == tuple(getattr(found["action step x patch"], n) for n in ("queries", "frames", "views"))
    assert all(p.grad is None for p in policy.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_fused_kernels_of_a_gpu(dtype):
    block = GIDM(GIDMConfig(heads=2)).encoder.transformer_blocks[0].to("cuda", dtype)
    x = torch.randn(2, 3, 40, 64, device="cuda", dtype=dtype, requires_grad=True)
    plain = block(x)
    expected, = torch.autograd.grad(plain.square().sum(), x)
    with record(block, gradients=True) as seen:
        out = block(x)
        got, = torch.autograd.grad(out.square().sum(), x)
    assert torch.equal(out, plain)
    assert torch.allclose(got, expected, rtol=.02, atol=1e-3*float(expected.abs().max())) # fused backward kernels may add up in any order
    y = block.norm1(x).flatten(0, 1)
    q, k = (layer(y).float().unflatten(-1, (2, -1)).transpose(1, 2) for layer in (block.spatial_attn.to_q, block.spatial_attn.to_k))
    assert torch.allclose(seen.attention[0].weights, torch.softmax(q @ k.mT/32**.5, -1).cpu(), atol=1e-4)
    assert all(r.weights.device.type == "cpu" and r.weights.dtype == torch.float32 and r.gradient is not None for r in seen.attention)
