"""Workers, ranks and ports that fail: one line each, and nothing lost that need not be."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import yaml
from small_run import config, distance, values, write_world
from started_run import TRAIN, process_tree, started

from blip2fast import train as train_script
from blip2fast.data.batches import PlannedBatches
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.language_models import load_language_model
from blip2fast.training import engine, loading
from blip2fast.training.config_files import parse_config
from blip2fast.training.trainer import train


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def _with_dying_workers(monkeypatch: pytest.MonkeyPatch, counter: Path, deaths: int) -> None:
    original, main = PlannedBatches.take, os.getpid()

    def dying(self: Any, micro_step: int) -> Any:
        died = len(list(counter.glob("*")))
        if micro_step >= 2 and died < deaths and os.getpid() != main:
            (counter / str(died)).write_text("")
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, micro_step)

    counter.mkdir()
    monkeypatch.setattr(PlannedBatches, "take", dying)


@pytest.mark.slow
def test_killed_workers_are_replaced(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config(world, tmp_path / "whole", 2), say=_quiet)
    _with_dying_workers(monkeypatch, tmp_path / "deaths", 2)
    said: list[str] = []
    train(config(world, tmp_path / "out", 2, data={"workers": 1}), say=said.append)
    assert distance(tmp_path / "out", tmp_path / "whole") == 0


@pytest.mark.slow
def test_workers_that_keep_dying_end_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_dying_workers(monkeypatch, tmp_path / "deaths", 100)
    with pytest.raises(OSError, match=r"data.workers 1: .*worker.*4 times in this run: lower data"):
        train(config(world, tmp_path / "out", 2, data={"workers": 1}), say=_quiet)


@pytest.mark.parametrize("lost", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_worker_that_dies_while_it_sends_is_replaced(
    lost: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the loader says nothing of workers, but that its connection is gone."""
    original, attempts = loading._iterator, []

    def breaking(loader: Any) -> Any:
        attempts.append(1)
        if len(attempts) > 1:
            return original(loader)

        def one_batch() -> Any:
            yield next(iter(loader))
            raise lost

        return one_batch()

    monkeypatch.setattr(loading, "_iterator", breaking)
    said: list[str] = []
    numbers = [{"x": torch.tensor(i)} for i in range(4)]
    found = loading.read_batches(numbers, range(4), 1, False, said.append)  # type: ignore[arg-type]
    assert [int(batch["x"]) for batch in found] == [0, 1, 2, 3]
    assert said == [
        f"a DataLoader worker was lost ({type(lost).__name__}): workers started again (1 of at "
        "most 3 times)"
    ]


class _Broken(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        raise ValueError(f"batch {number} is broken")


def test_no_worker_outlives_an_error() -> None:
    """Workers ignore the signal that would end them, so an exiting process would wait for them."""
    before = multiprocessing.active_children()
    with pytest.raises(ValueError, match=r"^batch 0 is broken$") as caught:
        list(loading.read_batches(_Broken(), range(4), 1, False, _quiet))
    assert multiprocessing.active_children() == before
    del caught


def test_the_error_of_a_worker_is_its_own_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any, micro_step: int) -> Any:
        raise ValueError(f"batch {micro_step} is broken")

    monkeypatch.setattr(PlannedBatches, "take", broken)
    with pytest.raises(ValueError, match=r"^batch 0 is broken$"):
        train(config(world, tmp_path / "out", 2, data={"workers": 1}), say=_quiet)


def _run(world: Path, output: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    file = output.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values(world, output, 2)))
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(TRAIN), "--config", str(file)],
        capture_output=True,
        text=True,
        timeout=120,
        env=kept | environment,
        check=False,
    )


