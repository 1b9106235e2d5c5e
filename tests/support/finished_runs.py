"""What a run leaves beside its model, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from blip2fast.data.records import CaptionRecord, QuestionRecord, write_records

CAPTIONS = ["a red ring", "a blue star", "a green cross", "a black disc", "a red cat"]


def as_run(folder: Path, stage: int, pictures: Path, **data: Any) -> Path:
    """Give a trained model what a run leaves beside it; its records name five pictures."""
    keys = [f"{number}.png" for number in range(5)]
    texts = zip(keys, CAPTIONS, strict=True)
    write_records(pictures / "r.jsonl", [CaptionRecord(k, (c, f"it is {c}")) for k, c in texts])
    write_records(pictures / "q.jsonl", [QuestionRecord(k, "what is it ?", "a cat") for k in keys])
    values: dict[str, Any] = {
        "stage": stage,
        "output_dir": str(folder),
        "data": {
            "records": str(pictures / "r.jsonl"),
            "images": str(pictures),
            "image_encoder": str(folder.parent / "vision"),
            **data,
        },
        "optim": {"max_steps": 4, "batch_size": 2, "warmup_steps": 1},
        "precision": "fp32",
    }
    if stage == 1:
        values["model"] = {"tokenizer": str(folder.parent / "words")}
    else:
        values["init_from"] = "runs/stage1"
        values["language_model"] = {"path": str(folder.parent / "language")}
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 4, "loss": 1.0}) + "\n")
    return folder
