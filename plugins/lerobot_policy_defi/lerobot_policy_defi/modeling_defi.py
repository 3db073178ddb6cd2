"defi_nb's policies behind LeRobot's interface."
from collections import deque
from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from lerobot.policies.pretrained import PreTrainedPolicy
from safetensors.torch import save_file

from defi_nb.core.spec import VIEWS, Batch, preset_of
from defi_nb.models.encoders import load_encoders
from defi_nb.models.policy import CoupledPolicy, PlainConfig, PlainPolicy, PolicyConfig
from defi_nb.train.config import EMA, make_optimizer
from defi_nb.weights.load import load_model
from defi_nb.weights.zoo import checkpoint_path

from .configuration_defi import STATE, DefiConfig


def build(cfg: DefiConfig):
    "The policy that a configuration describes, its pretrained parts loaded."
    encoders, change = load_encoders(cfg.preset), dict(action_dim=cfg.action_feature.shape[0], proprio_dim=11 if cfg.proprio else 0)
    if cfg.kind == "plain":
        base = preset_of(PlainConfig, cfg.preset, latent_channels=encoders.vae.channels)
        return PlainPolicy(replace(base, adapter=replace(base.adapter, **change)), encoders)
    gfdm = load_model(checkpoint_path(cfg.gfdm, "gfdm"), encoders, expect=("GFDM",))
    base = preset_of(PolicyConfig, cfg.preset, feature_dim=gfdm.feature_shape()[-1], views=VIEWS[:len(cfg.camera_keys)], projection_frozen=False)
    base = replace(base, adapter=replace(base.adapter, **change))
    if cfg.kind == "no_gidm": return CoupledPolicy(base.without_gidm(), encoders, gfdm)
    gidm = load_model(checkpoint_path(cfg.gidm, "gidm"), encoders, expect=("GIDM",))
    return CoupledPolicy(replace(base, gidm=replace(gidm.cfg, dec_blocks=0, texts=base.gidm.texts)), encoders, gfdm).start_from(gidm)


def without_gfdm(policy, keys):
    "Hook of `load_state_dict`: GFDM's weights, which are not saved with the policy, are not missing."
    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.startswith("model.gfdm.")]


class DefiPolicy(PreTrainedPolicy):
    "DeFI's coupled policy, or the plain one, trained and evaluated by LeRobot."
    config_class = DefiConfig
    name = "defi"

    def __init__(self, config: DefiConfig, **kwargs):
        super().__init__(config)
        config.validate_features()
        self.model, self.average, self.steps, self.last_predicted_latents = build(config), None, 0, None
        self.placed = None
        self.register_load_state_dict_post_hook(without_gfdm)
        self.reset()

    def get_optim_params(self):
        "The trained parameters, biases and norms without weight decay."
        groups = make_optimizer(self.model, self.config.recipe).param_groups
        return [dict(params=g["params"], weight_decay=g["weight_decay"]) for g in groups]

    def reset(self): self.queue = deque(maxlen=self.config.n_action_steps)

    def batch(self, given):
        "LeRobot's batch as one of defi_nb's: images (B,3,H,W) in [0, 1], actions in [-1, 1] but for what lies outside the quantiles."
        size, images = self.config.spec.image_size, []
        for key in self.config.camera_keys:
            x = given[key]
            x = x[:, -1] if x.ndim == 5 else x
            if x.shape[-2:] != (size, size): x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
            images.append((x*255).round().clamp(0, 255).to(torch.uint8))
        if self.config.kind == "plain": images = (images*2)[:2]  # its tokens have two places
        text, action = given.get("task", ""), given.get("action")
        text = [text]*len(images[0]) if isinstance(text, str) else list(text)
        proprio = given[STATE].float() if self.config.proprio else None
        latent = self.encoders_here().vae.encode(torch.stack(images, 1)).float()[:, :, None]
        return Batch(text=text, latent=latent, proprio=proprio, action=None if action is None else action.float().clamp(-1, 1))

    def encoders_here(self):
        "The frozen encoders, on the device that LeRobot has brought the policy to."
        device = next(self.model.parameters()).device
        if device != self.placed:
            self.model.encoders.to(device)
            self.placed = device
        return self.model.encoders

    def forward(self, batch):
        "Loss of a batch with actions; numbers to log."
        loss, logs = self.model.loss(self.batch(batch))
        return loss, {k: float(v) for k, v in logs.items()}

    def update(self):
        "Take the weights after a step into their average; LeRobot calls it."
        decay = self.config.recipe.ema_decay if self.config.ema_decay < 0 else self.config.ema_decay
        self.average = self.average or EMA(self.model, decay)  # made here: the model has its device now
        self.steps += 1
        self.average.update(self.steps)

    def averaged(self): return self.average.averaged() if self.average else nullcontext()

    @torch.no_grad()
    def predict_action_chunk(self, batch, **kwargs):
        "Actions (B,K,A), normalised."
        self.eval()
        given = self.batch({k: v for k, v in batch.items() if k != "action"})
        if self.config.save_predicted_video: self.last_predicted_latents = self.predicted(given)
        with self.averaged(): return self.model.act(given, noise=kwargs.get("noise"))

    def predicted(self, batch):
        "GFDM's last predicted frame of the first environment's first camera, as latents (1,C,n,h,w), once for each action that is executed."
        frame = self.model.gfdm.sample(batch.latent[:1, :1, 0].to(self.model.device), batch.text[:1], self.config.predicted_steps)[:, 0, -1]
        return frame[:, :, None].repeat(1, 1, self.config.n_action_steps, 1, 1)

    def decode_predicted_latents(self, latents):
        "Frames (n,H,W,3) uint8 of those latents; at each moment of a rollout, what was predicted for half a second later."
        return self.model.encoders.vae.decode(latents[0].transpose(0, 1)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def select_action(self, batch, **kwargs):
        "The next action (B,A), normalised."
        if not self.queue: self.queue.extend(self.predict_action_chunk(batch, **kwargs)[:, :self.config.n_action_steps].transpose(0, 1))
        return self.queue.popleft()

    def _save_pretrained(self, save_directory, state_dict=None):
        "Configuration and averaged weights, without the frozen GFDM, which the configuration names."
        self.config._save_pretrained(save_directory)
        with self.averaged(): tensors = {k: v.detach().cpu().contiguous().clone() for k, v in (state_dict or self.state_dict()).items() if not k.startswith("model.gfdm.")}
        save_file(tensors, save_directory/"model.safetensors")
