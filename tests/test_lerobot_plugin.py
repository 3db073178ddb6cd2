"The LeRobot plug-ins: with lerobot where it is installed (`constraints-lerobot.txt`), else against stand-ins of its base classes."
import json
import sys
from dataclasses import dataclass, field
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from conftest import ROOT

from defi_nb.core.spec import VIEWS

PLUGINS = ROOT/"plugins"


def stand_ins():
    "What the plug-ins take from lerobot, as its 0.6.1 has it, where the real one is absent."
    Kind = Enum("FeatureType", {n: n for n in ("STATE", "VISUAL", "ACTION")}, type=str)
    Mode = Enum("NormalizationMode", {n: n for n in ("IDENTITY", "QUANTILES")}, type=str)

    class Registry:
        def __init_subclass__(cls, **kw): cls.known = getattr(cls, "known", {})

        @classmethod
        def register_subclass(cls, name): return lambda sub: cls.known.setdefault(name, sub)

    @dataclass
    class Feature:
        type: Kind
        shape: tuple

    @dataclass
    class Config(Registry):
        input_features: dict = None
        output_features: dict = None
        device: str = "cpu"
        def __post_init__(self): pass

        @property
        def action_feature(self): return (self.output_features or {}).get("action")
        def _save_pretrained(self, folder): (folder/"config.json").write_text(json.dumps(dict(type="defi")))

    class Policy(torch.nn.Module):
        def __init__(self, config): super().__init__(); self.config = config

    @dataclass
    class Env(Registry):
        task: str = None
        fps: int = 30
        features: dict = field(default_factory=dict)
        features_map: dict = field(default_factory=dict)

    Named = lambda name: type(name, (), dict(__init__=lambda self, **kw: self.__dict__.update(kw)))
    parts = {"lerobot": {}, "lerobot.configs": dict(FeatureType=Kind, NormalizationMode=Mode, PreTrainedConfig=Config, PolicyFeature=Feature),
             "lerobot.optim": dict(AdamWConfig=Named("AdamWConfig"), DiffuserSchedulerConfig=Named("DiffuserSchedulerConfig")),
             "lerobot.policies": {}, "lerobot.policies.pretrained": dict(PreTrainedPolicy=Policy), "lerobot.envs": dict(EnvConfig=Env),
             "lerobot.processor": dict(make_default_pre_post_processors=lambda config, stats, normalizer_device: (config, stats, normalizer_device))}
    made = {name: ModuleType(name) for name in parts}
    for name, members in parts.items(): vars(made[name]).update(members)
    return made


@pytest.fixture(scope="module")
def plugins():
    "The two packages, imported as LeRobot imports them: by the names of their distributions."
    with pytest.MonkeyPatch.context() as patch:
        if find_spec("lerobot") is None:
            for name, module in stand_ins().items(): patch.setitem(sys.modules, name, module)
        for name in ("lerobot_policy_defi", "lerobot_env_playtable"): patch.syspath_prepend(str(PLUGINS/name))
        yield import_module("lerobot_policy_defi"), import_module("lerobot_env_playtable")
        for name in [n for n in sys.modules if n.startswith(("lerobot_policy_", "lerobot_env_"))]: sys.modules.pop(name)


def configured(plugins, n=2, action=7, state=15, **given):
    "A configuration with a dataset's features, as LeRobot fills them in."
    Feature, Kind = (getattr(sys.modules["lerobot.configs"], n) for n in ("PolicyFeature", "FeatureType"))
    features = {f"observation.images.{n}": Feature(Kind.VISUAL, (3, 48, 64)) for n in ("top", "wrist")[:n]}
    features |= {"observation.state": Feature(Kind.STATE, (state,))}
    return plugins[0].DefiConfig(device="cpu", input_features=features, output_features={"action": Feature(Kind.ACTION, (action,))}, **given)


def policy_of(config): return import_module(type(config).__module__.replace("configuration_", "modeling_")).DefiPolicy(config) # as LeRobot finds it


