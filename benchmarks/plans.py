"""What `blip2fast plan` says of the recipes in configs/, as a result file.

    python benchmarks/plans.py      # about a minute; writes benchmarks/results/DATE_plans.json
    python benchmarks/report.py     # then docs/memory_and_speed.md

The models that the recipes name on the hub are replaced by folders with a configuration of the same
architecture and sizes: a plan reads nothing else. Stage 2 is planned as with `--set offload=auto`,
so that every place of the language model can be compared.
"""

from __future__ import annotations

import datetime
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes
import yaml
from results import RESULTS
from transformers import Blip2Config, CLIPConfig, CLIPVisionConfig, PretrainedConfig

from blip2fast.demo.run import machine
from blip2fast.training.config_files import load_config
from blip2fast.training.memory_plan import GIB, Memory, plan_memory

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Cluster:
    """What the plans are for; the paper has 16 GPUs."""

    processes: int = 16
    machines: int = 2
    device_gib: int = 80
    host_gib: int = 1000


def published() -> dict[str, PretrainedConfig]:
    """By its name on the hub, the configuration of each model that a recipe names."""
    vit_l = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    vit_g = shapes.vision(1408, 39, 16, 224, 14)
    return {
        "Salesforce/blip2-opt-2.7b": Blip2Config(vision_config=vit_g.to_dict()),
        "openai/clip-vit-large-patch14": CLIPConfig(vision_config=vit_l.to_dict()),
        "facebook/opt-2.7b": shapes.opt(2560, 32, 32),
        "facebook/opt-6.7b": shapes.opt(4096, 32, 32),
        "google/flan-t5-xl": shapes.flan_t5(2048, 5120, 24, 32, vocab_size=32128),
        "google/flan-t5-xxl": shapes.flan_t5(4096, 10240, 24, 64, vocab_size=32128),
    }


def plan(
    recipe: Path, models: Path, cluster: Cluster, settings: Sequence[str] = ()
) -> dict[str, Any]:
    """The plan of a recipe.

    Args:
        recipe: a file of configs/.
        models: the folder with a folder for each of `published()`.
        cluster: of machines.
        settings: as those of `--set`.

    Returns:
        `batch_size`, `precision`, `parameters` by kind, `options` (name, bytes by purpose on each
        device, bytes of each process on the host, whether it fits) and the name of the `chosen`.
    """
    values = yaml.safe_load(recipe.read_text())
    overrides = [f"data.image_encoder={models / values['data']['image_encoder']}", *settings]
    if values["stage"] == 2:
        path = models / values["language_model"]["path"]
        overrides += [f"language_model.path={path}", "offload=auto"]
    run = load_config(recipe, overrides)
    memory = Memory(cluster.device_gib * GIB, cluster.host_gib * GIB, device_is_host=False)
    planned = plan_memory(run, cluster.processes, cluster.machines, memory)
    chosen = planned.first(run.stream_storage)
    return {
        "batch_size": run.optim.batch_size,
        "precision": run.precision,
        "parameters": _counts(planned.heading),
        "options": [
            {
                "name": option.name,
                "device": dict(option.device),
                "host": option.host_bytes,
                "fits": planned.fits(option),
            }
            for option in planned.options
        ],
        "chosen": None if chosen is None else chosen.name,
    }


def _counts(heading: str) -> dict[str, int]:
    """Parameters in the first line of a plan."""
    kinds = {
        "language model": r"([\d,]+) frozen parameters",
        "trained": r"([\d,]+) trained",
        "image encoder": r"([\d,]+) of the image encoder",
    }
    found = {kind: re.search(pattern, heading) for kind, pattern in kinds.items()}
    return {kind: int(at[1].replace(",", "")) for kind, at in found.items() if at is not None}


def plan_all(recipes: Mapping[str, Path], cluster: Cluster) -> dict[str, Any]:
    """The plans by the recipes' names."""
    with published_folder() as models:
        return {name: plan(path, models, cluster) for name, path in recipes.items()}


@contextmanager
def published_folder() -> Iterator[Path]:
    """A folder with a folder for each of `published()`."""
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder)
        for name, config in published().items():
            config.save_pretrained(models / name)
        yield models


def recipes() -> dict[str, Path]:
    """The paper's; those of the demo (scenes, digits) fit anywhere."""
    return {path.stem: path for path in sorted((ROOT / "configs").glob("vit*.yaml"))}


def main() -> int:
    """Plan every recipe and write the result file."""
    cluster = Cluster()
    here = machine()
    conditions = {
        "versions": {name: here["versions"][name] for name in ("torch", "transformers")},
        "commit": here["commit"],
        "cluster": vars(cluster),
    }
    result = {"conditions": conditions, "plans": plan_all(recipes(), cluster)}
    path = RESULTS / f"{datetime.date.today().isoformat()}_plans.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
