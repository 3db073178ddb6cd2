"Adapters of a GFDM through `fit` and `load_model`: exact resume, the right base, diffusers' folders, the paper's size."
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from defi_nb.core.spec import DataSpec
from defi_nb.data.episodes import WindowDataset, fake_frames
from defi_nb.models.encoders import load_encoders
from defi_nb.models.gfdm import GFDM, GFDMConfig, fit_encoders
from defi_nb.run.pretrained import fresh_model
from defi_nb.train.config import TrainConfig, trainable
from defi_nb.train.fit import fit
from defi_nb.weights.checkpoint import load_state, read_config, save_checkpoint
from defi_nb.weights.load import load_model, model_info
from defi_nb.weights.lora import LoraGFDM, LoraGFDMConfig, adapt
from defi_nb.weights.zoo import ship

pytest.importorskip("peft")
CFG = TrainConfig(steps=6, batch_size=2, warmup=2, lr=1e-2, log_every=2, save_every=3, ema_decay=.9, device="cpu")


@pytest.fixture(scope="module")
def encoders(): return load_encoders("tiny")


@pytest.fixture(scope="module")
def data(encoders):
    frames = fake_frames({"open_drawer": 2}, image_size=8)
    latent = torch.randn(len(frames), 2, encoders.vae.channels, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()
    return WindowDataset(frames, frames.windows, offsets=(0, 5, 10, 15), arrays={"latent": latent})


def adapted(folder, encoders):
    torch.manual_seed(0)
    return adapt(load_model(folder, encoders), str(folder), rank=4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoders, data):
    "A pretrained model and adapters of it, in folders."
    place = tmp_path_factory.mktemp("lora")
    base = fresh_model("gfdm", encoders, seed=1)
    save_checkpoint(place/"base", base, info=model_info(base, encoders))
    model = adapted(place/"base", encoders)
    fit(model, data, CFG, place/"adapters", info=model_info(model, encoders))
    return place


def cut_short(place, encoders, data):
    def stop(row):
        if row["step"] == 4: raise KeyboardInterrupt
    model = adapted(place/"base", encoders)
    try: fit(model, data, CFG, place/"cut", on_log=stop, info=model_info(model, encoders))
    except KeyboardInterrupt: pass


def test_interrupted_training_ends_the_same(trained, encoders, data):
    cut_short(trained, encoders, data)
    assert read_config(trained/"cut")["step"] == 3
    model = adapted(trained/"base", encoders)
    torch.nn.init.normal_(next(iter(trainable(model).values()))) # what it begins with is not what it goes on with
    fit(model, data, CFG, trained/"cut", info=model_info(model, encoders))
    whole, cut = (load_file(trained/name/"model.safetensors") for name in ("adapters", "cut"))
    assert whole.keys() == cut.keys() and all(torch.equal(whole[n], cut[n]) for n in whole)
    moments = [load_state(trained/name)["optimizer"]["state"] for name in ("adapters", "cut")]
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(*(m.values() for m in moments), strict=True))


def test_checkpoint_is_small_and_loads_as_any_other(trained, encoders, data):
    sizes = [(trained/name/"model.safetensors").stat().st_size for name in ("adapters", "base")]
    assert sizes[0] < .05*sizes[1] and not [*trained.rglob("*.pt"), *trained.rglob("*.bin"), *trained.rglob("*.pkl")]
    model, base = (load_model(trained/name, encoders, expect=("GFDM",)) for name in ("adapters", "base"))
    assert type(model) is GFDM and type(model.cfg) is GFDMConfig and model.cfg == base.cfg and not model.training
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: t.shape for n, t in base.state_dict().items()}
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, base.state_dict()[n])}
    assert changed and all(".to_" in n for n in changed)
    latent, text = data[[0, 1]].latent[:, 0, 0], ["open the drawer"]*2
    shipped = ship(trained/"adapters", trained/"shipped", encoders)
    with torch.no_grad(): one, two = (m.tokens(latent, text) for m in (model, shipped))
    assert torch.allclose(one, two, atol=.02*float(one.abs().max())) and read_config(trained/"shipped")["class"] == "GFDM"
    random = load_model(trained/"adapters", encoders, trained=False)
    assert type(random) is GFDM and not torch.equal(random.unet.conv_in.weight, base.unet.conv_in.weight)


def test_another_base_is_refused(trained, encoders, data, tmp_path):
    other = fresh_model("gfdm", encoders, seed=2)
    save_checkpoint(tmp_path/"other", other, info=model_info(other, encoders))
    with pytest.raises(ValueError, match="adapters of another GFDM than the one in .*other"):
        load_model(trained/"adapters", encoders, change=dict(base=str(tmp_path/"other")))
    with pytest.raises(FileNotFoundError, match="none.* is not there: put it there, or name its folder"):
        load_model(trained/"adapters", encoders, change=dict(base=str(tmp_path/"none")))
    with pytest.raises(ValueError, match="base_digest"):
        fit(adapted(tmp_path/"other", encoders), data, CFG, trained/"adapters", info=model_info(other, encoders))
    (trained/"base").rename(tmp_path/"moved")
    moved = load_model(trained/"adapters", encoders, change=dict(base=str(tmp_path/"moved")))
    (tmp_path/"moved").rename(trained/"base")
    assert torch.equal(moved.unet.conv_in.weight, load_model(trained/"adapters", encoders).unet.conv_in.weight)


def test_base_in_a_folder_of_diffusers(tmp_path, encoders):
    "As Stable Video Diffusion lies in ckpts."
    torch.manual_seed(0)
    base = GFDM(fit_encoders(GFDMConfig.tiny(), encoders, DataSpec.tiny()), encoders.clip)
    base.unet.save_pretrained(tmp_path/"svd/unet")
    first = base.unet.conv_in.weight.clone()
    model = adapt(base, str(tmp_path/"svd"), targets="attention,convolutions")
    save_checkpoint(tmp_path/"adapters", model, info=model_info(model, encoders))
    assert torch.equal(load_model(tmp_path/"adapters", encoders).unet.conv_in.weight, first)


def test_full_size(tmp_path):
    "Counted on the meta device: what is trained, and what its file holds."
    for targets, count in dict(attention=3_319_808).items() | {"attention,convolutions": 8_526_848}.items():
        with torch.device("meta"): model = LoraGFDM(replace(LoraGFDMConfig.paper(), targets=targets))
        numbers = {n: p.numel() for n, p in trainable(model).items()}
        assert sum(numbers.values()) == count and all("lora_" in n for n in numbers)
        assert sum(p.numel() for p in model.parameters()) == 1_524_623_082 + count
        if targets != "attention": continue
        save_file({n: torch.zeros(t.shape) for n, t in model.saved_state().items()}, tmp_path/"full.safetensors")
        assert (tmp_path/"full.safetensors").stat().st_size < 4*count + 1e5
