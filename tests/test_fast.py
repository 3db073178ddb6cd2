"""Acting fast computes what acting plainly computes, and the full size has the release's number of weights.

The slow test is left out unless it is asked for: `pytest -m slow tests/test_fast.py` (about 9 GB of memory, some minutes).
"""
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ENV
from safetensors.torch import save_file

from defi_nb.models.action_adapter import ActionAdapter, AdapterConfig
from defi_nb.run.bench_inference import (
    PARTS, bench_parts, count_macs, empty_models, plain_act, plain_latent_actions, plain_sample,
    plain_tokens, random_weights, share_weights)
from defi_nb.models.diffusion import exponential_sigmas
from defi_nb.models.encoders import load_acting_encoders, load_encoders, read_weights
from defi_nb.models.gfdm import GFDM, GFDMConfig, fit_encoders, for_features
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.models.policy import CoupledPolicy, PolicyConfig, batch_ee_state
from defi_nb.core.spec import DataSpec, fake_batch


def numbers(module): return sum(p.numel() for p in module.parameters())


def on_meta(make, *args):
    with torch.device("meta"): return make(*args)


def drawn(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The fast way equals the plain way

@pytest.mark.parametrize("cross_attn", ["causal", "full"])
def test_adapter_at_full_size(cross_attn):
    cfg = replace(AdapterConfig.paper(), cross_attn=cross_attn)
    adapter = random_weights(on_meta(ActionAdapter, cfg))
    context, noise, sigmas = drawn(1, 229, cfg.dim), drawn(1, 10, 7, seed=1), exponential_sigmas(10, 1., 80.)
    plain = plain_sample(adapter, context, noise, sigmas)
    assert plain.std() > .1
    torch.testing.assert_close(adapter.sample(context, noise, sigmas), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(cross_attn="causal"), dict(cross_attn="full"), dict(adaln_offset=0., pos_embed="none"), dict(enc_blocks=0, cross_attn="causal")])
def test_adapter_of_any_kind(changes):
    cfg = replace(AdapterConfig.tiny(), **changes)
    adapter = random_weights(on_meta(ActionAdapter, cfg))
    for tokens, batch, levels in ((3, 2, 10), (30, 1, 1), (30, 3, 4)): # fewer tokens than actions, too
        context, noise, sigmas = drawn(batch, tokens, cfg.dim), drawn(batch, 10, 7, seed=1), exponential_sigmas(levels, .01, 80.)
        torch.testing.assert_close(adapter.sample(context, noise, sigmas), plain_sample(adapter, context, noise, sigmas), rtol=0, atol=1e-5)


def released(encoders):
    "The tiny sizes as the release couples them: two levels of features and no frame, codes alone."
    return CoupledPolicy(PolicyConfig(), None, GFDM(fit_encoders(GFDMConfig(), encoders, DataSpec.tiny())))


@pytest.fixture(scope="module", params=["tiny", "released"])
def tiny(request):
    "A whole policy with random weights and the shipped encoders."
    encoders = load_encoders("tiny")
    policy = random_weights(empty_models("tiny", encoders)[0] if request.param == "tiny" else on_meta(released, encoders))
    policy.encoders, policy.gfdm.clip = encoders, encoders.clip
    return policy


def test_gfdm_tokens(tiny):
    latent, texts = drawn(4, *tiny.gfdm.noise.shape[1:]), ["open the drawer", "turn on the light bulb"]*2
    plain = plain_tokens(tiny.gfdm, latent, tiny.gfdm.encode_text(texts))
    torch.testing.assert_close(share_weights(tiny.gfdm).tokens(latent, texts), plain, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain[0], tiny.gfdm.tokens(latent[:1], texts[1:2])[0], atol=1e-2) # the text counts