def batch_of(config, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    batch = {k: torch.rand(B, *f.shape, generator=g) for k, f in config.input_features.items()}
    action = torch.randn(B, config.chunk_size, *config.output_features["action"].shape, generator=g)
    return batch | dict(action=action, task=["open the drawer", "turn on the led"][:B], action_is_pad=torch.zeros(B, config.chunk_size, dtype=torch.bool))


@pytest.mark.parametrize("kind,cameras,action", [("coupled", 1, 7), ("plain", 1, 3)])
def test_a_policy_learns_acts_and_is_saved(plugins, tmp_path, kind, cameras, action):
    torch.manual_seed(0)
    config = configured(plugins, cameras, action, kind=kind, ema_decay=.5)
    policy, batch = policy_of(config), batch_of(config)
    if kind != "plain": assert len(policy.model.cfg.views) == cameras and not any(p.requires_grad for p in policy.model.gfdm.parameters())
    groups = policy.get_optim_params()
    trained = {id(p) for p in policy.parameters() if p.requires_grad}
    assert {id(p) for g in groups for p in g["params"]} == trained and [g["weight_decay"] for g in groups] == [.01, 0]
    optimizer, losses = torch.optim.AdamW(groups, lr=1e-3), []
    policy.train()
    for _ in range(6):
        torch.manual_seed(1) # the same noise, so that the losses can be compared
        loss, logs = policy.forward(batch)
        optimizer.zero_grad(); loss.backward(); optimizer.step(); policy.update()
        losses.append(logs["action"])
    assert losses[-1] < losses[0] and loss.item() >= logs["action"] > 0
    noise = torch.randn(2, config.chunk_size, action, generator=torch.Generator().manual_seed(2))
    chunk = policy.predict_action_chunk(batch, noise=noise)
    assert chunk.shape == (2, config.chunk_size, action) and chunk.abs().max() <= 1
    taken = [policy.select_action(batch, noise=noise) for _ in range(config.n_action_steps)]
    assert torch.equal(torch.stack(taken, 1), chunk[:, :config.n_action_steps]) and not policy.queue
    policy._save_pretrained(tmp_path)
    from safetensors.torch import load_file
    saved, again = load_file(tmp_path/"model.safetensors"), policy_of(config)
    assert not any(k.startswith("model.gfdm.") for k in saved)
    missing, unexpected = again.load_state_dict(saved, strict=False)
    assert not unexpected and not missing # GFDM's are not reported as missing
    assert torch.allclose(again.predict_action_chunk(batch, noise=noise), chunk, atol=1e-5) # the averaged weights


def test_predicted_frames(plugins):
    config = configured(plugins, kind="no_gidm", save_predicted_video=True, predicted_steps=1)
    policy = policy_of(config)
    policy.select_action(batch_of(config))
    frames = policy.decode_predicted_latents(policy.last_predicted_latents)
    assert frames.shape == (config.n_action_steps, 64, 64, 3) and frames.dtype == torch.uint8 and torch.equal(frames[0], frames[-1])


@pytest.mark.parametrize("given,said", [
    (dict(kind="couple"), "kind is 'couple'"), (dict(preset="small"), "preset is 'small'"), (dict(n_action_steps=11), "of a chunk of 10"),
    (dict(kind="plain", save_predicted_video=True), "predicts no frames"), (dict(cameras=("observation.images.left",)), "no camera 'observation.images.left'"),
    (dict(proprio=True, state=6), "not CALVIN's robot_obs")])
def test_what_is_configured_wrong(plugins, given, said):
    given = dict(given)
    with pytest.raises(ValueError, match=said): configured(plugins, state=given.pop("state", 15), **given).validate_features()


def test_the_environment(plugins):
    "The names of its observations are those of the exported recordings, and Gymnasium makes it."
    import gymnasium
    config = plugins[1].PlayTableConfig(task="open_drawer, turn_on_led", image_size=16, episode_length=2)
    assert {k: v for k, v in config.features_map.items() if k.startswith("pixels")} == {f"pixels/{v}": f"observation.images.{v}" for v in VIEWS}
    assert set(config.features) == set(config.features_map)
    import_module(config.package_name)
    env = gymnasium.make(config.gym_id, **config.gym_kwargs)
    obs, info = env.reset(seed=0, options=dict(lerobot_new_rollout=True))
    assert info["task"] in ("open_drawer", "turn_on_led") and env.unwrapped.task_description == info["instruction"]
    assert obs["pixels"]["static"].shape == config.features["pixels/static"].shape and obs["agent_pos"].shape == config.features["agent_pos"].shape
    assert [env.step(env.action_space.sample())[3] for _ in range(2)] == [False, True] # cut off
