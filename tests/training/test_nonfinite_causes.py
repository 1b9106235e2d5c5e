"""What is said of a value that is not finite: whether a file, frozen weights or the computation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_run import config, write_world
from transformers import OPTForCausalLM, ViTConfig, ViTModel

from blip2fast.training.trainer import Trainer, train

VALUES = "image_encoder.model.layers.0.attention.v_proj.weight"


def _quiet(_: str) -> None: ...


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With pictures, their encoder, and a language model that holds NaN."""
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "images").mkdir()
    for split, count in (("train", 22), ("eval", 8)):
        for number in range(count):
            pixels = np.full((28, 28, 3), 5 * number, np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{split}{number}", "PNG")
    sizes = ViTConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=28,
        patch_size=14,
    )
    ViTModel(sizes, add_pooling_layer=False).save_pretrained(folder / "vit")
    language = OPTForCausalLM.from_pretrained(folder / "opt")
    language.model.decoder.layers[1].fc1.weight.data[0, 0] = float("nan")
    language.save_pretrained(folder / "damaged")
    for path in (folder / "opt").glob("token*"):
        (folder / "damaged" / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize(
    "placement",
    [
        {},
        {"offload": "stream"},
        {"zero_stage": 3},
        {"offload": "zero3", "offload_param": "cpu", "precision": "bf16"},
    ],
    ids=str,
)
def test_frozen_weights_are_named_wherever_they_are(
    world: Path, tmp_path: Path, placement: dict[str, Any]
) -> None:
    """Before, streamed and partitioned ones were said to be finite, and a lower rate to help."""
    run = config(
        world,
        tmp_path / "out",
        2,
        language_model={"path": str(world / "damaged")},
        data={"eval_records": None, "eval_features": None},
        on_nonfinite="skip",
        **placement,
    )
    name = r"'language_model\.model\.decoder\.layers\.1\.fc1\.weight'"
    message = rf"step 1: loss not finite, as frozen parameters are not: {name}: repair the files"
    with pytest.raises(FloatingPointError, match=message):
        train(run, say=_quiet)


@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_weights_that_are_not_finite_are_not_stored_in_few_bits(
    world: Path, tmp_path: Path, storage: str
) -> None:
    """Before, levels stood for them, and the run ended with a model and exit status 0."""
    language = {"path": str(world / "damaged")}
    run = config(
        world,
        tmp_path / "out",
        2,
        language_model=language,
        offload="stream",
        stream_storage=storage,
    )
    message = f"^fc1.weight, to be stored in {storage}: a weight holds values that are not finite"
    with pytest.raises(ValueError, match=message):
        train(run, say=_quiet)


def _spoil_values(trainer: Trainer) -> None:
    assert trainer.parts.image_encoder is not None
    weights = dict(trainer.parts.image_encoder.named_parameters())
    weights[VALUES.removeprefix("image_encoder.")].data.fill_(float("nan"))


def _overflow(trainer: Trainer) -> None:
    assert trainer.parts.image_encoder is not None
    trainer.parts.image_encoder.register_forward_hook(lambda *given: given[-1] * float("inf"))


@pytest.mark.parametrize("held_out", [False, True], ids=["train", "held_out"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_spoil_values, f"frozen parameters are not: '{VALUES}': repair the files"),
        (_overflow, "the tokens computed of images are not, which are finite themselves: '"),
    ],
)
def test_pictures_are_not_blamed_for_their_encoder(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    spoil: Callable[[Trainer], None],
    message: str,
    held_out: bool,
) -> None:
    """Before, the message was to repair the images."""
    name = "evaluate" if held_out else "_train_step"
    original = getattr(Trainer, name)

    def spoiled(self: Trainer, *args: Iterator[Any]) -> Any:
        spoil(self)
        return original(self, *args)

    monkeypatch.setattr(Trainer, name, spoiled)
    of_images = {
        "features": None,
        "eval_features": None,
        "images": str(world / "images"),
        "eval_images": str(world / "images"),
        "image_encoder": str(world / "vit"),
    }
    run = config(world, tmp_path / "out", 2, data=of_images, optim={"warmup_steps": 0})
    where = r"^held-out data, step 6: 'loss' not finite: " if held_out else "^step 1: .* as "
    with pytest.raises(FloatingPointError, match=where + message):
        train(run, say=_quiet)
