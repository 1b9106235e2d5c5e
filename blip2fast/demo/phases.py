"""Phases of the demo: timed, and reused by the next run if their settings are unchanged."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
from rich.console import Console

from blip2fast.data.manifest import replace_file, write_json

LEDGER = "phases.json"


class Clock:
    """Wall and CPU time since creation; CPU time includes all child processes.

    On a busy machine wall time means little; CPU time divided by the cores is its lower bound.
    """

    def __init__(self) -> None:
        self._start = self._now()

    def read(self) -> dict[str, float]:
        """`seconds` and `cpu_seconds`."""
        wall, cpu = (now - start for now, start in zip(self._now(), self._start, strict=True))
        return {"seconds": wall, "cpu_seconds": cpu}

    @staticmethod
    def _now() -> tuple[float, float]:
        used = sum(os.times()[:4])
        for child in psutil.Process().children(recursive=True):
            try:
                used += sum(child.cpu_times()[:4])
            except psutil.NoSuchProcess:
                continue  # it has just ended, and its time counts as its parent's
        return time.perf_counter(), used


@dataclass
class Phases:
    """Runs phases in sequence and records finished ones in `<output>/phases.json`.

    A phase is reused if its settings, those of all phases it depends on, and the package version
    are the same as when it finished, and all its products still exist.

    Args:
        output: the demo's folder.
        version: the package's version.
        console: console for messages.
        fresh: run all phases again.
    """

    output: Path
    version: str
    console: Console
    fresh: bool = False
    hashes: dict[str, str] = field(default_factory=dict)
    products: dict[str, tuple[Path, ...]] = field(default_factory=dict)
    times: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(
        self,
        name: str,
        action: Callable[[], None],
        settings: Any,
        after: Sequence[str] = (),
        products: Sequence[Path] = (),
    ) -> None:
        """Run `action`, which makes `products`, if the phase is due; arguments as in `due`.

        Raises:
            RuntimeError: the action did not make all products.
        """
        if self.due(name, settings, after, products):
            clock = self.begin(name)
            action()
            self.end(name, clock)

    def due(
        self, name: str, settings: Any, after: Sequence[str] = (), products: Sequence[Path] = ()
    ) -> bool:
        """Whether the phase has yet to run; prints a message if it is reused.

        Args:
            name: name of the phase, a sentence fragment such as "stage 1".
            settings: everything that the products depend on, as JSON values.
            after: names of earlier phases whose products it reads.
            products: files and folders that must exist for the phase to count as finished.

        Raises:
            ValueError: `after` names an unknown phase.
        """
        missing = [earlier for earlier in after if earlier not in self.hashes]
        if missing:
            raise ValueError(f"phase {name!r} builds on {missing}, which have not been run")
        plan = [self.version, name, settings, [self.hashes[earlier] for earlier in after]]
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()[:16]
        self.hashes[name] = digest
        self.products[name] = tuple(products)
        done = self._finished().get(name, {})
        if self.fresh or done.get("hash") != digest or self._absent(name):
            return True
        spent = {key: done[key] for key in ("seconds", "cpu_seconds")}
        self.times[name] = {**spent, "reused": True}
        self.console.print(
            f"[green]{name}[/green]: reused from {self.output} "
            f"({done['seconds']:.0f} s when it ran; --fresh runs it again)"
        )
        return False

    def begin(self, name: str) -> Clock:
        """Announce a phase that is due, and start its clock."""
        self.console.print(f"[bold]{name}[/bold]")
        return Clock()

    def end(self, name: str, clock: Clock) -> None:
        """Record a phase as finished.

        Raises:
            RuntimeError: a product is missing.
        """
        spent = clock.read()
        if absent := self._absent(name):
            raise RuntimeError(f"phase {name!r} ended without {', '.join(absent)}")
        self.times[name] = {**spent, "reused": False}
        self._remember(name, {"hash": self.hashes[name], **spent})
        self.console.print(f"[green]{name}[/green]: {spent['seconds']:.1f} s")

    def _absent(self, name: str) -> list[str]:
        return [str(product) for product in self.products[name] if not product.exists()]

    def _finished(self) -> dict[str, dict[str, Any]]:
        ledger = self.output / LEDGER
        if not ledger.is_file():
            return {}
        try:
            finished: dict[str, dict[str, Any]] = json.loads(ledger.read_text(encoding="utf-8"))
        except json.JSONDecodeError:
            self.console.print(f"{ledger} is not readable: every phase runs again")
            return {}
        return finished

    def _remember(self, name: str, entry: dict[str, Any]) -> None:
        finished = self._finished() | {name: entry}
        self.output.mkdir(parents=True, exist_ok=True)
        replace_file(self.output / LEDGER, write_json(finished))
