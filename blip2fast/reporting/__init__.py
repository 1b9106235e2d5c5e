"""A run as one self-contained page: `report.html`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blip2fast._imports import lazy

if TYPE_CHECKING:
    from blip2fast.reporting.run_report import REPORT, Sample, write_report
    from blip2fast.reporting.samples import Drawn, draw_samples

_NAMES = {
    **dict.fromkeys(("REPORT", "Sample", "write_report"), "run_report"),
    **dict.fromkeys(("Drawn", "draw_samples"), "samples"),
}
__all__ = ["REPORT", "Drawn", "Sample", "draw_samples", "write_report"]

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazy(__name__, _NAMES)
