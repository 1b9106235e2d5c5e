"""benchmarks/gpu.sh: every step apart, in time, and everything comes back in a few files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
# stands in for Python: notes how it was called, and writes what each step would
here=$(dirname "$0")
echo "$*" >>"$here/calls"
for argument; do
    case $argument in
        --benchmark-json=*) echo '{}' >"${argument#*=}" ;;
    esac
done
case $* in
    *get_device_name*) cat "$here/gpu" ;;
    *"import blip2fast, torch"*) exit "$(cat "$here/smoke")" ;;
    *why_not*) exit "$(cat "$here/extension")" ;;
    *sweep.py*--compiled*) cat "$here/sweep" >"$2"; exit "$(cat "$here/sweep_status")" ;;
    *tune.py*) echo 'TUNED'; echo '{}' >"$4" ;;
    *--show*) echo "TABLE $*" ;;
    *bench_itc*) echo "1 passed"; exec sleep "$(cat "$here/itc_seconds")" ;;
    *bench_glue*) echo "FAILED benchmarks/bench_glue.py::one - wrong"; exit 1 ;;
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
        self.says(gpu="NVIDIA Nothing", smoke="0", extension="0", itc_seconds="0")
        self.says(sweep="{}", sweep_status="0")

    def says(self, **answers: str) -> None:
        """What the stand-in answers, or how long it takes."""
        for name, answer in answers.items():
            (self.folder / name).write_text(answer)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        (self.folder / "calls").write_text("")
        return subprocess.run(
            [str(ROOT / "benchmarks" / "gpu.sh"), *arguments],
            env=os.environ | {"PYTHON": str(self.stub)},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> str:
        return (self.folder / "calls").read_text()


@pytest.fixture
def gpu_script(tmp_path: Path) -> GPUScript:
    return GPUScript(tmp_path)


def packed(out: Path) -> set[str]:
    with tarfile.open(out / "results.tar.gz") as archive:
        return {Path(name).name for name in archive.getnames()}


def test_every_step_is_a_process_and_few_files_come_back(gpu_script: GPUScript) -> None:
    done = gpu_script.run("-c", "abc", str(gpu_script.out))
    assert done.returncode == 0, done.stderr
    calls = gpu_script.calls()
    for part in (
        "tests/ops/test_glue_triton.py",
        "tests/ops/test_itc_gpu.py",
        "-m blip2fast kernels check --jobs",
        "benchmarks/bench_stage1_step.py --full -m brief -k bench_step",
        "benchmarks/sweep.py --compile --workers",
        "sweep.json --seconds",
        "benchmarks/bench_itc.py",
        "benchmarks/bench_qformer_attention.py",
        "benchmarks/bench_qformer.py",
    ):
        assert part in calls, part
    suites = re.findall(r".*benchmarks/bench_.*", calls)
    assert any("--benchmark-disable" in suite for suite in suites), "compiled beforehand"
    for suite in suites:
        if "--benchmark-disable" in suite:
            continue
        assert "--kernels=trust --without-compiled-rivals --bench-commit=abc" in suite
    came_back = {path.name for path in gpu_script.out.iterdir()}
    # one more than these may come
    assert came_back <= {"results.tar.gz", "log.txt", "table.txt", "records.json", "tuned.json"}
    assert {"step.json", "itc.json", "sweep.json", "tests.log"} <= packed(gpu_script.out)
    assert "bench_itc.py" in (gpu_script.out / "log.txt").read_text()
    assert "TABLE benchmarks/report.py --show" in done.stdout
    assert "FAILED benchmarks/bench_glue.py::one" in done.stdout


def test_what_the_sweep_found_is_what_later_steps_run(gpu_script: GPUScript) -> None:
    """Checks and times are of the tuned kernels, also where the sweep ran out of time."""
    gpu_script.says(sweep_status="124")
    done = gpu_script.run(str(gpu_script.out))
    assert "\nTUNED\n" in done.stdout
    calls = gpu_script.calls()
    order = ["test_itc_gpu.py", "--compiled", "tune.py", "kernels check", "--benchmark-only"]
    places = [calls.index(part) for part in order]
    assert places == sorted(places)
    assert (gpu_script.out / "tuned.json").exists()


def test_a_sweep_without_results_tunes_nothing(gpu_script: GPUScript) -> None:
    gpu_script.says(sweep="", sweep_status="1")
    done = gpu_script.run(str(gpu_script.out), "sweep", "check")
    assert "tune.py" not in gpu_script.calls()
    assert "kernels check" in gpu_script.calls()
    assert "done" in done.stdout
    assert not (gpu_script.out / "tuned.json").exists()


def test_an_import_that_fails_ends_the_run_at_once(gpu_script: GPUScript) -> None:
    gpu_script.says(smoke="1")
    done = gpu_script.run(str(gpu_script.out))
    assert done.returncode == 1
    assert "does not import" in done.stdout
    assert "pytest" not in gpu_script.calls()
    assert (gpu_script.out / "results.tar.gz").exists()


def test_the_extension_is_built_where_it_lacks_the_operators(gpu_script: GPUScript) -> None:
    gpu_script.run(str(gpu_script.out), "itc")
    assert "build_ext" not in gpu_script.calls()
    gpu_script.says(extension="1")
    gpu_script.run(str(gpu_script.out), "itc")
    assert "setup.py build_ext --inplace" in gpu_script.calls()


def test_it_ends_in_time(gpu_script: GPUScript) -> None:
    gpu_script.says(itc_seconds="60")
    done = gpu_script.run("-t", "9", str(gpu_script.out), "itc", "glue")
    assert "itc: out of time" in done.stdout
    assert "glue: out of time" in done.stdout, "no time was left for it"
    assert not re.search(r"bench_glue.*--benchmark-only", gpu_script.calls())


def test_without_a_gpu_small_shapes_are_rehearsed(gpu_script: GPUScript) -> None:
    gpu_script.says(gpu="")
    done = gpu_script.run(str(gpu_script.out))
    assert "a rehearsal" in done.stdout
    assert "sweep.py" not in gpu_script.calls()
    assert "--full -m not fullsize" in gpu_script.calls()


def test_steps_have_names(gpu_script: GPUScript) -> None:
    done = gpu_script.run(str(gpu_script.out), "itz")
    assert done.returncode == 2
    assert "no step itz; known:" in done.stderr
    assert gpu_script.run().returncode == 2


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """The script itself, without a stand-in: kernels interpreted, a suite at its small shapes."""
    script, options = ROOT / "benchmarks" / "gpu.sh", ("-c", "abc", "-t", "500")
    # not those of a worker of these tests, in which nothing is timed
    outside = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [str(script), *options, str(tmp_path), "tests", "itc"],
        env=outside | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"tests \(0\): \d+ passed", done.stdout), done.stdout
    assert re.search(r"itc \(0\): \d+ passed", done.stdout), done.stdout
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        results = archive.extractfile("./itc.json")
        assert results is not None
        found = json.load(results)["benchmarks"]
    assert all(bench["extra_info"]["conditions"]["commit"] == "abc" for bench in found)
    assert "blip2fast" in (tmp_path / "table.txt").read_text()
