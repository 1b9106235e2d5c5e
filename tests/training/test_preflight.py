"""Runs that cannot start are refused before anything is loaded, with the remedy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_run import config, write_world

from blip2fast.frozen.hub import check_pretrained, check_weights
from blip2fast.ops import dispatch, kernels_set_to
from blip2fast.ops.records import Key, Record
from blip2fast.training import preflight
from blip2fast.training.config_files import load_config
from blip2fast.training.preflight import check_machine

NO_GPU = "torch.cuda.is_available"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, file: str) -> str:
        raise OSError(f"{name} cannot be reached\nand more lines")

    monkeypatch.setattr("blip2fast.frozen.hub.cached_file", refuse)
    monkeypatch.setattr(NO_GPU, lambda: False)


def test_a_good_run_passes(world: Path, tmp_path: Path) -> None:
    for stage in (1, 2):
        check_machine(config(world, tmp_path / "out", stage), world_size=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "fp16"}, "'fp16' needs a GPU, none is found: use bf16 or fp32"),
        ({"offload_param": "cpu"}, "offload_param 'cpu' needs zero_stage 3, it is 0"),
        ({"offload_optimizer": "cpu"}, "offload_optimizer 'cpu' needs zero_stage 1, 2 or 3"),
        ({"offload_optimizer": "nvme", "zero_stage": 2}, "nvme needs zero_stage 3, it is 2"),
        ({"offload_param": "nvme", "zero_stage": 3}, "nvme_path None: not a folder"),
        ({"offload_param": "nvme", "zero_stage": 3}, "'nvme' needs precision bf16 or fp16, it is"),
        ({"optim": {"batch_size": 1}}, "stage 1 needs at least 2 samples"),
        (
            {"data": {"records": "no.jsonl"}},
            "data.records 'no.jsonl': not a file, folder",
        ),
        ({"data": {"features": "no"}}, "data.features 'no': no feature cache; build it with"),
        ({"init_from": "no"}, "init_from 'no': no model.json"),
        ({"model": {"tokenizer": "/no"}}, "model.tokenizer '/no': not found: give a local folder"),
        ({"model": {"bert": "a/bert"}}, r"model.bert 'a/bert': not found: .* \(a/bert cannot be"),
    ],
)
def test_stage1_refusals(
    world: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=rf"(?s)cannot start:.*{message}"):
        check_machine(config(world, tmp_path / "out", 1, **changes))


def test_nvme_names_what_it_needs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    nvme = {"offload_param": "nvme", "zero_stage": 3, "nvme_path": str(tmp_path)}
    nvme["precision"] = "bf16"
    run = config(world, tmp_path / "out", 2, **nvme)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: False)
    with pytest.raises(ValueError, match=r"cannot be built here: it takes a C\+\+ compiler"):
        check_machine(run)
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda _: True)
    check_machine(run)


def test_evaluation_batches_are_shared_evenly(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path / "out", 2, eval_batch_size=6)
    check_machine(run, world_size=3)
    with pytest.raises(ValueError, match="eval_batch_size 6 on 4 processes: give a multiple of 4"):
        check_machine(run, world_size=4)


def test_an_earlier_run_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"holds an earlier run \(metrics.jsonl\): set resume"):
        check_machine(config(world, tmp_path, 1))
    check_machine(config(world, tmp_path, 1, resume=True))
    with pytest.raises(ValueError, match="is a file"):
        check_machine(config(world, tmp_path / "metrics.jsonl", 1))


def test_several_faults_come_together(world: Path, tmp_path: Path) -> None:
    run = config(world, tmp_path, 1, precision="fp16", data={"records": "no"}, init_from="no")
    with pytest.raises(ValueError, match=r"(?s)records.*init_from.*fp16"):
        check_machine(run)


def test_weights_that_are_not_there(world: Path, tmp_path: Path) -> None:
    assert check_weights("language_model.path", str(world / "opt")) is None
    (tmp_path / "config.json").write_text("{}")
    assert "a config but no weights" in str(check_weights("key", str(tmp_path)))
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in str(check_pretrained("key", str(tmp_path / "empty")))
    (tmp_path / "stage2").mkdir()
    said = f"reached (is it {tmp_path / 'stage2'}?)"
    assert said in str(check_pretrained("model", str(tmp_path / "stag2")))
    assert str(check_pretrained("model", str(tmp_path / "far" / "off"))).endswith("reached")
    fault = check_weights("language_model.path", "facebook/opt-2.7b")
    assert fault == (
        "language_model.path 'facebook/opt-2.7b': not found: give a local folder or a hub name "
        "that can be reached (facebook/opt-2.7b cannot be reached)"
    )


def test_a_recipe_without_its_weights_is_refused_by_name(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "configs" / "vitg_flant5xl_stage2.yaml"
    run = load_config(recipe, [f"output_dir={tmp_path}"])
    with pytest.raises(ValueError, match=r"(?s)records.*images.*flan-t5-xl.*blip2-opt-2.7b"):
        check_machine(run)


# kernels


@pytest.fixture
def kernels_as_before() -> Iterator[None]:
    with kernels_set_to("check"):
        yield


@pytest.mark.usefixtures("kernels_as_before")
def test_kernels_are_set_and_without_a_gpu_not_checked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "check_kernels", None)
    for setting in ("never", "trust", "check"):
        run = replace(config(world, tmp_path / "out", 1), kernels=setting)
        assert preflight.prepare_kernels(run) == []
        assert dispatch._kernels == setting


@pytest.mark.usefixtures("kernels_as_before")
def test_kernels_of_a_run_are_checked_before_it_where_there_is_a_gpu(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = Key("bias_gelu", "triton", "dtype=bf16", "abc", "a card", "9.0", *"123456"[:5])
    found = [Record(key), Record(key, "crashed: SIGSEGV")]
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(NO_GPU, lambda: True)
    monkeypatch.setattr(preflight, "check_kernels", lambda **given: asked.append(given) or found)
    run = config(world, tmp_path / "out", 1)
    run = replace(run, model=replace(run.model, hidden_size=64, num_attention_heads=4, dropout=0.0))
    said: list[str] = []
    assert preflight.prepare_kernels(run, said.append) == found
    assert said == [
        "kernels: 1 of 2 kinds are right and quicker here",
        "kernels: bias_gelu by triton (dtype=bf16): its kernels were checked on a card: crashed: "
        "SIGSEGV",
    ]
    sizes = asked[0]["sizes"]
    assert (sizes.hidden, sizes.heads, sizes.dropout) == (64, 4, False)
    assert sizes.text == run.data.max_txt_len
    # neither of these asks
    for setting in ("never", "trust"):
        assert preflight.prepare_kernels(replace(run, kernels=setting)) == []
    assert len(asked) == 1
