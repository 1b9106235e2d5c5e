"""Writes `report.html` of a run: one file, which opens without a network.

Losses, retrieval, learning rates, throughput and what else `metrics.jsonl` holds, as charts; the
last values; how the run was started, each time; its configuration and environment; and, given
samples, pictures with what the model wrote about them.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from blip2fast import __version__
from blip2fast._imports import needs
from blip2fast.data.manifest import replace_file
from blip2fast.reporting.charts import Line, line_chart
from blip2fast.training.log import read_metrics

with needs("draw a report", "jinja2", "PIL"):
    import jinja2
    from PIL import Image

REPORT = "report.html"
# pixels of the longer side of a picture in the page, and JPEG's quality of pictures and overlays
_LONGEST = 384
_QUALITY, _OVERLAY_QUALITY = 88, 75


@dataclass(frozen=True)
class _Chart:
    """A chart of the page: its title, which metrics are drawn, their unit and scale."""

    title: str
    pattern: str
    unit: str = ""
    share: bool = False
    logarithmic: bool = False


# a metric is drawn in the first chart whose pattern matches it, without the prefix `eval_`
_CHARTS = (
    _Chart("Loss", r"loss(_\w+)?"),
    _Chart("Accuracy", r"accuracy_\w+", share=True),
    _Chart("Retrieval", r"(i2t|t2i)_r\d+", share=True),
    _Chart("Captions and answers", r"exact|cider|bleu\w*|rouge\w*|vqa\w*|accuracy"),
    _Chart("Learning rate", r"lr\w*"),
    _Chart("Temperature", r"temp\w*"),
    _Chart("Gradient norm", r"grad\w*norm\w*", logarithmic=True),
    _Chart("Throughput", r"samples_per_second", "samples a second"),
    _Chart("Seconds a step", r"seconds_per_step", "s"),
    _Chart("Waiting for data", r"\w*(wait|data)\w*", "share of the time"),
    _Chart("Memory", r"\w*_gib", "GiB"),
    _Chart("Other", r".*"),
)


@dataclass(frozen=True)
class Sample:
    """A picture in the report.

    Attributes:
        image: the picture.
        name: what it is called, such as its file.
        lines: texts by what they are: `{"caption": ..., "question": ..., "answer": ...}`.
        overlays: further pictures by their titles, such as where the queries look.
    """

    image: Image.Image
    name: str
    lines: Mapping[str, str] = field(default_factory=dict)
    overlays: Mapping[str, Image.Image] = field(default_factory=dict)


def write_report(
    folder: str | Path,
    samples: Sequence[Sample] = (),
    out: str | Path | None = None,
    notes: Sequence[str] = (),
) -> Path:
    """Write the report of a run, also while it is active.

    Args:
        folder: output folder of a run, with its `metrics.jsonl` and `config.yaml`.
        samples: pictures to show, with their texts (`blip2fast.reporting.draw_samples`).
        out: the file to write; None: `report.html` in the run's folder.
        notes: lines about the pictures, such as why there are none.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder holds no run, or its metrics are damaged.
    """
    folder = Path(folder)
    metrics = read_metrics(folder)
    config = _text(folder / "config.yaml")
    stage = re.search(r"^stage: (\d)", config, re.MULTILINE)
    planned = re.search(r"^\s+max_steps: (\d+)", config, re.MULTILINE)
    last_step = max((int(line["step"]) for line in metrics), default=0)
    page = _template().render(
        name=folder.resolve().name,
        stage=stage[1] if stage else "",
        last_step=last_step,
        planned=int(planned[1]) if planned else None,
        ended=(folder / "model.safetensors").is_file(),
        last=_last_values(metrics),
        charts=_charts(metrics),
        samples=[_shown(sample) for sample in samples],
        notes=list(notes),
        history=_history(folder),
        skipped=_text(folder / "skipped.jsonl").count("\n"),
        config=config,
        version=__version__,
    )
    path = Path(out) if out is not None else folder / REPORT
    replace_file(path, lambda aside: aside.write_text(page, encoding="utf-8"))
    return path


def _template() -> jinja2.Template:
    text = files("blip2fast.reporting").joinpath("run_report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    return environment.from_string(text)


def _number(value: Any) -> str:
    """A number as it is read: four digits, thousands apart."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1e4:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _series(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Line]:
    """Every metric that is a number, by its name in `metrics.jsonl`."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for line in metrics:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(line["step"]))
                values.append(float(value))
    return {name: Line(*both, name.startswith("eval_")) for name, both in found.items()}


def _charts(metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    lines = _series(metrics)
    last_step = max((int(line["step"]) for line in metrics), default=0)
    drawn: list[dict[str, str]] = []
    for chart in _CHARTS:
        taken: dict[str, list[Line]] = {}
        for name in [n for n in lines if re.fullmatch(chart.pattern, n.removeprefix("eval_"))]:
            taken.setdefault(name.removeprefix("eval_"), []).append(lines.pop(name))
        if taken:
            # a single line has no legend
            label = chart.unit or (next(iter(taken)) if len(taken) == 1 else "")
            svg = line_chart(
                taken, last_step, label, share=chart.share, logarithmic=chart.logarithmic
            )
            drawn.append({"title": chart.title, "svg": svg})
    return drawn


def _label(name: str) -> str:
    inner = name.removeprefix("eval_")
    return f"{inner}, held out" if inner != name else name


def _last_values(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """The last value of every metric and its step; held-out ones first."""
    last = {name: (value, int(line["step"])) for line in metrics for name, value in line.items()}
    last.pop("step", None)
    order = sorted(last, key=lambda name: not name.startswith("eval_"))
    return [(_label(name), *last[name]) for name in order]


def _history(folder: Path) -> list[dict[str, Any]]:
    """How the run was started, each time: the lines of `history.jsonl`."""
    lines = _text(folder / "history.jsonl").splitlines()
    return [json.loads(line) for line in lines if line.strip()]


def _shown(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.name,
        "image": _data_url(sample.image),
        "lines": dict(sample.lines),
        "overlays": {
            title: _data_url(image, _OVERLAY_QUALITY) for title, image in sample.overlays.items()
        },
    }


def _data_url(image: Image.Image, quality: int = _QUALITY) -> str:
    """The picture itself as the address of an image element."""
    small = image.convert("RGB")
    small.thumbnail((_LONGEST, _LONGEST))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=quality)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
