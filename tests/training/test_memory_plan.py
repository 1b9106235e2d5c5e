"""The memory plan against formulas, published sizes and what real models take; how auto chooses."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import plans
import torch
import yaml
from small_run import config, values, write_world
from stage2_models import opt_config, t5_config
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
    T5Config,
)

from blip2fast import command_line
from blip2fast.offload import stream_blocks
from blip2fast.stage1.config import Stage1Config
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config
from blip2fast.training import measuring
from blip2fast.training.build import build_run
from blip2fast.training.config import RunConfig
from blip2fast.training.config_files import parse_config
from blip2fast.training.measuring import (
    kept_tensors,
    measure_image_encoder,
    measure_language_model,
    measure_stage1,
    measure_trained,
)
from blip2fast.training.memory_plan import GIB, Memory, plan_memory
from blip2fast.training.placement import choose_placement, placed
from blip2fast.training.preflight import check_machine

# what the recipes name on the hub, in the published sizes
PUBLISHED: dict[str, Any] = plans.published()
OPT = {"num_attention_heads": 32, "num_hidden_layers": 32}
OPT67 = PUBLISHED["facebook/opt-6.7b"]
FLAN_XL = PUBLISHED["google/flan-t5-xl"]


def opt_parameters(c: OPTConfig) -> tuple[int, int]:
    """All, and of one block: attention, feed-forward, two norms."""
    C, F = c.hidden_size, c.ffn_dim
    block = 4 * (C * C + C) + (C * F + F) + (F * C + C) + 4 * C
    tables = c.vocab_size + c.max_position_embeddings + 2
    return tables * C + c.num_hidden_layers * block + 2 * C, block


def t5_parameters(c: T5Config) -> tuple[int, int]:
    """All, and of one decoder block (but the first, which has the positions)."""
    C, inner, F = c.d_model, c.num_heads * c.d_kv, c.d_ff
    attention, feed_forward = 4 * C * inner + C, 3 * C * F + C
    positions = 2 * c.relative_attention_num_buckets * c.num_heads
    decoder = 2 * attention + feed_forward
    blocks = c.num_layers * (attention + feed_forward) + c.num_decoder_layers * decoder
    return 2 * c.vocab_size * C + blocks + positions + 2 * C, decoder


@pytest.mark.parametrize(
    ("language", "formula", "published"),
    [
        (PUBLISHED["facebook/opt-2.7b"], opt_parameters, 2_651_596_800),
        (OPT67, opt_parameters, 6_658_473_984),
        (FLAN_XL, t5_parameters, 2_849_757_184),
    ],
    ids=["opt-2.7b", "opt-6.7b", "flan-t5-xl"],
)
def test_parameters_of_the_papers_language_models(
    language: Any, formula: Any, published: int
) -> None:
    """Counted on the model classes, by formula, and as the published checkpoints have them."""
    sizes = measure_language_model(language, torch.bfloat16, batch=4, prompts=32, text=32)
    total, block = formula(language)
    assert sizes.parameters == total == published
    assert sizes.weights == 2 * published
    largest = 2 * block
    if formula is t5_parameters:  # the first block has the relative positions too
        largest += 2 * language.relative_attention_num_buckets * language.num_heads
    # each tensor begins at a multiple of 256 bytes
    assert largest <= sizes.streams["as_is"].buffer <= largest + 256 * 32
    assert sizes.streams["as_is"].host + sizes.rest == pytest.approx(sizes.weights, rel=1e-4)
    assert sizes.streams["int8"].host == pytest.approx(sizes.streams["as_is"].host / 2, rel=0.01)
    assert sizes.streams["int4"].host == pytest.approx(
        sizes.streams["as_is"].host / 4 * (1 + 4 / 32), rel=0.01
    )
    assert sizes.kept > 8 * sizes.block_inputs


@contextmanager
def counted() -> Iterator[list[Any]]:
    """What autograd keeps of real computations, and still keeps when the context is left."""

    class Packed:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()

    packed: weakref.WeakSet[Packed] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Packed:
        kept = Packed(tensor)
        packed.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        storages: list[Any] = []
        yield storages
    storages += [p.tensor.untyped_storage() for p in packed]


@pytest.mark.parametrize("kind", ["opt", "t5", "llama"])
def test_what_is_kept_is_what_real_models_keep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # ZeRO-3 may have left its own in this process
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    language = {
        "opt": opt_config(num_hidden_layers=4),
        "t5": t5_config(num_layers=3),
        "llama": LlamaConfig(
            vocab_size=41,
            hidden_size=20,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
        ),
    }[kind]
    sizes = measure_language_model(language, torch.float32, batch=3, prompts=4, text=6)
    encoder_decoder = language.is_encoder_decoder
    auto = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = auto.from_config(language).eval().requires_grad_(False)
    weights = sum(p.nbytes for p in model.parameters())
    assert sizes.weights == weights
    given: dict[str, Any] = {"inputs_embeds": torch.randn(3, 10, 20, requires_grad=True)}
    # with padding: without any, transformers spares some models the mask
    given["attention_mask"] = (torch.arange(10) < torch.tensor([[10], [7], [2]])).long()
    if encoder_decoder:
        given["decoder_input_ids"] = torch.zeros(3, 6, dtype=torch.long)
    base = model if encoder_decoder else model.base_model
    resident = kept_bytes(model, lambda: base(**given, use_cache=False))
    stream = stream_blocks(model, "cpu")
    streamed = kept_bytes(model, lambda: base(**given, use_cache=False))
    assert resident == pytest.approx(sizes.kept, rel=0.01)
    assert streamed == pytest.approx(sizes.block_inputs + sizes.kept_outside, rel=0.01)
    assert stream.host_bytes == sizes.streams["as_is"].host
    assert stream.device_bytes == 2 * sizes.streams["as_is"].buffer
    assert sum(p.nbytes for p in model.parameters()) == sizes.rest


def kept_bytes(model: nn.Module, compute: Callable[[], Any]) -> int:
    """Storages that are not weights, each once."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with counted() as storages:
        out = compute()
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in own}
    del out
    return sum(sizes.values())


