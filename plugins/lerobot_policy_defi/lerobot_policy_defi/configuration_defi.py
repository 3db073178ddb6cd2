"What `--policy.type=defi` can be told; sizes and recipe follow from a preset of defi_nb's."
from dataclasses import dataclass, field

from lerobot.configs import FeatureType, NormalizationMode, PreTrainedConfig
from lerobot.optim import AdamWConfig, DiffuserSchedulerConfig

from defi_nb.core.spec import PRESETS, DataSpec, preset_of
from defi_nb.train.config import TrainConfig

KINDS = "coupled", "no_gidm", "plain"
STATE = "observation.state"


@PreTrainedConfig.register_subclass("defi")
@dataclass
class DefiConfig(PreTrainedConfig):
    "A coupled policy, or the plain one to compare it with."
    kind: str = "coupled"  # one of `KINDS`
    preset: str = "tiny"  # one of `core.spec.PRESETS`
    gfdm: str = "shipped"  # folder of a pretrained forward model; read by "coupled" and "no_gidm"
    gidm: str = "shipped"  # folder of a pretrained inverse model; read by "coupled"
    cameras: tuple[str, ...] = ()  # features that take the places of the static and the gripper camera; (): the first two
    proprio: bool = False  # whether the state is read, which must be CALVIN's robot_obs
    n_action_steps: int = 5  # of a chunk, executed before the policy is asked again
    save_predicted_video: bool = False  # whether lerobot-eval writes what GFDM predicts next to each rollout
    predicted_steps: int = 10  # denoising steps of those frames
    ema_decay: float = -1.0  # of the averaged weights; -1: the preset's, 0: none
    normalization_mapping: dict[str, NormalizationMode] = field(default_factory=lambda: {
        "VISUAL": NormalizationMode.IDENTITY, "STATE": NormalizationMode.IDENTITY, "ACTION": NormalizationMode.QUANTILES})

    def __post_init__(self):
        super().__post_init__()
        if self.kind not in KINDS: raise ValueError(f"kind is {self.kind!r}; choose one of {', '.join(KINDS)}")
        if self.preset not in PRESETS: raise ValueError(f"preset is {self.preset!r}; choose one of {', '.join(PRESETS)}")
        self.cameras = tuple(self.cameras)
        if self.save_predicted_video and self.kind == "plain": raise ValueError("save_predicted_video is true, and a plain policy predicts no frames: take kind coupled or no_gidm")
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(f"n_action_steps is {self.n_action_steps}: of a chunk of {self.chunk_size}, 1 to {self.chunk_size} can be executed")

    @property
    def spec(self): return preset_of(DataSpec, self.preset)

    @property
    def chunk_size(self): return self.spec.chunk

    @property
    def recipe(self): return TrainConfig.preset(self.preset, "policy")

    @property
    def camera_keys(self):
        "Features of the one or two cameras, in the order of axis V."
        return self.cameras or tuple(k for k, f in (self.input_features or {}).items() if f.type is FeatureType.VISUAL)[:2]

    @property
    def observation_delta_indices(self): return None  # the present alone: the future is predicted

    @property
    def action_delta_indices(self): return list(range(self.chunk_size))

    @property
    def reward_delta_indices(self): return None

    def get_optimizer_preset(self):
        r = self.recipe
        return AdamWConfig(lr=r.lr, betas=r.betas, weight_decay=r.weight_decay, grad_clip_norm=r.grad_clip or 1e9)

    def get_scheduler_preset(self): return DiffuserSchedulerConfig(name=self.recipe.schedule, num_warmup_steps=self.recipe.warmup)

    def validate_features(self):
        known = self.input_features or {}
        if not self.camera_keys: raise ValueError("the dataset has no camera: this policy needs one or two")
        if missing := [k for k in self.camera_keys if k not in known]: raise ValueError(f"there is no camera {missing[0]!r}; the dataset has {', '.join(known)}")
        if len(self.camera_keys) > 2: raise ValueError(f"cameras are {self.camera_keys}: give one or two")
        if self.action_feature is None: raise ValueError("the dataset has no action: this policy predicts them")
        if self.proprio and (STATE not in known or tuple(known[STATE].shape) != (15,)):
            raise ValueError("proprio is true, and the state is not CALVIN's robot_obs of 15 numbers: give --policy.proprio=false")
