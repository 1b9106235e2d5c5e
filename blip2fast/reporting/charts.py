"""Line charts as SVG that stands in a page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blip2fast._imports import needs

with needs("draw a report", "matplotlib"):
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# distinguishable in grey and with colour-vision deficiencies (Okabe and Ito)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: it can be read, searched and scaled
    "svg.hashsalt": "blip2fast",  # the same file for the same run
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e5e5e5",
}


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        steps, values: of the same length, in order.
        held_out: drawn dashed with dots, in the colour of the trained line of its name.
    """

    steps: Sequence[float]
    values: Sequence[float]
    held_out: bool = False


def line_chart(
    lines: Mapping[str, Sequence[Line]],
    last_step: int,
    unit: str = "",
    *,
    share: bool = False,
    logarithmic: bool = False,
) -> str:
    """An SVG element with the lines of each name, over optimizer steps.

    Args:
        lines: at least one name, as the legend has it, with its lines.
        last_step: end of the axis, the same for all charts of a run.
        unit: of the values, beside their axis.
        share: the values lie between 0 and 1, all of which is shown.
        logarithmic: scale of the values; taken as linear where one is not positive.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 3.1), layout="constrained")
        axes = figure.subplots()
        for number, (name, group) in enumerate(lines.items()):
            for line in group:
                axes.plot(
                    line.steps,
                    line.values,
                    label=name if line is group[0] else None,
                    color=COLOURS[number % len(COLOURS)],
                    linestyle="--" if line.held_out else "-",
                    linewidth=1.4,
                    # a line of one point would not be seen
                    marker="o" if line.held_out or len(line.steps) == 1 else "",
                    markersize=3.5,
                )
        drawn = (value for group in lines.values() for line in group for value in line.values)
        if logarithmic and all(value > 0 for value in drawn):
            axes.set_yscale("log")
        if share:
            axes.set_ylim(0, 1.04)
        axes.set_xlim(0, max(last_step, 1) * 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))  # there is no half step
        axes.set_xlabel("step")
        if unit:
            axes.set_ylabel(unit)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9, loc="best")
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    whole = file.getvalue()
    return whole[whole.index("<svg") :]
