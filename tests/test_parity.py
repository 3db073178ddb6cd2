"Official weights, loaded by `defi_nb.weights.official`, give the official release's numbers, for weights that anyone can generate (../shared/parity)."
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_nb.models.diffusion import exponential_sigmas, karras_sigmas, sample
from defi_nb.weights.official import export_policy, load_gfdm, load_gidm, load_policy, read_official

PARITY = Path(__file__).resolve().parents[2]/"shared"/"parity"
pytestmark = pytest.mark.skipif(not (PARITY/"expected.npz").exists(), reason="the parity fixtures are not beside this checkout")


def drawn(name, shape): # standard normal numbers that depend on the name only
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))


def weight(name, shape): # as the fixtures' README says
    x = drawn(name, shape)
    if len(shape) >= 2: return x/float(np.sqrt(np.prod(shape[1:])))
    return 1 + .1*x if name.endswith("weight") else .02*x


def weights_of(case):
    return {name: weight(name, shape) for name, shape in json.loads((PARITY/"param_shapes.json").read_text())[case].items()}


def expected_of(case):
    return {k.removeprefix(f"{case}/"): v for k, v in np.load(PARITY/"expected.npz").items() if k.startswith(f"{case}/")}


def close(found, expected, tolerance=1e-4): # relative error
    found = np.asarray(found.detach() if isinstance(found, torch.Tensor) else found)
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected)/np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error:.2e}"


@torch.no_grad()
def test_gidm_pretrain_small_b2():
    case = "gidm_pretrain_small_b2"
    gidm, expected = load_gidm(weights_of(case)), expected_of(case)
    assert (gidm.cfg.enc_blocks, gidm.cfg.dec_blocks, gidm.cfg.heads) == (2, 2, 12)
    dino, text = drawn(f"{case}.dino", (2, 2, 256, 768)), drawn(f"{case}.t5", (2, 7, 768))
    predicted, out = gidm.reconstruct(dino, text, torch.ones(2, 7, dtype=torch.bool))
    close(out.emb, expected["emb"])
    assert out.indices.tolist() == expected["indices"].tolist()
    close(out.z_q[:, None], expected["z_q"])
    close(predicted[:, ::32, ::64], expected["recon_slice"])
    mse = (predicted - dino[:, 1]).square().mean()
    close(mse, expected["mse"])
    close(out.codebook_loss, expected["q_loss"])
    close(mse + out.loss, expected["loss"])


@torch.no_grad()
def test_policy_a(tmp_path):
    name, expected, weights = "policy_a", expected_of("policy_a"), weights_of("policy")
    policy = load_policy(weights)
    features = .5*drawn(f"{name}.features", (2, 16, 256, 2560))
    text, goal = drawn(f"{name}.t5", (1, 8, 768)), drawn(f"{name}.clip", (1, 1, 512))

    seen = {}
    handles = [policy.video_former.register_forward_hook(lambda m, args, out: seen.update(video=out)),
               policy.gidm.encoder.register_forward_hook(lambda m, args, out: seen.update(gidm_input=args[1]))]
    context, latent = policy.infer(features, text, torch.ones(1, 8, dtype=torch.bool), goal)
    for handle in handles: handle.remove()
    assert context.equal(policy.condition(features, text, torch.ones(1, 8, dtype=torch.bool), goal))
    close(seen["video"][:, ::16, ::32], expected["video_former"])
    close(seen["gidm_input"][:, :, ::32, ::64], expected["gidm_input"])
    close(latent.emb, expected["emb"])
    assert latent.indices.tolist() == expected["indices"].tolist()
    close(latent.latent_actions, expected["latent_actions"])

    action, noise, x_T = (drawn(f"{name}.{kind}", (1, 10, 7)) for kind in ("action", "noise", "x_T"))
    loss, raw = policy.adapter.loss(context, action, torch.tensor([.7]), noise)
    close(loss, expected["loss"])
    close(raw, expected["model_output"])
    sigmas = exponential_sigmas(10, .001, 80.)
    close(sigmas, expected["sigmas"])
    close(policy.sample_actions(context, 80*x_T, sigmas), expected["actions"])

    export_policy(policy, tmp_path/"policy.safetensors")
    back = read_official(tmp_path/"policy.safetensors")
    back = back.tensors | back.unused
    assert back.keys() == weights.keys() and all(back[n].equal(t) for n, t in weights.items())


@pytest.fixture(scope="module")
def case():
    import diffusers
    configs, weights = json.loads((PARITY/"gfdm_configs.json").read_text()), weights_of("gfdm")
    unet = diffusers.UNetSpatioTemporalConditionModel(**configs["unet"]).eval()
    vae = diffusers.AutoencoderKLTemporalDecoder(**configs["vae"]).eval()
    for prefix, model in (("unet.", unet), ("vae.", vae)):
        model.load_state_dict({n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}, strict=True)
    return unet, vae, diffusers.EulerDiscreteScheduler.from_config(configs["scheduler"]), expected_of("gfdm_a")


@torch.no_grad()
def check_features(gfdm, expected):
    pixels = drawn("gfdm_a.pixels", (2, 1, 3, 256, 256)).tanh()[:, 0]
    close(gfdm.vae.model.encode(pixels).latent_dist.mode()[:, :, ::8, ::8], expected["image_latents"])
    maps = gfdm.features(pixels, drawn("gfdm_a.text", (2, 20, 512)), drawn("gfdm_a.noise", (2, 16, 4, 32, 32)))
    assert maps.shape == tuple(expected["feature_shape"])
    close(maps[:, ::3, ::8, ::4, ::4], expected["features"])
    close(np.array([maps.mean(), maps.std()]), expected["feature_mean_std"])


def test_gfdm_a(case): check_features(load_gfdm(*case[:3]), case[3])


def test_gfdm_a_from_a_pipeline_folder(case, tmp_path):
    for name, part in zip(("unet", "vae", "scheduler"), case): part.save_pretrained(tmp_path/name)
    check_features(load_gfdm(tmp_path), case[3])


def test_first_noise_level(case):
    "The level of the first step, and the number by which the network is told, equal the scheduler's."
    gfdm, scheduler, expected = load_gfdm(*case[:3]), case[2], case[3]
    scheduler.set_timesteps(20)
    assert gfdm.cfg.extract_sigma == pytest.approx(float(expected["sigma0"]), rel=1e-5) == pytest.approx(float(scheduler.sigmas[0]), rel=1e-5)
    c_noise = gfdm.edm.scalings(torch.tensor(gfdm.cfg.extract_sigma))[3]
    assert float(c_noise) == pytest.approx(float(expected["timestep0"]), rel=1e-5)


def test_sampler_is_diffusers_euler(case):
    "Ten steps of our sampler are ten steps of diffusers' EulerDiscreteScheduler."
    gfdm, scheduler = load_gfdm(*case[:3]), case[2]
    scheduler.set_timesteps(10)
    network = lambda x, c_noise: torch.sin(3*x) + c_noise.view(-1, 1, 1)
    start = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = start*scheduler.sigmas[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(3)), t, x).prev_sample
    ours = sample(lambda x, s: gfdm.edm.denoise(network, x, s), start*700., karras_sigmas(10))
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
