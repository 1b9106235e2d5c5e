"""Train anew what ships in `blip2fast/scenes/towers`, under 2 MB in all.

    python -m blip2fast.scenes.build_towers                          # all, into the package
    python -m blip2fast.scenes.build_towers --out DIR image_shapes   # one, elsewhere

    image_shapes, image_digits   `ViTModel` by masked autoencoding, each on its own images
    language                     `OPTForCausalLM` with its tokenizer, on texts of both worlds
    qformer_tokenizer            words of both worlds

The image tower of shapes takes three minutes on one core, the others five. Everything is seeded.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from blip2fast.scenes.image_tower import train_image_tower
from blip2fast.scenes.language_tower import train_language_tower
from blip2fast.scenes.splits import make_split
from blip2fast.scenes.wordlevel import qformer_tokenizer
from blip2fast.scenes.world import KINDS, Scene, SceneSpec

FOLDER = Path(__file__).parent / "towers"
TRAINING_SCENES = 8000
# Handwriting needs more width than drawn shapes: the kind of a digit by an unseen writer is read
# correctly in 77 % from 64 features per patch, and in 80 % from 96.
DIGITS = {"width": 96}
DIGITS_SCENES = 16_000
NAMES = (*(f"image_{source}" for source in KINDS), "language", "qformer_tokenizer")


def build(name: str, folder: Path) -> str:
    """Build one of `NAMES` as `folder / name`.

    Returns:
        The training results as text; empty for a tokenizer.

    Raises:
        ValueError: an unknown name.
    """
    if name == "qformer_tokenizer":
        qformer_tokenizer().save_pretrained(folder / name)
        return ""
    if name == "language":
        return str(train_language_tower(_training_scenes(), folder / name))
    specs = {f"image_{spec.source}": spec for spec in _specs()}
    if name not in specs:
        raise ValueError(f"no tower {name!r}; there are {', '.join(NAMES)}")
    spec = specs[name]
    digits = spec.source == "digits"
    train = make_split(spec, "train", DIGITS_SCENES if digits else TRAINING_SCENES)
    return str(train_image_tower(train.images, folder / name, **(DIGITS if digits else {})))


def main(argv: Sequence[str] | None = None) -> None:
    """Build the towers named on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--out", type=Path, default=FOLDER, help="where, if not in the package")
    given = parser.parse_args(argv)
    for name in given.names:
        print(name, build(name, given.out))


def _specs() -> list[SceneSpec]:
    return [SceneSpec(source="shapes"), SceneSpec(source="digits")]


def _training_scenes() -> list[Scene]:
    return [
        scene for spec in _specs() for scene in make_split(spec, "train", TRAINING_SCENES).scenes
    ]


if __name__ == "__main__":
    main()