def test_the_trained_part_is_the_papers() -> None:
    """107 and 108 million parameters (paper, table 2, less the frozen models)."""
    for width, expected in ((2560, 107_133_696), (4096, 108_314_880), (2048, 106_739_968)):
        sizes = measure_trained(Stage2Config(), width, torch.bfloat16, 2, 257)
        assert sizes.parameters == expected
        twice = measure_trained(Stage2Config(), width, torch.bfloat16, 4, 257)
        assert twice.kept == pytest.approx(2 * sizes.kept, rel=0.01)


def test_the_image_encoders_parameters() -> None:
    vit_l = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        patch_size=14,
    )
    C = 1024
    block = 4 * (C * C + C) + 2 * 4 * C * C + 5 * C + 4 * C
    embeddings = C + 3 * 14 * 14 * C + 257 * C
    assert measure_image_encoder(vit_l) == (embeddings + 24 * block + 4 * C, C)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


LARGE = Memory(80 * GIB, 500 * GIB, device_is_host=False)


def large_run(world: Path, tmp_path: Path, **changes: Any) -> RunConfig:
    """A run of OPT-6.7B, of which there is nothing but its configuration."""
    OPT67.save_pretrained(tmp_path / "opt-6.7b")
    section = {"path": str(tmp_path / "opt-6.7b")}
    model = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    model |= {"intermediate_size": 3072, "num_query_tokens": 32}
    data = {"max_txt_len": 32}
    optim = {"batch_size": 64}
    all_changes = {"precision": "bf16", "data": data, "optim": optim, **changes}
    return config(world, tmp_path / "out", 2, model=model, language_model=section, **all_changes)


def test_the_plan_of_a_large_run(world: Path, tmp_path: Path) -> None:
    plan = plan_memory(large_run(world, tmp_path), memory=LARGE)
    options = {option.name: option for option in plan.options}
    assert list(options) == [
        "none",
        "none, gradient_checkpointing",
        "stream",
        "stream, gradient_checkpointing",
        "zero3",
        "zero3, gradient_checkpointing",
        "stream, int8",
        "stream, int4",
    ]
    weights = 2 * 6_658_473_984
    resident, stream, zero3 = (options[name] for name in ("none", "stream", "zero3"))
    assert resident.device["language model"] == weights
    rest = 2 * (50272 + 2050 + 2) * 4096
    block = 2 * (12 * 4096**2 + 9 * 4096 + 4 * 4096)
    assert stream.device["language model"] == pytest.approx(rest + 2 * block, rel=0.001)
    assert stream.host["language model"] == pytest.approx(weights - rest, rel=0.001)
    assert zero3.device["language model"] == 2 * 1_000_000_000
    assert zero3.host["language model"] == weights
    # bf16 AdamW without ZeRO: weights, gradients and their fp32 sums; moments and fp32 weights
    trained = measure_trained(Stage2Config(encoder_hidden_size=12), 4096, torch.bfloat16, 64, 5)
    assert stream.device["trained"] == 8 * trained.parameters
    assert stream.device["optimiser"] == 12 * trained.parameters
    assert stream.device["logits"] == 64 * 32 * 50272 * (2 + 2 + 4 + 4)
    assert stream.device["activations"] == resident.device["activations"]
    again = options["stream, gradient_checkpointing"]
    assert again.device["activations"] < resident.device["activations"] / 4


