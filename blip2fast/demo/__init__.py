"""The demo: embedded scenes, two small towers, both stages, one table.

python -m blip2fast.demo                       drawn shapes, into runs/scenes
python -m blip2fast.demo --source digits       handwritten digits, into runs/digits
"""

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.demo.table import check_gates

__all__ = ["check_gates"]

_NAMES = {"check_gates": "table"}

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
