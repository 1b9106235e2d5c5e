"""The examples of docs/own_encoder.md run, and learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from small_run import config, write_world

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.training.build import build_run

PAGE = Path(__file__).parents[2] / "docs" / "own_encoder.md"


def test_features_given_and_ragged_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cached, ragged = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(cached, f"{PAGE}, cache", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "torch.Size([1, 63, 129])\n"
    cache = FeatureCache("runs/sounds/features")
    assert (cache.num_images, cache.encoder_id) == (12, "stft")
    (section,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    data = yaml.safe_load(section)["data"] | {"eval_records": None, "eval_features": None}
    run = build_run(config(write_world(tmp_path / "world"), tmp_path / "out", data=data), 0, 1)
    assert run.batches[0]["image_embeds"].shape == (4, 63, 129)
    exec(compile(ragged, f"{PAGE}, ragged", "exec"), {"__name__": "__main__"})
    lines = capsys.readouterr().out.splitlines()
    losses = [float(value) for line in lines for value in re.findall(r"loss (\d+\.\d+)", line)]
    assert len(losses) == 4
    assert losses[1] < losses[0] / 1.5
    assert losses[3] < losses[2] / 1.5
