"""The log of a run, read while it is written and after a kill."""

from __future__ import annotations

import errno
import math
import os
import re
import shlex
import sys
import threading
import time
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image
from small_run import config, write_world
from tensorboard.summary.writer.record_writer import RecordWriter

from blip2fast import checkpoints
from blip2fast.checkpoints.trained import Description
from blip2fast.command_line import main
from blip2fast.data.batches import PlannedBatches
from blip2fast.training import preflight
from blip2fast.training.faults import Faults
from blip2fast.training.finite import StepGate
from blip2fast.training.log import RunLog, read_metrics
from blip2fast.training.saving import how_to_use
from blip2fast.training.step_metrics import learning_rates
from blip2fast.training.trainer import train


def _quiet(_: str) -> None: ...


FIRST, SECOND = '{"step": 1, "loss": 3.0}\n', '{"step": 2, "loss": 2.5}\n'


@pytest.mark.parametrize("end", range(len(SECOND) + 1))
def test_a_last_line_without_its_end_is_left_out(tmp_path: Path, end: int) -> None:
    """Also where what is there of it would be a line: a number may go on."""
    (tmp_path / "metrics.jsonl").write_text(FIRST + SECOND[:end])
    expected = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.5}]
    assert read_metrics(tmp_path) == (expected if end == len(SECOND) else expected[:1])


