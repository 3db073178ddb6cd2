"A checkpoint that was written when the package was one flat folder of modules: it names classes, not modules, and loads."
from pathlib import Path

import torch

from defi_nb.models.encoders import load_encoders
from defi_nb.weights.checkpoint import read_config
from defi_nb.weights.load import load_model

FOLDER = Path(__file__).parent/"fixtures"/"before_the_house"


def test_gidm_loads_and_says_the_same():
    encoders, info = load_encoders("tiny"), read_config(FOLDER)["info"]
    model = load_model(FOLDER, encoders, expect=("GIDM",))
    features = torch.linspace(-1, 1, 2*2*16*384).reshape(2, 2, 16, 384)
    with torch.no_grad(): out = model.encode(features, *encoders.t5(["open the drawer", "turn on the light"]))
    assert out.indices.tolist() == info["codes"]
    assert torch.allclose(out.emb[:, 0, :4].flatten(), torch.tensor(info["latents"]), atol=1e-5)
