"""What the README promises: its commands exist, its code runs, its demo passes in a fresh clone."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from blip2fast.demo import check_gates

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def test_readme_opens_with_the_two_commands() -> None:
    commands = re.findall(r"^ {4}(make \w+)", README, flags=re.MULTILINE)
    assert commands[:2] == ["make demo", "make test"]


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"make ([\w-]+)", README)) <= targets


def test_every_config_of_the_readme_exists() -> None:
    configs = re.findall(r"configs/\w+\.yaml", README)
    assert configs
    assert [name for name in configs if not (ROOT / name).is_file()] == []


@pytest.mark.slow
def test_stage1_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (example,) = [block for block in blocks if "Stage1Config(" in block]
    names: dict[str, object] = {}
    exec(example, names)
    loss = names["out"].loss  # type: ignore[attr-defined]
    assert bool(loss.isfinite())
    assert names["model"].query_tokens.grad is not None  # type: ignore[attr-defined]


@pytest.mark.demo
def test_demo_in_a_fresh_clone_passes_its_gates(tmp_path: Path) -> None:
    """`git clone`, `make demo`, as a newcomer: no environment, no caches of this checkout."""
    clone = tmp_path / "blip2fast"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    env = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    subprocess.run(["make", "demo"], cwd=clone, env=env, check=True)
    summary = json.loads((clone / "runs/scenes/summary.json").read_text())
    assert check_gates(summary) == []
    assert summary["settings"]["held_out_scenes"] == 1000
    assert summary["from_nothing"]["seconds"] < 600
    shutil.rmtree(clone / ".venv")  # the run itself stays for a look


def test_tables_are_what_the_result_files_say() -> None:
    report = [sys.executable, "benchmarks/report.py", "--check"]
    done = subprocess.run(report, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
