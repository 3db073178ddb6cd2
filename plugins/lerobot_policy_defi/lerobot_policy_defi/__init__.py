"DeFI's policies for LeRobot; importing this registers the type `defi`."
from .configuration_defi import DefiConfig

__all__ = ["DefiConfig"]