@pytest.mark.slow
def test_a_busy_port_is_one_line(world: Path, tmp_path: Path) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        done = _run(world, tmp_path / "out", **place, MASTER_PORT=port)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"cannot meet at 127.0.0.1:{port}" in line
    assert "another --master_port" in line
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_with_one_line(world: Path, tmp_path: Path) -> None:
    process = started(world, tmp_path / "out", "deepspeed", 0)
    tree = process_tree(process.pid)
    ranks = [p for p in tree if str(TRAIN) in p.cmdline() and "--local_rank=1" in p.cmdline()]
    ranks[-1].kill()
    assert process.wait(timeout=60) != 0
    assert psutil.wait_procs(tree, timeout=30)[1] == []
    said = (tmp_path / "out.err").read_text()
    assert "error: process 1 of the run does not answer: it has ended or cannot be reached" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["python", "deepspeed"])
def test_no_process_listens_on_all_interfaces(world: Path, tmp_path: Path, kind: str) -> None:
    """Before, PyTorch's store did, without authentication."""
    process = started(world, tmp_path / "out", kind, 0)
    listening = [
        connection.laddr
        for each in process_tree(process.pid)
        for connection in each.net_connections()
        if connection.status == psutil.CONN_LISTEN
    ]
    process.terminate()
    process.wait(timeout=60)
    assert [place for place in listening if place.ip in ("0.0.0.0", "::")] == []
    assert kind != "deepspeed" or "127.0.0.1" in {place.ip for place in listening}


def test_system_errors_are_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Any) -> None:
        raise OSError(28, "No space left on device", "metrics.jsonl")

    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "out")))
    monkeypatch.setattr("blip2fast.training.trainer.train", full)
    with pytest.raises(SystemExit) as ended:
        train_script.main(["--config", str(file)])
    assert str(ended.value) == "error: [Errno 28] No space left on device: 'metrics.jsonl'"


BOMB = "a: &a [x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=False)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 10000 values, with its aliases"),
        ("a: &a [*a]\n", "more than 10000 values"),
        ("[" * 5000 + "]" * 5000, "keys in keys, deeper than"),
        ("a: 2026-99-99\n", "not valid YAML: month must be"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
    ],
    ids=["aliases", "recursive", "deep", "date", "bytes"],
)
def test_odd_configurations_are_one_line(tmp_path: Path, text: str | bytes, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SystemExit) as ended:
        train_script.main(["--config", str(file)])
    assert str(ended.value).startswith(f"error: {file}: {message}")


def test_a_seed_beyond_64_bits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"seed: .*less than 9223372036854775808, got 9223372"):
        parse_config(values(tmp_path, tmp_path / "out", 2, seed=2**63))


@pytest.mark.parametrize("name", ["a" * 300, "nul\0nul"], ids=["long", "nul"])
def test_odd_folder_names_are_one_line(world: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OSError)) as error:
        train(config(world, tmp_path / name, 2), say=_quiet)
    assert "output_dir" in str(error.value)


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_folder_with_code_of_its_own_does_not_run_it(tmp_path: Path, part: str) -> None:
    """Before, transformers asked on stdin whether to."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    code = f"open({str(ran)!r}, 'w')\nclass Own: pass\n"
    (folder / "own.py").write_text(code)
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
    named = {"model_type": "own", "auto_map": own}
    (folder / "config.json").write_text(json.dumps(named))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}})
    )
    load = {
        "model": lambda: load_language_model(str(folder), torch.float32),
        "tokenizer": lambda: qformer_tokenizer(str(folder)),
    }
    with pytest.raises(ValueError, match="not found"):
        load[part]()
    assert not ran.exists()


def test_a_process_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Process 2 has noticed the loss too, and says so in the store."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set("blip2fast/noticed/2", "")
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(engine, "_ANSWER_SECONDS", 0.3)

    def lose() -> None:
        with engine.losing_a_process(lambda: "Go on"):
            raise RuntimeError("Connection closed by peer")

    message = r"^process 1 of the run does not answer: it has ended .* by peer\)\. Go on$"
    with pytest.raises(engine.ProcessLostError, match=message):
        lose()
    store.set("blip2fast/noticed/1", "")

    def gone() -> None:
        raise RuntimeError("the store was on process 1")

    for found in (lambda: store, gone):
        monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", found)
        with pytest.raises(engine.ProcessLostError, match=r"^another process of the run has ended"):
            lose()
