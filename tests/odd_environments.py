"Environments that hang and die, apart from the tests, so that their processes import nothing else."
import ctypes
import os

import numpy as np

from defi_nb.benchmarks.subprocess_env import EnvProcess
from defi_nb.sim.playtable import PlayTable


class Hanging:
    "Hangs at a reset, in foreign code that doesn't let go of Python's lock."
    def reset(self): ctypes.PyDLL(None).sleep(600)
    def get_obs(self): return {"robot_obs": np.zeros(15), "rgb_obs": {"rgb_static": np.zeros((2, 2, 3), np.uint8)}}
    def close(self): pass


class Mortal(PlayTable):
    "Ends its process at the 15th step, unless that has happened before."
    def __init__(self, flag, *args):
        self.flag, self.count = flag, 0
        super().__init__(*args)

    def step(self, action):
        self.count += 1
        if self.count == 15 and not self.flag.exists():
            self.flag.touch()
            os._exit(9)
        return super().step(action)


def mortal_env(config, flag): return EnvProcess(Mortal, flag, config.scene, config.static_size, config.gripper_size)
