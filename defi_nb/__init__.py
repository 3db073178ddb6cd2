"A notebook-first workbench for DeFI; the names below are imported when they are first used."
from importlib import import_module

__version__ = "0.1.0"

_HOMES = {"Batch": "core.spec", "DataSpec": "core.spec", "PlayTable": "sim.playtable", "record_demonstrations": "data.record",
          "GFDM": "models.gfdm", "GIDM": "models.gidm", "CoupledPolicy": "models.policy", "PlainPolicy": "models.policy",
          "load_dataset": "data.load", "load_model": "weights.load", "TrainConfig": "train.config", "fit": "train.fit", "evaluate": "eval.evaluate"}
__all__ = [*_HOMES]


def __getattr__(name):
    if name not in _HOMES: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__(): return sorted({*globals(), *_HOMES})
