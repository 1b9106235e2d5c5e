"""Scenes on disk, the two towers, and the frozen features of every image."""

from __future__ import annotations

import multiprocessing
import os

import torch
from rich.console import Console

from blip2fast.demo.settings import DemoSettings, Places, cores
from blip2fast.demo.training import progress_bar
from blip2fast.feature_cache import FeatureCache
from blip2fast.image_encoders import load_image_encoder
from blip2fast.scenes import SceneSplit, make_split, save_tokenizers, write_records
from blip2fast.scenes.image_tower import to_pixel_values, train_image_tower
from blip2fast.scenes.language_tower import train_language_tower
from blip2fast.scenes.world import Split

SPLIT_SIZES: dict[Split, str] = {
    "train": "train_scenes",
    "held_out": "held_out_scenes",
    "unseen_pairs": "unseen_scenes",
}
BATCH = 256


def load_split(settings: DemoSettings, split: Split) -> SceneSplit:
    """Render a split; the same seed gives the same pixels."""
    count: int = getattr(settings, SPLIT_SIZES[split])
    return make_split(settings.spec, split, count, settings.seed)


def write_texts(settings: DemoSettings, places: Places) -> None:
    """Caption and question records of the training and held-out scenes, and both tokenizers."""
    for name in ("train", "held_out"):
        split = load_split(settings, name)
        write_records(places.captions(name), split.caption_records(settings.captions_per_scene))
        write_records(places.questions(name), split.question_records(settings.question_rounds))
    save_tokenizers(places.towers)


def train_towers(settings: DemoSettings, places: Places) -> None:
    """Train both towers, each on one modality, at the same time.

    The models are too small to fill several cores, so each gets a process and its share of them.

    Raises:
        RuntimeError: when a tower's process fails.
    """
    spawn = multiprocessing.get_context("spawn")
    processes = []
    for position, target in enumerate((_image_tower, _language_tower)):
        # Read by tqdm when it is imported: one line of the terminal for each bar.
        os.environ["TQDM_POSITION"] = str(position)
        process = spawn.Process(target=target, args=(settings, places), name=target.__name__[1:])
        process.start()
        processes.append(process)
    del os.environ["TQDM_POSITION"]
    for process in processes:
        process.join()
    failed = [f"{p.name} (status {p.exitcode})" for p in processes if p.exitcode != 0]
    if failed:
        raise RuntimeError(f"training of {', '.join(failed)} failed; its error is printed above")


def _image_tower(settings: DemoSettings, places: Places) -> None:
    torch.set_num_threads(max(1, cores() // 2))
    images = load_split(settings, "train").images
    train_image_tower(images, places.image_tower, seed=settings.seed, **settings.image_tower)


def _language_tower(settings: DemoSettings, places: Places) -> None:
    torch.set_num_threads(max(1, cores() // 2))
    train_language_tower(
        settings.spec, places.language_tower, seed=settings.seed, **settings.language_tower
    )


def cache_features(settings: DemoSettings, places: Places, console: Console) -> None:
    """Frozen features of every image of every split."""
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
                encoder.encoder_id,
                when_there="replace",
            ) as writer:
                for start in range(0, len(split.keys), BATCH):
                    images = split.images[start : start + BATCH]
                    writer.write(start, encoder(to_pixel_values(images)))
                    progress.advance(bar, len(images))
