"""Runs that kill themselves, each in a process of its own; started by test_crash_safety.py.

    python crash_driver.py WORLD OUTPUT

The processes are forked from one that has imported everything: imports take seconds, a run a
quarter of one. Nothing of PyTorch has computed, and no thread is there, when they fork.

Under OUTPUT, each scenario leaves `killed/` (the folder as the kill left it) and `resumed/` (after
another process went on), and `report.json` says how many there are of each kind.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed  # noqa: F401 (imported before the processes fork)
import torch
from small_run import config

from blip2fast.checkpoints import resume, trained
from blip2fast.checkpoints.trained import Description, read_description, read_parameters, save_model
from blip2fast.training import saving
from blip2fast.training.step_passes import TrainingStep
from blip2fast.training.trainer import train

STEPS = 6
# A log line spans a checkpoint, a checkpoint is replaced by the next, evaluations follow them.
RUN: dict[str, Any] = {"save_every": 2, "eval_every": 4, "keep_last": 1, "log_every": 1}
OLD, NEW, NEWER = 1, 2, 3
# (process, moment), and the checkpoint that there is then: half a file of the second process, amid
# the files of the first, after the checkpoint got its name.
OF_TWO = {(1, 1): 2, (0, 8): 2, (0, 22): 4}


class Stopped(BaseException):
    """Ends a writer in this process."""


def _die() -> None:
    """As kill -9 does: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def _stop() -> None:
    raise Stopped


