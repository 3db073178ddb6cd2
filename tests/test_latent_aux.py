"Time reversal, antisymmetry and a few labels beside GIDM's training: killed, gone on, taken away."
import pytest
import torch
from safetensors import safe_open

from defi_nb.models.encoders import load_encoders
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.models.gidm import GIDM, GIDMConfig
from defi_nb.train.auxiliary import FewLabels, LatentAuxiliaryConfig, LatentAuxiliary
from defi_nb.weights.load import load_model, model_info
from defi_nb.train.config import TrainConfig
from defi_nb.train.fit import fit

SMALL = GIDMConfig(in_dim=24, dim=16, enc_blocks=1, dec_blocks=1, heads=2, code_dim=8)


@pytest.fixture(scope="module")
def encoders(): return load_encoders("tiny")


def train(encoders, out, cfg, **kw):
    frames = fake_frames(dict(open_drawer=6), image_size=8)
    g = torch.Generator().manual_seed(0)
    data = WindowDataset(frames, frames.windows, offsets=(0, 10), chunk=10, arrays=dict(dino=torch.randn(len(frames), 2, 9, 24, generator=g).numpy()))
    torch.manual_seed(0)
    model = GIDM(SMALL, encoders.t5)
    auxiliary = None if cfg is None else LatentAuxiliary(cfg, SMALL)
    rows = fit(model, FewLabels(data, .5), TrainConfig(steps=8, batch_size=8, warmup=1, log_every=1, save_every=4, device="cpu"), out, info=model_info(model, encoders), auxiliary=auxiliary, **kw)
    return model, rows, auxiliary


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


ALL = LatentAuxiliaryConfig(antisymmetry=.1, label_weight=.3)


def test_killed_and_gone_on_is_the_same_training(encoders, tmp_path):
    whole, rows, head = train(encoders, tmp_path/"whole", ALL)
    def die(row):
        if row["step"] == 6: raise RuntimeError("killed")
    with pytest.raises(RuntimeError, match="killed"): train(encoders, tmp_path/"killed", ALL, on_log=die)
    again, later, other = train(encoders, tmp_path/"killed", ALL)
    assert same(whole, again) and same(head, other)
    numbers = lambda row: {k: v for k, v in row.items() if k not in ("seconds", "samples_per_second", "data_wait", "memory_gb")}
    assert list(map(numbers, rows)) == list(map(numbers, later)) and len(rows) == 8
    assert 0 < rows[-1]["labelled"] < 1 and {"reversed", "antisymmetry", "inverse", "gidm", "reconstruction"} <= set(rows[-1])


def test_nothing_of_it_is_in_the_checkpoint(encoders, tmp_path):
    plain, *_ = train(encoders, tmp_path/"plain", None)
    nothing, *_ = train(encoders, tmp_path/"nothing", LatentAuxiliaryConfig(p_reverse=0.))
    assert same(plain, nothing) # to the bit, restarts of codes included
    trained, *_ = train(encoders, tmp_path/"all", ALL)
    assert not same(plain, trained) and same(trained, load_model(tmp_path/"all", encoders, expect=("GIDM",)))
    with safe_open(tmp_path/"all"/"model.safetensors", "pt") as f, safe_open(tmp_path/"plain"/"model.safetensors", "pt") as g: assert sorted(f.keys()) == sorted(g.keys())


def test_another_auxiliary_loss_is_another_run(encoders, tmp_path):
    train(encoders, tmp_path, ALL)
    with pytest.raises(ValueError, match="holds another run.*antisymmetry"): train(encoders, tmp_path, LatentAuxiliaryConfig(antisymmetry=.2, label_weight=.3))
