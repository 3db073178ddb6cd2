"""The paper preset through all its stages, on stand-ins for the base models: right in kind and in the widths that the models meet at, else small.

GIDM and the policy have their full size, so this takes some gigabytes and minutes.
"""
import json
import shutil

import pytest
from conftest import ROOT, RUNS, command
from test_runs import arguments

from defi_nb.weights.load import find_base_model
from defi_nb.models.encoders import TINY_ENCODERS
from defi_nb.data.record import RecordConfig, record_demonstrations

pytestmark = pytest.mark.slow


def base_models(ckpts):
    "Untrained base models in the folders in which the preset looks for the public ones."
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, Dinov2WithRegistersConfig, Dinov2WithRegistersModel, T5Config, T5EncoderModel
    folder = {name: ckpts/find_base_model(name).folder for name in ("svd", "clip", "dino", "t5")}
    widths = 32, 32, 32, 32
    UNetSpatioTemporalConditionModel(block_out_channels=widths, num_attention_heads=(2, 2, 2, 2), layers_per_block=1, num_frames=16).save_pretrained(folder["svd"]/"unet")
    AutoencoderKLTemporalDecoder(block_out_channels=widths, down_block_types=("DownEncoderBlock2D",)*4, layers_per_block=1).save_pretrained(folder["svd"]/"vae")
    EulerDiscreteScheduler(sigma_min=.002, sigma_max=700., use_karras_sigmas=True, prediction_type="v_prediction", timestep_type="continuous",
                           timestep_spacing="leading").save_pretrained(folder["svd"]/"scheduler")
    small = dict(num_hidden_layers=1, num_attention_heads=8, intermediate_size=64)
    vocabulary = {name: json.loads((TINY_ENCODERS/name/"config.json").read_text())["vocab_size"] for name in ("clip", "t5")}
    CLIPTextModelWithProjection(CLIPTextConfig(vocab_size=vocabulary["clip"], hidden_size=512, projection_dim=512, **small)).save_pretrained(folder["clip"])
    T5EncoderModel(T5Config(vocab_size=vocabulary["t5"], d_model=768, d_kv=64, d_ff=64, num_layers=1, num_heads=12)).save_pretrained(folder["t5"])
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(hidden_size=768, num_hidden_layers=1, num_attention_heads=12, mlp_ratio=1, image_size=224, patch_size=14,
                                                       num_register_tokens=4)).save_pretrained(folder["dino"])
    for name in ("clip", "t5"):
        for path in (TINY_ENCODERS/name).iterdir():
            if "token" in path.name or path.suffix == ".txt" or path.name in ("vocab.json",): shutil.copy(path, folder[name])


def test_paper_preset(tmp_path):
    shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/"nbs").mkdir()
    for path in RUNS: shutil.copy(path, tmp_path/"nbs")
    base_models(tmp_path/"ckpts")
    record_demonstrations(tmp_path/"data/mine", RecordConfig(tasks=("open_drawer",), per_kind=3))
    common = {"preset": "paper", "split": "data/mine", "steps": 1, "engine.batch_size": 1}
    for name in ("pretrain_gfdm", "pretrain_gidm", "train_coupled"):
        done = command("defi-nb", "run", name, *arguments(common), cwd=tmp_path, timeout=1800)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    config = json.loads((tmp_path/"ckpts/coupled-paper-mine/config.json").read_text())
    assert (config["info"]["preset"], config["fields"]["adapter"]["cross_attn"]) == ("paper", "causal")
    played = command("defi-nb", "run", "eval_calvin", "--out", "runs/played", "-p", "policy", "ckpts/coupled-paper-mine", "-p", "tasks", "all", "-p", "chains", 1,
                     "-p", "steps", 10, "-p", "workers", 1, "-p", "film", 0, cwd=tmp_path, timeout=1800)
    assert played.returncode == 0, played.stdout[-3000:] + played.stderr
    protocol = json.loads((tmp_path/"runs/played/result.json").read_text())["protocol"]
    assert protocol["image_size"] == 256 and protocol["sequences"] == "first_sequences(chains)"
