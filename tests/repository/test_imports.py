"""Which room imports which, and what an import of the package costs and needs."""

from __future__ import annotations

import ast
import importlib
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import blip2fast

ROOT = Path(__file__).parents[2]
# A room imports from itself and from rooms before it.
ROOMS = (
    "_imports",
    "_choices",
    "_extension",
    "_heap",
    "kernels",
    "ops",
    "qformer",
    "frozen",
    "offload",
    "stage1",
    "stage2",
    "data",
    "evaluation",
    "checkpoints",
    "published",
    "training",
    "inference",
    "scoring",
    "search",
    "capfilt",
    "reporting",
    "demo_page",
    "scenes",
    "demo",
    "doctor",
    "train",
    "command_line",
    "__main__",
)
FACES = (
    *("capfilt", "checkpoints", "data", "demo", "demo_page", "evaluation", "frozen", "inference"),
    *(
        "offload",
        "published",
        "qformer",
        "reporting",
        "scoring",
        "search",
        "stage1",
        "stage2",
        "training",
    ),
)
# What not every user has installed beside torch, transformers and NumPy.
OPTIONAL = (
    *("pydantic", "deepspeed", "xformers", "triton", "tokenizers", "matplotlib", "rich"),
    *("sklearn", "psutil", "tensorboard", "PIL", "pyarrow", "datasets", "typer"),
    *("wandb", "peft", "jinja2", "gradio"),
)


def _modules(root: Path) -> dict[str, Path]:
    """Every module of the package by its name; `kernels` is a link beside the package's folder."""
    found = {}
    for folder, base in ((root / "blip2fast", root), (root / "kernels", root)):
        for path in sorted(folder.rglob("*.py")):
            parts = list(path.relative_to(base).with_suffix("").parts)
            if parts[:2] == ["blip2fast", "kernels"]:
                continue
            if parts[0] == "kernels":
                parts.insert(0, "blip2fast")
            if parts[-1] == "__init__":
                parts.pop()
            found[".".join(parts)] = path
    return found


def _imported(name: str, path: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """The modules of the package that a module imports, wherever in it, and the lines."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # the package's version is no room's
            inner = [alias.name for alias in node.names if alias.name != "__version__"]
            full = [f"{base}.{name}" for name in inner]
            targets = [each if each in known else base for each in full]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            targets = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            continue
        for target in targets:
            if target in known:
                yield target, node.lineno


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _upward(root: Path) -> list[str]:
    """Every import that runs up the list, or of or by a room that is not on it."""
    known, faults = _modules(root), []
    for name, path in known.items():
        if name == "blip2fast":
            continue  # its names are those of all rooms
        here = _room(name)
        for target, line in _imported(name, path, known):
            there = _room(target)
            if here == there or (target == "blip2fast" and here in ("demo", "command_line")):
                continue
            listed = here in ROOMS and there in ROOMS
            if not listed or ROOMS.index(there) > ROOMS.index(here):
                faults.append(f"{path.relative_to(root)}:{line}: {name} imports {target}")
    return faults


def _cycle(root: Path) -> list[str]:
    """The modules of a circle of imports, in order; empty where there is none."""
    known = _modules(root)
    edges = {
        name: sorted({target for target, _ in _imported(name, path, known)} - {name, "blip2fast"})
        for name, path in known.items()
        # what a room offers is imported on first use, and no module below imports the room itself
        if path.name != "__init__.py"
    }
    done: set[str] = set()

    def visit(name: str, above: list[str]) -> list[str]:
        if name in above:
            return [*above[above.index(name) :], name]
        if name in done:
            return []
        for target in edges.get(name, ()):
            found = visit(target, [*above, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in edges if (found := visit(name, []))), [])


def test_imports_run_down() -> None:
    assert _upward(ROOT) == []


def test_no_circle_of_imports() -> None:
    assert _cycle(ROOT) == []


@pytest.mark.parametrize(
    "line",
    [
        "from blip2fast.stage1.model import Blip2Stage1",
        "import blip2fast.stage2.text",
        "from blip2fast import training",
        "from ..inference import chat",
        "if TYPE_CHECKING:\n    from blip2fast.data.records import Record",
        "def late():\n    from blip2fast.stage1 import losses",
        "module = importlib.import_module('blip2fast.demo.run')",
    ],
)
def test_an_import_that_runs_up_is_found(tmp_path: Path, line: str) -> None:
    _copy(tmp_path)
    with (tmp_path / "blip2fast" / "qformer" / "masks.py").open("a") as file:
        file.write(f"\n{line}\n")
    (fault,) = set(_upward(tmp_path))
    assert "blip2fast.qformer.masks imports blip2fast." in fault


def test_a_circle_within_a_room_is_found(tmp_path: Path) -> None:
    _copy(tmp_path)
    with (tmp_path / "blip2fast" / "stage1" / "texts.py").open("a") as file:
        file.write("\ndef late():\n    from blip2fast.stage1.model import Blip2Stage1\n")
    assert {"blip2fast.stage1.texts", "blip2fast.stage1.model"} <= set(_cycle(tmp_path))


def _copy(folder: Path) -> None:
    for name, path in _modules(ROOT).items():
        inside = name.removeprefix("blip2fast.").split(".")[0] == "kernels"
        base = ROOT if not inside else ROOT / "kernels"
        target = folder / ("kernels" if inside else "") / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(path.read_text())


@pytest.mark.parametrize("room", ["", *FACES])
def test_names_of_a_room(room: str) -> None:
    """The table, `__all__`, `dir` and what type checkers read say the same, and all is there."""
    package: ModuleType = importlib.import_module(f"blip2fast.{room}".rstrip("."))
    tree = ast.parse(Path(str(package.__file__)).read_text())
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    declared = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom) and node.module != "blip2fast"
        for alias in node.names
    }
    table = {name: f"{package.__name__}.{below}" for name, below in package._NAMES.items()}
    assert declared == table
    assert set(package.__all__) == table.keys()
    assert table.keys() <= set(dir(package))
    for name, module in table.items():
        assert getattr(package, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match=f"module '{package.__name__}' has no attribute 'no'"):
        _ = package.no


def test_rooms_are_attributes() -> None:
    rooms = {*FACES, "ops", "scenes"} - {"demo"}
    assert set(blip2fast._ROOMS) == rooms
    for room in rooms:
        assert getattr(blip2fast, room).__name__ == f"blip2fast.{room}"


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def _without(*packages: str) -> str:
    """Code after which these packages cannot be found."""
    return f"""
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages}:
            return None
        return self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def test_qformer_and_ops_need_torch_and_transformers_alone() -> None:
    code = """
import torch
import blip2fast
from transformers import Blip2QFormerConfig

sizes = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
qformer = blip2fast.QFormer(Blip2QFormerConfig(**sizes, encoder_hidden_size=8)).eval()
out = qformer(torch.randn(1, 3, 8), encoder_hidden_states=torch.randn(2, 4, 8))
assert out.last_hidden_state.shape == (2, 3, 8)
for name in blip2fast.ops.__all__:
    getattr(blip2fast.ops, name)
image, text = torch.randn(4, 3, 16), torch.randn(4, 16)
print(float(blip2fast.ops.itc_loss(image, text, torch.tensor(0.1)).loss) > 0)
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & set(OPTIONAL)))
"""
    out = _python(f"{_without(*OPTIONAL)}\nOPTIONAL = {OPTIONAL}\n{code}")
    assert out.split("\n")[:2] == ["True", "[]"]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        ("blip2fast.patch", "tokenizers to replace transformers' Q-Formers"),
        ("blip2fast.Blip2Stage2", "tokenizers to convert transformers' BLIP-2"),
        ("blip2fast.data.read_captions", "pydantic to read records"),
        ("blip2fast.training.load_config", "pydantic to configure a run"),
        ("blip2fast.frozen.read_image", "pillow to read images"),
        ("blip2fast.scenes.make_split", "pillow to save scenes"),
        ("from blip2fast.demo import __main__", "matplotlib to run the demo"),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(use: str, expected: str) -> None:
    code = f"""
import blip2fast
try:
    {use}
except ModuleNotFoundError as error:
    print(error)
"""
    package = expected.split()[0]
    said = f"blip2fast needs {expected}, and it is not installed: pip install {package}\n"
    assert _python(_without(*OPTIONAL) + code) == said


