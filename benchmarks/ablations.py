"""Two ablations of the paper on the embedded scenes, with seeds and standard errors.

    python benchmarks/ablations.py                    # about 15 minutes a seed on one core
    python benchmarks/ablations.py --seeds 5 --output runs/ablations

1. Does stage 1 help stage 2 (paper, figure 5)? Stage 2 after stage 1, against stage 2 alone for as
   many steps, and for as many floating-point operations as both stages.
2. Does ITG help retrieval (paper, table 6)? Fine-tuning after a full pretraining, on ITC and ITM
   with and without ITG. Here the image encoder stays frozen; the paper trains it along.

Every seed draws weights, batches and negatives anew; the scenes are the same. A seed that is done
is not run again. Writes `benchmarks/results/DATE_ablations.json`, which `report.py` makes the table
in `docs/ablations.md` of.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from blip2fast.checkpoints.trained import load_trained
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.demo.data import cache_features, load_split, write_texts
from blip2fast.demo.measure import EvalSet, FrozenModel
from blip2fast.demo.run import machine
from blip2fast.demo.settings import REPOSITORY, DemoSettings, Places
from blip2fast.evaluation.stage1 import evaluate_stage1, held_out_losses
from blip2fast.evaluation.stage2 import exact_match, generate_texts
from blip2fast.frozen.language_models import load_language_model
from blip2fast.scenes import is_exact
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.config_files import config_values, load_config

RESULTS = REPOSITORY / "benchmarks" / "results"
BATCH = 32  # the demo's, over both of its processes
RERANKED = 10
STAGE2_RUNS = ("after_stage1", "alone_equal_steps", "alone_equal_compute")
STAGE1_SIZES = ("tokenizer", "bert", "embed_dim")
FINETUNE_RUNS = ("itc_itm", "itc_itm_itg")


@dataclass(frozen=True)
class Schedule:
    """Steps of each training run, `BATCH` samples each."""

    stage1: int
    stage2: int
    finetune: int


def overrides(run: str, places: Places, schedule: Schedule, longer: int) -> tuple[str, list[str]]:
    """Configuration and overrides of a run; `longer` is the steps of equal compute."""
    pretrained = f"init_from={places.run('stage1')}"
    if run in FINETUNE_RUNS:
        # a tenth of the pretraining's rate, as in the paper
        rate = ["optim.lr=3e-4", f"optim.losses=[{run.replace('_', ', ')}]"]
        return "stage1", [f"optim.max_steps={schedule.finetune}", pretrained, *rate]
    if run == "stage1":
        return "stage1", [f"optim.max_steps={schedule.stage1}"]
    steps = longer if run == "alone_equal_compute" else schedule.stage2
    if run == "after_stage1":
        return "stage2", [f"optim.max_steps={steps}", pretrained]
    sizes = config_values(load_config(DemoSettings().config("stage1")))["model"]
    sizes = {name: value for name, value in sizes.items() if name not in STAGE1_SIZES}
    alone = [f"model.{name}={value}" for name, value in sizes.items() if value is not None]
    return "stage2", [f"optim.max_steps={steps}", "init_from=null", *alone]


def train(runs: Sequence[str], places: Places, seed: int, schedule: Schedule, longer: int) -> None:
    """Train runs of a seed, one after another, in one process."""
    data = Places(places.output.parent / "scenes")
    command = [sys.executable, str(REPOSITORY / "blip2fast" / "train.py")]
    for run in runs:
        stage, chosen = overrides(run, places, schedule, longer)
        shutil.rmtree(places.run(run), ignore_errors=True)
        command += ["--config", str(REPOSITORY / "configs" / f"scenes_{stage}.yaml")]
        for value in (
            f"output_dir={places.run(run)}",
            f"data.records={data.captions('train')}",
            f"data.features={data.features('train')}",
            "data.eval_records=null",
            "data.eval_features=null",
            f"seed={seed}",
            f"optim.batch_size={BATCH}",
            *chosen,
        ):
            command += ["--set", value]
    subprocess.run(command, check=True, cwd=REPOSITORY)


def step_flops(model: Blip2Stage1 | Blip2Stage2, batch: dict[str, Tensor]) -> int:
    """Floating-point operations of a training step's forward and backward pass."""
    model.train()
    with FlopCounterMode(display=False) as counter:
        model(**batch).loss.backward()
    model.zero_grad()
    model.eval()
    return int(counter.get_total_flops())


def compute_ratio(places: Places, held_out: EvalSet, frozen: FrozenModel) -> float:
    """Operations of a stage-1 step over those of a stage-2 step, on the same scenes."""
    stage1 = load_trained(places.run("stage1"))
    stage2 = Blip2Stage2.from_stage1(stage1, frozen.model)
    images = held_out.images(torch.arange(BATCH))
    texts = held_out.captions
    one = step_flops(
        stage1,
        {
            "image_embeds": images,
            "input_ids": texts.input_ids[:BATCH],
            "attention_mask": texts.attention_mask[:BATCH],
        },
    )
    two = step_flops(
        stage2,
        {"image_embeds": images, **frozen.plain.train_batch(held_out.caption_texts[:BATCH])},
    )
    return one / two


