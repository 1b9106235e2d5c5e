"""Commands and code of the README and docs/ run, on small models, or are listed here.

Blocks that read no files run in test_docs.py. Those of a page run in order, in a folder that holds
what they name (tests/support/docs_world.py).
"""

from __future__ import annotations

import ast
import io
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from docs_world import write_docs_world
from stage2_models import SIZE

from blip2fast import train
from blip2fast.command_line import main
from blip2fast.training.config_files import parse_config, parse_text
from blip2fast.training.engine import leave_processes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LAUNCHERS = ("deepspeed", "torchrun", "srun")
PROGRAMS = ("blip2fast", *LAUNCHERS, "python", "pip", "make", "lmms_eval", "cd")

SEVERAL = "several processes: tests/training, tests/capfilt and tests/scoring start some"
PAPER = "a recipe of the paper, which takes GPUs: test_memory_plan.py plans them all"
# what is not run, and why; a pattern of the command, after its page
NOT_RUN = {
    r".*: pip install|releasing: (python -m (build|pip|venv)|/tmp|cd /tmp)": "installs: "
    "test_packaging.py builds the wheel and the sdist, and installs them",
    r".*: make |README: \. \.venv": "`.ci/run` and `make test-demo` run these",
    r".*: torchrun |.*: deepspeed --hostfile": SEVERAL,
    r"several_machines: (#!|#SBATCH|export|srun)": SEVERAL,
    r"(README|paper): deepspeed .*(vitg|scenes)_": PAPER,
    r"(README|checkpoints): deepspeed .*--resume": "goes on with a stopped run: tests/training",
    r"logs: python .*wandb": "needs a server: tests/training has a stand-in for wandb",
    r"fine_tuning: deepspeed .*coco_caption.yaml$": PAPER,
    r".*: blip2fast demo-page": "serves until Ctrl-C: tests/demo_page opens it in a browser",
    r".*: blip2fast kernels check": "needs a GPU: tests/ops/test_command_line_kernels.py",
    r"published_weights: blip2fast convert (SRC|blip2_pretrained)": "a form, and a file of LAVIS: "
    "tests/published/test_converting.py converts such files",
    r"published_weights: blip2fast caption .*DIR": "a form: tests/inference/test_moved_models.py",
    r"evaluation: lmms_eval ": "needs lmms-eval: tests/scoring/test_lmms_eval.py",
    r"kernel_model: python benchmarks/": "tests/ops/test_kernel_model.py, test_readme.py",
    r"scaling: python benchmarks/": "test_scaling.py",
}

# steps and sizes of a test, for the runs that pages start
SHORT = ("max_steps=2", "warmup_steps=1", "batch_size=2", "accumulation=1")
SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_query_tokens": 3,
    "max_position_embeddings": 32,
}
HERE = ("overwrite=true", "precision=fp32", "zero_stage=0", "data.workers=0", "eval_every=0")


@dataclass(frozen=True)
class Block:
    """A command, or a block of code, of a page."""

    page: str
    kind: str  # "command", "python" or "yaml"
    text: str

    @property
    def name(self) -> str:
        return f"{self.page}: {self.text}"

    @property
    def reads_files(self) -> bool:
        """Whether test_docs.py leaves it to this file."""
        from test_docs import _NEEDS_FILES

        return self.kind == "python" and _NEEDS_FILES.search(self.text) is not None

    @property
    def left_out(self) -> bool:
        return any(re.match(pattern, self.name) for pattern in NOT_RUN)


def blocks(page: Path) -> Iterator[Block]:
    """The blocks of a page in its order."""
    text = page.read_text()
    parts = re.compile(r"^```(\w*)\n(.*?)^```|((?:^ {4}\S.*\n(?:^ {4,}.*\n)*))", re.M | re.S)
    for found in parts.finditer(text):
        kind, fenced, indented = found.groups()
        if kind in ("python", "yaml"):
            yield Block(page.stem, kind, fenced)
            continue
        shell = kind in ("bash", "sh", "console")
        whole = re.sub(r"\\\n\s*", "", fenced if indented is None else indented)
        for line in whole.splitlines():
            command = re.sub(r"\s+#.*", "", line.strip().removeprefix("$ "))
            if command and (shell or command.split()[0] in PROGRAMS):
                yield Block(page.stem, "command", command)


