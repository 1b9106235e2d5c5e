"""Fixtures of the suites: agreement before time, contenders in turns, conditions in the result."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import selection
import torch
from comparing import Contender, Provider, Race, Work, plain
from machines import ceilings, run_conditions
from progress import Progress, clock_time
from results import reduce
from summary import rivals_table
from tables import REFERENCE

from blip2fast._choices import Kernels
from blip2fast._heap import keep_freed_memory
from blip2fast.ops import set_kernels


class DeviceClock:
    """What pytest-benchmark reads: seconds measured elsewhere, added up."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = DeviceClock()


STARTED = time.monotonic()
RUN = pytest.StashKey[Progress]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How much is timed; and options for a machine that is lent for minutes, without `.git`."""
    parser.addoption(
        "--full",
        action="store_true",
        help="time all shapes, compiled rivals and the reference: on 2 cores about an hour",
    )
    parser.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="leave out benchmarks that would end later than this; by default "
        f"{selection.LIMIT_S:.0f}, with --full none",
    )
    parser.addoption("--bench-commit", help="the commit that results name where there is no .git")
    parser.addoption(
        "--without-compiled-rivals",
        action="store_true",
        help="leave out what torch.compile makes of rivals: 10 to 25 s each before it runs",
    )
    parser.addoption(
        "--kernels",
        choices=get_args(Kernels),
        default="check",
        help="whether impl='auto' takes our kernels; trust: without a check",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let "auto" and whole models run what `--kernels` says."""
    set_kernels(config.getoption("kernels"))


def is_timed(config: pytest.Config) -> bool:
    """Whether this run is for times, not a look at contenders by the tests."""
    return bool(config.getoption("benchmark_only") and not config.getoption("benchmark_disable"))


