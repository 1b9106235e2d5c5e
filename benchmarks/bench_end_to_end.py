"""Whole runs, from files to the optimiser's step or to captions: what a user waits for.

Training runs by `blip2fast.training.trainer.train`, which reads captions of changing lengths
through the run's own loader, and logs; a folder is captioned as by `blip2fast caption`. The rivals
are plain loops over transformers' modules and a plain DataLoader, with the same weights, samples,
batch size and workers. In training the first losses must be the same, of captions all words.

A time is that of a step, or of a batch of pictures; what comes before the steps, such as loading,
is not counted. Results have pairs or pictures a second, and the share of each part of the run.
"""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import pytest
import torch
from caption_models import their_model
from comparing import Contender, Provider, plain
from our_runs import JUDGED, Steps, train_steps
from our_runs import caption_folder as our_captions
from run_files import RunFiles, language_words, run_config, write_files, write_pictures
from shapes import (
    CACHED_RUNS,
    CAPTION_SHAPES,
    PICTURE_RUNS,
    STAGE2_RUNS,
    CaptionShape,
    RunShape,
    cells,
)
from textbook_runs import TextbookRun, compile_layers, read_pictures
from textbook_runs import caption_folder as their_captions
from timing import WallClock
from transformers import Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from blip2fast import Blip2
from blip2fast.inference.picture_files import load_with
from blip2fast.training.build import build_run
from blip2fast.training.engine import start_processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of the losses, relative: of the first step, as of one repeated batch, and of those after an update
FIRST_LOSS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LATER_LOSSES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# of runs, and of those with an encoder, which take long
ROUNDS, PICTURE_ROUNDS = 3, 2
# batches that are read for the time of one
READS = 3
BEAMS = {"greedy": 1, "beam5": 5}  # the command's default is five
PICTURES = 32
COMPILED = ", layers compiled"


def run_cells(table: Mapping[str, RunShape], *dtypes: str) -> list[Any]:
    """Shapes by dtype; on a GPU bf16 alone."""
    return [
        pytest.param(name, dtype, marks=cell.marks, id=f"{name}-{dtype}")
        for cell in cells(table)
        for name in cell.values
        for dtype in dtypes
        if table[name].where != "cuda" or dtype == "bf16"
    ]


@pytest.fixture(scope="module")
def files_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunShape], RunFiles]:
    """What the runs of a shape read, written once."""
    made: dict[int, RunFiles] = {}

    def of(shape: RunShape) -> RunFiles:
        if id(shape) not in made:
            count = min(shape.batch * (JUDGED + shape.steps + 2 * shape.workers + 1), 2048)
            made[id(shape)] = write_files(tmp_path_factory.mktemp("run"), shape, count)
        return made[id(shape)]

    return of


@pytest.fixture
def compare_runs(
    files_of: Callable[[RunShape], RunFiles],
    compare: Callable[..., None],
    device: torch.device,
    compiled: bool,
    tmp_path: Path,
    conditions: dict[str, Any],
    request: pytest.FixtureRequest,
    benchmark: Any,
) -> Callable[[RunShape, torch.dtype], None]:
    """Time a training run beside its rivals."""

    def run(shape: RunShape, dtype: torch.dtype) -> None:
        rounds = ROUNDS if shape.vision is None else PICTURE_ROUNDS
        files, kernels = files_of(shape), request.config.getoption("kernels")
        config = run_config(shape, files, tmp_path / "run", dtype, kernels)
        start_processes()
        parts = build_run(config, 0, 1)
        names = ["textbook"]
        if compiled and shape.headline:
            names.append(f"textbook{COMPILED}")
        rivals = {
            name: TextbookRun(shape, files, config, parts, device, dtype, COMPILED in name)
            for name in names
        }
        reads: dict[str, Callable[[int], Any]] = {"blip2fast": parts.batches.__getitem__}
        reads |= {name: rival.read for name, rival in rivals.items()}
        del parts
        expected = rivals["textbook"](0).losses  # which begins with our weights just once

        def ours(steps: int) -> Steps:
            shutil.rmtree(config.output_dir, ignore_errors=True)
            return train_steps(config, steps)

        def agree(_: None, losses: list[float]) -> None:
            assert len(losses) == len(expected) == JUDGED
            for step, (found, want) in enumerate(zip(losses, expected, strict=True)):
                bound = LATER_LOSSES[dtype] if step else FIRST_LOSS[dtype]
                error = abs(found - want) / abs(want)
                assert error < bound, f"loss of step {step + 1}: {found}, textbook {want}"

        calls: dict[str, Callable[[int], Steps]] = {"blip2fast": ours, **rivals}
        providers = {name: provider_of(call, shape.steps) for name, call in calls.items()}
        known = {"textbook": plain(lambda _: expected)}
        conditions["pillow"] = PIL.__version__
        compare(providers, lambda seed: None, agree, dtype=dtype, judged=known, rounds=rounds)
        add_rates(benchmark, "pairs_per_s", shape.batch, reads)

    return run


def provider_of(call: Callable[[int], Steps], steps: int) -> Provider[None]:
    """A run whose first losses are compared, and whose steps are timed."""
    contender = Contender(
        {"": lambda: call(0).losses}, replayable=False, own_times=lambda: call(steps).times()
    )
    return lambda inputs: contender


