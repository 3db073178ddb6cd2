"Every row of the paper's tables is taken by the run notebooks, and every variant trains through `fit` and is loaded again."
from dataclasses import replace

import pytest
import torch

from defi_nb.weights.checkpoint import load_state
from defi_nb.run.pretrained import checkpoint_name, fresh_model
from defi_nb.models.encoders import load_encoders
from defi_nb.models.gidm import ENCODERS
from defi_nb.weights.load import load_model, load_to_act, model_info
from defi_nb.eval.published import ROWS
from defi_nb.models.action_adapter import AdapterConfig
from defi_nb.models.policy import BlindConfig, BlindPolicy, CoupledPolicy, PolicyConfig
from defi_nb.run.cli import check_parameters
from defi_nb.core.spec import DataSpec, fake_batch
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit
from defi_nb.models.vq import QUANTISERS

SPEC, STEPS = DataSpec.tiny(), 3


@pytest.fixture(scope="module")
def encoders(): return load_encoders("tiny")


class Clips:
    "Noise that holds what a stage reads: a dataset of twelve samples."
    def __init__(self, encoders, *fields, frames=1):
        batch = fake_batch(SPEC, 12, frames)
        encode = dict(latent=encoders.vae.encode, dino=encoders.dino)
        self.batch = replace(batch, video=None, **{f: encode[f](batch.video) for f in fields})

    def __len__(self): return len(self.batch)

    def __getitem__(self, indices):
        b, i = self.batch, torch.as_tensor(indices)
        part = {f: None if (x := getattr(b, f)) is None else x[i] for f in ("latent", "dino", "action", "proprio")}
        return replace(b, text=[b.text[j] for j in i], **part)


def train(model, data, encoders, folder):
    "The model as trained, and as loaded from its checkpoint."
    config = TrainConfig(steps=STEPS, batch_size=4, warmup=1, ema_decay=.5, seed=1, device="cpu")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    history = fit(model, data, config, folder, val_data=data, info=model_info(model, encoders))
    assert history[-1]["step"] == STEPS and all(torch.isfinite(torch.tensor(v)) for v in history[-1].values())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert load_state(folder)["run"]["train"]["steps"] == STEPS
    loaded = load_model(folder, encoders)
    assert type(loaded) is type(model) and loaded.cfg == model.cfg
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True): assert torch.equal(a, b), name
    return moved, loaded


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_row_is_taken_by_the_run_notebooks(row):
    taken = check_parameters("train_coupled", row.parameters())
    check_parameters("pretrain_gfdm", dict(variant=row.gfdm))
    check_parameters("pretrain_gidm", dict(variant=row.gidm))
    assert taken["variant"]["quantiser"] in QUANTISERS and taken["variant"]["inverse"] in ENCODERS
    names = [checkpoint_name(kind, "D_D", **given) for kind, given in (("gfdm", row.gfdm), ("gidm", row.gidm))]
    assert [name.count("-") > 2 for name in names] == [bool(row.gfdm), bool(row.gidm)] # another model, another folder


@pytest.mark.parametrize("fields", [dict(quantiser=q) for q in QUANTISERS] + [dict(inverse=i) for i in ENCODERS if i != "gidm"], ids=lambda f: "-".join(f.values()))
def test_inverse_model(encoders, tmp_path, fields):
    data = Clips(encoders, "dino", frames=2)
    model = fresh_model("gidm", encoders, **fields)
    _, loaded = train(model, data, encoders, tmp_path)
    features, (text, mask) = data.batch.dino[:3, 0], encoders.t5(data.batch.text[:3])
    with torch.no_grad(): a, b = model.encode(features, text, mask), loaded.encode(features, text, mask)
    assert torch.equal(a.latent_actions, b.latent_actions) and a.latent_actions.shape == (3, model.cfg.queries, model.cfg.dim)


@pytest.mark.parametrize("kind", ["svd", "dino"])
def test_forward_model(encoders, tmp_path, kind):
    data = Clips(encoders, dict(svd="latent", dino="dino")[kind], frames=SPEC.frames)
    model = fresh_model("gfdm", encoders, forward=kind)
    _, loaded = train(model, data, encoders, tmp_path)
    present = getattr(data.batch, getattr(model, "reads", "latent"))[:2, 0, 0]
    with torch.no_grad(): assert torch.equal(model.tokens(present, data.batch.text[:2]), loaded.tokens(present, data.batch.text[:2]))


