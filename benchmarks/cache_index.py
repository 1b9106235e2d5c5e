"""What a process pays for the names of a feature cache: memory that it holds, time to open it.

Caches of tiny features with n names; each is opened in a fresh process, as a run opens its own. A
worker that is forked from it shares the names until it looks one up: Python counts references in
the objects themselves, so the page of each is copied.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# 129 million names are at the same place between two doublings of a dict
SIZES = (250_000, 500_000, 1_000_000)

# what each of 16 x 8 workers looks up of 129 million names in 420 million samples
LOOKED_UP = 0.025


def key(number: int) -> str:
    """A name such as large data sets have: `00012/000123456.jpg`."""
    return f"{number // 10_000:05d}/{number:09d}.jpg"


def write(path: Path, images: int) -> None:
    """A cache of n images of one token of width 1."""
    import torch

    from blip2fast.data.feature_cache import FeatureCache

    keys = [key(n) for n in range(images)]
    with FeatureCache.create(path, keys, 1, 1, "bfloat16") as writer:
        writer.write(0, torch.zeros(images, 1, 1))


def opened(path: Path) -> dict[str, float]:
    """What this process holds more once it has opened a cache, and what a forked one copies of it.

    Returns:
        `bytes` that are private, `seconds` of opening, and `copied_bytes` by a worker that has
        looked up `LOOKED_UP` of the names.
    """
    import psutil

    from blip2fast.data.feature_cache import FeatureCache

    process = psutil.Process()
    gc.collect()
    before, start = process.memory_full_info().uss, time.perf_counter()
    cache = FeatureCache(path)
    seconds = time.perf_counter() - start
    gc.collect()
    held = process.memory_full_info().uss - before
    fork = multiprocessing.get_context("fork")
    receiving, sending = fork.Pipe(duplex=False)
    worker = fork.Process(target=_look_up, args=(cache, sending))
    worker.start()
    copied = receiving.recv()
    worker.join()
    return {"bytes": held, "seconds": seconds, "copied_bytes": copied}


def _look_up(cache: Any, sending: Any) -> None:
    import psutil

    process, draw = psutil.Process(), random.Random(0)
    gc.freeze()
    before = process.memory_full_info().uss
    for number in draw.sample(range(len(cache)), round(LOOKED_UP * len(cache))):
        cache.row(key(number))
    sending.send(process.memory_full_info().uss - before)


def measure(sizes: Sequence[int] = SIZES) -> dict[int, dict[str, float]]:
    """By number of names, what `opened` finds in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for images in sizes:
            path = Path(folder) / str(images)
            write(path, images)
            done = subprocess.run(
                [sys.executable, __file__, str(path)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                check=True,
            )
            found[images] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    told: dict[str, Any] = opened(Path(sys.argv[1]))
    print(json.dumps(told))
