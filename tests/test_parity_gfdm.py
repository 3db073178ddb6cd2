"The one-step features equal those of the official release, for weights that anyone can generate (../shared/parity)."
import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_nb.encoders import VAE
from defi_nb.gfdm import GFDM, GFDMConfig

PARITY = Path(__file__).resolve().parents[2]/"shared"/"parity"
pytestmark = pytest.mark.skipif(not (PARITY/"expected.npz").exists(), reason="the parity fixtures are not beside this checkout")


def drawn(name, shape): # standard normal numbers that depend on the name only
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)


def weight(name, shape): # as the fixtures' README says
    x = drawn(name, shape)
    if len(shape) >= 2: x = x/np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"): x = 1 + .1*x
    else: x = .02*x
    return torch.from_numpy(np.asarray(x, dtype=np.float32))


class Text: # in place of the CLIP encoder: the fixture's random text
    dim = 512

    def __call__(self, texts):
        self.hidden = torch.from_numpy(drawn("gfdm_a.text", (2, 20, 512)))
        return self


@pytest.fixture(scope="module")
def case():
    shapes = json.loads((PARITY/"param_shapes.json").read_text())["gfdm"]
    configs = json.loads((PARITY/"gfdm_configs.json").read_text())
    unet = configs["unet"]
    cfg = GFDMConfig(latent_channels=4, scaling_factor=configs["vae"]["scaling_factor"], latent_size=32, frames=16, widths=tuple(unet["block_out_channels"]),
                     attention=(True, True, True, False), heads=tuple(unet["num_attention_heads"]), layers=unet["layers_per_block"], text_dim=512,
                     id_dim=unet["addition_time_embed_dim"], extract_fps=4., group=1)
    from diffusers import AutoencoderKLTemporalDecoder
    vae, gfdm = AutoencoderKLTemporalDecoder(**configs["vae"]), GFDM(cfg, Text()).eval()
    for prefix, model in (("unet.", gfdm.unet), ("vae.", vae)):
        names = {n.removeprefix(prefix): s for n, s in shapes.items() if n.startswith(prefix)}
        model.load_state_dict({n: weight(prefix + n, s) for n, s in names.items()}, strict=True)
    expected = {k.removeprefix("gfdm_a/"): v for k, v in np.load(PARITY/"expected.npz").items() if k.startswith("gfdm_a/")}
    return VAE(vae), gfdm, configs, expected


def close(found, expected, tolerance): # the largest difference in units of the expected numbers' standard deviation
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < tolerance*expected.std()


def test_gfdm_a(case):
    vae, gfdm, _, expected = case
    pixels = np.tanh(drawn("gfdm_a.pixels", (2, 1, 3, 256, 256)))[:, 0]
    with torch.no_grad(): latent = vae.model.encode(torch.from_numpy(pixels)).latent_dist.mode()
    close(latent[:, :, ::8, ::8].numpy(), expected["image_latents"], 1e-3)
    noise = torch.from_numpy(drawn("gfdm_a.noise", (2, 16, 4, 32, 32)))
    tokens = gfdm.tokens(latent, ["one", "two"], noise)
    maps = tokens.mT.unflatten(-1, (16, 16)).numpy() # (N,T,D,h,w)
    assert maps.shape == tuple(expected["feature_shape"])
    close(maps[:, ::3, ::8, ::4, ::4], expected["features"], 1e-3)
    np.testing.assert_allclose([maps.mean(), maps.std()], expected["feature_mean_std"], atol=1e-3)


def test_first_noise_level(case):
    "The level of the first step, and the number by which the network is told, equal the scheduler's."
    _, gfdm, configs, expected = case
    from diffusers import EulerDiscreteScheduler
    scheduler = EulerDiscreteScheduler.from_config(configs["scheduler"])
    scheduler.set_timesteps(20)
    assert gfdm.cfg.extract_sigma == pytest.approx(float(expected["sigma0"]), rel=1e-5) == pytest.approx(float(scheduler.sigmas[0]), rel=1e-5)
    c_noise = gfdm.edm.scalings(torch.tensor(gfdm.cfg.extract_sigma))[3]
    assert float(c_noise) == pytest.approx(float(expected["timestep0"]), rel=1e-5)


def test_sampler_is_diffusers_euler(case):
    "Ten steps of our sampler are ten steps of diffusers' EulerDiscreteScheduler."
    _, gfdm, configs, _ = case
    from diffusers import EulerDiscreteScheduler

    from defi_nb.diffusion import karras_sigmas, sample
    scheduler = EulerDiscreteScheduler.from_config(configs["scheduler"])
    scheduler.set_timesteps(10)
    network = lambda x, c_noise: torch.sin(3*x) + c_noise.view(-1, 1, 1)
    start = torch.randn(3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = start*scheduler.sigmas[0]
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t.expand(3)), t, x).prev_sample
    ours = sample(lambda x, s: gfdm.edm.denoise(network, x, s), start*700., karras_sigmas(10))
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)
