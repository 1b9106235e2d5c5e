"""The memory of a run; in stage 2 for every placement of its frozen language model.

    plan = plan_memory(load_config("configs/vitg_opt6.7b_stage2.yaml"), processes=1)
    print(plan)

Only configurations are read. Parameters, optimizer states and saved activations are counted (see
`blip2fast.training.measuring`), with texts at full length. Temporaries, allocator rounding and the
CUDA context are covered by the tenth of the memory that must stay free.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from blip2fast._choices import Storage
from blip2fast._imports import needs
from blip2fast.checkpoints.trained import is_trained, read_description
from blip2fast.data.feature_cache import FeatureCache
from blip2fast.data.tokenizers import qformer_tokenizer
from blip2fast.frozen.image_encoders import count_tokens, encoder_image_size
from blip2fast.frozen.timm_models import is_timm, load_timm
from blip2fast.published.reading import open_weights, published_fault
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage2.config import Stage2Config
from blip2fast.training.config import RunConfig
from blip2fast.training.engine import NVME_BUFFERS, nvme_buffer_size
from blip2fast.training.measuring import (
    EncoderSizes,
    LanguageModelSizes,
    TrainedSizes,
    measure_image_encoder,
    measure_language_model,
    measure_stage1,
    measure_trained,
    measure_trained_encoder,
    read_model_config,
)
from blip2fast.training.precision import DTYPE_OF

with needs("plan memory", "psutil"):
    import psutil  # type: ignore[import-untyped]

GIB = 1 << 30
USED = 0.9  # usable fraction of a memory; the rest stays free
# DeepSpeed keeps up to this many parameters fetched (stage3_max_live_parameters)
ZERO3_LIVE = 1_000_000_000
# stage 1 computes its logits in chunks of at most this many bytes
LOGIT_BYTES = 512 * 2**20


@dataclass(frozen=True)
class Memory:
    """Free bytes of each device and of the host; on a CPU the device is the host."""

    device: int
    host: int
    device_is_host: bool


@dataclass(frozen=True)
class Option:
    """One placement of the language model.

    Attributes:
        name: label in the table.
        offload, gradient_checkpointing, storage: settings of the run.
        device: bytes on each device, by purpose.
        host: host bytes per process.
    """

    name: str
    offload: Literal["none", "stream", "zero3"]
    gradient_checkpointing: bool
    storage: str
    device: Mapping[str, int]
    host: Mapping[str, int]

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True)
class MemoryPlan:
    """All options of a run, in order of preference.

    Attributes:
        options: options that do not change the loss come first; among them, the fastest first.
        memory: the available memory.
        processes: processes on this machine.
        heading: the models and their parameter counts.
        notes: the assumptions made.
    """

    options: list[Option]
    memory: Memory
    processes: int
    heading: str
    notes: list[str]

    def fits(self, option: Option) -> bool:
        """Whether an option fits in memory for all processes on the machine."""
        device, host = option.device_bytes, option.host_bytes * self.processes
        if self.memory.device_is_host:
            return device * self.processes + host <= USED * self.memory.host
        return device <= USED * self.memory.device and host <= USED * self.memory.host

    def first(self, storage: str = "as_is") -> Option | None:
        """The first option that fits, among those with this storage of streamed weights."""
        for option in self.options:
            allowed = option.offload != "stream" or option.storage == storage
            if allowed and self.fits(option):
                return option
        return None

    def choose(self, storage: str = "as_is") -> Option:
        """Like `first`, but raises if nothing fits.

        Raises:
            ValueError: nothing fits; the message has the table and suggestions.
        """
        option = self.first(storage)
        if option is not None:
            return option
        raise ValueError(
            f"offload: auto: nothing fits this machine.\n{self}\nLower optim.batch_size (raise "
            "optim.accumulation), allow stream_storage: int8, or keep the weights on a disk "
            "(offload: zero3, offload_param: nvme)"
        )

    def table(self) -> list[list[str]]:
        """A row for each option, in GiB, beneath a header."""
        names = list(dict.fromkeys(name for o in self.options for name in o.device))
        table = [["GiB on each device", *names, "sum", "host, each process", "fits"]]
        for option in self.options:
            parts = [_gib(option.device.get(name, 0)) for name in names]
            sums = [_gib(option.device_bytes), _gib(option.host_bytes)]
            table.append([option.name, *parts, *sums, "yes" if self.fits(option) else "no"])
        return table

    @property
    def available(self) -> str:
        """The memory that there is, in words."""
        there = f"{_gib(self.memory.host)} GiB of host memory for {self.processes} process(es)"
        if not self.memory.device_is_host:
            there = f"{_gib(self.memory.device)} GiB on each device, {there}"
        return f"{there}; a tenth stays free"

    def __str__(self) -> str:
        table = self.table()
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in table
        ]
        return "\n".join([self.heading, self.available, "", *lines, *self.notes])


def machine_memory() -> Memory:
    """The free memory of this machine."""
    host = psutil.virtual_memory().available
    if not torch.cuda.is_available():
        return Memory(host, host, device_is_host=True)
    return Memory(torch.cuda.mem_get_info()[0], host, device_is_host=False)


def plan_memory(
    config: RunConfig, processes: int = 1, machines: int = 1, memory: Memory | None = None
) -> MemoryPlan:
    """Plan the memory of every option of a run; loads configurations only.

    Args:
        config: the run.
        processes: world size, over which ZeRO partitions.
        machines: number of machines; the processes of a machine share its host memory.
        memory: the available memory; by default this machine's free memory.

    Raises:
        ValueError: a model configuration that is not found, or inconsistent sizes.
    """
    here = -(-processes // machines)
    if config.stage == 1 or config.language_model is None:
        return _stage1_plan(config, processes, here, memory or machine_memory())
    notes: list[str] = []
    dtype = DTYPE_OF[config.precision]
    path = config.language_model.path
    language_config = read_model_config("language_model.path", path)
    if getattr(language_config, "quantization_config", None) is not None:
        notes.append(
            f"{path} is quantised: counted in {config.precision}, which is more than it is"
        )
    if config.language_model.activation is not None:
        language_config.dense_act_fn = config.language_model.activation
    encoder, image_tokens = _images(config, notes)
    sizes = _trained_config(config, encoder.width, notes)
    batch, lora = config.optim.batch_size, config.language_model.lora
    language = measure_language_model(
        language_config,
        dtype,
        batch,
        sizes.num_query_tokens,
        config.data.max_txt_len,
        None if lora is None else dataclasses.asdict(lora),
    )
    trained = measure_trained(sizes, language.width, dtype, batch, image_tokens)
    counts = _Counts(config, processes, language, trained, encoder, sizes, image_tokens)
    heading = (
        f"{path}: {language.parameters:,} frozen parameters, {counts.num_trained:,} trained"
        + (f" ({language.adapters:,} of LoRA adapters)" if language.adapters else "")
        + (f", {encoder.parameters:,} of the image encoder" if encoder.parameters else "")
        + (" (trained too)" if encoder.trained else "")
        + f"; {config.precision}, {batch} samples a process and pass"
    )
    memory = memory or machine_memory()
    return MemoryPlan(_options(counts, memory), memory, here, heading, notes)


def _stage1_plan(config: RunConfig, processes: int, here: int, memory: Memory) -> MemoryPlan:
    """The plan of stage 1, which has no language model to place."""
    notes = ["activations: of padded texts; the passes over packed ones keep less"]
    encoder, image_tokens = _images(config, notes)
    sizes = _stage1_config(config, encoder.width, notes)
    B, T, dtype = config.optim.batch_size, config.data.max_txt_len, DTYPE_OF[config.precision]
    losses = config.optim.losses
    measured = measure_stage1(sizes, losses, dtype, B, image_tokens, T)
    number = measured.parameters + encoder.trained
    weights, host = trained_bytes(config, number, processes, config.zero_stage)
    frozen = 0 if encoder.trained else encoder.parameters
    device = {"image encoder": frozen * dtype.itemsize, **weights}
    matched = 3 if "itm" in losses else 0  # pairs a sample that ITM judges
    texts = 1 + matched + ("itg" in losses)
    inputs = sizes.hidden_size * ((1 + matched) * sizes.num_query_tokens + texts * T)
    outside = (1 + matched) * image_tokens * sizes.encoder_hidden_size
    layers = sizes.num_hidden_layers
    recomputed = measured.kept // layers + B * (inputs * layers + outside) * dtype.itemsize
    logits = min(B * T * sizes.vocab_size * (dtype.itemsize + 4), LOGIT_BYTES)
    if "itg" not in losses:
        logits = 0
    options = []
    for way in (True,) if config.gradient_checkpointing else (False, True):
        kept = recomputed if way else measured.kept
        kept += encoder.activations(way or config.image_encoder.gradient_checkpointing)
        use = {**device, "activations": kept, "logits": logits}
        options.append(Option(_name("stage 1", way), "none", way, "as_is", use, host))
    heading = (
        f"stage 1: {number:,} trained parameters"
        + (f", {encoder.parameters:,} of the image encoder" if encoder.parameters else "")
        + (" (trained too)" if encoder.trained else "")
        + f"; {config.precision}, {B} samples a process and pass"
    )
    return MemoryPlan(options, memory, here, heading, notes)


def trained_bytes(
    config: RunConfig, number: int, processes: int, zero_stage: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of weights, gradients and AdamW states, on the device and on the host.

    Args:
        config: the run.
        number: trained parameters.
        processes: over which ZeRO partitions.
        zero_stage: of ZeRO.
    """
    itemsize = DTYPE_OF[config.precision].itemsize
    low, spread = itemsize < 4, processes if zero_stage >= 1 else 1
    gradient = itemsize
    if low and (zero_stage == 0 or config.optim.accumulation > 1):
        gradient = 4 if zero_stage else itemsize + 4  # summed in fp32
    gradients = gradient * number // (processes if zero_stage >= 2 else 1)
    # AdamW's two moments and, where there is one, its fp32 copy of the weights
    states = (12 if low or zero_stage else 8) * number // spread
    weights = itemsize * number
    if config.offload_optimizer == "none":
        return {"trained": weights + gradients, "optimiser": states}, {}
    host = {"optimiser": states} if config.offload_optimizer == "cpu" else {}
    return {"trained": weights + gradients, "optimiser": 0}, host