def measure_stage2(model: Blip2Stage2, frozen: FrozenModel, held_out: EvalSet) -> dict[str, float]:
    """Loss on captions, captions exact, and questions answered by reading them."""
    numbers = torch.arange(len(held_out))
    written = generate_texts(model, frozen.plain, held_out.images, numbers)
    batches = (
        {
            "image_embeds": held_out.images(part),
            **frozen.plain.train_batch([held_out.caption_texts[i] for i in part.tolist()]),
        }
        for part in numbers.split(BATCH)
    )
    described = [written[i] for i in held_out.asked_of.tolist()]
    answers = frozen.answers(held_out.asked(), described)
    return {
        "loss": held_out_losses(model, batches)["loss"],
        "caption_exact": exact_match(written, held_out.split.scenes, is_exact),
        "vqa_read": held_out.answers_right(answers)["all"],
    }


def measure_stage1(model: Blip2Stage1, held_out: EvalSet) -> dict[str, float]:
    """Retrieval by ITC and re-ranked by ITM."""
    found = evaluate_stage1(
        model,
        held_out.images,
        len(held_out),
        held_out.captions,
        swapped=held_out.swapped,
        rerank_k=RERANKED,
        batch_size=BATCH,
    )
    names = ("t2i_r1", "i2t_r1", "rerank_t2i_r1", "rerank_i2t_r1", "itm_accuracy")
    return {name: found[name] for name in names}


def run_seed(
    seed: int,
    folder: Path,
    schedule: Schedule,
    held_out: EvalSet,
    frozen: FrozenModel,
    stage2_runs: Sequence[str] = STAGE2_RUNS,
) -> dict[str, Any]:
    """The trainings of a seed and what they reach; kept in `result.json` beside them."""
    kept = folder / f"seed{seed}" / "result.json"
    if kept.is_file():
        found: dict[str, Any] = json.loads(kept.read_text())
        return found
    places = Places(kept.parent)
    train(["stage1"], places, seed, schedule, 0)
    ratio = compute_ratio(places, held_out, frozen)
    longer = schedule.stage2 + round(ratio * schedule.stage1)
    train([*FINETUNE_RUNS, *stage2_runs], places, seed, schedule, longer)
    result: dict[str, Any] = {"seed": seed, "stage1_over_stage2_flops": ratio, "steps": longer}
    for name in ("stage1", *FINETUNE_RUNS):
        model = load_trained(places.run(name))
        result[name] = measure_stage1(model, held_out)  # type: ignore[arg-type]
    for name in stage2_runs:
        model = load_trained(places.run(name), frozen.model)
        result[name] = measure_stage2(model, frozen, held_out)  # type: ignore[arg-type]
    kept.write_text(json.dumps(result, indent=1) + "\n")
    return result


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument(
        "--stage2-seeds", type=int, help="of these, how many ablate stage 2 too; all by default"
    )
    parser.add_argument("--output", type=Path, default=Path("runs", "ablations"))
    for stage in ("stage1", "stage2"):
        steps = load_config(DemoSettings().config(stage)).optim.max_steps
        parser.add_argument(f"--{stage}-steps", type=int, default=steps, help="%(default)s")
    parser.add_argument("--finetune-steps", type=int, default=300)
    given = parser.parse_args()
    schedule = Schedule(given.stage1_steps, given.stage2_steps, given.finetune_steps)
    folder = given.output.resolve()
    settings = DemoSettings()
    data = Places(folder / "scenes")
    if not data.features("held_out").is_dir():
        write_texts(settings, data)
        cache_features(settings, data, Console())
    held_out = EvalSet.build(
        load_split(settings, "held_out"),
        FeatureCache(data.features("held_out")),
        AutoTokenizer.from_pretrained(data.qformer_tokenizer),
        questions_per_scene=1,
    )
    frozen = FrozenModel.build(
        load_language_model(str(data.language_tower), torch.float32),
        AutoTokenizer.from_pretrained(data.language_tower),
    )
    seeds = []
    for seed in range(given.seeds):
        ablated = given.stage2_seeds is None or seed < given.stage2_seeds
        runs = STAGE2_RUNS if ablated else ()
        seeds.append(run_seed(seed, folder, schedule, held_out, frozen, runs))
        print(json.dumps(seeds[-1]), flush=True)
    result = {
        "conditions": {
            **machine(),
            "command": " ".join(["python", *sys.argv]),
            "schedule": vars(schedule),
            "batch": BATCH,
            "held_out_scenes": len(held_out),
        },
        "seeds": seeds,
    }
    target = RESULTS / f"{datetime.date.today().isoformat()}_ablations.json"
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
