"""Weights read tensor by tensor: the same model as transformers', and no second copy in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from stage2_models import opt_config, t5_config
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTForCausalLM,
    PreTrainedModel,
    T5ForConditionalGeneration,
)

from blip2fast.offload import loading
from blip2fast.offload import tensor_files as tensor_files_module
from blip2fast.offload.loading import load_streamed
from blip2fast.offload.tensor_files import tensor_files

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(folder: Path, kind: str) -> type[Any]:
    """A small model on disk, in several files; the auto class that reads it."""
    torch.manual_seed(0)
    model: PreTrainedModel
    if kind == "opt":
        model = OPTForCausalLM(opt_config(num_hidden_layers=3))
    elif kind == "gpt2":  # tied head, weights of [in, out]
        model = GPT2LMHeadModel(GPT2Config(vocab_size=41, n_embd=20, n_layer=2, n_head=2))
    else:
        model = T5ForConditionalGeneration(t5_config())
        if kind == "t5, own head":  # FlanT5: transformers ties the head until it sees the weights
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
            model.config.tie_word_embeddings = False
            model.all_tied_weights_keys.pop("lm_head.weight")
    model.generation_config.num_beams = 3
    model.save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return AutoModelForSeq2SeqLM if kind.startswith("t5") else AutoModelForCausalLM


def assert_same_models(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    found, expected = ours.state_dict(), theirs.state_dict()
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name
    assert ours.generation_config.to_dict() == theirs.generation_config.to_dict()
    for model in (ours, theirs):
        assert Path(model.config._name_or_path).is_dir()
        model.config._name_or_path = ""
    assert ours.config.to_dict() == theirs.config.to_dict()
    assert ours.all_tied_weights_keys == theirs.all_tied_weights_keys
    assert (ours.get_output_embeddings().weight is ours.get_input_embeddings().weight) == (
        theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["opt", "gpt2", "t5", "t5, own head"])
def test_the_model_is_that_of_transformers(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    auto = write(tmp_path, kind)
    theirs = auto.from_pretrained(tmp_path, dtype=dtype)
    state = torch.get_rng_state()
    ours, stream = load_streamed(str(tmp_path), dtype, "cpu")
    assert torch.equal(torch.get_rng_state(), state)  # what comes next starts as without streaming
    assert_same_models(ours, theirs)
    assert not any(p.requires_grad for p in ours.parameters())
    assert not any(module.training for module in ours.modules())
    stream.undo()
    assert_same_models(ours, theirs)
    ours.save_pretrained(tmp_path / "again")
    assert_same_models(auto.from_pretrained(tmp_path / "again", dtype=dtype), theirs)


def test_tensors_are_read_by_us_where_names_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names with or without the prefix of the inner model; anything else goes to transformers."""
    write(tmp_path / "model", "opt")
    called: list[str] = []
    original = loading.load_language_model

    def counted(name: str, dtype: torch.dtype) -> PreTrainedModel:
        called.append(name)
        return original(name, dtype)

    monkeypatch.setattr(loading, "load_language_model", counted)
    expected = load_streamed(str(tmp_path / "model"), torch.float32, "cpu")[0].state_dict()
    tensors = {}
    for shard in (tmp_path / "model").glob("*.safetensors"):
        tensors |= load_file(shard)
    for name, rename in (("bare", ""), ("strange", "x.")):
        folder = tmp_path / name
        folder.mkdir()
        renamed = {rename + key.removeprefix("model."): value for key, value in tensors.items()}
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text((tmp_path / "model" / "config.json").read_text())
    bare = load_streamed(str(tmp_path / "bare"), torch.float32, "cpu")[0].state_dict()
    assert all(torch.equal(bare[key], value) for key, value in expected.items())
    assert called == []
    load_streamed(str(tmp_path / "strange"), torch.float32, "cpu")
    assert called == [str(tmp_path / "strange")]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "opt")
    shard = sorted(tmp_path.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-40])
    with pytest.raises(ValueError, match=rf"{shard.name}: .* does not fit the file; download it"):
        load_streamed(str(tmp_path), torch.float32, "cpu")
    shard.write_bytes(whole[:4])
    with pytest.raises(ValueError, match=rf"{shard.name}: not a safetensors file, or damaged"):
        load_streamed(str(tmp_path), torch.float32, "cpu")
    shard.write_bytes(whole)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_dim": 26}))
    with pytest.raises(ValueError, match=r"has the shape \(24, 20\), the model's is \(26, 20\)"):
        load_streamed(str(tmp_path), torch.float32, "cpu")
    with pytest.raises(ValueError, match=r"language model '/nowhere': not found: give a local"):
        load_streamed("/nowhere", torch.float32, "cpu")


def test_reading_in_pieces_converts_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files_module, "_PIECE", 100)
    tensors = {"a": torch.randn(7, 11), "ids": torch.arange(5), "none": torch.empty(0, 3)}
    tensors["scalar"] = torch.tensor(2.5, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    for name, file in tensor_files(str(tmp_path)).items():
        for dtype in (None, torch.float32, torch.bfloat16):
            found = file.read(dtype)
            floating = tensors[name].is_floating_point()
            expected = tensors[name].to(dtype) if dtype and floating else tensors[name]
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


PEAK = """
import sys, torch
import transformers.models.opt.modeling_opt
from blip2fast.offload import loading
from blip2fast.training.engine import start_processes

def peak_bytes():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

path, dtype, how = sys.argv[1], getattr(torch, sys.argv[2]), sys.argv[3]
start_processes()
import deepspeed
zero = {"stage": 3, "offload_param": {"device": "cpu"}}
values = {"train_batch_size": 1, "zero_optimization": zero}
deepspeed.zero.Init(module=torch.nn.Linear(2, 2), config_dict_or_path=values)  # imports the rest
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak_bytes()
if how == "stream":
    model, stream = loading.load_streamed(path, dtype, "cpu")
    held = stream.host_bytes + stream.device_bytes
    blocks = stream.blocks
else:
    model = loading.load_partitioned(path, dtype, values)
    blocks = loading.find_blocks(model)
    parts = [p.ds_tensor for block in blocks for p in block.parameters()]
    held = sum(part.nbytes for part in parts)
    assert all(p.numel() == 0 for block in blocks for p in block.parameters())
inside = {id(p) for block in blocks for p in block.parameters()}
held += sum(p.nbytes for p in model.parameters() if id(p) not in inside)
print(peak_bytes() - before, held)
"""


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """320 MB in fp32, in one file; the number of its parameters."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 768, "word_embed_proj_dim": 768, "ffn_dim": 3072}
    more = {"num_hidden_layers": 11, "num_attention_heads": 12, "vocab_size": 2000}
    model = OPTForCausalLM(opt_config(**sizes, **more))
    model.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) == 1
    return folder, sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc"
)
@pytest.mark.parametrize("how", ["stream", "zero3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_second_copy_of_the_weights_in_memory(
    large_model: tuple[Path, int], dtype: str, how: str
) -> None:
    """The peak of loading stays below 1.3 times the weights; streaming's two buffers count."""
    folder, parameters = large_model
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), dtype, how],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, held = (int(number) for number in done.stdout.splitlines()[-1].split())
    print(f"{how}, {dtype}: peak {peak / 1e6:.0f} MB, kept {held / 1e6:.0f} MB")
    weights = parameters * getattr(torch, dtype).itemsize
    assert held >= weights  # it was loaded
    assert peak < 1.3 * weights
