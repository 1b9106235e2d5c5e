"""Tables of docs/scaling.md that extrapolate, each number with the arithmetic that gave it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import extrapolation as e
from cache_index import LOOKED_UP
from fits import Fit
from results import RESULTS, newest

GPUS = (16, 512)
_STEP, _STEP64 = "step[vit_g_b256_dropout_cuda-bf16]", "step[vit_g_b64_dropout_cuda-bf16]"
_SHARES, _PICTURES = "shares[vit_g_b256_dropout_cuda]", "loader[jpeg_640x480-1]"
_RECIPES = {recipe.name: recipe for recipe in (e.STAGE1, *e.STAGE2)}
_MODELS = {
    "vitg_opt2.7b_stage2": "facebook/opt-2.7b",
    "vitg_flant5xxl_stage2": "google/flan-t5-xxl",
}
HOW = ("as measured", "hoped for")
TERA, GIGA, MEGA = 1e12, 1e9, 1e6


@dataclass(frozen=True)
class Known:
    """Numbers from result files.

    Attributes:
        pair_flops: Of a pair of stage 1 on one process, without ITC.
        host_s: A step of 64 pairs on an H200.
        of_floor, gaps: Of a step of 256 pairs: share of the rate, share in which the GPU waits.
        encoder_flops, qformer_flops: Of an image.
        language_flops: By recipe of stage 2, of a sample.
        parameters: Trained, by recipe.
        recomputed: By recipe of stage 2, whether its language model's forward runs twice.
        plans: By recipe, processes and ZeRO stage, GiB of each device.
        name_bytes, copied_bytes: Of a name in the index of a feature cache: in a process that
            opened it, and copied by a worker that is forked from it.
        pictures_per_s: That a worker decodes.
        row_bytes, start_s, rows: Of the large table of records.
    """

    pair_flops: float
    host_s: float
    of_floor: float
    gaps: float
    encoder_flops: float
    qformer_flops: float
    language_flops: Mapping[str, float]
    parameters: Mapping[str, int]
    recomputed: Mapping[str, bool]
    plans: Mapping[str, float] = field(repr=False)
    name_bytes: float
    copied_bytes: float
    pictures_per_s: float
    row_bytes: float
    start_s: float
    rows: int

    @property
    def speeds(self) -> tuple[e.Speed, e.Speed]:
        """As measured, and hoped for."""
        busy = e.busy_share(self.of_floor, self.gaps)
        return e.Speed(busy, self.host_s), e.Speed(e.HOPED_SHARE)

    def pair(self, processes: int) -> float:
        """FLOPs of a pair of stage 1."""
        return e.pair_flops(self.pair_flops, processes, e.STAGE1.a_process)

    def sample(self, recipe: str) -> float:
        """FLOPs of a sample of stage 2."""
        return self.qformer_flops + self.language_flops[recipe]


def known(result: Mapping[str, Any]) -> Known:
    """What is known, from the counts and the newest other results."""
    paths = list(RESULTS.glob("*.json"))
    (h200,) = (file for file in newest(paths, "stage1_step") if file.machine == "h200")
    step, least = h200.cells[_STEP], h200.cells[_STEP64]
    ours = step["contenders"]["blip2fast"]
    pictures = next(f for f in newest(paths, "pictures") if _PICTURES in f.cells)
    decoded = pictures.cells[_PICTURES]["contenders"]["blip2fast"]
    table = json.loads(sorted(RESULTS.glob("????-??-??_large-table.json"))[-1].read_text())
    sizes, plans = result["full_size"], result["plans"]
    recomputed = {recipe: _is_recomputed(plans[f"{recipe}, 16, 1"]) for recipe in _MODELS}
    language = {}
    for recipe, model in _MODELS.items():
        passes = sizes["language_models"][model]
        times = 2 if recomputed[recipe] else 1
        language[recipe] = times * passes["forward"] + passes["backward"]
    index, copied = (
        Fit.of({int(n): x[what] for n, x in result["cache_index"].items()}, (0, 1))
        for what in ("bytes", "copied_bytes")
    )
    return Known(
        pair_flops=step["work"]["flops"] / 256,
        host_s=least["contenders"]["blip2fast"]["median_s"],
        of_floor=ours["of_floor"],
        gaps=h200.cells[_SHARES]["contenders"]["blip2fast"]["shares"]["gaps"],
        encoder_flops=sizes["image_encoder"],
        qformer_flops=sizes["qformer"],
        language_flops=language,
        parameters={name: plans[f"{name}, 16, 1"]["parameters"]["trained"] for name in _RECIPES},
        recomputed=recomputed,
        plans={name: _device_gib(plan) for name, plan in plans.items()},
        name_bytes=index.coefficients[1],
        copied_bytes=copied.coefficients[1],
        pictures_per_s=decoded["images_per_s"],
        row_bytes=table["bytes"] / table["rows"],
        start_s=sum(table["seconds"].values()),
        rows=table["rows"],
    )


def _is_recomputed(plan: Mapping[str, Any]) -> bool:
    return "gradient_checkpointing" in plan["options"][0]["name"]


def _device_gib(plan: Mapping[str, Any]) -> float:
    """Of the first option: everything on the device, as the recipe has it."""
    return sum(plan["options"][0]["device"].values()) / 2**30


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    first, *others = ["| " + " | ".join(row) + " |" for row in (header, *rows)]
    ruler = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join([first, ruler, *others])


def inputs(result: Mapping[str, Any]) -> str:
    """Every number that the page starts from, and what kind it is."""
    k = known(result)
    measured, hoped = k.speeds
    counted, assumed = "counted", "assumed"
    several = e.negatives_flops(e.CROSS_LAYERS, e.IMAGE_TOKENS, e.IMAGE_WIDTH, e.WIDTH)
    rows = [
        ("FLOPs of a pair in stage 1, one process, without ITC", _giga(k.pair_flops), counted),
        (
            "more with several processes: keys and values of the pair's negative image",
            _giga(several),
            "2 · 2 · S · E · 6 layers · 2 C; counted so on small models",
        ),
        ("ITC against N pairs", f"{e.contrast_flops(1):,} N", "3 · 2 · Q · D · N"),
        ("ViT-g, forward, an image of 224 pixels", _giga(k.encoder_flops), counted),
        ("Q-Former of stage 2, forward and backward", _giga(k.qformer_flops), counted),
    ]
    for name, flops in k.language_flops.items():
        again = ", forward again" if k.recomputed[name] else ""
        what = f"language model of {name}, 32 prompts and 32 tokens, forward and backward{again}"
        rows.append((what, _giga(flops), counted))
    rows += [
        (
            "least time of a stage-1 step: the host queues it",
            _time(k.host_s),
            "measured: 64 pairs, dropout, H200; with other GPUs assumed",
        ),
        (
            "share of the rate while a GPU computes in stage 1",
            f"{_percent(k.of_floor)} of the floor / (1 - {k.gaps:.2f} in gaps) = "
            f"{_percent(measured.share)}",
            "measured: 256 pairs, dropout, H200; of other GPUs assumed",
        ),
        ("share hoped for, without gaps, in every model", _percent(hoped.share), assumed),
    ]
    for gpu in e.GPUS:
        rate = f"{gpu.flops_per_s / TERA:.0f} TFLOP/s"
        rows.append((f"a large product in bf16, {gpu.name}", rate, gpu.source))
    rows += [
        (
            "a name in the index of a feature cache",
            f"{k.name_bytes:.0f} bytes in the process that opens it, {k.copied_bytes:.0f} copied "
            "by a forked worker",
            f"measured; the worker looked up {_percent(LOOKED_UP)} of the names",
        ),
        (
            "a record of a table",
            f"{k.row_bytes:.0f} bytes on disk, mapped",
            "measured ([data](data.md#tables))",
        ),
        (
            "JPEG files of 640 x 480 that a worker decodes",
            f"{k.pictures_per_s:.0f} a second",
            "measured: AMD EPYC",
        ),
        (
            "a machine",
            f"{e.GPUS_A_MACHINE} GPUs, {e.HOST_BYTES / TERA:.0f} TB of memory, "
            f"{e.DISK_BYTES / TERA:.0f} TB of own disk, {e.WORKERS} workers a GPU",
            assumed,
        ),
        ("a shared file system", f"{e.FILE_SYSTEM_BYTES_PER_S / GIGA:.0f} GB/s", assumed),
    ]
    return _table(("number", "value", "where from"), rows, left=3)


def _giga(flops: float) -> str:
    return f"{flops / GIGA:,.1f} GF"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _times(share: float) -> str:
    return _percent(share) if share < 2 else f"{share:.1f} times"


def _time(value: float) -> str:
    return f"{1e3 * value:,.0f} ms" if value < 1 else f"{value:,.2f} s"


def _hours(value: float) -> str:
    if value < 2:
        return f"{60 * value:.0f} min"
    return f"{value:,.1f} h" if value < 48 else f"{value:,.0f} h"


def glance(result: Mapping[str, Any]) -> str:
    """The answers alone, for three clusters."""
    k, b = known(result), e.STAGE1.a_process
    a100, h200, largest = e.GPUS[0], e.GPUS[-1], e.STAGE2[-1]
    hoped = k.speeds[1]
    columns: list[list[str]] = []
    for gpu, P in ((a100, 16), (h200, 16), (h200, 512)):
        steps = [speed.step_s(b * k.pair(P), gpu) for speed in k.speeds]
        encoder = hoped.step_s(b * k.encoder_flops, gpu)
        sample = k.sample(largest.name) + k.encoder_flops
        stage2 = hoped.step_s(largest.a_process * sample, gpu)
        handed = e.handed_bytes(P, b, k.parameters[e.STAGE1.name], 1)
        left = sum(e.leaving_a_machine(name, x, P) for name, x in handed.items())
        waited = _time(e.network_s(handed, P, e.NETWORKS["400 Gb/s"]))
        number = e.STAGE1.steps_on(P)
        reads = [e.read_bytes_per_s(P * b / step) / GIGA for step in steps]
        columns.append(
            [
                " / ".join(_hours(e.hours(number, step)) for step in steps),
                " / ".join(_hours(e.hours(number, step + encoder)) for step in steps),
                _hours(e.hours(largest.steps_on(P), stage2)),
                " / ".join(f"{k.plans[f'{r.name}, {P}, 1']:.1f}" for r in (e.STAGE1, largest)),
                f"{left / GIGA:.2f} GB: {waited}",
                " / ".join(f"{x:,.0f} GB/s" for x in reads),
            ]
        )
    names = (
        f"stage 1, cached features: {HOW[0]} / {HOW[1]}",
        f"stage 1, ViT-g in the loop: {HOW[0]} / {HOW[1]}",
        f"stage 2, FlanT5-XXL, ViT-g in the loop: {HOW[1]}",
        "GiB of a GPU, stage 1 / stage 2 of FlanT5-XXL, ZeRO-1",
        "stage-1 step: leaves a machine of 8 GPUs; at 400 Gb/s",
        f"the cache's {e.BF16.terabytes():.0f} TB (bf16) are read at: {HOW[0]} / {HOW[1]}",
    )
    rows = [list(row) for row in zip(names, *columns, strict=True)]
    return _table(("", f"16 {a100.name}", f"16 {h200.name}", f"512 {h200.name}"), rows)


# hours


def _by_rate() -> list[tuple[str, e.Gpu]]:
    """The GPUs, those of one rate together."""
    found: dict[float, list[e.Gpu]] = {}
    for gpu in e.GPUS:
        found.setdefault(gpu.flops_per_s, []).append(gpu)
    return [(", ".join(gpu.name for gpu in gpus), gpus[0]) for gpus in found.values()]


def stage1_hours(result: Mapping[str, Any]) -> str:
    """The arithmetic of one case, then all of them."""
    k = known(result)
    measured, hoped = k.speeds
    b, a100 = e.STAGE1.a_process, e.GPUS[0]
    on16, with_encoder = k.pair(16), k.pair(16) + k.encoder_flops
    step = hoped.step_s(b * on16, a100)
    several = e.negatives_flops(e.CROSS_LAYERS, e.IMAGE_TOKENS, e.IMAGE_WIDTH, e.WIDTH)
    told = [
        f"* A pair on 16 GPUs: {_giga(k.pair_flops)} + {_giga(several)} + "
        f"{e.contrast_flops(1):,} · {e.STAGE1.batch:,} = {_giga(on16)}; with ViT-g in the loop "
        f"+ {_giga(k.encoder_flops)} = {_giga(with_encoder)}.",
        f"* A step on an A100, hoped for: {b} · {_giga(on16)} / ({hoped.share} · "
        f"{a100.flops_per_s / TERA:.0f} TFLOP/s) = {_time(step)}; {e.STAGE1.steps:,} steps: "
        f"{_hours(e.hours(e.STAGE1.steps, step))}.",
        f"* As measured: never less than {_time(k.host_s)}, which the host needs; else at "
        f"{_percent(measured.share)} of the rate.",
        f"* {e.STAGE1.steps:,} · {e.STAGE1.batch:,} = {e.STAGE1.samples / MEGA:,.0f} million "
        f"pairs, {e.STAGE1.samples / e.PAIRS:.1f} times {e.PAIRS / MEGA:.0f} million. On 512 GPUs "
        f"with {b} pairs each N = {512 * b:,}, and {e.STAGE1.steps_on(512):,.0f} steps have as "
        "many.",
    ]
    rows = []
    for names, gpu in _by_rate():
        for processes in GPUS:
            steps = e.STAGE1.steps_on(processes)
            cells = [names, str(processes), f"{steps:,.0f}"]
            for flops in (b * k.pair(processes), b * k.encoder_flops):
                encoder = flops == b * k.encoder_flops
                for speed in k.speeds:
                    s = speed.step_s(b * k.pair(processes), gpu)
                    if encoder:
                        s += hoped.step_s(flops, gpu)
                    cells.append(f"{_time(s)}: {_hours(e.hours(steps, s))}")
            rows.append(cells)
    ways = [f"{mode}, {how}" for mode in ("cached", "ViT-g in the loop") for how in HOW]
    header = ("GPU", "GPUs", "steps", *ways)
    least = e.hours(e.STAGE1.steps, k.host_s)
    kept = (
        f"With the paper's N = {e.STAGE1.batch:,} instead, 512 GPUs have "
        f"{e.STAGE1.batch / 512:.1f} pairs each: as measured a step takes {_time(k.host_s)} all "
        f"the same, and the training {_hours(least)}, however many GPUs there are."
    )
    return "\n".join([*told, "", _table(header, rows), "", kept])


def stage2_hours(result: Mapping[str, Any]) -> str:
    """Stage 2, for which there is no measurement on a GPU."""
    k = known(result)
    rows = []
    for recipe in e.STAGE2:
        sample = k.sample(recipe.name)
        for names, gpu in _by_rate():
            for processes in GPUS:
                steps = recipe.steps_on(processes)
                cached = e.Speed(e.HOPED_SHARE).step_s(recipe.a_process * sample, gpu)
                more = e.Speed(e.HOPED_SHARE).step_s(recipe.a_process * k.encoder_flops, gpu)
                cells = [recipe.name, names, str(processes), f"{steps:,.0f}", _giga(sample)]
                both = (cached, cached + more)
                cells += [f"{_time(s)}: {_hours(e.hours(steps, s))}" for s in both]
                rows.append(cells)
    ways = [f"{mode}, {HOW[1]}" for mode in ("cached", "ViT-g in the loop")]
    header = ("recipe", "GPU", "GPUs", "steps", "a sample", *ways)
    return _table(header, rows, left=2)


def paper(result: Mapping[str, Any]) -> str:
    """What the paper's days say, beside this arithmetic, on 16 A100."""
    k, gpu, rows = known(result), e.GPUS[0], []
    for recipe in _RECIPES.values():
        if recipe.days is None:
            continue
        stage1 = recipe is e.STAGE1
        flops = (k.pair(16) if stage1 else k.sample(recipe.name)) + k.encoder_flops
        rate = e.samples_per_s(recipe, recipe.days) / 16
        step = e.Speed(e.HOPED_SHARE).step_s(recipe.a_process * flops, gpu)
        rows.append(
            (
                recipe.name,
                f"under {recipe.days:.0f} days",
                f"over {rate:.1f}",
                f"{_giga(flops)} · {rate:.1f} = {rate * flops / TERA:.0f} TFLOP/s",
                _percent(rate * flops / gpu.sheet_flops_per_s),
                f"{e.hours(recipe.steps, step) / 24:.1f} days",
            )
        )
    header = ("recipe", "the paper", "samples/s of a GPU", "in our FLOPs", "of the data sheet")
    header = (*header, "hoped for here")
    return _table(header, rows)


