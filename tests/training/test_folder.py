"""One run a folder, and what happens where it cannot be written to."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from small_run import config, distance, timeless, write_world

from blip2fast.checkpoints import resume
from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.data import manifest
from blip2fast.data.batches import PlannedBatches
from blip2fast.training.folder import LOCK, FolderLock, folder_faults
from blip2fast.training.trainer import Trainer, train

HOLD = (
    "import sys, time; from pathlib import Path; from blip2fast.training.folder import FolderLock\n"
    "lock = FolderLock(Path(sys.argv[1]), print); print('held', flush=True); time.sleep(100)\n"
)


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """Another process that holds the lock of `out`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_with_the_first(world: Path, tmp_path: Path, holder: Any) -> None:
    for resumes in (False, True):
        run = config(world, tmp_path / "out", 2, resume=resumes)
        message = rf"in use by process {holder.pid} on {socket.gethostname()} since .*: wait until"
        with pytest.raises(ValueError, match=message) as error:
            train(run, say=_quiet)
        assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "out").iterdir()] == [LOCK]


TRY = (
    "import sys; from pathlib import Path\n"
    "from blip2fast.training.folder import FolderLock, folder_faults\n"
    "folder = Path(sys.argv[1]); print(folder_faults(folder, False, False)[0])\n"
    "try:\n    FolderLock(folder, print)\n"
    "except ValueError as error:\n    print(error)\n"
)