def is_brief(config: pytest.Config) -> bool:
    """Whether this is the plain command: few shapes, few rounds."""
    return is_timed(config) and not config.getoption("full")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cells of the plain command, and leave it those, the weightiest first.

    Every benchmark's columns come from the device's clock.
    """
    order = list(selection.chosen(torch.cuda.is_available()))
    benchmarks = [item for item in items if "benchmark" in getattr(item, "fixturenames", ())]
    for item in benchmarks:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))
        if selection.cell_of(item.nodeid) in order:
            item.add_marker(pytest.mark.brief)
    if is_brief(config) and not selection.names_a_cell(config.args):
        kept = [item for item in benchmarks if item.get_closest_marker("brief")]
        kept.sort(key=lambda item: order.index(selection.cell_of(item.nodeid)))
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> str:
    """What will be timed, and about how long that takes."""
    if not is_timed(config):
        return ""
    expected = selection.expected_seconds(
        (item.nodeid for item in items), torch.cuda.is_available()
    )
    limit = config.getoption("time_limit")
    if limit is None and is_brief(config):
        limit = selection.LIMIT_S
    config.stash[RUN] = Progress(expected, limit, before=time.monotonic() - STARTED)
    told = f"{len(items)} benchmark{'s' * (len(items) != 1)}"
    if is_brief(config):
        told += f", on 2 cores about {clock_time(sum(expected))}; --full has all"
    return told


class Lines:
    """A line for each benchmark of a timed run, in place of pytest's dots.

    Args:
        config: Of the run.
        reporter: Where lines go.
    """

    def __init__(self, config: pytest.Config, reporter: Any) -> None:
        self._config = config
        self._reporter = reporter
        reporter.showfspath = False

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say which one begins."""
        run = self._config.stash[RUN]
        run.begin()
        self._reporter.write(run.line(" ".join(selection.cell_of(nodeid))), flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Leave out what would end too late."""
        if not self._config.stash[RUN].fits():
            pytest.skip("no time left: --time-limit SECONDS gives more, --full as much as it takes")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """End the line."""
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self._config.stash[RUN].end(ran=report.when == "call")
            self._reporter.write(f": {report.duration:.1f} s, {report.outcome}\n", flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: pytest.TestReport) -> tuple[str, str, str]:
        """Count it, and print no letter."""
        if report.when == "call" or report.skipped:
            return report.outcome, "", ""
        return "error" if report.failed else "", "", ""


def pytest_sessionstart(session: pytest.Session) -> None:
    """Replace pytest's dots by lines."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if is_timed(session.config) and reporter is not None:
        session.config.pluginmanager.register(Lines(session.config, reporter), "benchmark-lines")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Say at once why a benchmark failed: a run that ends early has no summary."""
    if report.failed:
        print(f"\nFAILED {report.nodeid}: {report.longreprtext}", flush=True)


@pytest.hookimpl(tryfirst=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Ours beside each rival, in place of the plugin's table of whoever ran first."""
    found = getattr(config, "_benchmarksession", None)
    if found is None or not is_timed(config):
        return
    found.quiet = True
    files = reduce({"benchmarks": [b.as_dict(include_data=False) for b in found.benchmarks]})
    if files:
        terminalreporter.section("ours beside each rival: over 1, ours is quicker")
        terminalreporter.write_line(rivals_table(files))
    if files and is_brief(config):
        left_out = "compiled rivals, the reference and other shapes are timed with --full"
        terminalreporter.write_line(f"\n{clock_time(config.stash[RUN].elapsed)}; {left_out}")


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Write what is finished beside `--benchmark-json`'s file, which a killed run never writes."""
    found = getattr(item.config, "_benchmarksession", None)
    if found is None or not found.json:
        return
    # older versions of the plugin open the file beforehand
    path = found.json if isinstance(found.json, Path) else Path(found.json.name)
    finished = [bench.as_dict(include_data=False) for bench in found.benchmarks if bench.stats.data]
    path.with_suffix(".part").write_text(json.dumps({"benchmarks": finished}))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave out what was interrupted before its first sample: its statistics are of nothing."""
    found = getattr(session.config, "_benchmarksession", None)
    if found is not None:
        found.benchmarks = [bench for bench in found.benchmarks if bench.stats.data]


@pytest.fixture(scope="session")
def run_facts(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Conditions that all benchmarks of a run share; on a CPU the heap is that of a run."""
    kept = is_timed(request.config) and not torch.cuda.is_available() and keep_freed_memory()
    return run_conditions(request.config.getoption("bench_commit")) | {"keeps_freed_memory": kept}


@pytest.fixture
def conditions(run_facts: dict[str, Any]) -> dict[str, Any]:
    """What a number is worth nothing without; a suite adds its own, such as the dtype."""
    return {**copy.deepcopy(run_facts), "dtype": "float32"}


@pytest.fixture
def device() -> torch.device:
    """The CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def timed(benchmark: Any) -> bool:
    """Whether benchmarks are timed; otherwise contenders are only looked at."""
    return bool(benchmark.enabled)


@pytest.fixture
def compiled(timed: bool, request: pytest.FixtureRequest) -> bool:
    """Whether rivals that `torch.compile` makes take part, where a suite has some."""
    left_out = is_brief(request.config) or request.config.getoption("without_compiled_rivals")
    return timed and not left_out


@pytest.fixture
def brief(request: pytest.FixtureRequest) -> bool:
    """Whether this is the plain command, which takes minutes."""
    return is_brief(request.config)


@pytest.fixture
def compare(
    benchmark: Any,
    conditions: dict[str, Any],
    device: torch.device,
    request: pytest.FixtureRequest,
) -> Callable[..., None]:
    """Time contenders in turns, after each has been seen to agree.

    pytest-benchmark's columns are of the first that runs; everything is in `extra_info`.
    """

    def run(
        providers: Mapping[str, Provider[Any]],
        make_inputs: Callable[[int], Any],
        agree: Callable[[Any, Any], None],
        *,
        work: Work | None = None,
        dtype: torch.dtype = torch.float32,
        judged: Mapping[str, Provider[Any]] | None = None,
        rounds: int | None = None,
    ) -> None:
        """See `comparing.Race`.

        Args:
            providers: By name, ours first.
            make_inputs: From a seed to one input set.
            agree: Raises AssertionError where a result is wrong.
            work: FLOPs and bytes that the floor is computed from.
            dtype: Of the matrix products.
            judged: Providers whose results are looked at instead (without dropout, say).
            rounds: How many; by default as many as fit `--benchmark-max-time` each. In the plain
                command fewer, and the reference does not take part.
        """
        if is_brief(request.config):
            providers = {name: p for name, p in providers.items() if name != REFERENCE}
        race = Race(make_inputs, agree, device, benchmark.enabled)

        def enter() -> None:
            size = work.input_bytes if work else 0
            for name, provider in providers.items():
                race.enter(name, provider, (judged or {}).get(name), size)

        if benchmark.enabled:
            enter()
        else:
            benchmark.pedantic(enter)
        conditions["dtype"] = str(dtype).removeprefix("torch.")
        if device.type == "cuda":
            conditions["kernels"] = request.config.getoption("kernels")
        benchmark.extra_info["conditions"] = conditions
        if benchmark.enabled and race.running():
            _time(race, benchmark, _rounds(race, request.config, rounds))
            benchmark.extra_info |= _numbers(race, work, device, dtype)
        if race.failures():
            pytest.fail(race.failures(), pytrace=False)
        if all(entry.reason for entry in race.entries):
            pytest.skip("; ".join(f"{e.name}: {e.reason}" for e in race.entries))

    return run


@pytest.fixture
def race(compare: Callable[..., None], conditions: dict[str, Any]) -> Callable[..., None]:
    """Time `ours` against rivals by whole calls; whether they agree, the suite has seen to."""

    def run(ours: Callable[[], Any], rivals: Mapping[str, Callable[[], Any]], rounds: int) -> None:
        def call(function: Callable[[], Any]) -> Callable[[Any], Contender]:
            return plain(lambda _: function())

        providers = {"ours": call(ours)} | {name: call(rival) for name, rival in rivals.items()}
        dtype = getattr(torch, conditions["dtype"].removeprefix("torch."))
        compare(providers, lambda seed: None, lambda *_: None, dtype=dtype, rounds=rounds)

    return run


def _rounds(race: Race[Any], config: pytest.Config, given: int | None) -> int:
    brief = is_brief(config)
    if given is not None:
        return min(given, selection.LEAST_ROUNDS) if brief else given
    if not brief:
        seconds = float(config.getoption("benchmark_max_time"))
        return race.rounds(seconds, int(config.getoption("benchmark_min_rounds")))
    return race.rounds(
        selection.CONTENDER_S, selection.LEAST_ROUNDS, long_round=selection.LONG_ROUND_S
    )


def _time(race: Race[Any], benchmark: Any, rounds: int) -> None:
    first, *others = race.running()
    turn = 0

    def in_turns() -> None:
        nonlocal turn  # another of the others begins each round
        turn += 1
        for place in range(len(others)):
            others[(turn + place) % len(others)].take()

    def timed() -> None:
        CLOCK.seconds += first.take()

    benchmark.pedantic(timed, setup=in_turns, rounds=rounds)


def _numbers(
    race: Race[Any], work: Work | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    rates = ceilings(device, dtype) if work is not None else None
    numbers: dict[str, Any] = {
        "contenders": {entry.name: entry.result(work, rates) for entry in race.entries}
    }
    if work is not None and rates is not None:
        floor_s, bound = work.floor(rates)
        numbers["work"] = {"flops": work.flops, "bytes": work.bytes}
        numbers["work"] |= {"floor_s": floor_s, "bound": bound}
        numbers["ceilings"] = dict(vars(rates))
    return numbers
