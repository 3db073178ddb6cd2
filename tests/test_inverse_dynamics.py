"The second paper's method against numbers that were computed without this package."
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from defi_nb.alignment import feature_distances, partial_spearman, pose_distance, thumbnails
from defi_nb.inverse_dynamics import InverseDynamicsConfig, InverseDynamicsHead, draw_reversed, inverse_dynamics_loss, reverse_batch, time_reverse
from defi_nb.latent_actions import code_action_information, codebook_report, decoder_use, reversal_antisymmetry
from defi_nb.latent_suite import linear_probe, r2
from defi_nb.probes import ProbeConfig, ProbeHead, held_out, ridge_probe, train_probe

VECTORS = Path(__file__).resolve().parents[2]/"shared"/"parity"/"inverse_dynamics_vectors.json"
pytestmark = pytest.mark.skipif(not VECTORS.is_file(), reason="the vectors are not beside the project")
close = dict(rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def vectors(): return json.loads(VECTORS.read_text())


def double(values): return torch.tensor(values, dtype=torch.float64)


def test_partial_spearman(vectors):
    for case in vectors["partial_spearman"]["cases"]:
        found = partial_spearman(case["x_feat"], case["y_pose"], case["z_pix"])
        if case["name"] == "z_equals_x": assert np.isnan(found)
        elif case["name"] == "z_constant": np.testing.assert_allclose(found, case["plain_spearman"], **close)
        else: np.testing.assert_allclose(found, case["partial_spearman"], **close)


def test_alignment(vectors):
    case = vectors["alignment_pipeline"]
    small = thumbnails(np.array(case["rgb_uint8"], np.uint8), 2)
    np.testing.assert_allclose(small, case["thumbnail_gray"], **close)
    (i, j), tokens, pose = np.array(case["pairs"]).T, np.array(case["tokens"]), np.array(case["pose"])
    np.testing.assert_allclose(pose.std(0), case["sigma"], **close)
    found = feature_distances(tokens[i], tokens[j])
    pixels, poses = np.square(small[i] - small[j]).mean((1, 2)), [pose_distance(pose[i], pose[j], pose.std(0), wrap) for wrap in (False, True)]
    for value, name in ((found["cos"], "d_cos"), (found["scale"], "d_scale"), (pixels, "d_pix"), (poses[0], "d_pose"), (poses[1], "d_pose_wrapped")):
        np.testing.assert_allclose(value, case[name], **close)
    for name in ("cos", "scale"):
        for apart, suffix in zip(poses, ("", "_wrapped")):
            np.testing.assert_allclose(partial_spearman(found[name], apart, pixels), case[f"rho_{name}{suffix}"], **close)


def test_time_reversal(vectors):
    case = vectors["ptr"]
    forward, back = double(case["forward_chunk_k4"]), double(case["reversed_chunk_k4"])
    torch.testing.assert_close(time_reverse(forward), back, **close)
    torch.testing.assert_close(time_reverse(back), forward, **close)
    mask = torch.tensor(case["batch_mask_example"]["mask"])
    assert (torch.tensor(case["batch_mask_example"]["u"]) < case["batch_mask_example"]["p_rev"]).tolist() == mask.tolist()
    now, later = torch.randn(4, 3, 2).double(), torch.randn(4, 3, 2).double()
    a, b, actions = reverse_batch(now, later, forward.expand(4, 4, 7), mask)
    for k, reverse in enumerate(mask):
        torch.testing.assert_close(actions[k], back if reverse else forward, **close)
        assert torch.equal(a[k], (later if reverse else now)[k]) and torch.equal(b[k], (now if reverse else later)[k])
    padded = torch.tensor(case["padded_chunk_rule"]["action_mask"]).bool().all()[None]
    assert padded.item() is case["padded_chunk_rule"]["sample_valid"] and not draw_reversed(1, 1., valid=padded).any()


def test_time_reversal_of_normalised_actions(vectors):
    case = vectors["ptr"]["normalisation_order"]
    q01, q99, raw, rest = (double(case[k]) for k in ("q01", "q99", "raw_motion", "zero_action_normalised"))
    normalise = lambda a: 2*(a - q01)/(q99 - q01) - 1
    torch.testing.assert_close(normalise(torch.zeros(6).double()), rest, **close)
    chunk = torch.cat([normalise(raw), double([1.])])[None]
    torch.testing.assert_close(time_reverse(chunk, rest)[0, :6], double(case["normalise(-raw)"]), **close)
    torch.testing.assert_close(time_reverse(chunk)[0, :6], double(case["-normalise(raw)"]), **close)


def test_head(vectors):
    case = vectors["inverse_dynamics_head"]
    head = InverseDynamicsHead(InverseDynamicsConfig(tokens=case["P"], dim=case["C"], hidden=case["D"], chunk=case["k"])).double()
    for layer, linear in enumerate([m for m in head.modules() if isinstance(m, nn.Linear)], 1):
        r, c = torch.meshgrid(*(torch.arange(n).double() for n in linear.weight.shape), indexing="ij")
        linear.weight.data, linear.bias.data = .5*torch.sin(layer + .7*r + .3*c), .1*torch.cos(r[:, 0] + layer)
    now, later = double(case["z_cur"]), double(case["z_fut"])
    torch.testing.assert_close(head.fuse(torch.cat([now, later, later - now], -1)), double(case["fused"]), **close)
    torch.testing.assert_close(head(now, later), double(case["output"]), **close)
    torch.testing.assert_close(head(later, now), double(case["output_swapped_frames"]), **close)


def test_head_sizes(vectors):
    for name, case in vectors["inverse_dynamics_head"]["param_counts"].items():
        with torch.device("meta"): head = InverseDynamicsHead(InverseDynamicsConfig(tokens=case["P"], dim=case["C"], hidden=case["D"], chunk=case["k"]))
        assert sum(p.numel() for p in head.parameters()) == case["total"], name


def test_loss(vectors):
    case = vectors["inverse_dynamics_loss"]
    predicted, target, weight = double(case["pred"]), double(case["target"]), case["lambda_g"]
    for valid, said in ((None, case), (torch.tensor([True, False]), case["with_sample_valid_[1,0]"])):
        loss, parts = inverse_dynamics_loss(predicted, target, weight, valid)
        for value, name in ((loss, "L_inv"), (parts["motion"], "L_motion"), (parts["gripper"], "L_gripper")):
            np.testing.assert_allclose(value.item(), said[name], **close)
    signed = torch.cat([target[..., :6], 2*target[..., 6:] - 1], -1) # CALVIN codes the gripper as -1 and 1
    assert torch.equal(inverse_dynamics_loss(predicted, signed, weight)[0], inverse_dynamics_loss(predicted, target, weight)[0])


def test_probe_sizes_and_reporting(vectors):
    for name, case in vectors["probe_head"].items():
        if not isinstance(case, dict): continue
        with torch.device("meta"): head = ProbeHead(ProbeConfig(tokens=case["P"], dim=case["C"], out=case["out"]))
        assert sum(p.numel() for p in head.parameters()) == case["total"], name
    case, rng = vectors["probe_reporting"], np.random.default_rng(0)
    cfg = ProbeConfig(tokens=2, dim=3, out=2, project=4, hidden=4, batch_size=8)
    result = train_probe(rng.standard_normal((20, 2, 3)), rng.standard_normal((20, 2)), held_out(np.repeat(range(5), 4)), cfg)
    assert cfg.steps == 1000 and len(result.curve) == case["n_val_evals_1000_steps"]
    np.testing.assert_allclose(result.val, np.mean([v for _, v in result.curve]), **close)
    np.testing.assert_allclose(np.mean(case["train_losses"]), case["reported_train"], **close)


def test_ridge_probe(vectors):
    case = vectors["latent_action_metrics"]["linear_probe"]
    found = ridge_probe(case["Z"], case["A"], np.arange(len(case["Z"])) >= case["train_rows"], case["ridge_lambda"])
    for value, name in ((found.predicted, "pred_val"), (found.r2, "R2_per_dim"), (found.r2_mean, "R2_mean"), (found.nmse, "NMSE_vs_train_mean")):
        np.testing.assert_allclose(value, case[name], **close)
    z, a, n = np.array(case["Z"]), np.array(case["A"]), case["train_rows"]
    said = linear_probe(z[:n], a[:n], np.arange(n), z[n:], penalties=(case["ridge_lambda"],))
    np.testing.assert_allclose(said, case["pred_val"], **close)
    np.testing.assert_allclose([r2(said[:, i:i + 1], a[n:, i:i + 1]) for i in range(a.shape[1])], case["R2_per_dim"], **close)


def test_latent_actions(vectors):
    suite = vectors["latent_action_metrics"]
    case, found = suite["codebook"], codebook_report(suite["codebook"]["indices"], suite["codebook"]["K"])
    for mine, name in (("usage", "usage_fraction"), ("dead", "dead_codes"), ("perplexity", "perplexity"), ("share", "normalised_perplexity"),
                       ("per_position", "perplexity_per_position"), ("tuples", "joint_unique_tuples"), ("joint", "joint_perplexity")):
        np.testing.assert_allclose(found[mine], case[name], **close, err_msg=name)
    case = suite["code_action_mi"]
    found = code_action_information(case["codes"], case["action_bins"])
    for mine, name in (("mi", "MI_nats"), ("h_code", "H_code"), ("h_action", "H_action"), ("nmi", "NMI_arithmetic"), ("explained", "action_uncertainty_explained")):
        np.testing.assert_allclose(found[mine], case[name], **close, err_msg=name)
    case = suite["reversal"]
    found = reversal_antisymmetry(case["z_forward"], case["z_reversed_pair"])
    for mine, name in (("cosines", "cos"), ("cos", "S_PCFC_style_mean_cos"), ("errors", "antisymmetry_error_per_row"), ("error", "antisymmetry_error")):
        np.testing.assert_allclose(found[mine], case[name], **close, err_msg=name)
    case = suite["decoder_use"]
    found = decoder_use(case["e_t"], case["e_tn"], case["rec_true_latent"], case["rec_shuffled_latent"])
    for mine, name in (("copy", "mse_copy"), ("true", "mse_true"), ("shuffled", "mse_shuffled"), ("skill", "skill_vs_copy"), ("gap", "controllability_gap"), ("psnr", "delta_psnr_db")):
        np.testing.assert_allclose(found[mine], case[name], **close, err_msg=name)
