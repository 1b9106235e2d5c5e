"""benchmarks/gpu.sh: it goes on where it stopped, and ends in time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STUB = """#!/bin/sh
# stands in for Python: notes how it was called, and writes what pytest-benchmark would
echo "$*" >>"$(dirname "$0")/calls"
for argument; do
    case $argument in
        --benchmark-json=*) echo '{}' >"${argument#*=}" ;;
        benchmarks/bench_itc.py) itc=1 ;;
    esac
done
case $* in
    *get_device_name*) echo ;;
    *--show*) echo "TABLE $*" ;;
    *bench_itc*) [ -z "$itc" ] || exec sleep "$(cat "$(dirname "$0")/itc_seconds")" ;;
esac
"""


class GPUScript:
    """Runs benchmarks/gpu.sh with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stub = folder / "python"
        self.stub.write_text(STUB)
        self.stub.chmod(0o755)
        self.out = folder / "out"
        self.itc_takes(0)

    def itc_takes(self, seconds: int) -> None:
        (self.folder / "itc_seconds").write_text(str(seconds))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").write_text("")
        return subprocess.run(
            [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
            env=os.environ | {"PYTHON": str(self.stub)},
            capture_output=True,
            text=True,
            check=False,
        )

    def suites(self) -> Sequence[str]:
        """The suites of the last call, in order."""
        words = (self.folder / "calls").read_text().split()
        return [w.removeprefix("benchmarks/bench_")[:-3] for w in words if "bench_" in w]


@pytest.fixture
def gpu_script(tmp_path: Path) -> GPUScript:
    return GPUScript(tmp_path)


def test_gpu_script_skips_what_its_folder_holds(gpu_script: GPUScript) -> None:
    gpu_script.out.mkdir()
    (gpu_script.out / "itc.json").write_text("{}")
    first = gpu_script.run("-c", "abc", str(gpu_script.out), "itc", "glue", "qformer")
    assert gpu_script.suites() == ["glue", "qformer"]
    assert "itc: done before" in first.stdout
    calls = (gpu_script.folder / "calls").read_text()
    assert "setup.py build_ext --inplace" in calls
    assert "--bench-commit=abc" in calls
    assert "-m pytest -q -rfEs -p no:cacheprovider -m gpu" in calls
    second = gpu_script.run(str(gpu_script.out), "itc", "glue", "qformer")
    assert gpu_script.suites() == []
    assert "tests: done before" in second.stdout
    assert second.stdout.splitlines()[-1].startswith("TABLE benchmarks/report.py --show")


def test_gpu_script_ends_in_time_and_goes_on_later(gpu_script: GPUScript) -> None:
    gpu_script.itc_takes(60)
    first = gpu_script.run("-t", "9", str(gpu_script.out), "itc", "glue")
    assert "itc: out of time" in first.stdout
    assert "glue: out of time" in first.stdout, "no time was left for it"
    kept = {path.name for path in gpu_script.out.glob("*.json")}
    assert kept == {"itc.partial.json"}
    gpu_script.itc_takes(0)
    gpu_script.run(str(gpu_script.out), "itc", "glue")
    assert gpu_script.suites() == ["itc", "glue"]
    assert {path.name for path in gpu_script.out.glob("*.json")} == {"itc.json", "glue.json"}


def test_gpu_script_names_its_suites(gpu_script: GPUScript) -> None:
    done = gpu_script.run(str(gpu_script.out), "itz")
    assert done.returncode == 2
    assert "no suite itz; known:" in done.stderr
    assert gpu_script.run().returncode == 2
