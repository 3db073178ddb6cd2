"The second paper's method against numbers that were computed without this package."
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.transform import Rotation
from torch import nn

from defi_nb.analysis.alignment import (
    _left_over, feature_distances, partial_spearman, pose_distance, thumbnails)
from defi_nb.train.auxiliary import InverseAuxiliary
from defi_nb.train.inverse_dynamics import (
    InverseDynamicsConfig, InverseDynamicsHead, draw_reversed, inverse_dynamics_loss, pair_loss,
    rest_action, reverse_batch, time_reverse)
from defi_nb.analysis.latent_actions import (
    code_action_information, codebook_report, decoder_use, reversal_antisymmetry)
from defi_nb.analysis.probes import ProbeConfig, ProbeHead, held_out, linear_probe, r2, train_probe
from defi_nb.data.robot_dataset import ActionScale
from defi_nb.core.spec import Batch

VECTORS = Path(__file__).resolve().parents[2]/"shared"/"parity"/"inverse_dynamics_vectors.json"
pytestmark = pytest.mark.skipif(not VECTORS.is_file(), reason="the vectors are not beside the project")
close = dict(rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def vectors(): return json.loads(VECTORS.read_text())


def double(values): return torch.tensor(values, dtype=torch.float64)


CASES = ("no_ties_n8", "ties_n12", "ties_n40_seeded", "z_constant", "z_equals_x")


@pytest.mark.parametrize("name", CASES)
def test_partial_spearman(vectors, name):
    case = next(c for c in vectors["partial_spearman"]["cases"] if c["name"] == name)
    x, y, z = case["x_feat"], case["y_pose"], case["z_pix"]
    for values, rank in ((x, "rank_x"), (y, "rank_y"), (z, "rank_z")): np.testing.assert_allclose(stats.rankdata(values), case[rank], **close)
    np.testing.assert_allclose(stats.spearmanr(x, y).statistic, case["plain_spearman"], **close)
    found = partial_spearman(x, y, z)
    if name == "z_equals_x":
        assert np.isnan(found)
        return
    residuals = [_left_over(stats.rankdata(v), stats.rankdata(z)) for v in (x, y)]
    for mine, said in zip(residuals, ("resid_x", "resid_y")): np.testing.assert_allclose(mine, case[said], **close)
    if name == "z_constant": # nothing is explained: Spearman's own correlation
        np.testing.assert_allclose(found, case["plain_spearman"], **close)
        return
    np.testing.assert_allclose(found, case["partial_spearman"], **close)
    assert abs(found - case["WRONG_if_no_intercept"]) > 1e-3
    t = found*np.sqrt(case["dof"]/(1 - found**2))
    assert case["dof"] == len(x) - 3
    np.testing.assert_allclose([t, 2*stats.t.sf(abs(t), case["dof"])], [case["t_stat"], case["p_two_sided"]], **close)


def test_no_case_of_partial_spearman_is_left_out(vectors): assert [c["name"] for c in vectors["partial_spearman"]["cases"]] == list(CASES)


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
    found = (time_reverse(chunk, rest) - time_reverse(chunk))[0, :6].abs().max().item()
    np.testing.assert_allclose(found, case["max_abs_difference"], **close)
    scale = ActionScale((*case["q01"], 0.), (*case["q99"], 1.), tuple("xyzrpyg"))
    torch.testing.assert_close(rest_action(scale).double(), rest, **close)


def test_time_reversal_of_symmetric_actions(vectors):
    case = vectors["ptr"]["symmetric_norm_commutes"]
    raw, scale = np.array(case["raw"]), ActionScale((-.65, -.65, 0.), (.65, .65, 1.), tuple("xyg"))
    normalise = lambda a: torch.from_numpy(scale.apply([*np.clip(a, -.65, .65), 1.])).double()
    norm, back = normalise(raw), normalise(-raw)
    for found, said in ((norm, "norm"), (back, "norm_of_neg")): torch.testing.assert_close(found[:2], double(case[said]), **close)
    assert rest_action(scale).abs().max() == 0
    torch.testing.assert_close(time_reverse(norm[None])[0], back, **close) # what is symmetric needs no `rest`


def test_swapped_tokens_are_swapped_pictures():
    torch.manual_seed(0)
    encode, pictures, later, action = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(3, 2, 5), torch.randn(3, 2, 5), torch.randn(3, 4, 7)
    head = InverseDynamicsHead(InverseDynamicsConfig(tokens=2, dim=4, hidden=6, chunk=4))
    now, then, _ = reverse_batch(encode(pictures), encode(later), action, torch.ones(3, dtype=torch.bool))
    torch.testing.assert_close(head(now, then), head(encode(later), encode(pictures)), **close)


def composed(steps, rotation):
    "Angle that is left when a chunk of rotation increments is followed by its reversal."
    action = torch.zeros(len(steps), 7).double()
    action[:, 3:6] = torch.from_numpy(steps)
    left = Rotation.identity()
    for a in torch.cat([action, time_reverse(action)])[:, 3:6].numpy(): left = rotation(a)*left
    return left.magnitude()


def test_reversal_undoes_rotations(vectors):
    "The vectors' chunks were drawn and are not in the file: exact where the inverse is, else within what 200 draws differ by."
    case, rng, euler = vectors["ptr"]["rotation_exactness"], np.random.default_rng(0), lambda a: Rotation.from_euler("xyz", a)
    for k, size, name in ((case["k"], case["per_step_uniform_rad"], "euler_composed_mean"), (4, .5, "euler_composed_mean_0.5rad_k4")):
        chunks = rng.uniform(-size, size, (200, k, 3))
        np.testing.assert_allclose([composed(c, Rotation.from_rotvec) for c in chunks], case["rotvec_mean"], **close)
        error = [composed(c, euler) for c in chunks]
        assert abs(np.mean(error) - case[name]) < 4*np.std(error)/np.sqrt(len(error)/2) # both means vary
        added = torch.zeros(k, 7).double()
        added[:, 3:6] = torch.from_numpy(chunks[0])
        torch.testing.assert_close((added + time_reverse(added)).sum(0), torch.zeros(7).double(), **close) # increments that are added to Euler angles, as CALVIN's


def test_head(vectors):
    case = vectors["inverse_dynamics_head"]
    head = InverseDynamicsHead(InverseDynamicsConfig(tokens=case["P"], dim=case["C"], hidden=case["D"], chunk=case["k"])).double()
    for layer, linear in enumerate([m for m in head.modules() if isinstance(m, nn.Linear)], 1):
        r, c = torch.meshgrid(*(torch.arange(n).double() for n in linear.weight.shape), indexing="ij")
        linear.weight.data, linear.bias.data = .5*torch.sin(layer + .7*r + .3*c), .1*torch.cos(r[:, 0] + layer)
    now, later = double(case["z_cur"]), double(case["z_fut"])
    torch.testing.assert_close(head.fuse(torch.cat([now, later, later - now], -1)), double(case["fused"]), **close)
    torch.testing.assert_close(head.act[:2](head.fuse(torch.cat([now, later, later - now], -1)).flatten(1)), double(case["hidden"]), **close)
    torch.testing.assert_close(head(now, later), double(case["output"]), **close)
    torch.testing.assert_close(head(later, now), double(case["output_swapped_frames"]), **close)


def test_head_sizes(vectors):
    for name, case in vectors["inverse_dynamics_head"]["param_counts"].items():
        with torch.device("meta"): head = InverseDynamicsHead(InverseDynamicsConfig(tokens=case["P"], dim=case["C"], hidden=case["D"], chunk=case["k"]))
        count = lambda module: sum(p.numel() for p in module.parameters())
        for part, said in ((head.fuse, "fusion"), (head.act[:2], "action_hidden"), (head.act[2:], "out"), (head, "total")): assert count(part) == case[said], (name, said)
    assert len(vectors["inverse_dynamics_head"]["param_counts"]) == 10


def test_loss(vectors):
    case = vectors["inverse_dynamics_loss"]
    predicted, target, weight = double(case["pred"]), double(case["target"]), case["lambda_g"]
    for valid, said in ((None, case), (torch.tensor([True, False]), case["with_sample_valid_[1,0]"])):
        loss, parts = inverse_dynamics_loss(predicted, target, weight, valid)
        for value, name in ((loss, "L_inv"), (parts["motion"], "L_motion"), (parts["gripper"], "L_gripper")):
            np.testing.assert_allclose(value.item(), said[name], **close)
    signed = torch.cat([target[..., :6], 2*target[..., 6:] - 1], -1) # CALVIN codes the gripper as -1 and 1
    assert torch.equal(inverse_dynamics_loss(predicted, signed, weight)[0], inverse_dynamics_loss(predicted, target, weight)[0])


def test_loss_of_two_cameras_and_of_a_policy(vectors):
    case, cfg = vectors["inverse_dynamics_loss"], InverseDynamicsConfig(tokens=1, dim=1, hidden=1, chunk=1, p_reverse=0., weight=.3)
    views, total = case["multi_view"], case["total"]
    head = InverseDynamicsHead(cfg).double()
    for p in head.parameters(): nn.init.zeros_(p) # it says 0 and a gripper logit of 0, of a chunk that makes each camera's loss what the vectors say
    assert cfg.weight == total["lambda_inv"]
    chunk = lambda loss: torch.cat([torch.full((1, 1, 6), loss - cfg.gripper_weight*np.log(2)), torch.ones(1, 1, 1)], -1).double()
    z = torch.zeros(2, 1, 1, 1).double()
    singles = [pair_loss(head, z[:1], z[:1], chunk(x))[0].item() for x in views["L_inv_per_view"]]
    np.testing.assert_allclose(singles, views["L_inv_per_view"], **close)
    told = nn.ModuleList(InverseDynamicsHead(replace(cfg, heads=2)).double() for _ in range(2))
    for h, loss in zip(told, views["L_inv_per_view"]): # two cameras that say different things of the same chunk
        for p in h.parameters(): nn.init.zeros_(p)
        h.act[2].bias.data[:6] = 1 - (loss - cfg.gripper_weight*np.log(2))
    both = torch.ones(1, 1, 7).double()
    np.testing.assert_allclose(pair_loss(told, z, z, both)[0].item(), views["L_inv"], **close)

    class Policy(nn.Module):
        def loss(self, batch): return torch.tensor(total["L_policy"]).double(), {}
    auxiliary = InverseAuxiliary(replace(cfg, weight=total["lambda_inv"]), lambda policy, batch: (*policy.loss(batch), z[:1].requires_grad_(), z[:1], None)).double()
    auxiliary.head.load_state_dict(head.state_dict())
    found, logs = auxiliary.loss(Policy(), Batch([""], action=chunk(total["L_inv"])))
    np.testing.assert_allclose([found.item(), logs["inverse"].item()], [total["L"], total["L_inv"]], **close)


def test_probe_sizes_and_reporting(vectors, monkeypatch):
    for name, case in vectors["probe_head"].items():
        if not isinstance(case, dict): continue
        with torch.device("meta"): head = ProbeHead(ProbeConfig(tokens=case["P"], dim=case["C"], out=case["out"]))
        count = lambda module: sum(p.numel() for p in module.parameters())
        for part, said in ((head.project, "token_proj"), (head.rest[0], "l1"), (head.rest[3], "l2"), (head.rest[6], "l3"), (head, "total")): assert count(part) == case[said], (name, said)
    case, rng = vectors["probe_reporting"], np.random.default_rng(0)
    cfg = ProbeConfig(tokens=2, dim=3, out=2, project=4, hidden=4, batch_size=8)
    result = train_probe(rng.standard_normal((20, 2, 3)), rng.standard_normal((20, 2)), held_out(np.repeat(range(5), 4)), cfg)
    assert cfg.steps == 1000 and len(result.curve) == case["n_val_evals_1000_steps"]
    np.testing.assert_allclose(result.val, np.mean([v for _, v in result.curve]), **close)
    said = iter(case["train_losses"]) # of the steps; what evaluations say is not asked for
    monkeypatch.setattr("defi_nb.analysis.probes.probe_loss", lambda predicted, *_: 0*predicted.sum() + (next(said) if torch.is_grad_enabled() else 0))
    result = train_probe(np.zeros((20, 2, 3)), np.zeros((20, 2)), held_out(np.repeat(range(5), 4)), replace(cfg, steps=len(case["train_losses"])))
    np.testing.assert_allclose(result.train, case["reported_train"], **close)


def test_linear_probe(vectors):
    case = vectors["latent_action_metrics"]["linear_probe"]
    z, a, n = np.array(case["Z"]), np.array(case["A"]), case["train_rows"]
    said = linear_probe(z[:n], a[:n], None, z[n:], penalties=(case["ridge_lambda"],))
    np.testing.assert_allclose(said, case["pred_val"], **close)
    np.testing.assert_allclose(r2(said, a[n:], 0), case["R2_per_dim"], **close)
    np.testing.assert_allclose(r2(said, a[n:], 0).mean(), case["R2_mean"], **close)
    error = lambda p: np.square(p - a[n:]).sum()
    np.testing.assert_allclose(error(said)/error(a[:n].mean(0)), case["NMSE_vs_train_mean"], **close)


def test_latent_actions(vectors):
    suite = vectors["latent_action_metrics"]
    case, found = suite["codebook"], codebook_report(suite["codebook"]["indices"], suite["codebook"]["K"])
    for mine, name in (("usage", "usage_fraction"), ("dead", "dead_codes"), ("perplexity", "perplexity"), ("fraction", "normalised_perplexity"),
                       ("per_position", "perplexity_per_position"), ("tuples", "joint_unique_tuples"), ("joint", "joint_perplexity")):
        np.testing.assert_allclose(found[mine], case[name], **close, err_msg=name)
    np.testing.assert_allclose(np.bincount(np.ravel(case["indices"]), minlength=case["K"])/np.size(case["indices"]), case["hist"], **close)
    np.testing.assert_allclose(np.log(found["perplexity"]), case["entropy_nats"], **close)
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
