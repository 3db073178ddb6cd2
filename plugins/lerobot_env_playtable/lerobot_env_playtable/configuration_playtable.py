"What `--env.type=playtable` can be told."
from dataclasses import dataclass, field

from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import EnvConfig

from defi_nb.core.spec import ACTION_DIM, CONTROL_HZ, VIEWS


@EnvConfig.register_subclass("playtable")
@dataclass
class PlayTableConfig(EnvConfig):
    "One or several of CALVIN's tasks in one or several scenes."
    task: str | None = "open_drawer"  # or several, separated by commas
    scene: str = "D"  # see `defi_nb.sim.layout.scene_names`
    fps: int = CONTROL_HZ
    episode_length: int = 360  # control steps, at most
    image_size: int = 64  # height and width of both cameras' images, pixels
    features: dict[str, PolicyFeature] = field(default_factory=dict)  # filled in below, as the map is
    features_map: dict[str, str] = field(default_factory=lambda: {
        "action": "action", "agent_pos": "observation.state", **{f"pixels/{v}": f"observation.images.{v}" for v in VIEWS}})

    def __post_init__(self):
        image = PolicyFeature(type=FeatureType.VISUAL, shape=(self.image_size, self.image_size, 3))
        self.features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTION_DIM,)),
                         "agent_pos": PolicyFeature(type=FeatureType.STATE, shape=(15,)), **{f"pixels/{v}": image for v in VIEWS}}

    @property
    def package_name(self): return "defi_nb.sim.gym_env"  # importing it registers the environment

    @property
    def gym_id(self): return "defi_nb/PlayTable-v0"

    @property
    def gym_kwargs(self):
        tasks = tuple(t.strip() for t in self.task.split(","))
        sizes = dict(static_size=self.image_size, gripper_size=self.image_size, max_episode_steps=self.episode_length)
        return dict(scene=self.scene, task=tasks, render_mode="rgb_array") | sizes