# memory, network


def memory(result: Mapping[str, Any]) -> str:
    """GiB of each device by ZeRO stage and processes, with the image encoder in the loop."""
    k, rows, stages = known(result), [], range(3)
    for recipe in _RECIPES:
        sums = {P: [k.plans[f"{recipe}, {P}, {stage}"] for stage in stages] for P in GPUS}
        most = max(max(each) for each in sums.values()) * 2**30
        fits = [gpu.name for gpu in e.GPUS if most <= 0.9 * gpu.memory_gb * GIGA]
        cells = [" / ".join(f"{x:.2f}" for x in each) for each in sums.values()]
        rows.append([recipe, *cells, ", ".join(fits) or "none"])
    header = ("GiB of a GPU by ZeRO-0 / 1 / 2", *(f"{P} processes" for P in GPUS), "fits all")
    return _table(header, rows)


def network(result: Mapping[str, Any]) -> str:
    """Bytes of a stage-1 step, and how long networks take for them beside a step."""
    k = known(result)
    b, parameters = e.STAGE1.a_process, k.parameters[e.STAGE1.name]
    handed = {P: e.handed_bytes(P, b, parameters, 1) for P in GPUS}
    rows = [
        [
            name,
            collective,
            *(f"{handed[P][name] / MEGA:,.2f}" for P in GPUS),
            *(f"{e.leaving_a_process(name, handed[P][name], P) / MEGA:,.1f}" for P in GPUS),
            *(f"{e.leaving_a_machine(name, handed[P][name], P) / MEGA:,.1f}" for P in GPUS),
        ]
        for name, collective in e.COLLECTIVES.items()
    ]
    header = ["MB a step, ZeRO-1", "", *(f"handed, {P} GPUs" for P in GPUS)]
    header += [f"leaves a GPU, {P}" for P in GPUS] + [f"leaves a machine, {P}" for P in GPUS]
    first = _table(header, rows, left=2)
    h200 = e.GPUS[-1]
    rows = []
    for name, rate in e.NETWORKS.items():
        cells = [name]
        for P in GPUS:
            s = e.network_s(handed[P], P, rate)
            cells.append(_time(s))
            steps = [speed.step_s(b * k.pair(P), h200) for speed in k.speeds]
            cells += [_times(s / step) for step in steps]
        rows.append(cells)
    inside = [
        sum(e.leaving_a_process(n, x, P) for n, x in handed[P].items()) / h200.nvlink_bytes_per_s
        for P in GPUS
    ]
    header = ["of a machine"]
    for P in GPUS:
        header += [f"{P} GPUs", "of a step as measured", "hoped for"]
    nvlink = ", ".join(f"{1e3 * s:.1f} ms on {P}" for s, P in zip(inside, GPUS, strict=True))
    texts = 3 * 4 * e.FEATURE_WIDTH
    gradients = 3 * 2 * parameters
    told = (
        "Steps are those of an H200 with cached features. NVLink (450 GB/s one way, data sheet) "
        f"takes {nvlink} for what leaves a GPU. ITC's texts and their gradients, {texts:,} N bytes "
        f"that leave a GPU, are as many as gradients and weights, {gradients / GIGA:.2f} GB, at N "
        f"= {gradients / texts:,.0f}: {gradients / texts / b:,.0f} GPUs."
    )
    return "\n".join([first, "", _table(header, rows), "", told])


