"""The demo: embedded scenes, two small towers, both stages, one table.

python -m blip2fast.demo                       drawn shapes, into runs/scenes
python -m blip2fast.demo --source digits       handwritten digits, into runs/digits
"""

from blip2fast.demo.table import check_gates

__all__ = ["check_gates"]