def add_rates(
    benchmark: Any, name: str, count: int, reads: Mapping[str, Callable[[int], Any]]
) -> None:
    """Beside the times: pairs or pictures a second, shares of parts, how long a batch is read.

    Args:
        benchmark: its results.
        name, count: what a second has, and how many of them a batch.
        reads: read a batch by its number, in this process.
    """
    for who, result in benchmark.extra_info.get("contenders", {}).items():
        if "median_s" in result:
            result[name] = count / result["median_s"]
            total = sum(result["phases_s"].values())
            result["shares"] = {part: s / total for part, s in result["phases_s"].items()}
            calls = [partial(reads[who], number) for number in range(READS)]
            result["reading_s"] = statistics.median(WallClock().laps(calls))


@pytest.mark.parametrize(("name", "dtype"), run_cells(CACHED_RUNS, "fp32", "bf16"))
def bench_cached(name: str, dtype: str, compare_runs: Callable[..., None]) -> None:
    """Stage 1 on cached features."""
    compare_runs(CACHED_RUNS[name], DTYPES[dtype])


@pytest.mark.parametrize(("name", "dtype"), run_cells(PICTURE_RUNS, "fp32", "bf16"))
def bench_pictures(name: str, dtype: str, compare_runs: Callable[..., None]) -> None:
    """Stage 1 on JPEG files, with the frozen encoder in the loop."""
    compare_runs(PICTURE_RUNS[name], DTYPES[dtype])


@pytest.mark.parametrize(("name", "dtype"), run_cells(STAGE2_RUNS, "fp32"))
def bench_stage2(name: str, dtype: str, compare_runs: Callable[..., None]) -> None:
    """Stage 2 on cached features."""
    compare_runs(STAGE2_RUNS[name], DTYPES[dtype])


Captioned = tuple[list[str], dict[str, float]]


class Captioners:
    """A folder of JPEG files, a BLIP-2 of transformers with its processor, and ours from there.

    Args:
        folder: an empty one.
        shape: of the model; `beams`: of the search.
        device: of both models.
    """

    def __init__(self, folder: Path, shape: CaptionShape, beams: int, device: torch.device) -> None:
        self._out, self._model, self._batch = folder / "out.jsonl", folder / "model", shape.batch
        size = shape.vision.image_size
        their_model(shape, torch.device("cpu")).save_pretrained(self._model)
        Blip2Processor(
            BlipImageProcessorPil(size={"height": size, "width": size}),
            language_words(shape.language.vocab_size, ["<image>"]),
            num_query_tokens=shape.qformer.num_query_tokens,
        ).save_pretrained(self._model)
        self.processor = Blip2Processor.from_pretrained(self._model)
        self.ours, self._device = Blip2.from_pretrained(self._model, device=device), device
        self._load = load_with(self.ours.transform)
        (folder / "pictures").mkdir()
        count = PICTURES if shape.where == "cpu" else READS * shape.batch + 1
        names = write_pictures(folder / "pictures", count, 640, 480)
        self.pictures = [folder / "pictures" / each for each in names]
        self._settings = {"batch": shape.batch, "beams": beams, "new_tokens": shape.new_tokens}

    def our_call(self) -> Captioned:
        """Captions by ours, and seconds by part."""
        self._out.unlink(missing_ok=True)
        return our_captions(self.ours, self.pictures, self._out, **self._settings)

    def their_call(self, compiled: bool = False) -> Callable[[], Captioned]:
        """The same by transformers."""
        model = Blip2ForConditionalGeneration.from_pretrained(self._model).to(self._device).eval()
        if compiled:
            compile_layers(model)
        return partial(their_captions, model, self.processor, self.pictures, **self._settings)

    def our_read(self, number: int) -> None:
        """Read a batch of pictures."""
        for path in self._some(number):
            self._load(path)

    def their_read(self, number: int) -> None:
        """The same."""
        read_pictures(self.processor, self._some(number))

    def _some(self, number: int) -> list[Path]:
        return self.pictures[number * self._batch :][: self._batch]


FOLDERS = {
    name: shape
    for name, shape in CAPTION_SHAPES.items()
    if shape.where != "cuda" and not shape.language.is_encoder_decoder
}


@pytest.mark.parametrize("search", list(BEAMS))
@pytest.mark.parametrize("name", cells(FOLDERS))
def bench_caption_folder(
    name: str,
    search: str,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
    conditions: dict[str, Any],
    tmp_path: Path,
    benchmark: Any,
) -> None:
    """A folder of JPEG files to a file of captions."""
    shape = FOLDERS[name]
    both = Captioners(tmp_path, shape, BEAMS[search], device)
    calls = {"blip2fast": both.our_call, "transformers": both.their_call()}
    if compiled:
        calls[f"transformers{COMPILED}"] = both.their_call(compiled=True)
    count, expected = len(both.pictures), calls["transformers"]()[0]
    assert len(expected) == count
    assert len(set(expected)) > 1, "captions must depend on images"

    def agree(_: None, captions: list[str]) -> None:
        differing = sum(a != b for a, b in zip(captions, expected, strict=True))
        assert not differing, f"{differing} of {count} captions are not those of transformers"

    def provider(call: Callable[[], Captioned]) -> Provider[None]:
        def times() -> dict[str, float]:
            return {part: s * shape.batch / count for part, s in call()[1].items()}

        contender = Contender({"": lambda: call()[0]}, replayable=False, own_times=times)
        return lambda inputs: contender

    conditions["pillow"] = PIL.__version__
    providers = {each: provider(call) for each, call in calls.items()}
    compare(providers, lambda seed: None, agree, dtype=shape.dtype, rounds=ROUNDS)
    reads = dict.fromkeys(calls, both.their_read) | {"blip2fast": both.our_read}
    add_rates(benchmark, "images_per_s", shape.batch, reads)