# storage


def storage(result: Mapping[str, Any]) -> str:
    """What the frozen tokens take on disk, and how fast they must be read, or computed anew."""
    k, h200, b = known(result), e.GPUS[-1], e.STAGE1.a_process
    rates = _rates(k)
    rows = []
    for stored in e.STORED:
        cells = [stored.name, f"{stored.image_bytes:,}", f"{stored.terabytes(10**6):.3f}"]
        cells.append(f"{stored.terabytes():.1f}")
        cells += [f"{e.read_bytes_per_s(rate, stored) / GIGA:.2f}" for rate in rates]
        cells += [
            f"{e.read_bytes_per_s(count * rates[0], stored) / GIGA:,.1f}"
            for count in (e.GPUS_A_MACHINE, *GPUS)
        ]
        rows.append([*cells, "yes" if stored.supported else "no"])
    header = ["tokens of an image", "bytes", "TB, a million", "TB, 129 million"]
    header += [f"GB/s a GPU, {how}" for how in HOW]
    header += [f"GB/s {count} GPUs, {HOW[0]}" for count in (e.GPUS_A_MACHINE, *GPUS)]
    header.append("`blip2fast features`")
    encoded = e.encoded_per_s(k.encoder_flops, h200)
    build = e.PAIRS / encoded / 3600
    bf16 = e.BF16
    told = [
        f"* {e.IMAGE_TOKENS} · {e.IMAGE_WIDTH} · 2 bytes = {bf16.image_bytes:,} bytes; times "
        f"{e.PAIRS / MEGA:.0f} million: {bf16.terabytes():.1f} TB.",
        f"* An H200 steps through {b} / {_time(b / rates[0])} = {rates[0]:,.0f} images a second as "
        f"measured, {rates[1]:,.0f} hoped for.",
        f"* Recomputed: {e.HOPED_SHARE} · {h200.flops_per_s / TERA:.0f} TFLOP/s / "
        f"{_giga(k.encoder_flops)} = {encoded:,.0f} images a second of an H200 that does nothing "
        f"else. To read as many takes {encoded * bf16.image_bytes / GIGA:.2f} GB/s in bf16: a disk "
        "or network that gives a GPU less is slower than its own ViT-g.",
        f"* The cache once: {e.PAIRS / MEGA:.0f} million / {encoded:,.0f} = {build:,.0f} GPU hours "
        f"on H200s, and {bf16.terabytes() / build / 3.6e-3:,.0f} MB/s written by each. `blip2fast "
        "features` is one process that writes one cache: it takes all of these hours.",
        f"* In the loop instead, {e.STAGE1.samples / MEGA:,.0f} million images: "
        f"{e.STAGE1.samples / encoded / 3600:,.0f} GPU hours.",
    ]
    return "\n".join([_table(header, rows), "", *told])