def test_processes_share_the_optimiser_and_the_host(world: Path, tmp_path: Path) -> None:
    run = large_run(world, tmp_path, zero_stage=2)
    one, eight = (plan_memory(run, processes=n, memory=LARGE) for n in (1, 8))
    for first, second in zip(one.options, eight.options, strict=True):
        assert second.device["optimiser"] == first.device["optimiser"] // 8
        share = 8 if first.offload == "zero3" else 1
        of_model = [next(v for k, v in o.host.items() if "language" in k) for o in (first, second)]
        assert of_model[1] == of_model[0] // share
    # eight copies of 12 GiB do not fit 80 GiB of host memory, on two machines they do
    host = replace(LARGE, host=80 * GIB)
    stream = {n: plan_memory(run, 8, n, host).options[2] for n in (1, 2)}
    assert [plan_memory(run, 8, n, host).fits(stream[n]) for n in (1, 2)] == [False, True]


@pytest.mark.parametrize(
    ("device_gib", "host_gib", "chosen"),
    [
        (80, 500, ("none", False)),
        (24, 500, ("none", True)),
        (17, 500, ("stream", False)),
        (7, 500, ("stream", True)),
        (80, 1, None),
        (1, 500, None),
    ],
)
def test_auto_takes_the_first_that_fits(
    world: Path, tmp_path: Path, device_gib: int, host_gib: int, chosen: tuple[str, bool] | None
) -> None:
    memory = Memory(device_gib * GIB, host_gib * GIB, device_is_host=False)
    run = large_run(world, tmp_path, offload="auto")
    if chosen is None:
        with pytest.raises(ValueError, match=r"(?s)nothing fits this machine.*Lower optim.batch_s"):
            choose_placement(run, memory=memory)
        return
    said: list[str] = []
    settled = choose_placement(run, say=said.append, memory=memory)
    assert (settled.offload, settled.gradient_checkpointing) == chosen
    assert settled == replace(run, offload=chosen[0], gradient_checkpointing=chosen[1])
    assert "offload: auto chose 'none" in said[0] or "offload: auto chose 'stream" in said[0]


def test_a_plan_does_not_depend_on_what_zero_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = large_run(world, tmp_path)
    plan = plan_memory(run, memory=LARGE)

    def as_zero_leaves_it(x: Any, weight: Any, bias: Any = None) -> Any:
        product = x.matmul(weight.t())
        return product if bias is None else product.add_(bias)

    monkeypatch.setattr(torch.nn.functional, "linear", as_zero_leaves_it)
    assert plan_memory(run, memory=LARGE) == plan
    assert torch.nn.functional.linear is as_zero_leaves_it


def test_auto_spreads_where_every_process_would_need_a_copy(world: Path, tmp_path: Path) -> None:
    """Eight processes, 40 GiB of host memory: a copy each does not fit, an eighth each does."""
    run = large_run(world, tmp_path, offload="auto", optim={"batch_size": 16})
    settled = choose_placement(run, 8, memory=Memory(10 * GIB, 40 * GIB, device_is_host=False))
    assert (settled.offload, settled.zero_stage, settled.offload_param) == ("zero3", 3, "cpu")
    check_machine(replace(settled, language_model=config(world, tmp_path, 2).language_model), 2)


def test_fewer_bits_are_chosen_only_where_asked_for(world: Path, tmp_path: Path) -> None:
    small = Memory(12 * GIB, 8 * GIB, device_is_host=False)
    with pytest.raises(ValueError, match="nothing fits"):
        choose_placement(large_run(world, tmp_path, offload="auto"), memory=small)
    run = large_run(world, tmp_path, offload="auto", stream_storage="int8")
    settled = choose_placement(run, memory=small)
    assert (settled.offload, settled.stream_storage) == ("stream", "int8")
    assert settled.gradient_checkpointing


