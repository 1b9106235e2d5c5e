"""The runs that one writes without this library: transformers' modules, a plain loop and loader.

LAVIS's formula: stage 1 in separate padded passes (`textbook_stage1.py`), stage 2 on padded texts
with the language model's own loss. A sample is read by itself, from a tensor file or a JPEG, and
texts are tokenized and padded where batches are put together.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from our_runs import (
    BACKWARD,
    DATA,
    ENCODER,
    FORWARD,
    JUDGED,
    LANGUAGE,
    OPTIMISER,
    QFORMER,
    Steps,
    fixed_negatives,
)
from PIL import Image
from run_clock import PartClock
from run_files import RunFiles
from shapes import RunShape
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoTokenizer,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    Blip2QFormerModel,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

from blip2fast.frozen.images import CLIP_MEAN, CLIP_STD
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.model import Blip2Stage2
from blip2fast.training.build import Run
from blip2fast.training.config import RunConfig
from blip2fast.training.engine import learning_rate
from blip2fast.training.parameter_groups import parameter_groups

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
from textbook_stage1 import TextbookStage1


class TextbookStage2(nn.Module):
    """Soft prompts of transformers' Q-Former before padded texts, from a copy of the weights."""

    def __init__(self, model: Blip2Stage2) -> None:
        super().__init__()
        self.query_tokens = nn.Parameter(model.query_tokens.detach().clone())
        self.ln_vision = copy.deepcopy(model.ln_vision)
        self.qformer = Blip2QFormerModel(model.config.qformer_config())
        self.qformer.load_state_dict(model.qformer.state_dict())
        self.language_projection = copy.deepcopy(model.language_projection)
        self.language_model = copy.deepcopy(model.language_model)

    def forward(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        queries = self.query_tokens.expand(len(image_embeds), -1, -1)
        states = self.qformer(
            query_embeds=queries, encoder_hidden_states=self.ln_vision(image_embeds)
        ).last_hidden_state
        prompts = self.language_projection(states)
        words = self.language_model.get_input_embeddings()(input_ids)
        before = attention_mask.new_ones(prompts.shape[:2])
        return self.language_model(
            inputs_embeds=torch.cat([prompts, words], dim=1),
            attention_mask=torch.cat([before, attention_mask], dim=1),
            labels=torch.cat([-100 * before, input_ids.where(attention_mask.bool(), -100)], dim=1),
        ).loss


@dataclass(frozen=True)
class Pairs(Dataset[tuple[Tensor, str]]):
    """An image and its caption: features of a tensor file, or the pixels of a JPEG."""

    files: RunFiles
    size: int | None

    def __len__(self) -> int:
        return len(self.files.keys)

    def __getitem__(self, number: int) -> tuple[Tensor, str]:
        key, caption = self.files.keys[number], self.files.captions[number]
        if self.size is None:
            return torch.load(self.files.tensor(key)), caption
        image = Image.open(self.files.images / key).convert("RGB")
        image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image, np.float32) / 255 - np.float32(CLIP_MEAN)) / np.float32(
            CLIP_STD
        )
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), caption


@dataclass(frozen=True)
class Collate:
    """Images stacked, captions padded to the longest; of stage 2 they end with the end token."""

    tokenizer: Any
    ends: bool
    longest: int = 32

    def __call__(self, pairs: Sequence[tuple[Tensor, str]]) -> dict[str, Tensor]:
        images, captions = zip(*pairs, strict=True)
        end = f" {self.tokenizer.eos_token}" if self.ends else ""
        texts = self.tokenizer(
            [caption + end for caption in captions],
            padding="longest",
            truncation=True,
            max_length=self.longest,
            return_tensors="pt",
        )
        ids, mask = texts["input_ids"], texts["attention_mask"]
        return {"images": torch.stack(images), "input_ids": ids, "attention_mask": mask}


class Vision(nn.Module):
    """transformers' vision model, up to the tokens that BLIP-2 takes."""

    def __init__(self, folder: Path, config: Any, dtype: torch.dtype) -> None:
        super().__init__()
        clip = isinstance(config, CLIPVisionConfig)
        kind: Any = CLIPVisionModel if clip else Blip2VisionModel
        model = kind.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        if clip:
            del model.encoder.layers[-1]
        else:
            model.post_layernorm = nn.Identity()
        self.model = model

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        tokens: Tensor = self.model(pixels).last_hidden_state
        return tokens


