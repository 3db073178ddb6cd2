"Checkpoints of earlier states of the package: of one flat folder of modules, and with other names of fields and weights."
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from defi_nb.models.direct_policy import DirectConfig, DirectPolicy
from defi_nb.models.encoders import load_encoders
from defi_nb.weights.checkpoint import checksum, read_config, save_checkpoint
from defi_nb.weights.load import load_model, model_info

FOLDER = Path(__file__).parent/"fixtures"/"before_the_house"


def test_gidm_loads_and_says_the_same():
    encoders, info = load_encoders("tiny"), read_config(FOLDER)["info"]
    model = load_model(FOLDER, encoders, expect=("GIDM",))
    features = torch.linspace(-1, 1, 2*2*16*384).reshape(2, 2, 16, 384)
    with torch.no_grad(): out = model.encode(features, *encoders.t5(["open the drawer", "turn on the light"]))
    assert out.indices.tolist() == info["codes"]
    assert torch.allclose(out.emb[:, 0, :4].flatten(), torch.tensor(info["latents"]), atol=1e-5)


def test_an_encoder_that_was_called_a_tower_is_found(tmp_path):
    "Fields and weights of earlier direct policies are read under the names of today."
    encoders, spelled = load_encoders("tiny"), {"vision_encoder": "tower", "layer": "tap"}
    policy = DirectPolicy(DirectConfig(dim=8, depth=1, heads=2, stem=(4, 8)), encoders)
    save_checkpoint(tmp_path, policy, step=1, info=model_info(policy, encoders))
    about, weights = json.loads((tmp_path/"config.json").read_text()), load_file(tmp_path/"model.safetensors")
    about["fields"] = {spelled.get(n, n): v for n, v in about["fields"].items()}
    save_file({n.replace("vision_encoder.", "tower."): x for n, x in weights.items()}, tmp_path/"model.safetensors")
    about["checksums"]["model.safetensors"] = checksum(tmp_path/"model.safetensors")
    (tmp_path/"config.json").write_text(json.dumps({n: v for n, v in about.items() if n != "checksum"}))
    assert any(n.startswith("tower.") for n in load_file(tmp_path/"model.safetensors"))
    again = load_model(tmp_path, encoders, expect=("DirectPolicy",))
    assert all(torch.equal(x, weights[n]) for n, x in again.state_dict().items() if n in weights)
