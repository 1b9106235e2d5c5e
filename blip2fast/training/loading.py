"""Reads the batches of a run, in worker processes that are started again when they die."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from blip2fast.data.worker_errors import has_traceback, without_traceback
from blip2fast.training.stopping import ignore_signals

# One that the system kills for its memory will be killed again.
MOST_RESTARTS = 3

Item = TypeVar("Item")


def read_batches(
    dataset: Dataset[Item],
    micro_steps: Sequence[int],
    workers: int,
    pin_memory: bool,
    say: Callable[[str], None],
) -> Iterator[Item]:
    """The batches of a sequence of micro-steps, in order.

    A batch depends on its number alone, so workers that were killed are replaced and the batches
    go on where they stopped.

    Args:
        dataset: item i is the batch of micro-step i.
        workers: processes that read ahead; 0: none.
        pin_memory: as in DataLoader.
        say: prints a line.

    Raises:
        ValueError, OSError: as the dataset raises, with its message alone.
        RuntimeError: workers died more than `MOST_RESTARTS` times.
    """
    done = restarts = 0
    while done < len(micro_steps):
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_size=None,
            sampler=micro_steps[done:],
            num_workers=workers,
            worker_init_fn=ignore_signals,
            pin_memory=pin_memory,
            # The loader draws a seed on start; from the global generator, a resume would shift it.
            generator=torch.Generator(),
        )
        failure: Exception | None = None
        try:
            for batch in _iterator(loader):
                done += 1
                yield batch
        except (RuntimeError, ValueError, OSError, EOFError) as error:
            failure = error
        if failure is None:
            continue
        if workers:
            # its frames hold the workers, which a signal does not end: the process would wait for
            # them when it exits
            failure = failure.with_traceback(None)
        first = _of_a_dead_worker(failure, workers)
        if not first:
            raise without_traceback(failure)
        if restarts == MOST_RESTARTS:
            raise OSError(
                f"data.workers {workers}: {first}; {MOST_RESTARTS + 1} times in this run: "
                "lower data.workers if the machine is out of memory"
            )
        restarts += 1
        say(f"{first}: workers started again ({restarts} of at most {MOST_RESTARTS} times)")


def _of_a_dead_worker(error: Exception, workers: int) -> str:
    """A line about the death of a worker; empty if the error is another."""
    if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):
        return str(error).splitlines()[0]
    # one that died while it sent a batch; a worker's own errors come with its traceback
    lost = isinstance(error, ConnectionError | EOFError)
    if workers > 0 and lost and not has_traceback(error):
        return f"a DataLoader worker was lost ({type(error).__name__})"
    return ""


def _iterator(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers; their death is then reported when a batch is asked for.

    PyTorch's handler of SIGCHLD would raise anywhere, also in the middle of a step.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    handler = signal.getsignal(signal.SIGCHLD)
    if getattr(handler, "__module__", "") == signal_handling.__name__:
        handler = signal.SIG_DFL  # PyTorch's own, which an earlier loader of this process set
    started = iter(loader)
    signal.signal(signal.SIGCHLD, handler)
    return started
