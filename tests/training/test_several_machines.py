"""Runs over two machines: two nodes of one process each on this one, over loopback.

What they do not share is told apart by relative paths, in working folders of their own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist
import torch.multiprocessing as mp
import yaml
from small_run import be_one_of_two, config, free_port, timeless, values, write_world
from started_run import LONG, TRAIN

from blip2fast.checkpoints.files import last_checkpoint, step_of
from blip2fast.data.records import CaptionRecord, write_records
from blip2fast.training import agreement, engine, folder
from blip2fast.training.agreement import SharedFault, processes_by_machine, together
from blip2fast.training.config import RunConfig
from blip2fast.training.stopping import RunStopped
from blip2fast.training.trainer import Trainer, train

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "several_machines.md"
STEPS = 4
OPTIM = {"max_steps": LONG, "batch_size": 2}


def _quiet(_: str) -> None: ...


def _run(world: Path, output: Path) -> dict[str, Any]:
    """A run that goes on until it is stopped."""
    return values(world, output, 1, optim=OPTIM)


def _train_some_steps(world: Path, output: Path) -> None:
    """One node of two processes, stopped by a signal after `STEPS`."""
    original = Trainer._train_step

    def stopped(self: Trainer, batches: Any) -> None:
        if self.state.step == STEPS - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        original(self, batches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopped)
        try:
            train(config(world, output, 1, optim=OPTIM), say=_quiet)
        except RunStopped:
            return
    raise RuntimeError("not stopped")


def _refused(run: Callable[[], Any]) -> dict[str, Any]:
    start = time.monotonic()
    try:
        run()
    except (ValueError, engine.ProcessLostError) as error:
        told = {"kind": type(error).__name__, "said": str(error)}
        return told | {"seconds": time.monotonic() - start}
    raise RuntimeError("not refused")


def _as_a_machine(rank: int, world: Path, place: Path) -> dict[str, dict[str, Any]]:
    """What this process is told where its machine, `node-<rank>`, lacks what the other has."""
    os.chdir(place / f"node-{rank}")
    shared = place / "shared"

    def local(**changes: Any) -> RunConfig:
        return config(Path("world"), shared / "out", 1, optim={"batch_size": 2}, **changes)

    if rank == 1:
        shutil.rmtree("world/train_features")
    found = {"features": _refused(lambda: train(local(), say=_quiet))}
    if rank == 1:
        shutil.copytree(world / "train_features", "world/train_features")
        shutil.rmtree("world/qformer_tokenizer")
    found["tokenizer"] = _refused(lambda: train(local(), say=_quiet))
    if rank == 1:
        shutil.copytree(world / "qformer_tokenizer", "world/qformer_tokenizer")
    alone = local(output_dir="out")
    found["output"] = _refused(lambda: train(alone, say=_quiet))
    seed = local(seed=rank)
    found["configuration"] = _refused(lambda: train(seed, say=_quiet))
    if rank == 1:
        write_records(Path("world/train.jsonl"), [CaptionRecord("train0", ("a red ring",))] * 22)
    found["contents"] = _refused(lambda: train(local(), say=_quiet))
    found["beside"] = {"machines": list(processes_by_machine())}
    return found


def _work(rank: int, port: int, world: Path, place: Path) -> None:
    be_one_of_two(rank, port)
    _train_some_steps(world, place / "one_node")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: f"node-{rank}")
        patch.setattr(folder, "_SHARED_SECONDS", 0.5)
        told = _as_a_machine(rank, world, place)
    together(lambda: None)
    if rank == 1:
        (place / "told-1.json").write_text(json.dumps(told))
        os._exit(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_ANSWER_SECONDS", 0.5)
        run = config(world, place / "lost", 2)
        told["lost"] = _refused(lambda: train(run, say=_quiet))
    engine.leave_processes()
    threads = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
    told["threads"] = {"gloo": [name for name in threads if "gloo" in name]}
    (place / "told-0.json").write_text(json.dumps(told))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("machines")
    world = write_world(place / "shared" / "world")
    for node in ("node-0", "node-1"):
        shutil.copytree(world, place / node / "world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")  # a tokenizer that is missing is looked for there
        mp.spawn(_work, (free_port(), world, place), nprocs=2)
    return place


@pytest.fixture(scope="module")
def told(place: Path) -> list[dict[str, Any]]:
    """What each process was told, by case."""
    return [json.loads((place / f"told-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("features", r"on node-1 \(process 1\): the run cannot start:\n  data.features 'world"),
        (
            "tokenizer",
            r"on node-1 \(process 1\): the run cannot start:\n  model.tokenizer 'world",
        ),
        ("output", r"on node-1 \(process 1\): output_dir 'out' is another folder than on node-0:"),
        (
            "configuration",
            r"the machines differ: seed is 0 on node-0 \(process 0\), 1 on node-1 \(process 1\)\.",
        ),
        (
            "contents",
            r"the machines differ: contents of data.records is '22 records, \w+' on node-0 .*, "
            r"'22 records, \w+' on node-1 \(process 1\); .*Copy the same files to every machine",
        ),
    ],
)
def test_what_one_machine_lacks_ends_all_and_names_it(
    told: list[dict[str, Any]], case: str, message: str
) -> None:
    """Before, its processes ended alone, and the others waited 30 minutes for them."""
    for found in told:
        assert found[case]["kind"] == "SharedFault"
        assert re.match(message, found[case]["said"]), found[case]["said"]
        assert found[case]["seconds"] < 60


def test_machines_are_counted_whatever_the_launcher_states(told: list[dict[str, Any]]) -> None:
    """DeepSpeed's launcher sets no LOCAL_WORLD_SIZE: eight processes were taken for machines."""
    assert [found["beside"]["machines"] for found in told] == [[2, 1], [2, 1]]