def limits(result: Mapping[str, Any]) -> str:
    """What breaks, from where on, and what there is against it."""
    k = known(result)
    rows = [*_few_gpus(k), *_many_images(k), *_many_gpus(k), *_not_reached(k)]
    return _table(("what", "from where on", "arithmetic", "then"), rows, left=4)


def _rates(k: Known) -> list[float]:
    """Images a second of an H200 with cached features, as measured and hoped for."""
    b = e.STAGE1.a_process
    return [b / speed.step_s(b * k.pair(16), e.GPUS[-1]) for speed in k.speeds]


def _few_gpus(k: Known) -> list[tuple[str, ...]]:
    b, h200, bf16 = e.STAGE1.a_process, e.GPUS[-1], e.BF16.image_bytes
    rates, slow = _rates(k), e.NETWORKS["10 Gb/s"]
    fed = [e.FILE_SYSTEM_BYTES_PER_S / e.read_bytes_per_s(rate) for rate in rates]
    handed = e.handed_bytes(16, b, k.parameters[e.STAGE1.name], 1)
    step = k.speeds[0].step_s(b * k.pair(16), h200)
    return [
        (
            "the launcher",
            f"more than {e.GPUS_A_MACHINE} GPUs",
            "",
            "DeepSpeed's hostfile, `torchrun` or Slurm ([several machines](several_machines.md)), "
            "tried with CPU processes on one machine",
        ),
        (
            "a network of 10 Gb/s",
            "2 machines",
            f"{_time(e.network_s(handed, 16, slow))} beside a step of {_time(step)}",
            "200 Gb/s or more",
        ),
        (
            "one shared file system with the cache",
            f"{fed[0]:.1f} GPUs as measured, {fed[1]:.1f} hoped for",
            f"{e.FILE_SYSTEM_BYTES_PER_S / GIGA:.0f} GB/s / ({rates[0]:,.0f} or {rates[1]:,.0f} "
            f"images/s · {bf16:,} bytes)",
            "the machines' own disks, or a parallel file system; int8; ViT-g in the loop",
        ),
        (
            "the host, at constant N",
            "16 GPUs",
            f"{_time(k.host_s)} a step, however few pairs a GPU has",
            "more pairs a GPU; fewer launches: no training step is captured today",
        ),
        (
            "the batch, at constant pairs a GPU",
            "more than 16 GPUs",
            f"512 · {b} = {512 * b:,} pairs, {512 // 16} times the paper's",
            "nobody has shown what it trains to",
        ),
    ]


