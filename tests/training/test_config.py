"""The configuration: what is read, what is refused and how."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import values

from blip2fast.data.source_config import RecordSource
from blip2fast.training.config_files import (
    SHIPPED,
    config_values,
    known_keys,
    load_config,
    nearest_key,
    parse_config,
    save_config,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
BASE: dict[str, Any] = {
    "stage": 1,
    "output_dir": "out",
    "model": {"tokenizer": "words"},
    "data": {"records": "captions.jsonl", "features": "cache"},
    "optim": {"max_steps": 10, "batch_size": 4, "warmup_steps": 2},
}


def _changed(**changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(BASE)
    for name, change in changes.items():
        section, _, key = name.partition("__")
        if key:
            values[section][key] = change
        else:
            values[name] = change
    return values


def _stage2(**changes: Any) -> dict[str, Any]:
    return _changed(**{"stage": 2, "model": {}, "language_model": {"path": "opt"}, **changes})


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    config = load_config(path)
    task = "retrieval" if config.stage == 1 else config.data.task
    assert f"stage{config.stage}" in path.stem or task in path.stem


def test_the_recipes_are_the_papers() -> None:
    """Effective batch sizes on 16 GPUs, steps and learning rates of section 3.4."""
    folder = CONFIGS[0].parent
    recipes = {p.stem: load_config(p) for p in folder.glob("vit*_stage?.yaml")}
    per_step = {name: 16 * c.optim.batch_size for name, c in recipes.items()}
    assert per_step == {
        "vitl_stage1": 2320,
        "vitg_stage1": 1680,
        "vitl_opt2.7b_stage2": 1920,
        "vitl_flant5xl_stage2": 1520,
        "vitg_opt2.7b_stage2": 1920,
        "vitg_opt6.7b_stage2": 1920,
        "vitg_flant5xl_stage2": 1520,
        "vitg_flant5xxl_stage2": 1520,
    }
    for config in recipes.values():
        optim = config.optim
        assert (optim.max_steps, optim.min_lr) == {1: (250_000, 1e-5), 2: (80_000, 5e-5)}[
            config.stage
        ]
        assert (optim.lr, optim.warmup_steps, optim.betas) == (1e-4, 2000, (0.9, 0.98))
        assert optim.weight_decay == 0.05


def test_the_fine_tunings_are_the_papers() -> None:
    """Batch sizes on 16 GPUs, image sizes and layer decay of the appendix; 5 epochs."""
    recipes = {p.stem: load_config(p) for p in CONFIGS if p.stem.startswith("vit")}
    tuned = {name: each for name, each in recipes.items() if each.image_encoder.train}
    found = {
        name: (16 * c.optim.batch_size, c.data.image_size, c.image_encoder.layer_decay)
        for name, c in tuned.items()
    }
    assert found == {
        "vitg_opt2.7b_coco_caption": (256, 364, 1),
        "vitg_opt2.7b_vqav2": (128, 490, 0.95),
        "vitg_coco_retrieval": (224, 364, 0.95),
    }
    for name, samples in (("coco_caption", 566_747), ("vqav2", 658_111), ("retrieval", 566_747)):
        (config,) = (c for full, c in tuned.items() if full.endswith(name))
        optim = config.optim
        assert optim.max_steps == round(5 * samples / (16 * optim.batch_size))
        assert (optim.lr, optim.warmup_steps, optim.betas) == (1e-5, 1000, (0.9, 0.999))
        assert (optim.weight_decay, optim.min_lr) == (0.05, 0)


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    text = yaml.safe_dump(_changed()) + "seed: 7\n"
    file.write_text(text.replace("max_steps: 10", "max_steps: 10\n  lr: 3e-4\n  min_lr: 0"))
    config = load_config(file, ["optim.betas=[0.8, 0.9]", "zero_stage=2", "optim.eps=1e-9"])
    assert (config.optim.lr, config.optim.min_lr, config.seed) == (3e-4, 0.0, 7)
    assert (config.optim.betas, config.zero_stage, config.optim.eps) == ((0.8, 0.9), 2, 1e-9)
    # An empty section is its defaults, and a set key makes its section.
    assert load_config(file, ["model.dropout=0", "data.max_txt_len=9"]).data.max_txt_len == 9


def test_what_is_saved_is_read_back(tmp_path: Path) -> None:
    config = parse_config(_stage2(language_model={"path": "t5", "prompt": "a photo of"}))
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_values(config)["language_model"]["prompt"] == "a photo of"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim__warmup": 3}, "optim.warmup: no such key; the nearest is optim.warmup_steps"),
        ({"optim__learning_rate": 1}, "no such key; the nearest is optim.lr"),
        ({"lr": 1e-4}, "lr: no such key; the nearest is optim.lr"),
        ({"zero": 1}, "zero: no such key; the nearest is zero_stage"),
        ({"optim__batch_size": "8"}, "optim.batch_size: .*integer, got '8'"),
        ({"optim__batch_size": 0}, "optim.batch_size: .*greater than or equal to 1, got 0"),
        ({"optim__batch_size": True}, "optim.batch_size: .*integer, got True"),
        ({"optim__max_steps": 10.0}, "optim.max_steps: .*integer, got 10.0"),
        ({"optim__betas": [0.9]}, "optim.betas"),
        ({"optim__lr": "fast"}, "optim.lr: .*number, got 'fast'"),
        ({"stage": 3}, "stage: .*1 or 2, got 3"),
        ({"zero_stage": 4}, "zero_stage: .*0, 1, 2 or 3, got 4"),
        ({"precision": "int4"}, "precision: .*'fp32', 'bf16' or 'fp16', got 'int4'"),
        ({"data": {"features": "cache"}}, "data.records: missing"),
        ({"data": 3}, "data: .*got 3"),
        ({"data__max_txt_len": 1}, "data.max_txt_len: .*2, got 1"),
    ],
)
def test_unknown_and_ill_typed_keys_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(_changed(**changes), "run.yaml")


def test_every_fault_is_listed() -> None:
    with pytest.raises(ValueError, match=r"(?s)run.yaml:\n  stage: .*\n  optim.batch_size: "):
        parse_config(_changed(stage="one", optim__batch_size=-1), "run.yaml")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_changed(data__images="photos"), "either features .* or images"),
        (_changed(data={"records": "r"}), "either features .* or images"),
        (_changed(data={"records": "r", "images": "i"}), "needs data.image_encoder"),
        (_changed(data__image_encoder="vit"), "features is a cache"),
        (_changed(data__eval_records="r"), "eval_records and eval_features go together"),
        (_changed(eval_every=5), "eval_every is 5, but data.eval_records is not set"),
        (_changed(optim__min_lr=1.0), "min_lr 1.0 is above optim.lr 0.0001"),
        (_changed(optim__warmup_steps=10), "warmup_steps 10 leaves none of optim.max_steps 10"),
        (_changed(optim__losses=["itm", "itg"]), "optim.losses .* lacks itc"),
        (
            _stage2() | {"optim": _changed(optim__losses=["itc"])["optim"]},
            "losses belongs to stage 1",
        ),
        (_changed(optim__grad_cache=True), "grad_cache with optim.accumulation 1"),
        (
            _stage2() | {"optim": _changed(optim__grad_cache=True)["optim"]},
            "grad_cache belongs to stage 1",
        ),
        (_changed(model={}), "model.tokenizer: stage 1"),
        (_changed(language_model={"path": "opt"}), "language_model belongs to stage 2"),
        (_changed(data__task="vqa"), "task 'vqa' belongs to stage 2, but stage is 1"),
        (_changed(stage=2, model={}), "language_model: stage 2 needs one"),
        (_stage2() | {"model": {"tokenizer": "words"}}, "model.tokenizer belongs to stage 1"),
        (
            _stage2() | {"language_model": {"path": "opt", "prompt": "Q: {}"}},
            "data.task is caption",
        ),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_config(values)


def test_bad_files_and_overrides_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration at .*nowhere.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    file = tmp_path / "run.yaml"
    file.write_text("stage: [1")
    with pytest.raises(ValueError, match=r"run.yaml: not valid YAML"):
        load_config(file)
    file.write_text("just words")
    with pytest.raises(ValueError, match="expected keys and values, got str"):
        load_config(file)
    file.write_text(yaml.safe_dump(BASE))
    with pytest.raises(ValueError, match=r"--set 'optim.lr': expected key=value"):
        load_config(file, ["optim.lr"])
    with pytest.raises(ValueError, match="stage holds 1, not keys"):
        load_config(file, ["stage.x=1"])
    with pytest.raises(ValueError, match=r"optim.foo: no such key"):
        load_config(file, ["optim.foo=1"])


def test_nearest_key_prefers_the_section_and_the_word() -> None:
    names = known_keys()
    assert len(names) == len(set(names))
    assert {"optim.lr", "data", "data.features", "language_model.path"} <= set(names)
    assert nearest_key("optim.batchsize") == "optim.batch_size"
    assert nearest_key("batch_size") == "optim.batch_size"
    assert nearest_key("model.lr") == "optim.lr"
    assert nearest_key("language_model.pth") == "language_model.path"


def test_sources_of_records(tmp_path: Path) -> None:
    """A path, a source with options, or a list of both; each fault is told once."""
    given = ["a.jsonl", {"source": "b.csv", "caption_key": "x"}]
    config = parse_config(values(tmp_path, tmp_path, data={"records": given}))
    assert config.data.records == ["a.jsonl", RecordSource(source="b.csv", caption_key="x")]
    assert parse_config(config_values(config)) == config
    for wrong, message in (
        ([{"sorce": "b"}], "sorce: no such key; the nearest is data.records.source"),
        ([{"source": "b", "weight": "x"}], "weight: Input should be a valid number, got 'x'"),
        (3, "data.records.path: Input should be a valid string, got 3"),
    ):
        with pytest.raises(ValueError) as caught:
            parse_config(values(tmp_path, tmp_path, data={"records": wrong}))
        assert message in str(caught.value)
        assert str(caught.value).count("data.records") <= 3


def test_shipped_configurations_find_the_files_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As from a wheel, in a folder that is no checkout."""
    monkeypatch.chdir(tmp_path)
    config = load_config("scenes_vqa", ["language_model.prompt=blip2fast/nothing"])
    assert Path(str(config.model.tokenizer), "tokenizer_config.json").is_file()
    assert config.language_model is not None
    assert Path(config.language_model.path, "config.json").is_file()
    assert config.language_model.prompt == "blip2fast/nothing"
    own = tmp_path / "own.yaml"
    own.write_text((SHIPPED / "scenes_vqa.yaml").read_text())
    assert str(load_config(own).model.tokenizer).startswith("blip2fast/")
