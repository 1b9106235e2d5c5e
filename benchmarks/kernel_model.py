"""What each hot kernel's machine code says about its time, without a GPU.

    python benchmarks/kernel_model.py                  # a line for each kernel, cards and dropout
    python benchmarks/kernel_model.py --write          # and into results/kernel_model.json
    python benchmarks/kernel_model.py --sweep --write  # all configurations that were timed
    python benchmarks/kernel_model.py --only gelu --card H200

Kernels of `kernel_configurations.py` are compiled ahead of time by the installed Triton, in the
tiles that `auto` takes on each card; what another Triton wrote stays in the file. CUDA kernels are
read from `blip2fast/_C.so`, where it was built with nvcc. `sass.py` counts and replays the
instructions, `kernel_work.py` and `cuda_work.py` say how often, `cards.py` what a card can do and
`predict.py` makes a time of it. Then `python benchmarks/report.py` writes docs/kernel_model.md.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "ops"))
import cuda_work
import triton
from aot import Launch, record_launches
from cards import CARDS, Card
from kernel_configurations import CASES, Case, Configuration
from kernel_work import NotModelled, PlainLaunches, cached_bytes, memory_bytes, programs
from model_rows import Row, launch_row, significant
from predict import Constants, Kernel, predict
from sass import Code

from blip2fast.kernels.bias_gelu import config as gelu_config
from blip2fast.kernels.dropout_add_layer_norm import config as norm_config
from blip2fast.kernels.itc import backward as itc_backward
from blip2fast.kernels.itc import forward as itc_forward
from blip2fast.kernels.qformer_attention import config as attention_config

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "kernel_model.json"
DROPOUT = 0.1
CONSTANTS = Constants()


def launches(
    case: Case, dropout_p: float, card: Card, configuration: Configuration | None
) -> tuple[list[Launch], PlainLaunches]:
    """What a case launches on a card, and what PyTorch does besides.

    Args:
        case: Which.
        dropout_p: Its probability.
        card: Decides about tiles.
        configuration: Of the case; None: what `auto` launches there, tuned where there is a file.
    """
    with ExitStack() as stack:
        for module in (attention_config, gelu_config, norm_config, itc_forward, itc_backward):
            stack.enter_context(patch.object(module, "capability", lambda device: card.capability))
        inputs: list[dict[str, Any]] = []
        record_launches(lambda: inputs.append(case.make("meta", dropout_p)))
        launcher: Callable[..., Any] = case.run.args[0]
        with PlainLaunches() as plain:
            if configuration is None:
                found = record_launches(lambda: launcher(**inputs[0]))
            else:
                found = record_launches(lambda: case.run(inputs[0], configuration))
    return found, plain


_COMPILED: dict[tuple[str, int], tuple[Code, int, int, int]] = {}


def kernel_of(launch: Launch, card: Card) -> Kernel:
    """A launch as compiled for a card; each variant once."""
    key = str(launch.variant), card.capability
    if key not in _COMPILED:
        compiled = launch.compile(card.capability)
        of = compiled.resources
        _COMPILED[key] = Code.of(compiled.sass), of["REG"], of["STACK"], compiled.shared_bytes
    name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
    return Kernel(name, *_COMPILED[key], launch.options["num_warps"], math.prod(launch.grid))


def row(case: Case, dropout_p: float, card: Card, configuration: str | None = None) -> Row:
    """A case's prediction on a card.

    Raises:
        NotModelled: with the reason.
    """
    chosen = None if configuration is None else case.configurations[configuration]
    recorded, plain = launches(case, dropout_p, card, chosen)
    total, held = 0.0, []
    for launch, moved in zip(recorded, memory_bytes(case, recorded), strict=True):
        kernel, parts = kernel_of(launch, card), programs(case, launch)
        cached = cached_bytes(launch, moved)
        found = predict(card, kernel, parts, moved, CONSTANTS, cached)
        work = max(parts, key=lambda part: (len(part.trips), part.way or 0))
        held.append(launch_row(kernel, found, work))
        total += found.seconds
    total += plain.count * CONSTANTS.plain_s + plain.bytes / card.bytes_per_s
    floor_s = max(case.flops / card.flops_per_s, case.bytes / card.bytes_per_s)
    return {
        "case": case.name,
        "dropout": dropout_p,
        "card": card.name,
        "configuration": configuration or same_as(case, dropout_p, card, recorded),
        "floor_s": significant(floor_s),
        "predicted_s": significant(total),
        "of_floor": significant(floor_s / total),
        "plain_launches": plain.count,
        "launches": held,
    }


def same_as(case: Case, dropout_p: float, card: Card, recorded: Sequence[Launch]) -> str:
    """The configuration of the sweep that launches the same; else an empty string."""
    own = [(launch.variant, launch.grid) for launch in recorded]
    for name, configuration in case.configurations.items():
        other, _ = launches(case, dropout_p, card, configuration)
        if [(launch.variant, launch.grid) for launch in other] == own:
            return name
    return ""


def rates(case: Case) -> tuple[float, ...]:
    """Probabilities of dropout; products of pairs and GELU have none."""
    return (0.0,) if case.name.startswith(("gelu", "itc")) else (0.0, DROPOUT)


def shipped(cards: Sequence[Card], only: Sequence[str]) -> Iterator[Row]:
    """What `auto` launches; a case without a prediction has the reason."""
    for card in cards:
        for case in CASES:
            if only and not any(part in case.name for part in only):
                continue
            for p in rates(case):
                try:
                    yield row(case, p, card)
                except NotModelled as error:
                    yield _reason(case, p, card, "", error)


def _reason(case: Case, p: float, card: Card, configuration: str, error: Exception) -> Row:
    about = {"case": case.name, "dropout": p, "card": card.name, "configuration": configuration}
    return about | {"not_modelled": str(error)}


def swept(only: Sequence[str]) -> Iterator[Row]:
    """All that the newest sweep timed, in its order, without what launches consist of."""
    cases = {case.name: case for case in CASES}
    for timed in measured():
        case = cases[timed["case"]]
        if "median_s" not in timed or (only and not any(part in case.name for part in only)):
            continue
        p, name = timed["dropout"], timed["configuration"]
        try:
            found = row(case, p, CARDS[0], name)
        except NotModelled as error:
            yield _reason(case, p, CARDS[0], name, error)
            continue
        bound = max(found["launches"], key=lambda x: x["seconds"])["bound"]
        kept = {x: found[x] for x in ("case", "dropout", "card", "configuration", "predicted_s")}
        yield kept | {"bound": bound}


def measured() -> list[Row]:
    """The rows of the newest sweep on the first card."""
    files = sorted(RESULTS.glob("????-??-??_sweep_*H200.json"))
    held: list[Row] = json.loads(files[-1].read_text())["rows"] if files else []
    return held


def line(found: Row) -> str:
    """A row for people."""
    about = f"{found['card']:11} {found['case']:34} {found['dropout']:4}"
    if "not_modelled" in found:
        return f"{about} {found['not_modelled']}"
    bound = ", ".join(launch["bound"] for launch in found.get("launches", ())) or found["bound"]
    share = f"{100 * found['of_floor']:4.0f} %" if "of_floor" in found else ""
    return f"{about} {1e6 * found['predicted_s']:9.1f} us {share} {bound} {found['configuration']}"


def write(name: str, part: str, rows: Sequence[Row]) -> None:
    """Put rows in place of those of the same compiler, part and card and case into the file."""
    data: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    data["constants"] = asdict(CONSTANTS)
    data["cards"] = [asdict(card) for card in CARDS]
    own = data.setdefault(name, {})
    own["commit"] = kernels_commit()
    new = {_key(found) for found in rows}
    held = [found for found in own.get(part, ()) if _key(found) not in new] + list(rows)
    own[part] = sorted(held, key=_place)
    text = json.dumps(data, separators=(",", ":"), sort_keys=False)
    # a row is a line
    FILE.write_text(text.replace('{"case"', '\n{"case"') + "\n")


def kernels_commit() -> str:
    """The commit that last changed the kernels; empty outside of a checkout."""
    command = ["git", "log", "-1", "--format=%h", "--", "kernels", "csrc"]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _key(found: Row) -> tuple[Any, ...]:
    return tuple(found[name] for name in ("card", "case", "dropout"))


def _place(found: Row) -> tuple[int, int, float]:
    """Cards and cases in their order."""
    cards, cases = [card.name for card in CARDS], [case.name for case in CASES]
    return cards.index(found["card"]), cases.index(found["case"]), found["dropout"]


def main() -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of the names of cases")
    parser.add_argument("--card", nargs="*", default=[card.name for card in CARDS])
    parser.add_argument("--sweep", action="store_true", help="all configurations that were timed")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels, not Triton's")
    parser.add_argument("--write", action="store_true", help=f"into {FILE.name}")
    given = parser.parse_args()
    unknown = set(given.card) - {card.name for card in CARDS}
    if unknown:
        parser.error(f"--card: no {', '.join(unknown)}; there are {[card.name for card in CARDS]}")
    cards = [card for card in CARDS if card.name in given.card]
    if given.cuda:
        name, part, source = "nvcc", "shipped", cuda_work.rows(cards, given.only, CONSTANTS)
    elif given.sweep:
        name, part, source = f"triton {triton.__version__}", "sweep", swept(given.only)
    else:
        name, part, source = f"triton {triton.__version__}", "shipped", shipped(cards, given.only)
    rows = []
    try:
        for found in source:
            rows.append(found)
            print(line(found), flush=True)
    except NotModelled as error:
        print(error, file=sys.stderr)
        return 1
    if given.write:
        write(name, part, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