def _many_images(k: Known) -> list[tuple[str, ...]]:
    gpus, workers = e.GPUS_A_MACHINE, e.GPUS_A_MACHINE * e.WORKERS
    forked = e.index_bytes(k.name_bytes, k.copied_bytes)
    spawned = e.index_bytes(k.name_bytes, k.name_bytes)
    fp32, bf16, int8 = (stored.image_bytes for stored in e.STORED[:3])
    pairs = f"{e.PAIRS / MEGA:.0f} million"
    build = e.PAIRS / e.encoded_per_s(k.encoder_flops, e.GPUS[-1]) / 3600
    return [
        (
            "pages in memory",
            f"{e.HOST_BYTES / bf16 / MEGA:.1f} million images in bf16",
            f"{e.HOST_BYTES / TERA:.0f} TB / bytes of an image; of {pairs} "
            f"{_percent(e.HOST_BYTES / bf16 / e.PAIRS)} are there",
            "every image is read from the disk, in one piece",
        ),
        (
            "a machine's own disk",
            f"{e.DISK_BYTES / bf16 / MEGA:.0f} million images in bf16, "
            f"{e.DISK_BYTES / int8 / MEGA:.0f} in int8",
            f"{e.DISK_BYTES / TERA:.0f} TB / bytes of an image",
            "a cache in parts, one for each machine, and steps that draw from it: **there is "
            "none**, every process opens the whole cache",
        ),
        (
            "names of a feature cache",
            f"{e.images_by_index(forked) / MEGA:.0f} million images, "
            f"{e.images_by_index(spawned) / MEGA:.0f} where workers are spawned",
            f"0.9 · {e.HOST_BYTES / TERA:.0f} TB / ({gpus} · {k.name_bytes:.0f} + {workers} · "
            f"{k.copied_bytes:.0f} bytes), or {gpus + workers} · {k.name_bytes:.0f}; at {pairs} "
            f"{e.PAIRS * k.name_bytes / GIGA:.0f} GB a process, "
            f"{e.PAIRS * forked / GIGA:.0f} GB a machine",
            "an index that processes share, as they do tables of records: **there is none**; "
            "fewer workers; ViT-g in the loop needs no index",
        ),
        (
            "addresses of a process",
            f"{e.ADDRESS_BYTES / fp32 / MEGA:.0f} million images in fp32, "
            f"{e.ADDRESS_BYTES / bf16 / MEGA:.0f} in bf16",
            "2^47 bytes / bytes of an image: a cache is mapped whole",
            "bf16, int8",
        ),
        (
            "writing the cache",
            pairs,
            f"{build:,.0f} h of an H200 in one process, "
            f"{e.BF16.terabytes():.1f} TB on one file system",
            "parts that are joined: **there are none**",
        ),
        (
            "mapped files of a process",
            f"{e.MAPS * e.FILE_BYTES / bf16 / MEGA:.0f} million images in bf16",
            f"{e.MAPS:,}, Linux's default, · 4 GiB / bytes of an image",
            "larger files: `--file-gb` of `blip2fast features`",
        ),
        (
            "object storage",
            "any size",
            "",
            "**not read**: images, webdataset shards and features are files below a folder",
        ),
    ]


