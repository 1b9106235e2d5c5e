"""Converts trained weights between runs of blip2fast, transformers' folders and LAVIS's files.

    convert("blip2_pretrained_opt2.7b.pth", "converted", "transformers",
            language_model="facebook/opt-2.7b", image_encoder="eva_vit_g.pth")

What is written appears under its name when it is whole.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from blip2fast.data.manifest import aside, flush
from blip2fast.frozen.lavis_files import VisionWeights
from blip2fast.published.lavis_layout import write_lavis
from blip2fast.published.native_layout import write_run
from blip2fast.published.parts import Named, find_vision
from blip2fast.published.reading import IMAGE, LANGUAGE, open_weights
from blip2fast.published.report import Report
from blip2fast.published.targets import check_target
from blip2fast.published.transformers_layout import write_transformers
from blip2fast.published.weights import Layout, Weights

_WRITERS: dict[str, Callable[..., Report]] = {
    "transformers": write_transformers,
    "lavis": write_lavis,
    "blip2fast": write_run,
}


def convert(
    source: str | Path,
    target: str | Path,
    to: Layout,
    *,
    image_size: int | None = None,
    language_model: str | None = None,
    image_encoder: str | None = None,
    tokenizer: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write trained weights in another layout.

    Args:
        source: as `open_weights` takes it.
        target: a folder, or for LAVIS a `.pth` file.
        to: "transformers", "lavis" or "blip2fast".
        image_size: side of the images, in pixels: the encoder's positions are interpolated.
        language_model: folder or hub name; needed where the source holds and names none.
        image_encoder: folder, hub name or file of LAVIS, likewise.
        tokenizer: folder or hub name of the Q-Former's tokenizer, likewise.
        overwrite: replace a target that exists.

    Returns:
        What was mapped, left out and missing.

    Raises:
        ValueError: the source is not found or of another kind, the target exists, a part is
            missing, or the target's layout cannot express it.
    """
    source, path = str(source), Path(target).expanduser()
    if to not in _WRITERS:
        raise ValueError(f"--to {to}: expected {', '.join(_WRITERS)}")
    check_target(source, path, to, overwrite)
    weights = open_weights(source)
    if weights.layout == to and image_size is None:
        raise ValueError(f"{source} is {weights.what} already: there is nothing to convert")
    vision = None
    held = weights.vision_config is not None and image_encoder is None
    if to != "blip2fast" or held or image_size is not None:
        vision = _vision(weights, to, image_encoder, image_size)
    if image_size is not None:
        if vision is None:
            raise ValueError(
                f"--image-size {image_size}: {source} holds no image encoder whose positions could "
                "be interpolated; give --image-encoder"
            )
        vision = vision.resized(image_size)
    named = Named(language_model, image_encoder, tokenizer)
    with _written_whole(path) as partial:
        report = _WRITERS[to](weights, vision, named, partial, path.resolve())
    taken = {IMAGE} if vision is not None else set()
    if weights.layout == "transformers" and to != "lavis" and language_model is None:
        taken.add(LANGUAGE)
    unused = {reason: n for reason, n in weights.others.items() if n and reason not in taken}
    return replace(report, left=unused | dict(report.left))


def _vision(
    weights: Weights, to: Layout, given: str | None, image_size: int | None
) -> VisionWeights | None:
    try:
        return find_vision(weights, given)
    except ValueError:
        # a file of LAVIS may do without one: the report says so
        if to == "lavis" and given is None and image_size is None:
            return None
        raise


@contextmanager
def _written_whole(path: Path) -> Iterator[Path]:
    """A path to write at, which becomes `path` at the end, and is removed after an error."""
    partial, old = aside(path), aside(path.with_name(path.name + ".old"))
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        for each in [*partial.rglob("*"), partial]:
            flush(each)
    except BaseException:
        _remove(partial)
        raise
    _remove(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    flush(path.parent)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
