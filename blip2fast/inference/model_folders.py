"""What can be said of a model's folder before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from blip2fast.checkpoints.files import last_checkpoint
from blip2fast.checkpoints.trained import is_trained, read_description
from blip2fast.frozen.hub import check_weights

# kinds of transformers models by the stage of BLIP-2 that they hold
_ARCHITECTURES = {
    1: ("Blip2ForImageTextRetrieval",),
    2: ("Blip2ForConditionalGeneration", "InstructBlipForConditionalGeneration"),
}
_MEANING = {
    1: "compare images with texts; give a run of stage 1, or a transformers "
    "Blip2ForImageTextRetrieval",
    2: "write text; give a run of stage 2, or a transformers BLIP-2 or InstructBLIP",
}


def check_model_folder(path: str | Path, stages: Collection[int]) -> int:
    """The stage of a model that could be loaded from `path`; weights are not read.

    Args:
        path: run, checkpoint, transformers folder or hub name.
        stages: those that serve, such as (1,).

    Raises:
        ValueError: not found, damaged, an unfinished run, or a model of another stage.
    """
    folder = Path(path)
    if is_trained(folder):
        stage = read_description(folder).stage
        if stage not in stages:
            raise ValueError(f"{path} was trained in stage {stage} and cannot {_wanted(stages)}")
        return stage
    if (folder / "checkpoints").is_dir():
        last = last_checkpoint(folder / "checkpoints")
        raise ValueError(f"{path} is a run that has not ended; give a checkpoint of it, {last}")
    fault = check_weights("model", str(path))
    if fault is not None:
        raise ValueError(fault)
    stage = stage_of_transformers(str(path))
    if stage not in stages:
        raise ValueError(f"{path} cannot {_wanted(stages)}")
    return stage


def stage_of_transformers(path: str) -> int:
    """The stage that a transformers folder or hub name holds; 0 if it is no BLIP-2."""
    from transformers.utils import cached_file

    try:
        config = json.loads(Path(cached_file(path, "config.json")).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"model {path!r}: {str(error).splitlines()[0]}") from None
    named = config.get("architectures") or []
    found = [stage for stage, names in _ARCHITECTURES.items() if {*names} & {*named}]
    if found:
        return found[0]
    # older folders name no architecture; only models that write have these types
    return 2 if not named and config.get("model_type") in ("blip-2", "instructblip") else 0


def _wanted(stages: Collection[int]) -> str:
    return "; or ".join(_MEANING[stage] for stage in stages)