def _many_gpus(k: Known) -> list[tuple[str, ...]]:
    b = e.STAGE1.a_process
    tenth, half = (e.pairs_at_share(k.pair_flops, share) for share in (0.1, 0.5))
    return [
        (
            "ITC over N pairs",
            f"a tenth of the FLOPs at N = {tenth:,.0f}, half at {half:,.0f}",
            f"{e.contrast_flops(1):,} N beside {_giga(e.pair_flops(k.pair_flops, 2, 0))}; "
            f"5 · {b} · N bytes kept: {5 * b * 512 * b / MEGA:.0f} MB on 512 GPUs",
            "nothing needed on 512 GPUs",
        ),
        ("processes that meet", "not known", "", "tried with 4 at most"),
    ]


def _not_reached(k: Known) -> list[tuple[str, ...]]:
    parameters = k.parameters[e.STAGE1.name]
    encoder_s = k.encoder_flops / (e.HOPED_SHARE * e.GPUS[-1].flops_per_s)
    in_loop = 1 / (1 / _rates(k)[1] + encoder_s)
    return [
        (
            "records",
            "not reached",
            f"{e.PAIRS / MEGA:.0f} million · {k.row_bytes:.0f} bytes = "
            f"{e.PAIRS * k.row_bytes / GIGA:.0f} GB, mapped once a machine; "
            f"{k.rows / MEGA:.0f} million started in {k.start_s:.1f} s",
            "",
        ),
        (
            "decoding, with ViT-g in the loop",
            "not reached",
            f"{in_loop:,.0f} images/s hoped for / {k.pictures_per_s:.0f} of a worker = "
            f"{in_loop / k.pictures_per_s:.1f} workers a GPU",
            "",
        ),
        (
            "checkpoints",
            "not reached",
            f"weights and AdamW's states, 14 bytes · {parameters:,} = "
            f"{14 * parameters / GIGA:.1f} GB, every process its part, every 5,000 steps",
            "",
        ),
    ]
