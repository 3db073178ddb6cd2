"The embedded simulator as LeRobot's environment `playtable`; importing this registers it."
from .configuration_playtable import PlayTableConfig

__all__ = ["PlayTableConfig"]
