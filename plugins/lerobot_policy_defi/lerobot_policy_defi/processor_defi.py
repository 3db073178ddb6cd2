"What happens to a batch before the policy, and to its actions behind it: LeRobot's own steps."
from lerobot.processor import make_default_pre_post_processors


def make_defi_pre_post_processors(config, dataset_stats=None):
    "Rename, batch, device, normalise; and back."
    return make_default_pre_post_processors(config, dataset_stats, normalizer_device=config.device)