def test_a_run_holds_its_folder_to_the_end(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, the run opened its lock once more to read it, and closing that released it."""
    output, said = tmp_path / "out", []
    original = Trainer._train_step

    def beside(self: Trainer, batches: Any) -> None:
        original(self, batches)
        if self.state.step == 5:
            command = [sys.executable, "-c", TRY, str(output)]
            said.extend(subprocess.check_output(command, text=True).splitlines())

    monkeypatch.setattr(Trainer, "_train_step", beside)
    train(config(world, output, 2, save_every=2), say=_quiet)
    of_a_start, of_the_lock = said
    assert f"in use by process {os.getpid()} on {socket.gethostname()} since" in of_the_lock
    assert of_a_start == of_the_lock, "not: delete it with overwrite"


def test_the_lock_of_a_killed_process_is_taken_over(
    world: Path, tmp_path: Path, holder: Any
) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    train(config(world, tmp_path / "out", 2), say=_quiet)
    assert not (tmp_path / "out" / LOCK).exists()


def test_a_child_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """A worker that outlives a killed run does not hold up the next one."""
    ended = multiprocessing.get_context("fork").Event()
    with FolderLock(tmp_path, _quiet):
        child = multiprocessing.get_context("fork").Process(target=ended.wait)
        child.start()
    code = HOLD.replace("time.sleep(100)", "pass")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False
    )
    ended.set()
    child.join()
    assert done.stdout == "held\n", done.stderr


def test_an_earlier_run_is_deleted_where_that_is_asked_for(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    train(config(world, output, 2, save_every=3), say=_quiet)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="overwrite: true to delete it, or choose another"):
        train(config(world, output, 2), say=_quiet)
    train(config(world, output, 2, optim={"max_steps": 3}, overwrite=True), say=_quiet)
    assert (output / "notes.txt").read_text() == "mine"
    assert not (output / "checkpoints").exists()
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 4
    with pytest.raises(ValueError, match="set one of them"):
        config(world, output, 2, overwrite=True, resume=True)


def test_folders_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    (tmp_path / "file").write_text("")
    assert "is a link to 'nowhere', which does not exist" in folder_faults(link, False, False)[0]
    for below in ("file", "file/below"):
        (fault,) = folder_faults(tmp_path / below, False, False)
        assert "file' is a file" in fault
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    (fault,) = folder_faults(tmp_path / "a" / "b", False, False)
    assert fault.endswith(f"{str(tmp_path)!r} cannot be written to; choose another folder")


@pytest.mark.parametrize("kind", [SafetensorError, OSError, RuntimeError])
def test_a_full_disk_is_one_line_and_loses_no_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "out"
    train(config(world, whole, 2), say=_quiet)
    original, calls = resume.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise kind("I/O error: No space left on device (os error 28)")
        original(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(resume, "save_file", full)
        with pytest.raises(
            OSError, match=r"step 4: no checkpoint: .*No space left.* from"
        ) as error:
            train(config(world, output, 2, save_every=2), say=_quiet)
    assert "\n" not in str(error.value)
    assert str(error.value).endswith(f"{output}/checkpoints/step-00000002")
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000002"]
    train(config(world, output, 2, save_every=2, resume=True), say=_quiet)
    assert distance(output, whole) == 0


def test_a_process_that_cannot_write_its_part_says_why(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.save tells a full disk as `enforce fail ... unexpected pos 64 vs 0`."""
    original = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if self.suffix == ".pt":
            raise OSError(28, "No space left on device", str(self))
        return original(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"step 2: no checkpoint: .*No space left.*process_00000\.pt"):
        train(config(world, tmp_path / "out", 2, save_every=2), say=_quiet)


def test_a_full_disk_is_named_by_file(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/dev/full takes no byte; the system's error for an open file names none."""
    output = tmp_path / "out"
    output.mkdir()
    (output / "metrics.jsonl").symlink_to("/dev/full")
    run = config(world, output, 2, resume=True)
    monkeypatch.setattr("blip2fast.training.log._drop_after", lambda *_: [])
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics.jsonl'"):
        train(run, say=_quiet)


@pytest.mark.parametrize("where", ["a batch", "the evaluation"])
@pytest.mark.parametrize("stage", [1, 2])
def test_a_sample_that_cannot_be_read_does_not_cost_the_training(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, stage: int
) -> None:
    """Before, a damaged held-out image left neither a model nor a checkpoint of a whole run."""
    whole, output = tmp_path / "whole", tmp_path / "out"
    settings = {"log_every": 4, "optim": {"batch_size": 2, "accumulation": 2}}
    train(config(world, whole, stage, **settings), say=_quiet)

    def damaged(*given: Any) -> Any:
        if where == "a batch" and given[1] < 10:
            return original(*given)
        raise ValueError("image x: is cut off or damaged")

    original = PlannedBatches.take
    with monkeypatch.context() as patch:
        if where == "a batch":
            patch.setattr(PlannedBatches, "take", damaged)
        else:
            patch.setattr("blip2fast.training.trainer.validate", damaged)
        with pytest.raises(ValueError, match="image x: is cut off or damaged"):
            train(config(world, output, stage, **settings), say=_quiet)
    step = 5 if where == "a batch" else 6
    saved = output / "checkpoints" / f"step-{step:08d}"
    assert last_checkpoint(output / "checkpoints") == saved
    train(config(world, output, stage, resume=True, **settings), say=_quiet)
    assert timeless(output) == timeless(whole)
    assert distance(output, whole) == 0


@pytest.mark.parametrize("mask", [0o022, 0o007])
def test_files_have_the_permissions_of_the_umask(world: Path, tmp_path: Path, mask: int) -> None:
    """Before, safetensors' files could be read by their owner alone."""
    before = os.umask(mask)
    try:
        train(config(world, tmp_path / "out", 2, save_every=3), say=_quiet)
    finally:
        os.umask(before)
    modes = {
        path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert modes == {0o666 & ~mask}


def test_a_link_among_the_checkpoints_and_a_partial_file_are_removed(
    world: Path, tmp_path: Path
) -> None:
    """Before, a save died after its rename, and every resume on the plain file."""
    output = tmp_path / "out"
    train(config(world, output, 2, save_every=2, keep_last=1), say=_quiet)
    first = last_checkpoint(output / "checkpoints")
    assert first is not None
    elsewhere = tmp_path / "elsewhere"
    shutil.move(first, elsewhere)
    first.symlink_to(elsewhere)
    (output / "checkpoints" / "x.partial").write_text("")
    longer = {"max_steps": 8}
    (elsewhere / "state.json").write_text(
        (elsewhere / "state.json").read_text().replace('"max_steps": 6', '"max_steps": 8')
    )
    manifest.seal(elsewhere, manifest.read_manifest(elsewhere))
    train(
        config(world, output, 2, save_every=2, keep_last=1, resume=True, optim=longer), say=_quiet
    )
    assert [p.name for p in (output / "checkpoints").iterdir()] == ["step-00000008"]
    assert (elsewhere / "model.safetensors").is_file()


def test_a_manifest_that_names_a_file_outside_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    manifest.replace_files(folder, {"a.txt": lambda path: path.write_text("a")})
    values = json.loads((folder / "manifest.json").read_text())
    values["files"]["../x"] = values["files"]["a.txt"]
    (folder / "manifest.json").write_text(json.dumps(values))
    (tmp_path / "x.partial").write_text("a")
    with pytest.raises(ValueError, match=r"manifest.json names '../x', which is outside"):
        manifest.check(folder)
    manifest.replace_files(folder, {"b.txt": lambda path: path.write_text("b")})
    assert (tmp_path / "x.partial").exists()