def test_records_of_a_run_need_pyarrow() -> None:
    code = """
import blip2fast
try:
    blip2fast.data.open_records
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install pyarrow" in _python(_without("pyarrow") + code)


def test_shapes_need_no_handwriting() -> None:
    code = """
from blip2fast.scenes import SceneSpec, make_split
assert len(make_split(SceneSpec(), "train", 2, seed=0).images) == 2
try:
    make_split(SceneSpec(source="digits"), "train", 2, seed=0)
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install scikit-learn" in _python(_without("sklearn") + code)


def test_training_without_deepspeed_says_what_to_install() -> None:
    code = """
from blip2fast.training import engine, train
try:
    engine.start_processes()
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install deepspeed" in _python(_without("deepspeed") + code)


def test_backends_name_a_missing_package() -> None:
    """Triton and xformers are backends: an op runs without them, and forced ones say what to do."""
    code = """
import torch
from blip2fast.ops import AttentionLayout, qformer_attention
layout = AttentionLayout.build(1, 2)
try:
    qformer_attention(torch.randn(2, 3, 1, 16), layout, impl="triton")
except NotImplementedError as error:
    print(error)
"""
    assert "triton is not installed: pip install triton" in _python(_without(*OPTIONAL) + code)


def test_the_ops_import_with_pytorch_alone() -> None:
    """Processes that check kernels start often."""
    code = """
import torch
import blip2fast
from blip2fast.ops import bias_gelu, check_kernels, set_kernels
import blip2fast.ops._check_worker
set_kernels("check")
print(bias_gelu(torch.zeros(1, 3)).tolist(), check_kernels(), blip2fast.__version__)
"""
    needless = (*OPTIONAL, "transformers", "yaml", "safetensors")
    assert _python(_without(*needless) + code).startswith("[[0.0, 0.0, 0.0]] [] 0.")


def test_the_package_alone_imports_nothing() -> None:
    _python("import sys, blip2fast; assert 'torch' not in sys.modules; blip2fast.QFormer")


def test_import_costs_next_to_nothing_beside_torch() -> None:
    code = "import torch, time; t = time.perf_counter(); import blip2fast; "
    code += "print(time.perf_counter() - t)"
    assert min(float(_python(code)) for _ in range(3)) < 0.3


def test_help_is_quick() -> None:
    """In CPU time, as tests share their cores."""
    times = []
    for _ in range(3):
        start = _children_seconds()
        _python("from blip2fast.command_line import main; main(['--help'])")
        times.append(_children_seconds() - start)
    assert min(times) < 0.6


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
