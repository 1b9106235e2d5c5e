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
from collections.abc import Callable, Mapping
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
from textbook_runs import TextbookRun, compile_layers
from textbook_runs import caption_folder as their_captions
from transformers import Blip2ForConditionalGeneration, Blip2Processor, BlipImageProcessorPil

from blip2fast import Blip2
from blip2fast.training.build import build_run
from blip2fast.training.engine import start_processes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# of the losses, relative: of the first step, as of one repeated batch, and of those after an update
FIRST_LOSS = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
LATER_LOSSES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
ROUNDS = 3
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
        compare(providers, lambda seed: None, agree, dtype=dtype, judged=known, rounds=ROUNDS)
        add_rates(benchmark, "pairs_per_s", shape.batch)

    return run


def provider_of(call: Callable[[int], Steps], steps: int) -> Provider[None]:
    """A run whose first losses are compared, and whose steps are timed."""
    contender = Contender(
        {"": lambda: call(0).losses}, replayable=False, own_times=lambda: call(steps).times()
    )
    return lambda inputs: contender


def add_rates(benchmark: Any, name: str, count: int) -> None:
    """Pairs or pictures a second and the shares of parts, beside the times."""
    for result in benchmark.extra_info.get("contenders", {}).values():
        if "median_s" in result:
            result[name] = count / result["median_s"]
            total = sum(result["phases_s"].values())
            result["shares"] = {part: s / total for part, s in result["phases_s"].items()}


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


def write_captioner(folder: Path, shape: CaptionShape) -> None:
    """A BLIP-2 of transformers with its processor."""
    their_model(shape, torch.device("cpu")).save_pretrained(folder)
    size = shape.vision.image_size
    Blip2Processor(
        BlipImageProcessorPil(size={"height": size, "width": size}),
        language_words(shape.language.vocab_size, ["<image>"]),
        num_query_tokens=shape.qformer.num_query_tokens,
    ).save_pretrained(folder)


FOLDERS = {
    name: shape
    for name, shape in CAPTION_SHAPES.items()
    if shape.where != "cuda" and not shape.language.is_encoder_decoder
}


@pytest.mark.parametrize("name", cells(FOLDERS))
def bench_caption_folder(
    name: str,
    device: torch.device,
    compiled: bool,
    compare: Callable[..., None],
    conditions: dict[str, Any],
    tmp_path: Path,
    benchmark: Any,
) -> None:
    """A folder of JPEG files to a file of greedy captions."""
    shape = FOLDERS[name]
    write_captioner(tmp_path / "model", shape)
    (tmp_path / "pictures").mkdir()
    count = PICTURES if shape.where == "cpu" else 2 * shape.batch + 1
    names = write_pictures(tmp_path / "pictures", count, 640, 480)
    pictures = [tmp_path / "pictures" / each for each in names]
    ours = Blip2.from_pretrained(tmp_path / "model", device=device)
    theirs = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model").to(device).eval()
    processor = Blip2Processor.from_pretrained(tmp_path / "model")
    settings = {"batch": shape.batch, "new_tokens": shape.new_tokens}

    def our_call() -> tuple[list[str], dict[str, float]]:
        out = tmp_path / "captions.jsonl"
        out.unlink(missing_ok=True)
        return our_captions(ours, pictures, out, **settings)

    def their_call(
        model: Blip2ForConditionalGeneration,
    ) -> tuple[list[str], dict[str, float]]:
        return their_captions(model, processor, pictures, **settings)

    calls = {"blip2fast": our_call, "transformers": lambda: their_call(theirs)}
    if compiled:
        again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "model").to(device).eval()
        compile_layers(again)
        calls[f"transformers{COMPILED}"] = lambda: their_call(again)
    expected = their_call(theirs)[0]
    assert len(expected) == count
    assert len(set(expected)) > 1, "captions must depend on images"

    def agree(_: None, captions: list[str]) -> None:
        differing = sum(a != b for a, b in zip(captions, expected, strict=True))
        assert not differing, f"{differing} of {count} captions are not those of transformers"

    def provider(call: Callable[[], tuple[list[str], dict[str, float]]]) -> Provider[None]:
        def times() -> dict[str, float]:
            return {part: s * shape.batch / count for part, s in call()[1].items()}

        contender = Contender({"": lambda: call()[0]}, replayable=False, own_times=times)
        return lambda inputs: contender

    providers = {each: provider(call) for each, call in calls.items()}
    conditions["pillow"] = PIL.__version__
    compare(providers, lambda seed: None, agree, dtype=shape.dtype, rounds=ROUNDS)
    add_rates(benchmark, "images_per_s", shape.batch)