@pytest.mark.parametrize("forward", ["svd", "dino"])
@pytest.mark.parametrize("trained", [("adapter",), ("gidm", "adapter"), ("gfdm", "adapter"), ("gfdm", "gidm", "adapter")], ids="+".join)
def test_policy_trains_what_it_names(encoders, tmp_path, forward, trained):
    ahead, behind = fresh_model("gfdm", encoders, forward=forward), fresh_model("gidm", encoders, quantiser="ema")
    views = ("static",) if forward == "dino" else ("static", "gripper")
    config = PolicyConfig(feature_dim=ahead.feature_shape()[-1], gidm=replace(behind.cfg, dec_blocks=0), train=trained, views=views, latents="both")
    model = CoupledPolicy(config, encoders, ahead).start_from(behind)
    book = model.gidm.vq.vq.codebook.clone()
    moved, loaded = train(model, Clips(encoders, getattr(ahead, "reads", "latent")), encoders, tmp_path)
    own = {"project", "time_pos_emb", "video_former", "adapter"}
    assert {name.split(".")[0] for name in moved} == own | set(trained) - {"adapter"}
    assert torch.equal(model.gidm.vq.vq.codebook, book) == ("gidm" not in trained) # a frozen GIDM's running means stand still too
    batch, noise = fake_batch(SPEC), torch.randn(2, SPEC.chunk, 7)
    assert torch.equal(model.act(batch, noise), loaded.act(batch, noise))


@pytest.mark.parametrize("fields", [dict(latents="embedding"), dict(latents="both", feature_norm=True), dict(present=True), dict(latents="none", train=("adapter",))], ids=str)
def test_policy_with_other_inputs(encoders, tmp_path, fields):
    ahead = fresh_model("gfdm", encoders)
    adapter = AdapterConfig(latent_dim=0 if fields.get("latents") == "none" else 64, proprio_dropout=.5)
    model = CoupledPolicy(PolicyConfig(feature_dim=ahead.feature_shape()[-1], adapter=adapter, **fields), encoders, ahead)
    moved, loaded = train(model, Clips(encoders, "latent"), encoders, tmp_path)
    assert "adapter.no_proprio" in moved and ("place" in moved) == fields.get("present", False)
    batch, noise = fake_batch(SPEC), torch.randn(2, SPEC.chunk, 7)
    assert torch.equal(model.act(batch, noise), loaded.act(batch, noise))
    assert torch.allclose(load_to_act(tmp_path).act(batch, noise), loaded.act(batch, noise), atol=1e-5)


@pytest.mark.parametrize("inverse", ["mlp", "transformer"])
def test_policy_straight_to_actions(encoders, tmp_path, inverse):
    "Table 7 as printed: no latent actions, no Video Former, no diffusion."
    ahead = fresh_model("gfdm", encoders)
    base = replace(PolicyConfig.tiny(), feature_dim=ahead.feature_shape()[-1]).without_gidm("actions")
    model = CoupledPolicy(replace(base, gidm=replace(base.gidm, inverse=inverse)), encoders, ahead)
    moved, loaded = train(model, Clips(encoders, "latent"), encoders, tmp_path)
    assert {name.split(".")[0] for name in moved} == {"project", "time_pos_emb", "adapter"}
    batch = fake_batch(SPEC)
    acted = loaded.act(batch)
    assert torch.equal(model.act(batch), acted) and acted.shape == (2, SPEC.chunk, 7) and acted.abs().max() <= 1
    assert torch.allclose(load_to_act(tmp_path).act(batch), acted, atol=1e-5)


def test_blind_policy(encoders, tmp_path):
    model = BlindPolicy(BlindConfig(), encoders)
    _, loaded = train(model, Clips(encoders, "latent"), encoders, tmp_path)
    batch, noise = fake_batch(SPEC), torch.randn(2, SPEC.chunk, 7)
    assert torch.equal(load_to_act(tmp_path).act(replace(batch, video=batch.video.flip(0)), noise), loaded.act(batch, noise))