class DiesWhileWriting:
    """Kills this process at the n-th change that it makes to files below `folder`.

    A change is: a file opened for writing, a flush, a name made, changed or removed; and a file
    written by `save_file`, `Path.write_bytes` or `Path.write_text` of which half is there.

    Args:
        folder: other files do not count.
        moment: n, from 1; 0: only count.
        how: it ends.
    """

    def __init__(self, folder: Path, moment: int, how: Callable[[], None] = _die) -> None:
        self.die = how
        self.folder, self.moment, self.count, self.armed = str(folder), moment, 0, False
        self.thread = threading.get_ident()
        sys.addaudithook(self._audit)
        self._flush = os.fsync
        os.fsync = self._fsync
        for module in (resume, trained):
            module.save_file = self._half(module.save_file, 1)
        Path.write_bytes = self._half(Path.write_bytes, 0)  # type: ignore[method-assign]
        Path.write_text = self._half(Path.write_text, 0)  # type: ignore[method-assign]

    def during(self, module: Any, name: str, call: int) -> None:
        """Count during the `call`-th call (from 1) of a function, and not otherwise."""
        original, calls = getattr(module, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            self.armed = calls == call
            try:
                return original(*args, **kwargs)
            finally:
                self.armed = False

        setattr(module, name, counted)

    def _due(self) -> bool:
        if not self.armed or threading.get_ident() != self.thread:
            return False
        self.count += 1
        return self.count == self.moment

    def _audit(self, event: str, args: Any) -> None:
        if not self.armed:
            return
        named = event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
        opened = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (named or opened) and self._is_ours(str(args[0])) and self._due():
            self.die()

    def _is_ours(self, path: str) -> bool:
        # rmtree names files from inside their folder
        return path.startswith(self.folder) or not Path(path).is_absolute()

    def _fsync(self, descriptor: int) -> None:
        if self._due():
            self.die()
        if self.die is _die:
            self._flush(descriptor)

    def _half(self, write: Callable[..., Any], position: int) -> Callable[..., Any]:
        def written(*args: Any, **kwargs: Any) -> Any:
            if not self._due():
                return write(*args, **kwargs)
            self.armed = False
            write(*args, **kwargs)
            path = Path(args[position])
            os.truncate(path, path.stat().st_size // 2)
            return self.die()

        return written


def in_processes(works: Sequence[Callable[[], Any]], log: Path) -> bool:
    """Run each in a process of its own; whether one was killed, and with it the rest.

    Raises:
        RuntimeError: one failed before any was killed.
    """
    running = {_forked(work, log) for work in works}
    killed = False
    while running:
        child, status = os.wait()
        running.remove(child)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            # what a launcher does
            for other in () if killed else running:
                os.kill(other, signal.SIGKILL)
            killed = True
        elif status != 0 and not killed:
            raise RuntimeError(log.read_text())
    return killed


def _forked(work: Callable[[], Any], log: Path) -> int:
    child = os.fork()
    if child == 0:
        with log.open("a") as sink:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return child


class Scenarios:
    """The runs on one world; every method leaves folders below `output`."""

    def __init__(self, world: Path, output: Path) -> None:
        self.world, self.output, self.log = world, output, output / "log"

    def train(self, folder: Path, stage: int, settings: dict[str, Any], **more: Any) -> None:
        """A training in this process."""
        train(config(self.world, folder, stage, **settings, **more))

    def run(self, folder: Path, stage: int, settings: dict[str, Any], **more: Any) -> None:
        """A whole training in a process of its own."""
        killed = in_processes([lambda: self.train(folder, stage, settings, **more)], self.log)
        if killed:
            raise RuntimeError(f"{folder}: killed by something else")

    def killed_while_writing(self, name: str, function: str, call: int, every: int) -> list[int]:
        """Kill at every n-th change of files during one call of a function that the trainer calls.

        Returns:
            At which; under moment 0 is the run that was not killed.
        """
        moments = [0]
        for moment in moments:
            folder = self.output / name / str(moment) / "resumed"
            counted = self.output / name / "count"

            def work(folder: Path = folder, moment: int = moment, counted: Path = counted) -> None:
                killer = DiesWhileWriting(folder, moment)
                killer.during(saving, function, call)
                self.train(folder, 2, RUN)
                counted.write_text(str(killer.count))

            folder.parent.mkdir(parents=True)
            killed = in_processes([work], self.log)
            if killed != (moment > 0):
                raise RuntimeError(f"{folder}: {'killed' if killed else 'not killed'}")
            if moment:
                shutil.copytree(folder, folder.with_name("killed"))
                self.run(folder, 2, RUN, resume=True)
            else:
                moments += range(1, int(counted.read_text()) + 1, every)
        return moments[1:]

    def killed_in_a_step(self, name: str, stage: int, settings: dict[str, Any]) -> None:
        """Kill in step 4, between a forward and a backward pass."""
        self.run(self.output / name / "whole", stage, settings)
        folder = self.output / name / "resumed"
        passes = 3 * settings.get("optim", {}).get("accumulation", 1) + 1

        def work() -> None:
            forward, calls = TrainingStep.forward, 0

            def counted(step: TrainingStep, **batch: Any) -> Any:
                nonlocal calls
                output = forward(step, **batch)
                # in evaluation the model is called without this wrapper
                calls += 1
                if calls == passes:
                    _die()
                return output

            TrainingStep.forward = counted  # type: ignore[method-assign]
            self.train(folder, stage, settings)

        if not in_processes([work], self.log):
            raise RuntimeError(f"{folder}: not killed")
        shutil.copytree(folder, folder.with_name("killed"))
        time.sleep(1.1)  # TensorBoard reads files in the order of the second in their names
        self.run(folder, stage, settings, resume=True)

    def killed_of_two(self, name: str) -> None:
        """Kill one of two processes while they write the second checkpoint."""
        whole = self.output / name / "whole" / "resumed"
        self._two(whole, dies=None)
        for rank, moment in OF_TWO:
            folder = self.output / name / f"{rank}-{moment}" / "resumed"
            if not self._two(folder, (rank, moment)):
                raise RuntimeError(f"{folder}: not killed")
            shutil.copytree(folder, folder.with_name("killed"))
            self._two(folder, dies=None, resume=True)

    def _two(self, folder: Path, dies: tuple[int, int] | None, **more: Any) -> bool:
        """A training on two processes, of which `dies` may name one and its moment."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])

        def work(rank: int) -> None:
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            os.environ.update({name: str(value) for name, value in launched.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            if dies is not None and dies[0] == rank:
                killer = DiesWhileWriting(folder, dies[1])
                killer.during(saving, "save_checkpoint", 2)
            self.train(folder, 2, RUN, zero_stage=2, optim={"batch_size": 2}, **more)

        folder.parent.mkdir(parents=True, exist_ok=True)
        return in_processes([partial(work, rank) for rank in range(2)], self.log)

    def stopped_while_replacing(self) -> list[list[Any]]:
        """Replace a model twice, stopped at each change of the first and of the second time.

        A process for each of these pairs would take half a minute; an error that nothing catches
        stops the writer at the same places.

        Returns:
            For each pair: its moments, and what was there after both, and after a third attempt
            that went well: (step of the description, value in the tensors).
        """
        folder, kept = self.output / "replaced", self.output / "replaced once"
        writer = DiesWhileWriting(folder, 0, how=_stop)

        def save(step: int, moment: int) -> bool:
            writer.moment, writer.count, writer.armed = moment, 0, True
            tensors = {"weight": torch.full((64,), float(step))}
            try:
                save_model(folder, tensors, Description(1, {}, step=step))
            except Stopped:
                return True
            finally:
                writer.armed = False
            return False

        def there() -> tuple[int, Any]:
            try:
                step = read_description(folder).step
                return step, read_parameters(folder)["weight"].mean().item()
            except ValueError as error:
                return 0, str(error)

        found: list[list[Any]] = []
        for first in itertools.count(1):
            shutil.rmtree(folder, ignore_errors=True)
            save(OLD, 0)
            if not save(NEW, first):
                return found
            after_one = there()
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(folder, kept)
            for second in itertools.count(1):
                shutil.rmtree(folder)
                shutil.copytree(kept, folder)
                stopped = save(NEWER, second)
                after_two = there()
                save(NEWER, 0)
                found.append([first, second, after_one, after_two, there()])
                if not stopped:
                    break
        return found


def main() -> None:
    """See above."""
    scenarios = Scenarios(Path(sys.argv[1]), Path(sys.argv[2]))
    gc.freeze()  # else every process copies what it counts references of
    report: dict[str, Any] = {
        # the second of three checkpoints
        "checkpoint": scenarios.killed_while_writing("checkpoint", "save_checkpoint", 2, every=1),
        "model": scenarios.killed_while_writing("model", "save_model", 1, every=4),
    }
    scenarios.killed_in_a_step("step-1", 1, {**RUN, "optim": {"accumulation": 2, "batch_size": 2}})
    scenarios.killed_in_a_step("step-2", 2, {**RUN, "log_every": 3})
    gc.unfreeze()
    report["replaced"] = scenarios.stopped_while_replacing()
    scenarios.killed_of_two("two")
    (scenarios.output / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
