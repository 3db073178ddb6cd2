"GIDM and the coupled policy compute what the official release computes, for weights that anyone can generate (../shared/parity)."
import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from defi_nb.diffusion import exponential_sigmas
from defi_nb.gidm import GIDM, GIDMConfig
from defi_nb.policy import CoupledPolicy, PolicyConfig

PARITY = Path(__file__).resolve().parents[2]/"shared"/"parity"
pytestmark = pytest.mark.skipif(not (PARITY/"expected.npz").exists(), reason="the parity fixtures are not beside this checkout")
PREFIXES = {"lam.": "gidm.", "Video_Former.": "video_former.", "goal_emb.": "project.", "time_pos_emb": "time_pos_emb", "model.inner_model.": "adapter."}
UNUSED = tuple(f"model.inner_model.{name}" for name in ("pos_emb", "goal_emb", "proprio_emb")) # in the official files, never used


def drawn(name, shape): # standard normal numbers that depend on the name only
    return torch.from_numpy(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32))


def weight(name, shape): # as the fixtures' README says
    x = drawn(name, shape)
    if len(shape) >= 2: return x/float(np.sqrt(np.prod(shape[1:])))
    return 1 + .1*x if name.endswith("weight") else .02*x


def load(model, shapes, rename=lambda name: name):
    "Fill a model with the fixtures' weights; every parameter must get its own, of its own shape."
    given = {rename(name): weight(name, shape) for name, shape in shapes.items()}
    missing, unexpected = model.load_state_dict(given, strict=False)
    assert unexpected == [] and {name.split(".")[-1] for name in missing} <= {"usage"} # the running use of the codes is ours
    return model.eval()


def expected_of(case):
    return {k.removeprefix(f"{case}/"): v for k, v in np.load(PARITY/"expected.npz").items() if k.startswith(f"{case}/")}


def close(found, expected, tolerance=1e-4): # relative error
    found = found.detach().numpy()
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected)/np.linalg.norm(expected)
    assert error < tolerance, f"relative error {error:.2e}"


def test_gidm_pretrain_small_b2():
    case = "gidm_pretrain_small_b2"
    gidm = load(GIDM(replace(GIDMConfig.paper(), enc_blocks=2, dec_blocks=2)), json.loads((PARITY/"param_shapes.json").read_text())[case])
    dino, text, expected = drawn(f"{case}.dino", (2, 2, 256, 768)), drawn(f"{case}.t5", (2, 7, 768)), expected_of(case)
    with torch.no_grad(): predicted, out = gidm.reconstruct(dino, text, torch.ones(2, 7, dtype=torch.bool))
    close(out.emb, expected["emb"])
    assert out.indices.tolist() == expected["indices"].tolist()
    close(out.z_q[:, None], expected["z_q"])
    close(predicted[:, ::32, ::64], expected["recon_slice"])
    mse = (predicted - dino[:, 1]).square().mean()
    close(mse, expected["mse"])
    close(out.codebook_loss, expected["q_loss"])
    close(mse + out.loss, expected["loss"])


@pytest.fixture(scope="module")
def policy():
    shapes = json.loads((PARITY/"param_shapes.json").read_text())["policy"]
    def rename(name):
        prefix = next(p for p in PREFIXES if name.startswith(p))
        return PREFIXES[prefix] + name.removeprefix(prefix)
    return load(CoupledPolicy(PolicyConfig.paper(), None), {n: s for n, s in shapes.items() if not n.startswith(UNUSED)}, rename)


@torch.no_grad()
def test_policy_a(policy):
    expected, name = expected_of("policy_a"), "policy_a"
    features = .5*drawn(f"{name}.features", (2, 16, 256, 2560))
    text, goal = drawn(f"{name}.t5", (1, 8, 768)), drawn(f"{name}.clip", (1, 1, 512))

    seen = {}
    handles = [policy.video_former.register_forward_hook(lambda m, args, out: seen.update(video=out)),
               policy.gidm.encoder.register_forward_hook(lambda m, args, out: seen.update(gidm_input=args[1]))]
    context, latent = policy.infer(features, text, torch.ones(1, 8, dtype=torch.bool), goal)
    for handle in handles: handle.remove()
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
