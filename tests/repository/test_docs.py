"""What the pages in docs/ and the README show: commands exist with their options, code runs."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from blip2fast.command_line.application import app
from blip2fast.training.config_files import known_keys

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# code that reads a trained model, a published one or somebody's files; it is compiled, and its
# imports run; test_docs_run.py runs it on small models
_NEEDS_FILES = re.compile(
    r"from_pretrained\(|open\(|\.(png|jpe?g|pth|jsonl|csv|safetensors)\b|runs/"
)


def code_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Lines of code that start one of our programs, with lines that `\\` continues."""
    text = page.read_text().replace("\\\n", " ")
    fenced = re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    indented = re.findall(r"^ {4,}(\S.*)$", text, re.MULTILINE)
    start = re.compile(r"(?:\$ )?((?:python -m )?(?:blip2fast|deepspeed|torchrun) .*)")
    code = [line.strip() for block in fenced for line in block.splitlines()] + indented
    lines = [found[1] for line in code if (found := start.match(line))]
    inside = re.findall(r"`(blip2fast [a-z-]+[^`\n]*)`", text)
    return [re.sub(r"\s+#.*", "", line) for line in [*lines, *inside]]


@pytest.mark.parametrize("page", filter(commands, PAGES), ids=lambda page: page.name)
def test_commands_exist_with_their_options(page: Path) -> None:
    for line in commands(page):
        words = [w for w in shlex.split(line) if w not in ("python", "-m", "...")]
        if words[0] in ("deepspeed", "torchrun"):
            assert any("blip2fast" in word for word in words), line
            _check_settings(words, line)
            continue
        if len(words) == 1:
            continue
        _parse(words[1:], line)
        _check_settings(words, line)


def _parse(words: list[str], line: str) -> None:
    """Finds the command, and every option that the line gives it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        if not words or words[0].startswith("-"):
            break
        assert words[0] in command.commands, f"{line}: there is no {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    own_parser = command.context_settings.get("ignore_unknown_options", False)
    options = {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--\w", word)}
    assert own_parser or given <= options | {"--help"}, f"{line}: {given - options}"


def _check_settings(words: list[str], line: str) -> None:
    """`--set key=value` names keys that exist, `--config` configurations that do."""
    known = known_keys()
    for word, value in itertools.pairwise(words):
        if word == "--set":
            assert value.partition("=")[0] in known, f"{line}: {value}"
        if word == "--config" and value.startswith("configs/") and "_..." not in value:
            assert (ROOT / value).is_file(), f"{line}: {value}"


# the README's is in test_readme.py
@pytest.mark.parametrize("page", filter(code_blocks, PAGES[1:]), ids=lambda page: page.name)
def test_code_of_a_page(page: Path) -> None:
    """In order and in one process, so that a block may use the names of those before it."""
    program = []
    for block in code_blocks(page):
        tree = ast.parse(block)
        if _NEEDS_FILES.search(block):
            tree.body = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        program.append(ast.unparse(tree))
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Links within the repository; addresses are not looked up."""
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = set(re.findall(r"^(\w+)$", index, re.MULTILINE))
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == listed & pages


def test_the_drawing_is_of_the_masks() -> None:
    command = [sys.executable, str(ROOT / "docs" / "draw_masks.py")]
    drawn = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert drawn == (ROOT / "docs" / "masks.svg").read_text()
