"""What is left out of tables and feature caches where `--on-error skip` says so; cache files."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTModel

from blip2fast.command_line import main
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.images import FileImages
from blip2fast.data.importing import import_records
from blip2fast.data.skipping import most_skipped
from blip2fast.data.table import RecordTable
from blip2fast.frozen.images import ImageTransform
from blip2fast.frozen.pictures import load_image
from blip2fast.frozen.unusable import UnusableImageError

FEATURES = torch.randn(7, 3, 8, generator=torch.Generator().manual_seed(0))
KEYS = [f"{n}.png" for n in range(7)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_features_in_several_files_are_those_of_one(tmp_path: Path, dtype: str) -> None:
    """Three rows a file; rows are written across borders, and a write that stopped goes on."""
    with FeatureCache.create(tmp_path / "one", KEYS, 3, 8, dtype) as writer:  # type: ignore[arg-type]
        writer.write(0, FEATURES)
    each = 3 * 8 * {"float32": 4, "bfloat16": 2, "int8": 1}[dtype]
    settings = (KEYS, 3, 8, dtype, "", "resume", 3 * each + 1)
    stopped = FeatureCache.create(tmp_path / "many", *settings)  # type: ignore[arg-type]
    stopped.write(2, FEATURES[2:5])
    stopped._release()
    with FeatureCache.create(tmp_path / "many", *settings) as writer:  # type: ignore[arg-type]
        assert writer.missing_rows == [0, 1, 5, 6]
        writer.write(0, FEATURES[:2])
        writer.write(5, FEATURES[5:])
    names = sorted(path.name for path in (tmp_path / "many").glob("*.bin"))
    kinds = ("features", "scales") if dtype == "int8" else ("features",)
    assert names == [f"{kind}-{n:05d}.bin" for kind in kinds for n in range(3)]
    assert (tmp_path / "many" / names[0]).stat().st_size == 3 * each
    rows = [6, 0, 3, 2, 3]
    one, many = FeatureCache(tmp_path / "one"), FeatureCache(tmp_path / "many")
    assert torch.equal(many.read(rows), one.read(rows))
    assert many.relative_error == one.relative_error
    assert json.loads((tmp_path / "one" / "manifest.json").read_text())["format"] == 1
    os.truncate(tmp_path / "many" / names[1], 5)
    with pytest.raises(ValueError, match=r"features-00001.bin has 5 bytes"):
        FeatureCache(tmp_path / "many")


def test_a_cache_says_what_it_lacks(tmp_path: Path) -> None:
    with FeatureCache.create(tmp_path / "c", KEYS, 3, 8) as writer:
        for row in (0, 1, 3, 4, 6):
            writer.write(row, FEATURES[row : row + 1])
        writer.leave_out(2, "is empty")
        writer.leave_out(5, "no such file")
    cache = FeatureCache(tmp_path / "c")
    assert cache.keys == ["0.png", "1.png", "3.png", "4.png", "6.png"]
    assert cache.lacking == {"2.png": "is empty", "5.png": "no such file"}
    assert len(cache) == 5
    assert torch.equal(cache.read([cache.row("6.png"), 2]), FEATURES[[6, 3]])
    assert "6.png" in cache
    with pytest.raises(UnusableImageError, match=r"'2.png' was left out of .*: is empty"):
        cache.row("2.png")
    with pytest.raises(ValueError, match=r"rows 5..5 .* holds rows 0..4"):
        cache.read([5])
    (tmp_path / "c" / "lacking.json").write_text("{}")
    with pytest.raises(ValueError, match=r"lacking\.json is not that of the manifest"):
        FeatureCache(tmp_path / "c")
    with (
        pytest.raises(ValueError, match="none of the 1 images can be used; the first: is empty"),
        FeatureCache.create(tmp_path / "d", ["a"], 3, 8) as writer,
    ):
        writer.leave_out(0, "is empty")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures, of which one is cut off; a row without a caption; a vision model."""
    folder = tmp_path_factory.mktemp("photos")
    draws = np.random.default_rng(0)
    rows = []
    for n in range(10):
        pixels = draws.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "caption": f"picture {n}"})
    whole = (folder / "4.png").read_bytes()
    (folder / "4.png").write_bytes(whole[: len(whole) // 2])
    rows[7]["caption"] = "\u200b"
    (folder / "r.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows[7]["caption"] = "picture 7"
    (folder / "good.jsonl").write_text("\n".join(map(json.dumps, rows)))
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 24, "image_size": 28, "patch_size": 14}
    ViTModel(ViTConfig(**sizes), add_pooling_layer=False).save_pretrained(folder / "vit")
    return folder


@pytest.mark.parametrize("workers", ["0", "1"])
def test_features_without_bad_pictures(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str
) -> None:
    command = ["features", "--images", str(photos), "--records", str(photos / "r.jsonl")]
    command += ["--encoder", str(photos / "vit"), "--batch-size", "4", "--workers", workers]
    command += ["--out", str(tmp_path / "cache")]
    with pytest.raises(SystemExit, match=r"r.jsonl, line 8: image '7.png' has an empty caption"):
        main(command)
    with pytest.raises(SystemExit, match=r"1 of 10 rows and images .* max_skipped 0: .*line 8"):
        main([*command, "--on-error", "skip", "--max-skipped", "0"])
    with pytest.raises(SystemExit, match=r"^error: image .*4\.png: is cut off [^\n]*$"):
        main([*command[:-1], str(tmp_path / "d"), "--records", str(photos / "good.jsonl")])
    again = [*command, "--records", str(photos / "good.jsonl"), "--on-error", "skip"]
    again += ["--out", str(tmp_path / "again")]
    with pytest.raises(SystemExit, match=r"1 of 10 images .* 0: 4.png: .*is cut off"):
        main([*again, "--max-skipped", "0"])
    main(again)  # goes on; a hundredth of ten, rounded up
    assert list(FeatureCache(tmp_path / "again").lacking) == ["4.png"]
    main([*command, "--on-error", "skip", "--max-skipped", "0.2", "--file-gb", "0.0000002"])
    out = capsys.readouterr().out
    assert "left out: " in out
    assert "r.jsonl, line 8: image '7.png' has an empty caption" in out
    assert "8 images of 5 tokens x 12" in out
    cache = FeatureCache(tmp_path / "cache")
    assert list(cache.lacking) == ["4.png"]
    assert "cut off or damaged" in cache.lacking["4.png"]
    assert len(list((tmp_path / "cache").glob("features-*.bin"))) == 9
    small = [*command[:-1], str(tmp_path / "small"), "--on-error", "skip", "--max-skipped", "0"]
    with pytest.raises(SystemExit, match=r"0.png: \d+ x \d+ pixels, more than 8; make it smaller"):
        main([*small, "--records", str(photos / "good.jsonl"), "--max-pixels", "8"])


def test_a_worker_that_is_killed_is_one_line(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "blip2fast.data.caching.read_picture", lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    )
    command = ["features", "--images", str(photos), "--records", str(photos / "good.jsonl")]
    command += ["--encoder", str(photos / "vit"), "--workers", "1", "--out", str(tmp_path / "c")]
    with pytest.raises(SystemExit, match=r"^error: DataLoader worker [^\n]*fewer --workers"):
        main(command)


def test_import_without_bad_rows(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["data", "import", str(photos / "r.jsonl"), "--out", str(tmp_path / "t")]
    with pytest.raises(SystemExit, match=r"line 8: image '7.png' has an empty caption"):
        main(command)
    with pytest.raises(SystemExit, match=r"1 of 10 rows .*, more than the 0 of max_skipped 0"):
        main([*command, "--on-error", "skip", "--max-skipped", "0"])
    assert not (tmp_path / "t").exists()
    main([*command, "--on-error", "skip"])  # a hundredth of ten, rounded up
    assert "1 rows left out" in capsys.readouterr().out
    assert len(RecordTable([tmp_path / "t"], "caption")) == 9
    (line,) = (tmp_path / "t" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["where"] == f"{photos / 'r.jsonl'}, line 8"
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match="after row 0: not readable as Parquet"):
        import_records(tmp_path / "bad.parquet", tmp_path / "u", on_error="skip", max_skipped=9)
    (tmp_path / "all.jsonl").write_text("[1]\n[2]\n")
    with pytest.raises(ValueError, match=r"holds no records that can be used; the first: .*line 1"):
        import_records(tmp_path / "all.jsonl", tmp_path / "v", on_error="skip", max_skipped=9)


def test_the_limit_as_a_count_or_a_share() -> None:
    assert [most_skipped(n, 250) for n in (None, 0, 7, 0.1, 0.001)] == [3, 0, 7, 25, 1]


def test_a_failing_disk_is_not_a_bad_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that may pass must end a run, not leave good pictures out."""

    def failing(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Image, "open", failing)
    with pytest.raises(ValueError, match=r"a.png: Input/output error") as caught:
        load_image(tmp_path / "a.png")
    assert not isinstance(caught.value, UnusableImageError)


def test_the_limit_of_a_run_is_that_of_its_pictures(photos: Path) -> None:
    store = FileImages(photos, ImageTransform(4), seed=0, max_pixels=8)
    with pytest.raises(UnusableImageError, match=r"0.png: .* pixels, more than 8"):
        store.load("0.png", 0, 0)
