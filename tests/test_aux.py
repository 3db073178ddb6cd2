"The auxiliary loss on a vision-language-action model that is not ours: transformers' PI0, tiny, with random weights."
import copy

import pytest
import torch

from defi_nb.train.inverse_dynamics import AuxInverseDynamics, InverseDynamicsConfig
from defi_nb.models.direct_policy import VisionTokens

CAMERAS, CHUNK, IMAGE = 2, 4, 63 # the last is the token that stands for a patch


@pytest.fixture
def pi0():
    from transformers import PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration
    text = dict(model_type="gemma", vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    vision = dict(model_type="siglip_vision_model", hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14, projection_dim=32)
    vlm = PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)
    torch.manual_seed(0)
    return PI0ForConditionalGeneration(PI0Config(vlm_config=vlm, dit_config=dict(text), chunk_size=CHUNK, max_action_dim=7, max_state_dim=8)).eval()


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(1)
    ids = torch.tensor([[IMAGE]*16*CAMERAS + [5, 6, 7]]*3)
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(3, CAMERAS, 3, 56, 56, generator=g),
                pixel_attention_mask=torch.ones(3, CAMERAS, dtype=torch.bool), state=torch.randn(3, 8, generator=g), actions=torch.randn(3, CHUNK, 7, generator=g),
                noise=torch.randn(3, CHUNK, 7, generator=g), timestep=torch.rand(3, generator=g))


def attach(pi0): return AuxInverseDynamics(InverseDynamicsConfig.tiny(tokens=16, dim=64, chunk=CHUNK), VisionTokens(pi0), views=CAMERAS)


def both(pi0, aux, batch):
    with aux.attached():
        own = pi0(**batch).loss
        extra, _ = aux.loss(dict(pixel_values=batch["pixel_values"].flip(0).flatten(0, 1)), batch["actions"], generator=torch.Generator().manual_seed(0))
    return own, extra