def test_a_full_disk_is_named_by_file_and_ends_no_thread_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """TensorBoard writes in a thread: before, its traceback and an error without a file."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def train_long() -> None:
        with RunLog(tmp_path, 0, 1000, 1) as log:
            for step in range(1000):
                time.sleep(0.01)
                log.write(step, {"loss": 1.0})

    before = threading.excepthook
    monkeypatch.setattr(RecordWriter, "write", full)
    message = r"No space left on device: '.*/tensorboard'\. No checkpoint was saved$"
    with pytest.raises(OSError, match=message):
        train_long()
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is before


def test_an_error_of_closing_does_not_hide_the_one_before_it(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0, 10, 1)
    log._file.close()
    log._file = Path("/dev/full").open("w")  # noqa: SIM115 (closed by the log)
    log._file.write("a line")
    with pytest.raises(ValueError, match="the cause"), log:
        raise ValueError("the cause")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"step": 1, "lo\n' + SECOND, r"metrics.jsonl, line 1 is not JSON \(.*; delete it"),
        (FIRST + "\n", "metrics.jsonl, line 2 is not JSON"),
        (FIRST + '{"loss": 2.5}\n', "line 2: expected a step and its metrics, got '{\"loss"),
        (FIRST + "7\n", "line 2: expected a step and its metrics, got '7'"),
    ],
)
def test_other_damage_is_an_error_that_names_the_line(
    tmp_path: Path, lines: str, message: str
) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path)


def test_a_folder_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl: not a file; give the output folder"):
        read_metrics(tmp_path)


def test_a_resumed_log_goes_on_after_the_damaged_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(FIRST + SECOND + "\0\0\0\n" + '{"step": 4, "loss": 2.0}\n')
    log = RunLog(tmp_path, start_step=1, max_steps=4, stage=2)
    log.write(2, {"loss": 2.25})
    log.close()
    assert path.read_text() == FIRST + '{"step": 2, "loss": 2.25}\n'


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


STILL: dict[str, Any] = {"model": {"dropout": 0.0}, "optim": {"max_steps": 3, "warmup_steps": 1}}


def _lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run) if "lr" in line]


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_norm_is_the_same_under_every_zero_stage(
    world: Path, tmp_path: Path, stage: int
) -> None:
    """Before clipping; against the gradients that PyTorch leaves in the parameters."""
    norms: list[float] = []
    original = Faults.read_outcomes

    def kept(self: Faults, wait: bool) -> bool:
        if self._config.zero_stage == 0 and self._config.precision == "fp32":
            norms.append(float(self.gate.gradient_norm() or 0))
        return original(self, wait)

    def judged(self: StepGate, *given: Any) -> Any:
        parameters = self._engine.module.parameters()
        computed.append(
            math.hypot(*(float(p.grad.norm()) for p in parameters if p.grad is not None))
        )
        return judge(self, *given)

    computed: list[float] = []
    judge = StepGate.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Faults, "read_outcomes", kept)
        patch.setattr(StepGate, "judge", judged)
        train(config(world, tmp_path / "0", stage, **STILL), say=_quiet)
    found = [line["gradient_norm"] for line in _lines(tmp_path / "0")]
    assert found == pytest.approx(computed, rel=1e-5)
    assert found == norms
    for zero_stage in (2, 3):
        output = tmp_path / str(zero_stage)
        train(config(world, output, stage, zero_stage=zero_stage, **STILL), say=_quiet)
        spread = [line["gradient_norm"] for line in _lines(output)]
        assert spread == pytest.approx(found, rel=1e-4)
    train(config(world, tmp_path / "bf16", stage, precision="bf16", **STILL), say=_quiet)
    rounded = [line["gradient_norm"] for line in _lines(tmp_path / "bf16")]
    # then rounding may draw another hard negative in stage 1, which is another loss
    same = 1 if stage == 1 else len(found)
    assert rounded[:same] == pytest.approx(found[:same], rel=0.05)
    assert len(rounded) == len(found)


def test_a_line_has_what_the_page_says_and_nothing_else(world: Path, tmp_path: Path) -> None:
    said: list[str] = []
    log = RunLog.say
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunLog, "say", lambda self, line: (said.append(line), log(self, line))[0])
        last = train(config(world, tmp_path / "out", 1, **STILL), say=said.append)
    first = _lines(tmp_path / "out")[0]
    page = (Path(__file__).parents[2] / "docs" / "logs.md").read_text()
    rows = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+\*?)`", row)]
    patterns = [name.replace("*", ".*") for name in named]
    unknown = [key for key in first if not any(re.fullmatch(p, key) for p in patterns)]
    assert unknown == []
    needed = {name for name in named if "*" not in name and name != "skipped"}
    assert needed <= first.keys()
    assert 0 <= first["data_wait_share"] <= 1
    assert 0.1 < first["peak_memory_gib"] < 64
    assert first["temperature"] == pytest.approx(0.07, abs=0.02)
    held_out = [line for line in said if line.startswith("step 3, held-out data: ")]
    assert len(held_out) == 1
    assert f"t2i_r1 {last['eval_t2i_r1']:.4g}" in held_out[0]
    assert said[-1].startswith(f"model in {tmp_path / 'out'}; train stage 2 from it: --set init_fr")


def test_a_slow_source_is_what_the_run_waits_for(world: Path, tmp_path: Path) -> None:
    def slow(self: Any, number: int) -> Any:
        time.sleep(0.5)
        return original(self, number)

    original = PlannedBatches.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PlannedBatches, "take", slow)
        train(config(world, tmp_path, 2, **STILL, overwrite=True), say=_quiet)
    lines = _lines(tmp_path)
    assert all(line["data_wait_share"] >= 0.5 / line["seconds_per_step"] - 0.02 for line in lines)


def test_each_group_of_parameters_has_its_rate() -> None:
    same = [{"lr": 0.1, "params": []}, {"lr": 0.1, "params": []}]
    assert learning_rates(same) == {"lr": 0.1}
    apart = [{"lr": 0.1, "name": "new"}, {"lr": 0.01}, {"lr": 0.1, "name": "no_decay"}]
    assert learning_rates(apart) == {"lr": 0.1, "lr_new": 0.1, "lr_1": 0.01}


@pytest.mark.parametrize(
    ("stage", "encoder", "task", "expected"),
    [
        (
            1,
            "vit, block 12",
            "caption",
            "model in runs/a b; train stage 2 from it: --set init_from='runs/a b'",
        ),
        (2, "vit, block 12", "caption", "blip2fast caption --model 'runs/a b' IMAGE"),
        (2, "vit, block 12", "vqa", "blip2fast caption --model 'runs/a b' IMAGE --question"),
        (2, "own features", "caption", "blip2fast.checkpoints.load_trained('runs/a b')"),
        (2, "vit, block 12", "sequence", "blip2fast.checkpoints.load_trained('runs/a b')"),
    ],
)
def test_the_hint_at_the_end_is_a_command_that_exists(
    stage: int,
    encoder: str,
    task: str,
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("IMAGE", "PNG")  # the command looks at the picture first
    line = how_to_use("runs/a b", Description(stage, {}, encoder), task)
    assert line.startswith("model in runs/a b")
    assert expected in line
    command = line.partition("try: ")[2]
    if command.startswith("blip2fast caption"):
        with pytest.raises(SystemExit) as refused:
            main(shlex.split(command.removeprefix("blip2fast ")))
        told = f"{refused.value}{capsys.readouterr().err}"
        assert "runs/a b" in told
        assert "no such option" not in told.lower()
        assert "usage" not in told.lower()
    elif command:
        with pytest.raises(ValueError, match="runs/a b"):
            checkpoints.load_trained("runs/a b")


class _Wandb(ModuleType):
    """A stand-in for the package that notes its calls."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.calls: list[tuple[str, Any]] = []
        self.fails = ""

    def Settings(self, **given: Any) -> dict[str, Any]:
        return given

    def init(self, **given: Any) -> _Wandb:
        if self.fails == "init":
            raise self.Error("no API key configured")
        self.calls.append(("init", given))
        return self

    def define_metric(self, *given: Any, **named: Any) -> None:
        self.calls.append(("define_metric", (given, named)))

    def log(self, values: dict[str, float]) -> None:
        if self.fails == "log":
            raise self.Error("the service has ended")
        self.calls.append(("log", values))

    def finish(self, exit_code: int) -> None:
        self.calls.append(("finish", exit_code))


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> _Wandb:
    module = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_every_line_and_one_run(
    world: Path, tmp_path: Path, wandb: _Wandb
) -> None:
    output = tmp_path / "my_run"
    settings: dict[str, Any] = {**STILL, "save_every": 2, "log": {"wandb": "pairs"}}
    train(config(world, output, 2, **settings), say=_quiet)
    (start,) = [given for name, given in wandb.calls if name == "init"]
    assert (start["project"], start["name"], start["dir"]) == ("pairs", "my_run", str(output))
    assert start["config"]["optim"]["max_steps"] == 3
    logged = [given for name, given in wandb.calls if name == "log"]
    expected = []
    for line in read_metrics(output):
        step = line.pop("step")
        tags = {
            (f"eval/{n[5:]}" if n.startswith("eval_") else f"train/{n}"): v for n, v in line.items()
        }
        expected.append({"step": step, **tags})
    assert logged == expected
    assert wandb.calls[-1] == ("finish", 0)
    wandb.calls.clear()
    train(config(world, output, 2, resume=True, **settings), say=_quiet)
    again = wandb.calls[0][1]
    assert (again["id"], again["resume"]) == (start["id"], "allow")
    wandb.calls.clear()
    train(config(world, output, 2, overwrite=True, **settings), say=_quiet)
    assert wandb.calls[0][1]["id"] != start["id"]


def test_weights_and_biases_that_fails_is_a_line(
    world: Path, tmp_path: Path, wandb: _Wandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(world, tmp_path / "out", 2, **STILL, log={"wandb": True})
    said: list[str] = []
    monkeypatch.setattr(RunLog, "say", lambda self, line: said.append(line))
    wandb.fails = "log"
    train(run, say=_quiet)
    assert sum("the service has ended: no more is sent" in line for line in said) == 1
    assert (tmp_path / "out" / "model.safetensors").is_file()
    wandb.fails = "init"
    message = "log.wandb: no API key configured: run `wandb login`, or set WANDB_MODE=offline"
    with pytest.raises(ValueError, match=message):
        train(replace(run, overwrite=True), say=_quiet)
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"wandb True needs wandb, which is not installed"):
        train(replace(run, output_dir=str(tmp_path / "new")), say=_quiet)
    assert not (tmp_path / "new").exists()
