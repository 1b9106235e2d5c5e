"""Search among a million images on a CPU: time of each step, what is read, recall of the quick way.

    python benchmarks/search_speed.py --images 1000000
    python benchmarks/search_speed.py --run runs/scenes/stage1 --scenes 10000

Random features are the worst case for a search: no axis holds more of them than another. They are
drawn for 20,000 images and their codes repeated, so that a million fit into little memory.
Features of a trained model say what the bounds are worth. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from blip2fast.search.coding import Basis, bounds_of_texts
from blip2fast.search.scan import nearest

Q, D = 32, 256
DRAWN = 20_000


def measured(work: Callable[[], Any], repeats: int = 7) -> dict[str, float]:
    """Milliseconds: least and median of the wall clock, and the least that this thread computed.

    With one thread the last is what a core takes, also where others use the machine.
    """
    work()
    wall, core = [], []
    for _ in range(repeats):
        start, used = time.perf_counter(), time.thread_time()
        work()
        wall.append(1e3 * (time.perf_counter() - start))
        core.append(1e3 * (time.thread_time() - used))
    return {
        "least_ms": round(min(wall), 1),
        "median_ms": round(statistics.median(wall), 1),
        "least_thread_ms": round(min(core), 1),
    }


def recall(found: Tensor, true: Tensor) -> float:
    """Share of the k best that were found; of equal scores any counts."""
    return (found >= true.amin() - 1e-6).float().mean().item()


def random_features(count: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    parts = [
        normalize(torch.randn(2000, Q, D, generator=draw), dim=-1) for _ in range(count // 2000)
    ]
    return torch.cat([part.half() for part in parts])


def on_random(images: int, width: int, texts: int = 10) -> dict[str, Any]:
    drawn = min(images, DRAWN)
    features = random_features(drawn, 0)
    queries = normalize(torch.randn(texts, D, generator=torch.Generator().manual_seed(1)), dim=-1)
    basis = Basis.fit(features[:8000], width)
    parts = [basis.encode(some) for some in features.split(2000)]
    losses = torch.stack([each for _, each in parts]).amax(0)
    codes = torch.cat([each for each, _ in parts])
    found: dict[str, Any] = {"images": images, "queries": Q, "width": D, "code_width": width}
    # what a limit on a million images leaves of those drawn
    exact: list[int] = []
    quick: dict[int, list[float]] = {drawn // 1000: [], drawn // 250: [], drawn // 100: []}
    for query in queries:
        bounds = bounds_of_texts(basis, codes, losses, query[None])[0]
        scores = torch.cat([(some.float() @ query).amax(1) for some in features.split(2000)])
        true = scores.topk(10).values
        exact.append(nearest(bounds, lambda rows, s=scores: s[rows], 10).read)
        coarse = bounds_of_texts(basis, codes, losses, query[None], False)[0]
        for limit, recalls in quick.items():
            near = nearest(coarse, lambda rows, s=scores: s[rows], 10, limit)
            recalls.append(recall(near.similarity, true))
    found["of_drawn"] = drawn
    found["exact_reads_median"] = statistics.median(exact)
    found["recall_at_10"] = {k: round(statistics.mean(v), 3) for k, v in quick.items()}
    codes = codes.repeat(images // drawn, 1, 1)
    found["codes_gb"] = codes.numel() / 1e9
    found["read_codes"] = measured(lambda: codes.view(torch.int64).sum())
    query = queries[0]

    def similarity(rows: Tensor) -> Tensor:
        return (features[rows % drawn].float() @ query).amax(1)

    bounds = bounds_of_texts(basis, codes, losses, query[None])[0]
    for name, fine in (("coarse_bounds", False), ("fine_bounds", True)):
        found[name] = measured(
            lambda how=fine: bounds_of_texts(basis, codes, losses, query[None], how)
        )
    found["best_of_1000"] = measured(lambda: nearest(bounds, similarity, 10, 1000))
    four = queries[:4]
    found["coarse_bounds_of_4_texts"] = measured(
        lambda: bounds_of_texts(basis, codes, losses, four, False), 3
    )
    return found


def on_scenes(run: Path, scenes: int, encoder: str | None, widths: list[int]) -> dict[str, Any]:
    """The bounds on features of a run of the embedded scenes."""
    import random

    from blip2fast import Blip2Retriever
    from blip2fast.scenes import SceneSpec, captions, make_split

    retriever = Blip2Retriever.from_pretrained(run, image_encoder=encoder)
    split = make_split(SceneSpec(), "train", scenes, seed=3)
    parts = [
        retriever.encode_images([image.transpose(1, 2, 0) for image in split.images[i : i + 64]])
        for i in range(0, scenes, 64)
    ]
    features = torch.cat(parts).half()
    draw = random.Random(0)
    texts = [captions(scene, 1, draw)[0] for scene in split.scenes[:100]]
    queries = retriever.encode_texts(texts)
    found: dict[str, Any] = {"images": scenes, "shape": list(features.shape[1:]), "texts": 100}
    for width in widths:
        basis = Basis.fit(features[::4], width)
        codes, losses = basis.encode(features)
        bounds = bounds_of_texts(basis, codes, losses, queries)
        coarse = bounds_of_texts(basis, codes, losses, queries, False)
        reads: list[int] = []
        recalls: dict[int, list[float]] = {1: [], 2: []}
        for query, bound, quick in zip(queries, bounds, coarse, strict=True):
            scores = (features.float() @ query).amax(1)
            true = scores.topk(10).values
            reads.append(nearest(bound, lambda rows, s=scores: s[rows], 10).read)
            for percent, values in recalls.items():
                limit = scenes * percent // 100
                near = nearest(quick, lambda rows, s=scores: s[rows], 10, limit)
                values.append(recall(near.similarity, true))
        found[f"code_width_{width}"] = {
            "exact_reads_median": statistics.median(reads),
            "exact_reads_most": max(reads),
            "recall_at_10_by_percent_read": {
                percent: round(statistics.mean(values), 4) for percent, values in recalls.items()
            },
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--code-width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", type=Path, help="a stage-1 run of the scenes, instead")
    parser.add_argument("--image-encoder", help="of that run, where it is now")
    parser.add_argument("--scenes", type=int, default=10_000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.run is not None:
        found = on_scenes(given.run, given.scenes, given.image_encoder, [17, 33, 65])
    else:
        found = on_random(given.images, given.code_width)
    print(json.dumps({"torch": torch.__version__, "threads": given.threads, **found}, indent=1))


if __name__ == "__main__":
    main()
