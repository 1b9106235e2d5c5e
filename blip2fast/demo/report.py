"""The demo's evaluation: loads the trained models, measures them and draws the plots."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from rich.console import Console
from transformers import AutoTokenizer

from blip2fast.checkpoints.trained import load_trained
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import read_questions
from blip2fast.demo import attention, measure, plots
from blip2fast.demo.data import load_split
from blip2fast.demo.measure import EvalSet, FrozenModel, Rows
from blip2fast.demo.settings import TRAINING_RUNS, DemoSettings, Places
from blip2fast.demo.training import progress_bar
from blip2fast.frozen.language_models import load_language_model
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2


def evaluate_demo(
    settings: DemoSettings, places: Places, console: Console
) -> tuple[Rows, dict[str, Any]]:
    """Measure the trained models and their controls, and draw the plots.

    Returns:
        The table's rows, and further numbers for the summary.
    """
    with progress_bar(console) as progress:
        bar = progress.add_task("evaluation", total=5, note="")
        held_out, unseen = (
            _eval_set(settings, places, name) for name in ("held_out", "unseen_pairs")
        )
        models = Models.load(settings, places)
        progress.update(bar, advance=1, note="retrieval and matching")
        stage1 = measure.stage1_rows(
            models.stage1, models.untrained1, held_out, unseen, settings.rerank_k
        )
        progress.update(bar, advance=1, note="captions, and questions after stage 2")
        questions = [dataclasses.asdict(q) for q in read_questions(places.questions("train"))]
        blind = measure.blind_vqa(models.frozen, held_out, questions)
        stage2, captions = measure.stage2_rows(
            models.stage2, models.untrained2, models.frozen, held_out, unseen
        )
        progress.update(bar, advance=1, note="questions after fine-tuning")
        tuned = measure.tuned_rows(models.vqa, models.frozen, held_out, unseen)
        progress.update(bar, advance=1, note="plots")
        rows = measure.merge(stage1, stage2, blind, tuned)
        looked = attention.attention_on_objects(models.stage1, held_out)
        folder = places.output / "plots"
        folder.mkdir(exist_ok=True)
        runs = {name: places.run(name) / "metrics.jsonl" for name in TRAINING_RUNS}
        plots.loss_curves(runs, folder / "losses.png")
        plots.metric_bars(rows, folder / "metrics.png")
        plots.attention_sheet(held_out.split, looked, folder / "attention.png")
        plots.caption_sheet(held_out.split, captions, folder / "captions.png")
        progress.update(bar, advance=1, note="")
    numbers = {
        name: getattr(looked, name)
        for name in ("on_mentioned", "on_other", "area_mentioned", "area_other")
    }
    return rows, {"attention": numbers, "captions": captions[:20]}


@dataclasses.dataclass(frozen=True)
class Models:
    """The trained models, and controls of the same sizes with an untrained Q-Former."""

    stage1: Blip2Stage1
    untrained1: Blip2Stage1
    stage2: Blip2Stage2
    untrained2: Blip2Stage2
    vqa: Blip2Stage2
    frozen: FrozenModel

    @classmethod
    def load(cls, settings: DemoSettings, places: Places) -> Models:
        language_model = load_language_model(str(places.language_tower), torch.float32)
        stage1 = load_trained(places.run("stage1"))
        stage2 = load_trained(places.run("stage2"), language_model)
        vqa = load_trained(places.run("vqa"), language_model)
        if not (
            isinstance(stage1, Blip2Stage1)
            and isinstance(stage2, Blip2Stage2)
            and isinstance(vqa, Blip2Stage2)
        ):
            raise ValueError(f"{places.output} holds runs of other stages; run with --fresh")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            untrained1 = Blip2Stage1(stage1.config).eval()
            untrained2 = Blip2Stage2(stage2.config, language_model).eval()
        tokenizer = AutoTokenizer.from_pretrained(places.language_tower, trust_remote_code=False)
        return cls(
            stage1,
            untrained1,
            stage2,
            untrained2,
            vqa,
            FrozenModel.build(language_model, tokenizer),
        )


def _eval_set(settings: DemoSettings, places: Places, name: Any) -> EvalSet:
    return EvalSet.build(
        load_split(settings, name),
        FeatureCache(places.features(name)),
        AutoTokenizer.from_pretrained(places.qformer_tokenizer, trust_remote_code=False),
        questions_per_scene=1,
    )
