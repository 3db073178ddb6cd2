"A policy of LeRobot's own (ACT), trained a step, saved, served and asked as an evaluation asks; where LeRobot is installed (`constraints-lerobot.txt`)."
from pathlib import Path

import pytest
import torch

from defi_nb.core.spec import VIEWS, DataSpec, fake_batch
from defi_nb.data.lerobot import INSTRUCTION

pytest.importorskip("lerobot")
TINY = dict(dim_model=32, n_heads=2, dim_feedforward=32, n_encoder_layers=1, n_vae_encoder_layers=1, chunk_size=12, n_action_steps=5)
SHAPES = {f"observation.images.{v}": (3, 64, 64) for v in reversed(VIEWS)} | {"observation.state": (15,), INSTRUCTION: (64,)}


def statistics(shape, seed):
    "As meta/stats.json has them, of an image by its colours."
    size = (3, 1, 1) if len(shape) == 3 else shape
    g = torch.Generator().manual_seed(seed)
    return dict(mean=torch.rand(size, generator=g), std=torch.rand(size, generator=g) + .5)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    "LeRobot's policy and processors, and the folder that they were saved in."
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors
    kind = lambda key: FeatureType.VISUAL if "images" in key else FeatureType.ENV if key == INSTRUCTION else FeatureType.STATE
    inputs = {k: PolicyFeature(kind(k), shape) for k, shape in SHAPES.items()}
    output = dict(action=PolicyFeature(FeatureType.ACTION, (7,)))
    torch.manual_seed(0)
    config = ACTConfig(input_features=inputs, output_features=output, device="cpu", pretrained_backbone_weights=None, **TINY)
    policy, folder = ACTPolicy(config), tmp_path_factory.mktemp("act")
    before, after = make_pre_post_processors(config, dataset_stats={k: statistics(s, i) for i, (k, s) in enumerate((SHAPES | dict(action=(7,))).items())})
    # as at the end of a training that began with ImageNet's weights, which must not be downloaded again
    config.pretrained_backbone_weights = "ResNet18_Weights.IMAGENET1K_V1"
    for part in (policy, before, after): part.save_pretrained(folder)
    return policy.eval(), before, after, folder


def asked(saved, batch, encode):
    "What LeRobot itself answers, one observation at a time, as its evaluation asks."
    policy, before, after, _ = saved
    rows = []
    for i, text in enumerate(batch.text):
        policy.reset()
        given = {f"observation.images.{v}": batch.video[i:i + 1, j, 0].float()/255 for j, v in enumerate(VIEWS)}
        given |= {"observation.state": batch.proprio[i:i + 1], INSTRUCTION: torch.from_numpy(encode(text))[None], "task": [text]}
        rows.append(torch.cat([after(policy.select_action(before(given))) for _ in range(TINY["n_action_steps"])]))
    return torch.stack(rows)


def test_it_acts_here_as_in_lerobot_and_behind_the_wire(saved):
    from defi_nb.serve.remote_policy import RemotePolicy
    from defi_nb.serve.inference import contract_of, load_served
    from defi_nb.serve.server import PolicyServer, serving
    from defi_nb.weights.lerobot_policy import instruction_encoder
    policy, digest = load_served(str(saved[-1]), "cpu")
    contract = contract_of(policy, checkpoint=digest)
    assert (contract.policy, contract.horizon, contract.views, contract.image_size, contract.state) == ("act", 12, VIEWS, 64, 15) and len(digest) == 16
    batch, noise = fake_batch(DataSpec.tiny(), B=3), torch.randn(3, 10, 7)
    actions, theirs = policy.act(batch, noise), asked(saved, batch, instruction_encoder())
    assert actions.shape == (3, 10, 7) and torch.allclose(actions[:, :5], theirs, atol=1e-5)
    assert not torch.allclose(actions[0], actions[1], atol=1e-3)
    with serving(PolicyServer(policy, contract)) as url:
        remote = RemotePolicy(url)
        wired = remote.act(batch, noise)
        remote.client.close()
    arm = actions[..., :6].clamp(-1, 1) # as the server and an evaluation take them
    assert torch.allclose(wired[..., :6], arm, atol=1e-5) and torch.equal(wired[..., 6], torch.where(actions[..., 6] > 0, 1., -1.))


def test_what_it_is_not_trained_for_is_refused(saved, tmp_path):
    import json
    import shutil

    from defi_nb.serve.vla_eval import _ServedPolicy
    from defi_nb.weights.lerobot_policy import load_lerobot_policy
    with pytest.raises(ValueError, match="reads all of CALVIN's robot_obs"): _ServedPolicy(str(saved[-1]), "cpu", 5, 0)
    other = Path(shutil.copytree(saved[-1], tmp_path/"other"))
    config = json.loads((other/"config.json").read_text())
    config["output_features"]["action"]["shape"] = [6]
    (other/"config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its actions have shape"): load_lerobot_policy(other)