def test_settings_that_contradict_are_refused(world: Path, tmp_path: Path) -> None:
    def refused(match: str, stage: int = 2, **changes: Any) -> None:
        with pytest.raises(ValueError, match=match):
            parse_config(values(world, tmp_path, stage, **changes))

    refused("offload 'stream' is for stage 2's language model, but stage is 1", 1, offload="stream")
    refused("offload 'stream' needs zero_stage 0, 1 or 2, not 3", offload="stream", zero_stage=3)
    refused("offload 'auto' needs zero_stage 0, 1 or 2", offload="auto", zero_stage=3)
    refused(
        "'stream' decides where the language model is: remove offload_param 'cpu'",
        offload="stream",
        offload_param="cpu",
    )
    refused("'zero3' stands for zero_stage 3, but zero_stage is 1", offload="zero3", zero_stage=1)
    refused("stream_storage 'int8' belongs to offload: stream, not 'none'", stream_storage="int8")
    refused("stream_buffers 3 belongs to offload: stream", offload="zero3", stream_buffers=3)
    refused("stream_buffers: .*greater than or equal to 2", offload="stream", stream_buffers=1)
    refused("offload: .*'none', 'stream', 'zero3' or 'auto', got 'disk'", offload="disk")
    run = parse_config(values(world, tmp_path, 2, offload="zero3"))
    assert placed(run, "zero3").zero_stage == 3
    nvme = parse_config(values(world, tmp_path, 2, offload="zero3", offload_param="nvme"))
    with pytest.raises(ValueError, match="nvme_path None: not a folder"):
        check_machine(nvme)
    check_machine(replace(run, output_dir=str(tmp_path / "out"), offload_optimizer="cpu"))


def test_the_command_plans_without_weights(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    OPT67.save_pretrained(tmp_path / "opt-6.7b")
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "out", 2)))
    path = f"language_model.path={tmp_path / 'opt-6.7b'}"
    sizes = ["--device-gib", "24", "--host-gib", "64"]
    command_line.main(["plan", "--config", str(file), "--set", path, *sizes])
    said = capsys.readouterr().out
    assert "6,658,473,984 frozen parameters" in said
    assert "24.00 GiB on each device, 64.00 GiB of host memory for 1 process(es)" in said
    line = next(line for line in said.splitlines() if line.startswith("none  "))
    assert line.split()[1] == f"{4 * 6_658_473_984 / GIB:.2f}"
    assert "no" in line.split()
    assert said.splitlines()[-1] == "offload: auto would choose 'stream'"
    with pytest.raises(SystemExit, match=r"error: language_model.path '/nowhere': not found"):
        command_line.main(["plan", "--config", str(file), "--set", "language_model.path=/nowhere"])
    one = tmp_path / "one.yaml"
    one.write_text(yaml.safe_dump(values(world, tmp_path / "out", 1)))
    command_line.main(["plan", "--config", str(one), *sizes])
    said = capsys.readouterr().out
    assert said.startswith("stage 1: ")
    assert said.splitlines()[-1] == "it fits as 'stage 1'"


@pytest.mark.parametrize("losses", [("itc",), ("itc", "itm", "itg")], ids=["itc", "all"])
def test_stage1_keeps_at_most_what_is_planned(losses: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound, since padding and keys and values are counted for every pass."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    sizes = Stage1Config(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        intermediate_size=1024,
        encoder_hidden_size=264,
        num_query_tokens=16,
        vocab_size=300,
        bos_token_id=299,
        embed_dim=16,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = Blip2Stage1(sizes, losses=losses)
    ids = torch.randint(5, 298, (4, 24))
    with kept_tensors(model) as kept:
        _ = model(torch.randn(4, 100, 264), ids, torch.ones_like(ids), torch.arange(4)).loss
    planned = measure_stage1(sizes, losses, torch.float32, 4, 100, 24)
    assert kept.nbytes <= planned.kept <= 1.5 * kept.nbytes
    assert planned.parameters == sum(p.numel() for p in model.parameters())


def test_an_unreachable_hub_name_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str, **_: Any) -> None:
        raise OSError(f"{name} cannot be reached\nand more lines")

    monkeypatch.setattr(measuring.AutoConfig, "from_pretrained", refuse)
    run = config(world, tmp_path, 2, language_model={"path": "facebook/opt-2.7b"}, offload="auto")
    match = r"language_model.path 'facebook/opt-2.7b': not found: .* cannot be reached\)"
    with pytest.raises(ValueError, match=match):
        choose_placement(run)


