"""The demo's settings and paths."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from blip2fast.scenes import SceneSpec
from blip2fast.scenes.world import Source
from blip2fast.training.config_files import SHIPPED

REPOSITORY = Path(__file__).resolve().parent.parent.parent
TOWERS = Path(__file__).resolve().parents[1] / "scenes" / "towers"
TRAINING_RUNS = ("stage1", "stage2", "vqa")


@dataclass(frozen=True)
class DemoSettings:
    """Settings that the configurations in `configs/` do not have.

    Attributes:
        source: drawn shapes or handwritten digits.
        seed: seed of the scenes, the training runs and the controls.
        train_scenes, held_out_scenes, unseen_scenes: number of images in each split.
        captions_per_scene: caption paraphrases per training scene.
        question_rounds: questions per type and training scene.
        rerank_k: number of candidates that ITM re-ranks.
        overrides: overrides of the training configurations, by run.
    """

    source: Source = "shapes"
    seed: int = 0
    train_scenes: int = 24_000
    held_out_scenes: int = 1000
    unseen_scenes: int = 500
    captions_per_scene: int = 4
    question_rounds: int = 1
    rerank_k: int = 10
    overrides: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def spec(self) -> SceneSpec:
        return SceneSpec(source=self.source)

    def config(self, run: str) -> Path:
        """The configuration file of a training run."""
        prefix = "scenes" if self.source == "shapes" else "digits"
        return SHIPPED / f"{prefix}_{run}.yaml"


def fast(settings: DemoSettings) -> DemoSettings:
    """Settings for a smoke run of about a minute: everything runs, nothing is learned."""
    few_steps = ("optim.max_steps=4", "optim.warmup_steps=2", "log_every=2")
    return dataclasses.replace(
        settings,
        train_scenes=96,
        held_out_scenes=40,
        unseen_scenes=20,
        rerank_k=2,
        overrides=dict.fromkeys(TRAINING_RUNS, few_steps),
    )


@dataclass(frozen=True)
class Places:
    """Paths of the demo's files: its own in one output folder, the towers in the package."""

    output: Path
    source: Source = "shapes"

    @property
    def data(self) -> Path:
        return self.output / "data"

    @property
    def image_tower(self) -> Path:
        return TOWERS / f"image_{self.source}"

    @property
    def language_tower(self) -> Path:
        return TOWERS / "language"

    @property
    def qformer_tokenizer(self) -> Path:
        return TOWERS / "qformer_tokenizer"

    def captions(self, split: str) -> Path:
        return self.data / f"captions_{split}.jsonl"

    def questions(self, split: str) -> Path:
        return self.data / f"questions_{split}.jsonl"

    def features(self, split: str) -> Path:
        return self.output / "features" / split

    def images(self, split: str) -> Path:
        return self.output / "images" / split

    def run(self, name: str) -> Path:
        return self.output / name

    @property
    def training_log(self) -> Path:
        return self.output / "logs" / "training.log"

    def overrides(self, run: str) -> tuple[str, ...]:
        """The paths that a training configuration reads and writes, as `key=value`."""
        records = self.questions if run == "vqa" else self.captions
        values = [
            f"output_dir={self.run(run)}",
            f"data.records={records('train')}",
            f"data.features={self.features('train')}",
            f"data.eval_records={records('held_out')}",
            f"data.eval_features={self.features('held_out')}",
        ]
        if run != "stage2":
            values.append(f"model.tokenizer={_from_here(self.qformer_tokenizer)}")
        if run != "stage1":
            values.append(f"language_model.path={_from_here(self.language_tower)}")
            values.append(f"init_from={self.run('stage1' if run == 'stage2' else 'stage2')}")
        if run == "vqa":
            values.append(f"init_text_from={self.run('stage1')}")
        return tuple(values)


def digest(folder: Path) -> str:
    """A short hash of a model folder's weights."""
    whole = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        whole.update(file.read_bytes())
    return whole.hexdigest()[:16]


def _from_here(path: Path) -> str:
    """A path relative to the working directory, as in the configurations (the repository root)."""
    return os.path.relpath(path)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def training_processes() -> int:
    """One process on a GPU; on CPU two, if there are at least two cores to share."""
    return 1 if torch.cuda.is_available() or cores() < 2 else 2
