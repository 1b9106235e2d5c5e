"""A run as one self-contained page: `report.html`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.reporting.run_report import REPORT, Sample, write_report

_NAMES = dict.fromkeys(("REPORT", "Sample", "write_report"), "run_report")
__all__ = ["REPORT", "Sample", "write_report"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