@dataclass(frozen=True)
class _Counts:
    """The measurements from which all options are computed."""

    config: RunConfig
    processes: int
    language: LanguageModelSizes
    trained: TrainedSizes
    encoder: EncoderSizes
    sizes: Stage2Config
    image_tokens: int

    @property
    def itemsize(self) -> int:
        return DTYPE_OF[self.config.precision].itemsize

    @property
    def num_trained(self) -> int:
        """All parameters that are trained."""
        return self.trained.parameters + self.encoder.trained + self.language.adapters

    def other_than_language(self, zero_stage: int) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes of the trained part and the image encoder, on the device and on the host."""
        trained, host = trained_bytes(self.config, self.num_trained, self.processes, zero_stage)
        frozen = 0 if self.encoder.trained else self.encoder.parameters
        return {"image encoder": frozen * self.itemsize, **trained}, host

    def activations(self, recomputed: bool) -> dict[str, int]:
        """Bytes saved for the backward pass, of both models and of the loss."""
        B, item = self.config.optim.batch_size, self.itemsize
        layers, size = self.sizes.num_hidden_layers, self.sizes
        qformer, language = self.trained.kept, self.language.kept
        if recomputed:
            inputs = size.num_query_tokens * size.hidden_size * layers
            inputs += self.image_tokens * size.encoder_hidden_size
            qformer = qformer // layers + B * inputs * item
            language = self.language.block_inputs + self.language.kept_outside
            language += self.language.kept_block
        checkpointed = recomputed or self.config.image_encoder.gradient_checkpointing
        encoder = self.encoder.activations(checkpointed)
        # logits and their gradient, the fp32 log-softmax, and in 16 bits an fp32 copy of the logits
        each = 12 if item == 4 else 2 * item + 8
        logits = B * self.config.data.max_txt_len * self.language.words * each
        return {"activations": encoder + qformer + language, "logits": logits}


def _options(counts: _Counts, memory: Memory) -> list[Option]:
    config = counts.config
    asked = config.gradient_checkpointing
    # recomputation changes only the speed, so it is offered even if not requested
    ways = (True,) if asked else (False, True)
    options = [_resident(counts, memory, recomputed) for recomputed in ways]
    if counts.language.adapters:
        return options  # the blocks of a model with adapters are not moved
    options += [_streamed(counts, "as_is", recomputed) for recomputed in ways]
    if not counts.encoder.trained:  # `config_faults` says why not
        options += [_zero3(counts, recomputed) for recomputed in ways]
    # fewer bits change the loss and are never chosen automatically, so they come last
    fewer: tuple[Storage, ...] = ("int8", "int4")
    for storage in fewer:
        chosen = storage == config.stream_storage
        options += [_streamed(counts, storage, way) for way in (ways if chosen else (asked,))]
    return options


def _resident(counts: _Counts, memory: Memory, recomputed: bool) -> Option:
    """The language model on the device, or partitioned over devices if the run uses ZeRO-3."""
    config, weights = counts.config, counts.language.weights
    spread = counts.processes if config.zero_stage == 3 else 1
    device, host = counts.other_than_language(config.zero_stage)
    device = {"language model": weights // spread, **device}
    device |= counts.activations(recomputed)
    if not memory.device_is_host:
        host = {"language model, loading": weights, **host}
    return Option(_name("none", recomputed), "none", recomputed, "as_is", device, host)


def _streamed(counts: _Counts, storage: Storage, recomputed: bool) -> Option:
    config, stream = counts.config, counts.language.streams[storage]
    device, host = counts.other_than_language(config.zero_stage)
    buffers = config.stream_buffers * stream.buffer + stream.decoded
    device = {"language model": counts.language.rest + buffers, **device}
    device |= counts.activations(recomputed)
    host = {"language model": stream.host, **host}
    name = _name("stream" if storage == "as_is" else f"stream, {storage}", recomputed)
    return Option(name, "stream", recomputed, storage, device, host)


def _zero3(counts: _Counts, recomputed: bool) -> Option:
    device, host = counts.other_than_language(3)
    live = min(counts.language.parameters, ZERO3_LIVE) * counts.itemsize
    device = {"language model": live, **device, **counts.activations(recomputed)}
    share = -(-counts.language.weights // counts.processes)
    if counts.config.offload_param != "nvme":
        host = {"language model": share, **host}
    else:
        largest = counts.language.words * counts.language.width
        buffers = NVME_BUFFERS * nvme_buffer_size(largest, counts.processes)
        host = {"language model, read from nvme": buffers * counts.itemsize, **host}
    return Option(_name("zero3", recomputed), "zero3", recomputed, "as_is", device, host)


def _name(name: str, recomputed: bool) -> str:
    return f"{name}, gradient_checkpointing" if recomputed else name


def _images(config: RunConfig, notes: list[str]) -> tuple[EncoderSizes, int]:
    """The image encoder in the loop, or the width E of a feature cache if known; image tokens S."""
    data = config.data
    if data.image_encoder is not None:
        if config.image_encoder.train:
            return _trained_encoder(config, data.image_encoder)
        return _encoder_in_loop(data.image_encoder, data.image_size, notes)
    if data.features is not None and Path(data.features, "manifest.json").is_file():
        cache = FeatureCache(data.features)
        return EncoderSizes(width=cache.width), cache.num_tokens
    notes.append(f"data.features {data.features!r} does not exist yet: 257 tokens an image assumed")
    return EncoderSizes(), 257


def _encoder_in_loop(name: str, size: int | None, notes: list[str]) -> tuple[EncoderSizes, int]:
    """Sizes and image tokens of an encoder that stays frozen."""
    if is_timm(name):
        model = load_timm(name, pretrained=False)
        parameters = sum(p.numel() for p in model.parameters())
        sizes, count = EncoderSizes(parameters, model.config.hidden_size), None
    else:
        config = read_model_config("data.image_encoder", name)
        sizes = EncoderSizes(*measure_image_encoder(config))
        count = count_tokens(config, size or encoder_image_size(name))
    if count is None:
        notes.append(f"data.image_encoder {name!r}: 257 tokens an image assumed")
    return sizes, count or 257


def _trained_encoder(config: RunConfig, name: str) -> tuple[EncoderSizes, int]:
    """Sizes and image tokens of an encoder that is trained."""
    encoder = read_model_config("data.image_encoder", name)
    size = config.data.image_size or encoder_image_size(name)
    dtype, batch = DTYPE_OF[config.precision], config.optim.batch_size
    layer = config.data.image_encoder_layer
    sizes = measure_trained_encoder(encoder, dtype, batch, size, layer)
    return sizes, count_tokens(encoder, size) or 257


def _trained_config(config: RunConfig, width: int | None, notes: list[str]) -> Stage2Config:
    """Sizes of the trained part: the model section's, else those of `init_from`, else BLIP-2's."""
    return Stage2Config(**_sizes(config, Stage2Config, width, notes))


def _stage1_config(config: RunConfig, width: int | None, notes: list[str]) -> Stage1Config:
    """Likewise of stage 1; the words are the tokenizer's where it is a folder, else BERT's."""
    sizes = _sizes(config, Stage1Config, width, notes)
    tokenizer = config.model.tokenizer
    if tokenizer is not None and Path(tokenizer).is_dir():
        sizes |= {"vocab_size": len(qformer_tokenizer(tokenizer)), "bos_token_id": 0}
    return Stage1Config(**sizes)


def _sizes(config: RunConfig, kind: type, width: int | None, notes: list[str]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    sizes: dict[str, Any] = {}
    start = config.init_from
    if start is not None and is_trained(start):
        found = read_description(start).sizes
        sizes |= {name: value for name, value in found.items() if name in known}
    elif start is not None and Path(start).exists() and not published_fault("init_from", start):
        found = open_weights(start).sizes
        sizes |= {name: value for name, value in found.items() if name in known}
    elif start is not None:
        notes.append(f"init_from {config.init_from!r} is not here: BLIP-2's sizes assumed")
    section = dataclasses.asdict(config.model)
    sizes |= {name: v for name, v in section.items() if name in known and v is not None}
    if width is not None:
        sizes["encoder_hidden_size"] = width
    return sizes


def _gib(count: int) -> str:
    return f"{count / GIB:.2f}"
