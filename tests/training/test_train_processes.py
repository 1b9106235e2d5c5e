"""Training in two processes, and through the launcher."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
import yaml
from small_run import be_one_of_two, config, distance, free_port, values, write_world

from blip2fast import train as train_script
from blip2fast.kernels.philox import philox_state
from blip2fast.stage1 import model as stage1
from blip2fast.training import validation
from blip2fast.training.build import build_run
from blip2fast.training.engine import leave_processes
from blip2fast.training.log import read_metrics
from blip2fast.training.trainer import train

TRAIN = Path(train_script.__file__)
# Nothing random, and nothing that depends on how samples are spread: no dropout, texts of one
# length, and (stage 1, whose negatives are drawn) next to no learning.
STILL = {
    "model": {"dropout": 0.0},
    "data": {"max_txt_len": 4},
    "optim": {"lr": 1e-12, "min_lr": 0.0},
}
PLAIN = {"model": {"dropout": 0.0}, "data": {"max_txt_len": 3}}


def _quiet(_: str) -> None: ...


def _two(settings: dict[str, Any]) -> dict[str, Any]:
    """The same samples a step, on two processes."""
    return {**settings, "optim": {**settings.get("optim", {}), "batch_size": 2}}


def _work(rank: int, port: int, world: Path, outputs: Path) -> None:
    be_one_of_two(rank, port)
    train(config(world, outputs / "still", 1, **_two(STILL)), say=_quiet)
    _train_and_keep_seeds(world, outputs / "dropout", rank)
    for zero_stage in range(4):
        for stage in (1, 2):
            settings = _two(PLAIN) | {"zero_stage": zero_stage, "save_every": 3}
            train(config(world, outputs / f"{stage}-{zero_stage}", stage, **settings), say=_quiet)
    resume = {"zero_stage": 1, "resume": True, **_two(PLAIN)}
    train(config(world, outputs / "resumed", 2, **resume), say=_quiet)
    for zero_stage in (2, 3):
        _evaluate_with_known_captions(world, outputs / f"shares-{zero_stage}-{rank}", zero_stage)
    leave_processes()


def _train_and_keep_seeds(world: Path, output: Path, rank: int) -> None:
    """Train with dropout; keeps the seeds of its masks and negatives."""
    seeds: list[int] = []

    def drawn(device: torch.device) -> torch.Tensor:
        state = philox_state(device=device)
        if torch.is_grad_enabled():  # an evaluation's negatives are the same each time
            seeds.append(int(state[0]))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage1, "philox_state", drawn)
        train(config(world, output, 1, **_two({})), say=_quiet)
    output.with_name(f"seeds-{rank}.json").write_text(json.dumps(seeds))


def _evaluate_with_known_captions(world: Path, output: Path, zero_stage: int) -> None:
    """Evaluate with right captions of images 0, 2 and 5; keeps which images were asked for."""
    settings = config(world, output, 2, zero_stage=zero_stage)
    parts = build_run(settings, torch.distributed.get_rank(), 2)
    assert parts.held_out is not None
    records = parts.held_out.records
    asked: list[int] = []

    def write(model: Any, text: Any, images: Any, numbers: torch.Tensor, *_: Any, **__: Any) -> Any:
        asked.extend(numbers.tolist())
        return [records[i].captions[0] if i in (0, 2, 5) else "no" for i in numbers.tolist()]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(validation, "generate_texts", write)
        results = validation.validate(parts.model, parts, settings, lambda batch: batch)
    output.with_suffix(".json").write_text(json.dumps([asked, results["exact"]]))


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process under `one/`, of two under `two/`."""
    folder = tmp_path_factory.mktemp("processes")
    world = write_world(folder / "world")
    one = folder / "one"
    train(config(world, one / "still", 1, **STILL), say=_quiet)
    train(config(world, one / "2", 2, save_every=3, keep_last=9, **PLAIN), say=_quiet)
    # Stopped at step 3 by one process, to be continued by two.
    checkpoint = one / "2" / "checkpoints" / "step-00000003"
    target = folder / "two" / "resumed" / "checkpoints" / checkpoint.name
    target.mkdir(parents=True)
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    mp.spawn(_work, (free_port(), world, folder / "two"), nprocs=2)
    return folder