def test_what_is_left_out_is_there() -> None:
    """A reason that is about nothing, or about everything of a page, hides what nobody runs."""
    names = [each.name for page in PAGES for each in blocks(page)]
    about = {pattern: [n for n in names if re.match(pattern, n)] for pattern in NOT_RUN}
    assert [pattern for pattern, found in about.items() if not found] == []
    assert len({name for found in about.values() for name in found}) < len(names) / 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_docs_world(tmp_path_factory.mktemp("docs"))


def to_run(page: Path) -> list[Block]:
    return [
        each
        for each in blocks(page)
        if (each.kind == "command" and not each.left_out) or each.reads_files
    ]


@pytest.mark.parametrize("page", filter(to_run, PAGES), ids=lambda page: page.stem)
def test_the_page_runs(
    page: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = tmp_path / "world"
    shutil.copytree(base, world)
    if page.stem == "start":  # trains these itself
        for name in ("stage1", "stage2"):
            shutil.rmtree(world / "runs" / name)
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {}
    for block in blocks(page):
        if block.kind == "yaml" and "output_dir" in block.text:
            (world / "captions.yaml").write_text(block.text)
        elif block.kind == "python":
            tree = ast.parse(block.text)
            if not block.reads_files:
                tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
            exec(compile(tree, block.name, "exec"), names)
        elif block.kind == "command" and not block.left_out:
            monkeypatch.setattr(sys, "stdin", io.StringIO("what is it ?\n"))
            run(shlex.split(block.text), block.name)


def run(words: list[str], name: str) -> None:
    """A command in this process, where its launcher starts several; trains for two steps."""
    if words[0] == "blip2fast" and words[1] != "train":
        try:
            # of the small encoder's patches
            main([str(2 * SIZE) if word == "364" else word for word in words[1:]])
        except SystemExit as end:
            raise AssertionError(f"{name}: {end}") from end
        return
    given = words[words.index("--config") :]
    short = [f"optim.{each}" for each in SHORT] + [*HERE]
    if "stage1" not in given[1]:
        # the small tokenizer has no line break, the small encoder is of none of the runs
        short += ["language_model.end_text=null", "allow_other_frozen=true"]
    else:
        short += [f"model.{key}={value}" for key, value in SMALL.items()]
        short += ["model.bert=null", "data.max_txt_len=12"]
    if "coco" in given[1]:
        short.append(f"data.image_size={SIZE}")
    try:
        train.main([*given, *(word for each in short for word in ("--set", each))])
    except SystemExit as end:
        raise AssertionError(f"{name}: {end}") from end
    finally:
        leave_processes()


CONFIGURATIONS = [each for page in PAGES for each in blocks(page) if each.kind == "yaml"]


@pytest.mark.parametrize("block", CONFIGURATIONS, ids=lambda block: block.page)
def test_configurations_are_read(block: Block) -> None:
    given = parse_text(block.text, block.name)
    if "optim" in given and "output_dir" in given:
        parse_config(given)
        return
    data = {"records": "r", "images": "i", "image_encoder": "e"}
    data |= {"eval_records": "r", "eval_images": "i"}
    if "features" in given.get("data", {}):
        data = {"records": "r"}
    base: dict[str, Any] = {
        "stage": 2,
        "output_dir": "o",
        "init_from": "runs/stage1",
        "data": data,
        "language_model": {"path": "facebook/opt-2.7b"},
        "optim": {"max_steps": 9, "batch_size": 2, "warmup_steps": 1},
    }
    for key, value in given.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    parse_config(base)
