"""A value that is not finite is found in its step, named, and never saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from small_run import (
    NUM_TOKENS,
    WIDTH,
    be_one_of_two,
    config,
    distance,
    free_port,
    timeless,
    weights,
    write_world,
)

from blip2fast.checkpoints.files import checkpoints_in
from blip2fast.checkpoints.trained import read_description, save_model
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.training.build import build_run
from blip2fast.training.engine import leave_processes
from blip2fast.training.engine_state import (
    lowers_loss_scale,
    optimizer_state,
    restore_loss_scale,
)
from blip2fast.training.faults import Faults
from blip2fast.training.finite import StepGate
from blip2fast.training.log import Progress, read_metrics
from blip2fast.training.trainer import Trainer, train

ALL = [{"zero_stage": stage} for stage in range(4)] + [
    {"zero_stage": stage, "precision": "bf16"} for stage in range(3)
]
# DeepSpeed wraps AdamW otherwise where it sums gradients of passes
ALL += [
    {"zero_stage": stage, "precision": precision, "optim": {"batch_size": 2, "accumulation": 2}}
    for stage, precision in ((0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"))
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With features of which those of one image, of the third step, hold an infinite value."""
    world = write_world(tmp_path_factory.mktemp("world"))
    _spoil(world, "train", _image_of_step(world, 3))
    _spoil(world, "eval", "eval5")
    return world


def _spoil(world: Path, split: str, key: str) -> None:
    keys = [f"{split}{i}" for i in range(22 if split == "train" else 8)]
    cache = FeatureCache(world / f"{split}_features")
    features = cache.read([cache.row(each) for each in keys]).float()
    features[keys.index(key), 1, 2] = float("inf")
    folder = world / f"{split}_bad"
    with (
        pytest.MonkeyPatch.context() as patch,
        FeatureCache.create(folder, keys, NUM_TOKENS, WIDTH, encoder_id="codes") as writer,
    ):
        # the writer refuses them, but a cache may be made by others
        patch.setattr(torch, "isfinite", lambda _: torch.ones(()))
        writer.write(0, features)


def _image_of_step(world: Path, step: int) -> str:
    parts = build_run(config(world, world / "unused"), 0, 1)
    return parts.batches.keys(step - 1)[2]


def _settings(world: Path, output: Path, stage: int, *, bad: bool = True, **more: Any) -> Any:
    data = {"eval_records": None, "eval_features": None} | more.pop("data", {})
    if bad:
        data["features"] = str(world / "train_bad")
    return config(world, output, stage, data=data, **{"save_every": 1, "keep_last": 9, **more})


def _quiet(_: str) -> None: ...


def _all_finite(folder: Path) -> bool:
    files = [*folder.rglob("*.safetensors")]
    return all(bool(v.isfinite().all()) for f in files for v in load_file(f).values())


def _steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in checkpoints_in(folder / "checkpoints"))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", ALL, ids=str)
def test_an_image_with_an_infinite_token_is_named_in_its_step(
    world: Path, tmp_path: Path, stage: int, settings: dict[str, Any]
) -> None:
    """Before, batches of stage 1 "had no negative", or NaN was trained on until the next log."""
    output, key = tmp_path / "out", _image_of_step(world, 3)
    rare = {"log_every": 100, "save_every": 1}  # the log is not what finds it
    with pytest.raises(FloatingPointError) as error:
        train(_settings(world, output, stage, **settings, **rare), say=_quiet)
    message = str(error.value)
    assert message.startswith("step 3: loss"), message
    assert f"not finite, as the tokens of images are not: '{key}': repair them" in message
    assert message.endswith(f"resume: true continues from {output}/checkpoints/step-00000002")
    assert "\n" not in message
    assert _steps_saved(output) == [1, 2]
    assert _all_finite(output)
    assert not (output / "model.safetensors").exists()