class TextbookRun:
    """A training run by a plain loop; what it has learned stays for the next round.

    Args:
        shape, files: of the run.
        config: ours, whose batch size, rates and order of samples it has, too.
        parts: ours, whose weights it begins with.
        device: where it trains.
        dtype: of products: below fp32 by autocast, on fp32 weights.
        compiled: its layers go through `torch.compile`.
    """

    def __init__(
        self,
        shape: RunShape,
        files: RunFiles,
        config: RunConfig,
        parts: Run,
        device: torch.device,
        dtype: torch.dtype,
        compiled: bool = False,
    ) -> None:
        self.shape, self.files, self.config, self.plan = shape, files, config, parts.batches.plan
        self.device, self.dtype = device, dtype
        model = parts.model
        self.model: nn.Module = (
            TextbookStage1(model) if isinstance(model, Blip2Stage1) else TextbookStage2(model)
        ).to(device)
        self.vision = None
        if shape.vision is not None:
            self.vision = Vision(files.encoder, shape.vision, dtype).to(device)
        size = None if shape.vision is None else int(shape.vision.image_size)
        self.pairs = Pairs(files, size)
        tokenizer = AutoTokenizer.from_pretrained(files.words)
        self.collate = Collate(tokenizer, ends=shape.language is not None)
        optim = config.optim
        self.adamw = torch.optim.AdamW(
            parameter_groups(self.model, optim.weight_decay),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            fused=True,
        )
        self.taken = 0
        if compiled:
            compile_layers(self.model, self.vision)

    def __call__(self, steps: int) -> Steps:
        """`JUDGED` steps, and then as many as are timed."""
        found, clock = Steps(), PartClock(self.device)
        batches = iter(self._loader(JUDGED + steps))
        for number in range(JUDGED + steps):
            if number == JUDGED:
                clock.start()
            with clock.during(DATA):
                batch = next(batches)
            loss = self._step(batch, clock, judged=number < JUDGED)
            if number < JUDGED:
                found.losses.append(float(loss))
        if steps:
            clock.stop()
            found.take(clock, steps)
        return found

    def _loader(self, steps: int) -> DataLoader[Any]:
        # ours reads ahead beyond the last timed step, and so does this one
        ahead = range(steps + 2 * self.shape.workers)
        return DataLoader(
            self.pairs,
            self.shape.batch,
            sampler=[number for step in ahead for number in self._numbers(step)],
            num_workers=self.shape.workers,
            collate_fn=self.collate,
            pin_memory=self.device.type == "cuda",
        )

    def _numbers(self, step: int) -> list[int]:
        return [int(number) for number in self.plan.batch(step).indices]

    def read(self, step: int) -> dict[str, Tensor]:
        """The batch of a step."""
        return self.collate([self.pairs[number] for number in self._numbers(step)])

    def _step(self, batch: dict[str, Tensor], clock: PartClock, judged: bool) -> Tensor:
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate(self.taken, self.config.optim) * group["lr_scale"]
        self.taken += 1
        batch = {name: x.to(self.device, non_blocking=True) for name, x in batch.items()}
        tokens = batch.pop("images")
        if self.vision is not None:
            with clock.during(ENCODER):
                tokens = self.vision(tokens.to(self.dtype))
        more: dict[str, Any] = {}
        if judged and self.shape.language is None:
            more["negatives"] = fixed_negatives(self.shape.batch, self.device)
        half = self.dtype != torch.float32
        with clock.during(FORWARD), torch.autocast(self.device.type, self.dtype, enabled=half):
            found = self.model(tokens.float(), **batch, **more)
            loss: Tensor = found["loss"] if isinstance(found, Mapping) else found
        with clock.during(BACKWARD):
            loss.backward()
        with clock.during(OPTIMISER):
            self.adamw.step()
            self.adamw.zero_grad()
        return loss.detach()


def compile_layers(*models: nn.Module | None) -> None:
    """Compile the layers of all stacks, whose lengths change."""
    for model in models:
        for stack in [] if model is None else model.modules():
            if isinstance(stack, nn.ModuleList) and len(stack) > 1:
                for layer in stack:
                    layer.compile()


def read_pictures(processor: Blip2Processor, pictures: Sequence[Path]) -> Any:
    """Pictures and their prompts, as the model takes them."""
    images = [Image.open(path).convert("RGB") for path in pictures]
    return processor(images=images, text=["a photo of"] * len(images), return_tensors="pt")


def caption_folder(
    model: Blip2ForConditionalGeneration,
    processor: Blip2Processor,
    pictures: Sequence[Path],
    batch: int,
    beams: int,
    new_tokens: int,
) -> tuple[list[str], dict[str, float]]:
    """Caption pictures by transformers' `generate`; their captions, and seconds by part."""
    clock, captions = PartClock(model.device), list[str]()
    with clock.watching({ENCODER: model.vision_model, QFORMER: model.qformer}):
        clock.start()
        for start in range(0, len(pictures), batch):
            with clock.during(DATA):
                inputs = read_pictures(processor, pictures[start : start + batch])
                inputs = inputs.to(model.device, model.dtype)
            with clock.during(LANGUAGE):
                tokens = model.generate(
                    **inputs, num_beams=beams, do_sample=False, max_new_tokens=new_tokens
                )
            words = processor.batch_decode(
                tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
            )
            captions += [text.strip() for text in words]
        clock.stop()
    return captions, {"": clock.whole(), **clock.seconds()}
