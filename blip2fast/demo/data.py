"""Scenes on disk, and the shipped image tower's features of every image."""

from __future__ import annotations

from functools import lru_cache

from rich.console import Console

from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.records import write_records
from blip2fast.demo.settings import DemoSettings, Places
from blip2fast.demo.training import progress_bar
from blip2fast.frozen.image_encoders import load_image_encoder
from blip2fast.scenes import SceneSpec, SceneSplit, make_split
from blip2fast.scenes.image_tower import to_pixel_values
from blip2fast.scenes.world import Split

SPLIT_SIZES: dict[Split, str] = {
    "train": "train_scenes",
    "held_out": "held_out_scenes",
    "unseen_pairs": "unseen_scenes",
}
BATCH = 256


def load_split(settings: DemoSettings, split: Split) -> SceneSplit:
    """Render a split, used for texts, features and evaluation."""
    return _split(settings.spec, split, getattr(settings, SPLIT_SIZES[split]), settings.seed)


@lru_cache(maxsize=len(SPLIT_SIZES))
def _split(spec: SceneSpec, split: Split, count: int, seed: int) -> SceneSplit:
    return make_split(spec, split, count, seed)


def write_texts(settings: DemoSettings, places: Places) -> None:
    """Caption and question records of the training and held-out scenes, and held-out pictures."""
    for name in ("train", "held_out"):
        split = load_split(settings, name)
        write_records(places.captions(name), split.caption_records(settings.captions_per_scene))
        write_records(places.questions(name), split.question_records(settings.question_rounds))
    # training reads features: these are for people, and for the reports of the runs
    load_split(settings, "held_out").write_images(places.images("held_out"))


def cache_features(settings: DemoSettings, places: Places, console: Console) -> None:
    """Cache the frozen features of all images of all splits."""
    encoder = load_image_encoder(str(places.image_tower))
    sizes = {split: getattr(settings, name) for split, name in SPLIT_SIZES.items()}
    with progress_bar(console) as progress:
        bar = progress.add_task("images", total=sum(sizes.values()), note="")
        for name in sizes:
            split = load_split(settings, name)
            with FeatureCache.create(
                places.features(name),
                split.keys,
                encoder.num_tokens,
                encoder.width,
                "bfloat16",
                encoder.identity,
                when_there="replace",
            ) as writer:
                for start in range(0, len(split.keys), BATCH):
                    images = split.images[start : start + BATCH]
                    writer.write(start, encoder(to_pixel_values(images)))
                    progress.advance(bar, len(images))
