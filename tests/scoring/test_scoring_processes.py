"""Two processes have the predictions and the numbers of one; a fault is reported once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing as mp
from scoring_cases import NAMES, questions, setup
from small_run import be_one_of_two, free_port

from blip2fast.inference.inputs import GenerationOptions
from blip2fast.scoring.retrieving import evaluate_retrieval
from blip2fast.scoring.writing import evaluate_answers, evaluate_captions

QUICK: GenerationOptions = {"num_beams": 1, "max_new_tokens": 4}
TASKS = ("caption", "vqa", "retrieval")


def evaluate_all(world: Path, out: Path) -> list[dict[str, Any] | None]:
    damaged = world / "pictures" / "damaged"
    return [
        evaluate_captions(setup(world, out / "caption", 2, images=damaged), None, QUICK),
        evaluate_answers(setup(world, out / "vqa", 2, questions(world)), None, QUICK),
        evaluate_retrieval(setup(world, out / "retrieval", 1, images=damaged, batch_size=2), 2),
    ]


def _work(rank: int, port: int, world: Path, folder: Path) -> None:
    be_one_of_two(rank, port)
    results = evaluate_all(world, folder / "two")
    assert [result is None for result in results] == [rank == 1] * 3
    fault = ""
    try:
        evaluate_captions(setup(world, folder / "fault", 1), None, QUICK)
    except (ValueError, SystemExit) as error:
        fault = f"{type(error).__name__}: {error}"
    (folder / f"fault{rank}").write_text(fault)


@pytest.fixture(scope="module")
def done(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which one process, and two, have evaluated."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(_work, (free_port(), world, folder), nprocs=2)
    evaluate_all(world, folder / "one")
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_find_what_one_finds(done: Path, task: str) -> None:
    one, two = (done / name / task for name in ("one", "two"))
    assert (one / "predictions.jsonl").read_bytes() == (two / "predictions.jsonl").read_bytes()
    first, second = (json.loads((each / "result.json").read_text()) for each in (one, two))
    assert (first["conditions"]["processes"], second["conditions"]["processes"]) == (1, 2)
    for name in ("metrics", "failed", "samples"):
        assert first[name] == second[name]
    parts = [path.stat().st_size for path in sorted((two / "batches").iterdir())]
    assert len(parts) == 2
    if task != "retrieval":  # so few images are one unit of matching
        assert min(parts) > 50


def test_a_fault_is_reported_by_the_first_process_alone(done: Path) -> None:
    first, second = ((done / f"fault{rank}").read_text() for rank in (0, 1))
    assert first.startswith("ValueError: ")
    assert "was trained in stage 1" in first
    assert second == "StoppedElsewhereError: 1"


def test_the_command(world: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "blip2fast", "eval", "caption"]
    command += ["--model", str(world / "stage2" / "run"), "--data", str(world / "flickr.json")]
    command += ["--images", str(world / "pictures" / "damaged"), "--num-beams", "1"]
    command += ["--max-new-tokens", "4", "--batch-size", "3", "--length-penalty", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr  # a picture could not be used
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["CIDEr-D", "ROUGE-L"]
    assert lines[-1] == f"6 of 7 samples; {tmp_path / 'out' / 'result.json'}"
    assert lines[-2].startswith(f"not evaluated: 4: image {world / 'pictures' / 'damaged'}")
    rows = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(row)["image"] for row in rows] == NAMES