def test_gidm(tiny):
    features, text = drawn(3, 2, 16, tiny.cfg.gidm.in_dim), drawn(3, 5, 64, seed=1)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    found = tiny.gidm.encode(features, text, mask).latent_actions
    torch.testing.assert_close(found, plain_latent_actions(tiny.gidm, features, text, mask).latent_actions, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_policy_read_for_acting_only(tiny, tmp_path):
    "Half of the VAE, no DINOv2, no tail of the UNet where it is not needed, text remembered: the same actions."
    save_file({name: w.contiguous() for name, w in tiny.state_dict().items()}, tmp_path/"model.safetensors")
    encoders = load_acting_encoders("tiny")
    light = for_features(on_meta(GFDM, tiny.gfdm.cfg, encoders.clip))
    policy = read_weights(on_meta(CoupledPolicy, tiny.cfg, encoders, light), [tmp_path/"model.safetensors"]).eval()
    assert not any(w.is_meta for w in (*policy.parameters(), *policy.buffers()))
    assert (numbers(policy.gfdm) < numbers(tiny.gfdm)) != tiny.gfdm.cfg.feature_frame # the predicted frame needs the whole UNet
    assert encoders.dino is None and numbers(encoders.vae.model) < numbers(tiny.encoders.vae.model)
    for seed in range(3):
        batch, noise = fake_batch(DataSpec.tiny(), B=1, seed=seed), drawn(1, 10, 7, seed=seed)
        plain = plain_act(tiny, batch, batch_ee_state(batch, tiny.cfg.adapter, "cpu"), noise)
        torch.testing.assert_close(policy.act(batch, noise), plain, rtol=0, atol=1e-4)
        torch.testing.assert_close(tiny.act(batch, noise), plain, rtol=0, atol=1e-4)


def test_text_is_encoded_once(tiny, monkeypatch):
    encoders, batch, noise, calls = tiny.encoders.to("cpu"), fake_batch(DataSpec.tiny(), B=1), drawn(1, 10, 7), []
    for encoder in (encoders.clip, encoders.t5):
        monkeypatch.setattr(encoder, "encode", lambda text, encode=encoder.encode: (calls.append(text), encode(text))[1])
    for _ in range(3): tiny.act(batch, noise)
    assert calls == batch.text*2 # by CLIP and by T5


# The full size

def test_parameters_at_full_size():
    gfdm, policy = on_meta(GFDM, GFDMConfig.paper()), on_meta(CoupledPolicy, PolicyConfig.paper(), None)
    assert numbers(gfdm) == 1_524_623_082
    assert numbers(policy.gidm) == 114_752_896 and numbers(on_meta(GIDM, GIDMConfig.paper())) == 201_554_560
    assert numbers(policy.video_former) == 17_713_536 and numbers(policy.project) == 2_557_440
    unused = 235*384 + (768*512 + 768 + 384*768 + 384) + (768*8 + 768 + 384*768 + 384) # pos_emb, goal_emb, proprio_emb of the release
    assert numbers(policy.adapter) == 22_897_927 - unused == 21_816_199
    assert numbers(policy) == 156_841_607 # all that the release trains
    assert gfdm.feature_shape() == (16, 256, 2560)
    tail = [*gfdm.unet.up_blocks[2:], gfdm.unet.conv_norm_out, gfdm.unet.conv_out]
    assert numbers(for_features(gfdm)) == 1_524_623_082 - sum(map(numbers, tail)) == 1_355_628_826


def test_operations_at_full_size():
    parts = {p.name: p for p in bench_parts("paper", [n for n in PARTS if n != "text"], device="meta")}
    gmac = {name: [count_macs(f)/1e9 for f in (p.plain, p.fast)] for name, p in parts.items()}
    assert gmac["GFDM"] == pytest.approx([4955, 2870 - 127], rel=.01) # as derived by hand from the release
    assert gmac["Video Former"] == pytest.approx([42, 42], rel=.05)
    assert gmac["adapter"] == pytest.approx([21.5, 2.3], rel=.02)
    assert gmac["MLP and GIDM"][1] < gmac["MLP and GIDM"][0]


ACT = """
import json, resource, time
from types import SimpleNamespace
import torch
from defi_nb.run.bench_inference import empty_models, random_weights
from defi_nb.models.encoders import ClipText
from defi_nb.models.gfdm import for_features
from defi_nb.core.spec import DataSpec, fake_batch

start = time.perf_counter()
policy, vae = empty_models("paper")
for_features(policy.gfdm)
random_weights(policy), random_weights(vae.model)
clip = lambda texts: ClipText(torch.randn(len(texts), 20, 512), torch.ones(len(texts), 20).bool(), torch.randn(len(texts), 512))
t5 = lambda texts: (torch.randn(len(texts), 8, 768), torch.ones(len(texts), 8).bool())
policy.encoders, policy.gfdm.clip = SimpleNamespace(vae=vae, clip=clip, t5=t5), clip
built = time.perf_counter()
actions = policy.act(fake_batch(DataSpec.paper(), B=1))
print(json.dumps(dict(shape=list(actions.shape), finite=bool(actions.isfinite().all()), built_s=built - start, act_s=time.perf_counter() - built,
                      gigabytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024/1e9)))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of the peak memory is Linux's")
def test_a_full_size_policy_acts_once():
    done = subprocess.run([sys.executable, "-c", ACT], env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["shape"] == [1, 10, 7] and found["finite"]
    assert found["gigabytes"] < 12