@pytest.fixture
def spoil_gradient(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, ...]], None]:
    """Makes a gradient NaN in some steps, while the losses stay finite."""

    def spoil(steps: tuple[int, ...]) -> None:
        original = Trainer._train_step

        def step(self: Trainer, batches: Iterator[Any]) -> None:
            if not hasattr(self, "spoiled"):
                self.spoiled = True
                parameter = dict(self.model.named_parameters())["ln_vision.weight"]
                parameter.register_hook(
                    lambda g: g * float("nan") if self.state.step + 1 in steps else g
                )
            original(self, batches)

        monkeypatch.setattr(Trainer, "_train_step", step)

    return spoil


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", ALL, ids=str)
def test_a_gradient_in_the_last_step_does_not_reach_the_model(
    world: Path, tmp_path: Path, stage: int, settings: dict[str, Any], spoil_gradient: Any
) -> None:
    """Before, fp32 in ZeRO stage 0 ended with exit status 0 and a model of NaN."""
    spoil_gradient((6,))
    output = tmp_path / "out"
    run = _settings(world, output, stage, bad=False, **settings, save_every=0)
    with pytest.raises(FloatingPointError, match=r"step 6: the gradient not finite, from finite"):
        train(run, say=_quiet)
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("settings", ALL, ids=str)
def test_skipped_steps_are_counted_and_the_run_resumes_exactly(
    world: Path, tmp_path: Path, stage: int, settings: dict[str, Any], spoil_gradient: Any
) -> None:
    """Before, a resumed AdamW counted skipped steps, and stage 1 died after one in ZeRO-3."""
    spoil_gradient((2,))
    settings = {**settings, "on_nonfinite": "skip", "log_every": 2}
    whole, resumed, said = tmp_path / "whole", tmp_path / "resumed", []
    train(_settings(world, whole, stage, **settings), say=said.append)
    lines = [line for line in read_metrics(whole) if "lr" in line]
    assert [line.get("skipped", 0) for line in lines] == [1, 1, 0]
    assert all("loss" in line for line in lines)
    assert _all_finite(whole)
    shutil.copytree(whole, resumed)
    for step in (4, 5, 6):
        shutil.rmtree(resumed / "checkpoints" / f"step-{step:08d}")
    train(_settings(world, resumed, stage, **settings, resume=True), say=_quiet)
    assert timeless(whole) == timeless(resumed)
    assert distance(resumed, whole) == 0
    state = json.loads((resumed / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert (state["skipped"], state["optimizer"]["updates"]) == (2, 4)


def test_a_skipped_step_leaves_the_parameters_alone(world: Path, tmp_path: Path) -> None:
    train(_settings(world, tmp_path / "out", 2, on_nonfinite="skip"), say=_quiet)
    before, after, later = (
        load_file(tmp_path / "out" / "checkpoints" / f"step-0000000{n}" / "model.safetensors")
        for n in (2, 3, 4)
    )
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not all(torch.equal(after[name], value) for name, value in later.items())


def test_more_skipped_steps_than_the_limit_end_the_run(
    world: Path, tmp_path: Path, spoil_gradient: Any
) -> None:
    spoil_gradient((2, 3, 5))
    run = _settings(world, tmp_path / "out", 2, bad=False, on_nonfinite="skip", skip_limit=2)
    with pytest.raises(FloatingPointError, match=r"step 5.* 3 steps .* more than skip_limit 2"):
        train(run, say=_quiet)


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_parameter_that_is_not_finite_is_never_saved(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    """No run recovers from it, so it is an error under either policy."""
    original = Trainer._train_step

    def overflows_in_step_4(self: Trainer, batches: Iterator[Any]) -> None:
        original(self, batches)
        if self.state.step == 3:
            self.model.ln_vision.bias.data[0] = float("inf")

    monkeypatch.setattr(Trainer, "_train_step", overflows_in_step_4)
    cases = (
        (1, "step 4: 'ln_vision.bias' not finite after the update"),
        (5, "step 5: loss not finite, as parameters are not: 'ln_vision.bias'"),
    )
    for every, message in cases:
        output = tmp_path / str(every)
        run = _settings(world, output, 2, bad=False, on_nonfinite=policy, save_every=every)
        with pytest.raises(FloatingPointError, match=message):
            train(run, say=_quiet)
        assert _all_finite(output)
        assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("stage", [1, 2])
def test_a_held_out_loss_that_is_not_finite_is_an_error(
    world: Path, tmp_path: Path, stage: int
) -> None:
    """Before, `NaN` was written to metrics.jsonl, which is no JSON."""
    data = {"eval_records": str(world / "eval.jsonl"), "eval_features": str(world / "eval_bad")}
    run = _settings(
        world, tmp_path / "out", stage, bad=False, data=data, eval_every=2, save_every=0
    )
    message = r"held-out data, step 2: .*not finite: the tokens of images are not: 'eval5'"
    with pytest.raises(FloatingPointError, match=message):
        train(run, say=_quiet)
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert _steps_saved(tmp_path / "out") == [2], "the training is not lost for it"


def test_weights_of_the_language_model_that_are_not_finite_are_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._train_step

    def spoiled(self: Trainer, batches: Iterator[Any]) -> None:
        self.model.get_parameter("language_model.lm_head.weight").data[0] = float("nan")
        original(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", spoiled)
    message = "step 1: loss not finite, as frozen parameters are not: 'language_model.*embed_tokens"
    with pytest.raises(FloatingPointError, match=message):
        train(_settings(world, tmp_path / "out", 2, bad=False), say=_quiet)


def test_a_start_from_a_model_that_is_not_finite_is_refused(world: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    train(_settings(world, start, 2, bad=False), say=_quiet)
    state = weights(start)
    state["ln_vision.weight"][3] = float("inf")
    save_model(start, state, read_description(start))
    run = _settings(world, tmp_path / "out", 2, bad=False, init_from=str(start))
    with pytest.raises(ValueError, match=r"init_from '.*start': 'ln_vision.weight' not finite"):
        train(run, say=_quiet)


@pytest.mark.parametrize("name", ["lr", "min_lr", "eps", "weight_decay", "clip_norm"])
def test_settings_that_are_not_finite_are_refused(world: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=rf"optim.{name}: .*finite number"):
        _settings(world, tmp_path / "out", 2, optim={name: float("inf")})


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host learns of a step after the next one, as on a GPU."""
    original = StepGate.__init__

    def lags(self: StepGate, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self._lags = True

    monkeypatch.setattr(StepGate, "__init__", lags)


@pytest.mark.usefixtures("lagging")
@pytest.mark.parametrize("zero_stage", [0, 2])
def test_no_step_passes_before_the_host_knows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    seen: list[Any] = []
    original = Faults.read_outcomes

    def noted(self: Faults, wait: bool) -> bool:
        seen.append({n: v.clone() for n, v in self._state.parameters().items()})
        return original(self, wait)

    monkeypatch.setattr(Faults, "read_outcomes", noted)
    rare = {"log_every": 100, "save_every": 0, "zero_stage": zero_stage}
    with pytest.raises(FloatingPointError, match="step 3: loss not finite, as the tokens"):
        train(_settings(world, tmp_path / "out", 2, **rare), say=_quiet)
    assert len(seen) == 4 if zero_stage == 0 else len(seen) in (3, 4)
    for after in seen[2:]:
        assert all(torch.equal(after[name], value) for name, value in seen[1].items())


@pytest.mark.usefixtures("lagging")
def test_a_late_count_is_complete_where_it_is_written(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    settings = {"on_nonfinite": "skip", "log_every": 3, "save_every": 3}
    train(_settings(world, output, 2, **settings), say=_quiet)
    assert [line.get("skipped", 0) for line in read_metrics(output)] == [1, 0]
    state = json.loads((output / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert (state["skipped"], state["optimizer"]["updates"]) == (1, 2)


def test_a_step_is_judged_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the meta device have no values: reading one, as a wait would, raises."""
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    parameter.grad = torch.zeros(3, device="meta")
    basic = torch.optim.AdamW([parameter])
    engine = SimpleNamespace(
        optimizer=basic,
        basic_optimizer=basic,
        module=torch.nn.ParameterList([parameter]),
        zero_optimization_stage=lambda: 0,
        fp16_enabled=lambda: False,
    )
    for stays_closed in (False, True):
        gate = StepGate(engine, torch.device("meta"), stays_closed)
        losses = {"loss": torch.zeros((), device="meta")}
        left_out = gate.judge(1, losses, stop=False)
        progress = Progress({})
        for _ in range(2):
            progress.add(losses, 2, left_out)
    assert basic.found_inf.device.type == "meta"


@pytest.mark.parametrize(("clip_norm", "norm"), [(0.0, 5.0), (2.5, 2.5), (7.0, 5.0)])
def test_the_gate_clips_what_no_engine_clips(
    monkeypatch: pytest.MonkeyPatch, clip_norm: float, norm: float
) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 1)
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(3)]
    for parameter, value in zip(parameters, (3.0, -4.0), strict=False):
        parameter.grad = torch.tensor([value])  # the third has none
    basic = torch.optim.AdamW(parameters)
    engine = SimpleNamespace(
        optimizer=basic,
        basic_optimizer=basic,
        module=torch.nn.ParameterList(parameters),
        zero_optimization_stage=lambda: 0,
        fp16_enabled=lambda: False,
    )
    gate = StepGate(engine, torch.device("cpu"), False, clip_norm)
    gate.judge(1, {"loss": torch.zeros(())}, stop=False)
    assert float(gate.gradient_norm()) == 5.0  # before clipping
    found = [float(p.grad) for p in parameters[:2]]
    assert found == pytest.approx([3.0 * norm / 5, -4.0 * norm / 5], rel=1e-5)
    assert parameters[2].grad is None


def test_a_run_in_fp32_clips(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW sees gradients of norm `clip_norm`."""
    seen, step = list[float](), torch.optim.AdamW.step

    def spy(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"]]
        seen.append(float(torch.nn.utils.get_total_norm([g for g in grads if g is not None])))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    optim = {"max_steps": 2, "warmup_steps": 1, "clip_norm": 0.01}
    train(config(world, tmp_path / "out", 1, optim=optim), say=_quiet)
    assert seen[-2:] == pytest.approx([0.01, 0.01], rel=1e-3)


def _fp16_engine(kind: str) -> Any:
    """As much of an engine as its loss scale needs: fp16 is not there on a CPU."""
    from deepspeed.runtime.fp16.loss_scaler import (
        DynamicLossScaler,
        LossScaleConfig,
        LossScaleProfile,
    )

    shard = torch.nn.Parameter(torch.zeros(2))
    basic = torch.optim.AdamW([shard])
    basic.state[shard] = {"step": torch.tensor(7.0)}
    if kind == "unfused":
        scaler = LossScaleConfig(torch.float16, True, 1.0, None, profile=LossScaleProfile.UNFUSED)
        holder = SimpleNamespace(loss_scale_config=scaler)
    else:
        scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
        holder = SimpleNamespace(loss_scaler=scaler)
    engine = SimpleNamespace(
        fp16_enabled=lambda: True,
        zero_optimization_stage=lambda: 0 if kind == "unfused" else 2,
        optimizer=holder,
        basic_optimizer=basic,
    )
    return engine, scaler


@pytest.mark.parametrize("kind", ["unfused", "zero"])
@pytest.mark.parametrize("other", ["unfused", "zero"])
def test_the_loss_scale_of_fp16_is_kept(kind: str, other: str) -> None:
    """Before, a resumed run began with the first scale again and skipped steps for it."""
    engine, scaler = _fp16_engine(kind)
    scaler.cur_scale, scaler.cur_iter, scaler.last_overflow_iter = 512.0, 40, 31
    kept = json.loads(json.dumps(optimizer_state(engine)))
    assert kept["updates"] == 7
    resumed, restored = _fp16_engine(other)
    restore_loss_scale(resumed, kept)
    found = (restored.cur_scale, restored.cur_iter, restored.last_overflow_iter)
    assert found == (512.0, 40, 31)
    assert lowers_loss_scale(resumed)
    restored.cur_scale = 0.25 if other == "unfused" else 1.0
    assert not lowers_loss_scale(resumed)


def _work(rank: int, port: int, world: Path, folder: Path) -> None:
    be_one_of_two(rank, port)
    for zero_stage in range(4):
        settings = {"zero_stage": zero_stage, "optim": {"batch_size": 2}}
        said = []
        for policy in ("raise", "skip"):
            output = folder / f"{policy}-{zero_stage}"
            try:
                train(_settings(world, output, 1, on_nonfinite=policy, **settings), say=said.append)
            except FloatingPointError as error:
                (folder / f"error-{zero_stage}-{rank}").write_text(str(error))
    leave_processes()


@pytest.mark.slow
def test_every_process_gives_the_same_error(world: Path, tmp_path: Path) -> None:
    """The image is on one of two; no process waits for one that has left."""
    mp.spawn(_work, (free_port(), world, tmp_path), nprocs=2)
    key = _image_of_step(world, 3)
    for zero_stage in range(4):
        one, two = ((tmp_path / f"error-{zero_stage}-{rank}").read_text() for rank in (0, 1))
        assert one == two
        assert "step 3: loss_itc and loss_itg and loss_itm not finite" in one
        assert f"'{key}'" in one
        assert _steps_saved(tmp_path / f"raise-{zero_stage}") == [1, 2]
        skipping = tmp_path / f"skip-{zero_stage}"
        assert [line.get("skipped", 0) for line in read_metrics(skipping)][2] == 1
        assert all(v.isfinite().all() for v in weights(skipping).values())