def _series(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(outputs: Path) -> None:
    """ITC and ITG of the whole batch, in training and in evaluation; ITM draws its negatives."""
    one, two = outputs / "one" / "still", outputs / "two" / "still"
    for name in ("loss_itc", "loss_itg", "eval_loss_itc", "eval_loss_itg", "eval_t2i_r1"):
        expected = _series(one, name)
        assert len(expected) == (1 if "eval" in name else 6)
        torch.testing.assert_close(_series(two, name), expected, rtol=1e-5, atol=0, msg=name)


@pytest.mark.slow
def test_each_process_and_step_drops_out_and_draws_by_a_seed_of_its_own(outputs: Path) -> None:
    steps = len(_series(outputs / "two" / "dropout", "loss"))
    seeds = [json.loads((outputs / "two" / f"seeds-{rank}.json").read_text()) for rank in (0, 1)]
    assert [len(own) for own in seeds] == [steps, steps]
    assert len({*seeds[0], *seeds[1]}) == 2 * steps


@pytest.mark.slow
def test_two_processes_train_as_one(outputs: Path) -> None:
    one = outputs / "one" / "2"
    for folder in ("2-0", "resumed"):
        two = outputs / "two" / folder
        first = 3 if folder == "resumed" else 0
        torch.testing.assert_close(
            _series(two, "loss"), _series(one, "loss")[first:], rtol=1e-5, atol=0
        )
        torch.testing.assert_close(
            _series(two, "eval_loss"), _series(one, "eval_loss"), rtol=1e-5, atol=0
        )


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_zero_stages_train_alike_on_two_processes(
    outputs: Path, stage: int, zero_stage: int
) -> None:
    reference = outputs / "two" / f"{stage}-0"
    spread = outputs / "two" / f"{stage}-{zero_stage}"
    torch.testing.assert_close(
        _series(spread, "loss"), _series(reference, "loss"), rtol=2e-6, atol=0
    )
    assert distance(spread, reference) < 3e-4


@pytest.mark.slow
def test_processes_share_what_they_write_in_evaluation(outputs: Path) -> None:
    """Each its part of the images, one score for all; under ZeRO-3 they stay in step instead."""

    def seen(zero_stage: int, rank: int) -> Any:
        return json.loads((outputs / "two" / f"shares-{zero_stage}-{rank}.json").read_text())

    assert [seen(2, rank) for rank in (0, 1)] == [[[0, 2, 4, 6], 3 / 8], [[1, 3, 5, 7], 3 / 8]]
    assert [seen(3, rank) for rank in (0, 1)] == [[list(range(8)), 3 / 8]] * 2


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    # what other tests of this process left there, Accelerate among them
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return subprocess.run(
        command, capture_output=True, text=True, env=kept | environment, timeout=300, check=False
    )


def test_half_a_launcher_is_refused(tmp_path: Path) -> None:
    """Before, DeepSpeed asked for mpi4py, with a traceback."""
    world = write_world(tmp_path / "world")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "out", 1)))
    done = _run([sys.executable, str(TRAIN), "--config", str(file)], RANK="0")
    assert done.returncode == 1
    told = "error: RANK is set in the environment, but not LOCAL_RANK, WORLD_SIZE, MASTER_ADDR"
    assert done.stderr.splitlines()[-1].startswith(told)


@pytest.mark.slow
def test_the_launcher_and_plain_python_train_alike(tmp_path: Path) -> None:
    world = write_world(tmp_path / "world")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "launched", 1, save_every=3)))
    launcher = str(Path(sys.executable).parent / "deepspeed")
    script = [str(TRAIN), "--config", str(file)]
    launched = _run([launcher, "--master_port", str(free_port()), *script])
    assert launched.returncode == 0, launched.stdout + launched.stderr
    second = tmp_path / "second.yaml"
    second.write_text(yaml.safe_dump(values(world, tmp_path / "after", 2)))
    then = ["--config", str(second), "--set", f"init_from={tmp_path / 'plain'}"]
    plain = _run([sys.executable, *script, "--set", f"output_dir={tmp_path / 'plain'}", *then])
    assert plain.returncode == 0, plain.stdout + plain.stderr
    assert "stage 1: 6 steps of 4 samples" in plain.stdout
    assert "stage 2: 6 steps of 4 samples" in plain.stdout
    assert "Warning" not in plain.stdout + plain.stderr
    names = {p.name for p in (tmp_path / "launched").iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "deepspeed.json",
        "history.jsonl",
        "manifest.json",
        "metrics.jsonl",
        "model.json",
        "model.safetensors",
        "report.html",
        "tensorboard",
    }
    losses = [_series(tmp_path / name, "loss") for name in ("launched", "plain")]
    assert losses[0] == losses[1]
    again = _run([sys.executable, *script])
    assert again.returncode == 1
    assert again.stderr.startswith("error: the run cannot start:\n  output_dir")


def test_bad_input_is_one_error_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(tmp_path, tmp_path / "out")))
    with pytest.raises(SystemExit) as refused:
        train_script.main(["--config", str(file), "--set", "optim.learning_rate=1"])
    assert str(refused.value) == (
        f"error: {file}:\n  optim.learning_rate: no such key; the nearest is optim.lr"
    )


def test_several_configurations_run_in_order_each_with_its_overrides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "one.yaml", tmp_path / "two.yaml"]
    for stage, file in enumerate(files, 1):
        file.write_text(yaml.safe_dump(values(tmp_path, tmp_path / str(stage), stage)))
    runs: list[Any] = []
    monkeypatch.setattr("blip2fast.training.trainer.train", runs.append)
    one, two = (["--config", str(file)] for file in files)
    train_script.main([*one, "--set", "seed=3", "--set", "optim.lr=0.5", *two, "--set", "seed=4"])
    assert [(run.stage, run.seed, run.optim.lr) for run in runs] == [(1, 3, 0.5), (2, 4, 1e-2)]
    with pytest.raises(SystemExit):
        train_script.main([*one, *two, "--set", "seed=x"])
    assert len(runs) == 2, "nothing runs where a later configuration is refused"
    with pytest.raises(SystemExit):
        train_script.main(["--set", "seed=3", *one])
    assert (
        "--set seed=3: comes before the --config or --resume that it changes"
        in capsys.readouterr().err
    )


def test_cores_are_shared_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    for processes, given, expected in (("2", None, "3"), ("8", None, "1"), ("2", "5", "5")):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given is not None:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        train_script._share_cores()
        assert os.environ["OMP_NUM_THREADS"] == expected


def test_the_script_imports_the_package_and_not_its_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a script its folder comes first on the path, where `kernels` hides another package."""
    monkeypatch.setattr(sys, "path", [str(TRAIN.parent), "/elsewhere"])
    train_script._import_from_repository()
    assert sys.path == [str(TRAIN.parent.parent), "/elsewhere"]