def test_it_reaches_the_vision_tower_and_nothing_else(pi0, batch):
    own, extra = both(pi0, attach(pi0), batch)
    assert own == pi0(**batch).loss
    extra.backward()
    touched = {n for n, p in pi0.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert touched and all(n.startswith("model.vlm.") and "vision_tower" in n for n in touched)


def test_attach_train_detach(pi0, batch):
    keys, before = list(pi0.state_dict()), pi0(**batch).logits
    aux = attach(pi0)
    both(pi0, aux, batch)
    assert torch.equal(pi0(**batch).logits, before) # attached and detached, nothing is different
    optimizer = torch.optim.Adam([dict(params=pi0.parameters()), dict(params=aux.parameters())], 1e-3)
    losses = []
    for _ in range(12):
        own, extra = both(pi0, aux, batch)
        optimizer.zero_grad()
        (own + aux.cfg.weight*extra).backward()
        optimizer.step()
        losses.append((own.item(), extra.item()))
    assert losses[-1][0] < losses[0][0] and losses[-1][1] < losses[0][1]
    assert list(pi0.state_dict()) == keys and not any(m._forward_hooks or m._forward_pre_hooks for m in pi0.modules())
    with aux.attached(): trained = pi0(**batch).logits
    del aux, optimizer
    assert torch.equal(pi0(**batch).logits, trained) and not torch.equal(trained, before)


def test_a_frozen_tower_is_refused(pi0):
    pi0.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the SiglipVisionModel is frozen"): attach(pi0)


class Both(torch.nn.Module):
    "What data parallelism wraps: the policy's loss and the auxiliary one."
    def __init__(self, pi0, aux):
        super().__init__()
        self.pi0, self.head, self.aux = pi0, aux.head, aux

    def forward(self, batch):
        own, extra = both(self.pi0, self.aux, batch)
        return own + self.aux.cfg.weight*extra


def test_data_parallelism_waits_for_no_parameter(pi0, batch):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from defi_nb.models.direct_policy import freeze_unused
    aux = attach(pi0)
    step = Both(pi0, aux)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        waiting = DistributedDataParallel(copy.deepcopy(step))
        waiting(batch).backward()
        with pytest.raises(RuntimeError, match="did not receive grad"): waiting(batch)
        frozen = freeze_unused(step(batch), pi0)
        assert any("vision_tower.head" in n for n in frozen) and not any("vision_tower.encoder" in n for n in frozen)
        ready = DistributedDataParallel(step)
        for _ in range(2): ready(batch).backward()
    finally: dist.destroy_process_group()
    assert all((p.grad is not None) == p.requires_grad for p in step.parameters())


def test_projected_tokens_of_a_foreign_model(pi0, batch):
    "What its language model reads, through the projection, which then learns too."
    vision = VisionTokens(pi0, "projected")
    aux = AuxInverseDynamics(InverseDynamicsConfig.tiny(tokens=16, dim=32, chunk=CHUNK, heads=CAMERAS, gripper="shift"), vision, views=CAMERAS)
    with aux.attached():
        own = pi0(**batch).loss
        extra, _ = aux.loss(dict(pixel_values=batch["pixel_values"].flip(0).flatten(0, 1)), batch["actions"], before=torch.ones(3))
    assert own == pi0(**batch).loss
    extra.backward()
    touched = {n for n, p in pi0.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {"vision_tower" in n or "multi_modal_projector" in n for n in touched} == {True} and any("multi_modal_projector" in n for n in touched)


# The project's own policies, through the same training as ever.

SMALL = dict(size=32, stem=(8, 16), dim=32, depth=1)


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    "A direct policy trained alone, with the auxiliary loss at weight 0, with it, and with its options, each in its folder."
    from defi_nb.models.action_adapter import AdapterConfig
    from defi_nb.train.auxiliary import InverseAuxiliary, encoder_pair, fit_inverse
    from defi_nb.models.direct_policy import DirectConfig, DirectPolicy
    from defi_nb.models.encoders import load_acting_encoders
    from defi_nb.data.episodes import WindowDataset, fake_frames
    from defi_nb.weights.load import model_info
    from defi_nb.train.config import TrainConfig
    from defi_nb.train.fit import fit
    folder, encoders, frames = tmp_path_factory.mktemp("direct"), load_acting_encoders("tiny"), fake_frames(dict(open_drawer=3), image_size=64)
    data = WindowDataset(frames, frames.windows, offsets=(0, 10), chunk=10, video=True)
    cfg = TrainConfig(steps=4, batch_size=8, warmup=1, log_every=2, ema_decay=.9, device="cpu")
    policies, rows = {}, {}
    options = dict(weight=.3, heads=2, norm=True, fusion_layers=2, gripper="shift")
    for name, changes in dict(alone=None, unweighted=dict(weight=0.), together=dict(weight=.3), options=options).items():
        torch.manual_seed(0)
        policy = DirectPolicy(DirectConfig(**SMALL, shift=3 if name == "options" else 0, adapter=AdapterConfig(dim=32, enc_blocks=1, dec_blocks=1, latent_dim=0, proprio_dim=0)), encoders)
        auxiliary = None if changes is None else InverseAuxiliary(fit_inverse(InverseDynamicsConfig.tiny(**changes), policy), encoder_pair)
        rows[name] = fit(policy, data, cfg, folder/name, info=model_info(policy, encoders), auxiliary=auxiliary)
        policies[name] = policy
    return folder, policies, rows


def test_a_policy_keeps_nothing_of_its_auxiliary_loss(direct):
    folder, policies, rows = direct
    alone, unweighted, together = (policies[n].state_dict() for n in ("alone", "unweighted", "together"))
    assert all(torch.equal(alone[k], unweighted[k]) for k in alone) and not torch.equal(alone["vision_encoder.place"], together["vision_encoder.place"])
    optional = policies["options"].state_dict()
    assert list(alone) == list(together) == list(optional) and not torch.equal(together["vision_encoder.place"], optional["vision_encoder.place"])
    for name in ("together", "options"): assert {"inverse", "inverse_motion", "policy_loss"} <= set(rows[name][-1])
    from safetensors import safe_open
    for name in ("alone", "together", "options"):
        with safe_open(folder/name/"model.safetensors", "pt") as f: assert sorted(f.keys()) == sorted(alone)


def test_a_direct_policy_acts_as_the_others_do(direct):
    import numpy as np

    from defi_nb.weights.load import load_to_act
    from defi_nb.eval.rollout import obs_to_batch, predict
    from defi_nb.serve.inference import contract_of
    folder, policies, _ = direct
    rng = np.random.default_rng(0)
    obs = [dict(rgb_obs=dict(rgb_static=rng.integers(0, 256, (200, 200, 3), np.uint8), rgb_gripper=rng.integers(0, 256, (84, 84, 3), np.uint8)), robot_obs=rng.normal(size=15)) for _ in range(2)]
    batch, noise, loaded = obs_to_batch(obs, ["open the drawer"]*2, 64), torch.randn(2, 10, 7), load_to_act(folder/"together")
    action = predict(loaded, batch, noise)
    np.testing.assert_array_equal(action, predict(policies["together"], batch, noise))
    assert action.shape == (2, 10, 7) and not np.array_equal(action[0], action[1])
    contract = contract_of(loaded)
    assert (contract.policy, contract.views, contract.state, contract.horizon) == ("DirectPolicy", ("static", "gripper"), 0, 10)