def test_no_thread_of_the_process_group_is_left(told: list[dict[str, Any]]) -> None:
    """One that is at work when the interpreter ends aborts the process."""
    assert told[0]["threads"]["gloo"] == []


def test_a_process_that_is_lost_before_the_first_step_is_named(told: list[dict[str, Any]]) -> None:
    """As one that the system kills for its memory while it loads a model."""
    assert told[0]["lost"]["kind"] == "ProcessLostError"
    assert told[0]["lost"]["said"].startswith("process 1 of the run does not answer: it has ended")
    assert told[0]["lost"]["said"].endswith("No checkpoint was saved")


def test_alone_a_process_raises_its_own_error() -> None:
    def fail() -> None:
        raise FileNotFoundError("here")

    assert processes_by_machine() == (1, 1)
    with pytest.raises(FileNotFoundError, match="here"):
        together(fail)


def test_the_same_fault_on_all_machines_is_told_once() -> None:
    faults = [("a", "lost"), ("a", "lost"), ("b", "lost")]
    assert agreement._by_machine(faults) == "lost"
    found = agreement._by_machine([*faults, ("b", None), ("c", "full")])
    assert found == "on a (processes 0, 1), b (process 2): lost\non c (process 4): full"
    assert agreement._by_machine([("a", None), ("b", None)]) == ""


SRUN = """#!/bin/bash
for node in 0 1; do
  mkdir -p "$NODES/home$node" "$NODES/tmp$node"
  HOME=$NODES/home$node TMPDIR=$NODES/tmp$node SLURM_NODEID=$node SLURM_PROCID=$node \\
    "$@" > "$NODES/node$node.log" 2>&1 &
  pids="$pids $!"
done
code=0
for pid in $pids; do wait "$pid" || code=1; done
exit $code
"""


def _start_script(place: Path, output: Path) -> subprocess.Popen[str]:
    """The page's Slurm script, with stand-ins for Slurm's commands."""
    commands = place / "commands"
    commands.mkdir()
    (commands / "srun").write_text(SRUN)
    (commands / "scontrol").write_text("#!/bin/bash\necho 127.0.0.1\necho 127.0.0.1\n")
    for each in commands.iterdir():
        each.chmod(0o755)
    run = place / "run.yaml"
    run.write_text(yaml.safe_dump(_run(place / "shared" / "world", output)))
    script = re.search(r"```bash\n(#!/bin/bash\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert script is not None
    text = script[1].replace("configs/vitg_stage1.yaml", str(run))
    text = text.replace("PORT=$((20000 + SLURM_JOB_ID % 20000))", f"PORT={free_port()}")
    assert str(run) in text
    assert "20000" not in text
    (place / "job.sh").write_text(text.replace("blip2fast/train.py", str(TRAIN)))
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "RANK", "WORLD_SIZE")}
    slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NNODES": "2"}
    path = f"{commands}:{Path(sys.executable).parent}:{kept['PATH']}"
    return subprocess.Popen(
        ["bash", str(place / "job.sh")],
        env=kept | slurm | {"NODES": str(place), "PATH": path, "OMP_NUM_THREADS": "1"},
        text=True,
    )


def test_the_slurm_script_trains_as_one_node_does_and_stops_in_time(place: Path) -> None:
    """Two nodes by torchrun; the same losses to the last bit, and Slurm's warning to everyone."""
    output = place / "two_nodes"
    process = _start_script(place, output)
    metrics, limit = output / "metrics.jsonl", time.monotonic() + 240
    while not metrics.is_file() or metrics.read_text().count("\n") < STEPS:
        logs = [(place / f"node{n}.log").read_text() for n in (0, 1) if process.poll() is not None]
        assert process.poll() is None, logs
        assert time.monotonic() < limit
        time.sleep(0.2)
    tree = psutil.Process(process.pid).children(recursive=True)
    told = [p for p in tree if any("torchrun" in w or str(TRAIN) in w for w in p.cmdline()[:4])]
    assert len([p for p in told if str(TRAIN) in p.cmdline()]) >= 2
    for each in told:
        each.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) != 0
    alive = psutil.wait_procs(tree, timeout=30)[1]
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
    said = [(place / f"node{n}.log").read_text() for n in (0, 1)]
    assert any("saved. To go on, run the same command" in each for each in said), said
    saved = last_checkpoint(output / "checkpoints")
    assert saved is not None
    assert step_of(saved) >= STEPS
    assert timeless(output)[:STEPS] == timeless(place / "one_node")
    assert len(list(saved.glob("process_*.pt"))) == 2


def test_a_fault_of_all_is_printed_once_a_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from blip2fast import train as train_script

    printed: list[str] = []
    monkeypatch.setattr(sys.stderr, "write", printed.append)
    monkeypatch.setattr(dist, "barrier", lambda: printed.append("all wait"))
    for rank in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            train_script._exit_together("error: no such file")
        assert ended.value.code == 1
    assert "".join(printed) == "error: no such file\nall waitall wait"
    assert issubclass(SharedFault, ValueError)