def test_the_command_reports_what_fewer_bits_cost(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(world, tmp_path / "out", 2, offload="stream")))
    command_line.main(["storage-loss", "--config", str(file), "--batches", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["int8", "int4"]
    parts = build_run(config(world, tmp_path / "out", 2), 0, 1)
    model = parts.model.eval()
    with torch.no_grad():
        loss = sum(float(model(**parts.batches[i]).loss) for i in range(2)) / 2
    assert all(f"against {loss:.4f} with the weights as they are" in line for line in lines)


# the parameters that are counted of each
COUNTED = {
    "Salesforce/blip2-opt-2.7b": 985_952_256,
    "openai/clip-vit-large-patch14": 303_179_776,
    "facebook/opt-2.7b": 2_651_596_800,
    "facebook/opt-6.7b": 6_658_473_984,
    "google/flan-t5-xl": 2_849_757_184,
    "google/flan-t5-xxl": 11_135_332_352,
}
ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The configurations that the recipes name on the hub, and the folders of the repository."""
    local = AutoConfig.from_pretrained

    def read(name: str, **settings: Any) -> PretrainedConfig:
        return local(name, **settings) if Path(name).exists() else PUBLISHED[name]

    monkeypatch.setattr(measuring.AutoConfig, "from_pretrained", read)
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_planned(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From configuration files alone; ViTs failed in the initialisation of their weights."""
    names = yaml.safe_load(recipe.read_text())
    sizes = ["--processes", "16", "--machines", "2", "--device-gib", "80", "--host-gib", "1000"]
    settings = ["offload=auto"] if names["stage"] == 2 else []
    given = [part for setting in settings for part in ("--set", setting)]
    command_line.main(["plan", "--config", str(recipe), *given, *sizes])
    said = capsys.readouterr().out
    assert PUBLISHED.keys() == COUNTED.keys()
    for name in (name for name in COUNTED if name in recipe.read_text()):
        parameters, image = COUNTED[name], PUBLISHED[name].model_type in ("blip-2", "clip")
        kind = "of the image encoder" if image else "frozen parameters"
        assert f"{parameters:,} {kind}" in said
    verdict = "offload: auto would choose" if names["stage"] == 2 else "it fits as"
    assert verdict in said.splitlines()[-1]
    # those that train the ViT: without its last norm, which `ln_vision` replaces
    assert ("trained too" in said) == ("image_encoder" in names)


def test_what_is_trained_besides_is_counted(tmp_path: Path) -> None:
    """AdamW's states, gradients and weights of the encoder and the adapters, and activations."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, intermediate_size=64)
    vision.save_pretrained(tmp_path / "vit")
    language = OPTConfig(**{**OPT, "num_hidden_layers": 3}, hidden_size=64, word_embed_proj_dim=64)
    language.save_pretrained(tmp_path / "opt")
    data = {"records": "r", "images": "i", "image_encoder": str(tmp_path / "vit")}
    values = {"stage": 2, "output_dir": "o", "precision": "fp32", "data": data}
    values |= {"optim": {"max_steps": 9, "batch_size": 2, "warmup_steps": 1}}
    path = {"path": str(tmp_path / "opt")}
    options, adapted = (
        plan_memory(parse_config({**values, "language_model": path | lora, **more})).options
        for lora, more in (({}, {}), ({"lora": {"r": 4}}, {"image_encoder": {"train": True}}))
    )
    assert {option.offload for option in options} == {"none", "stream", "zero3"}
    assert {option.offload for option in adapted} == {"none"}
    plain, tuned = options[0], adapted[0]
    # two blocks of three, the norm before them, and 257 positions (the class token is one vector)
    E, patch = 32, 32
    block = 4 * E * E + 4 * E + 2 * E * 64 + 64 + E + 4 * E
    encoder = 2 * block + 2 * E + 3 * patch * patch * E + E + ((224 // patch) ** 2 + 1) * E
    adapters = 3 * 2 * 2 * 4 * 64  # two of r = 4 for the queries and values of three layers

    more = {purpose: count - plain.device[purpose] for purpose, count in tuned.device.items()}
    assert more["optimiser"] == more["trained"] == 8 * (encoder + adapters)
    assert tuned.device["image encoder"] == 0 < plain.device["image encoder"]
    assert more["language model"] == 0
    # at least what the two blocks' products read, of two images of 50 tokens, and q and v's
    assert more["activations"] > 4 * 2 * 50 * 2 * (4 * E + 64)
