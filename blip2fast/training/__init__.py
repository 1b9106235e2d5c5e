"""Training runs: configuration, checks before the start, memory plan, engine and loop."""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.training.config import RunConfig
    from blip2fast.training.config_files import load_config, save_config
    from blip2fast.training.log import read_metrics
    from blip2fast.training.memory_plan import plan_memory
    from blip2fast.training.stopping import RunStopped
    from blip2fast.training.trainer import train

__all__ = [
    "RunConfig",
    "RunStopped",
    "load_config",
    "plan_memory",
    "read_metrics",
    "save_config",
    "train",
]

_NAMES = {
    "RunConfig": "config",
    "RunStopped": "stopping",
    "load_config": "config_files",
    "plan_memory": "memory_plan",
    "read_metrics": "log",
    "save_config": "config_files",
    "train": "trainer",
}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
