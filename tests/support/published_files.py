"""Small random checkpoints laid out as LAVIS's files are; tests/published/lavis_keys.json has the
keys, which were derived from the modules of LAVIS and from what its trainer saves: every buffer,
the trained parameters, and frozen ones that are tied under a second name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

KEYS = json.loads((Path(__file__).parents[1] / "published" / "lavis_keys.json").read_text())
# heads are 64 wide in the Q-Former and 88 in the image encoder, as in the real ones
HIDDEN, LAYERS, QUERIES, INNER, EMBED = 128, 3, 4, 48, 8
WIDTH, BLOCKS, PATCH, SIDE, MLP = 88, 2, 4, 3, 40
IMAGE_SIZE = PATCH * SIDE
LANGUAGE = {"opt": 48, "t5": 32, "llm": 48}  # widths, as in small_run
VOCABULARY, POSITIONS = 39, 16
WORDS = 17  # of the Q-Former's tokenizer in small_run
KINDS = {
    "blip2_pretrained": ("both_stages", "text_branch", "heads"),
    "blip2_finetune_coco": ("image_encoder", "both_stages", "text_branch", "heads"),
    "blip2_pretrained_opt2.7b": ("both_stages", "opt"),
    "blip2_caption_opt2.7b": ("image_encoder", "both_stages", "opt"),
    "blip2_pretrained_flant5xl": ("both_stages", "t5"),
    "instruct_blip_flanxl_trimmed": ("both_stages", "text_branch", "t5"),
    "instruct_blip_vicuna7b_trimmed": ("both_stages", "text_branch", "vicuna"),
}


def keys(kind: str, blocks: int = BLOCKS, layers: int = LAYERS) -> list[str]:
    """The names in a file of LAVIS."""
    numbers = {
        "{block}": range(blocks),
        "{layer}": range(layers),
        "{crossing}": range(0, layers, 2),
    }
    found = []
    for part in KINDS[kind]:
        for key in KEYS[part]:
            place = next((place for place in numbers if place in key), None)
            if place is None:
                found.append(key)
            else:
                found += [key.replace(place, str(number)) for number in numbers[place]]
    return found


def _shape(name: str, words: int) -> tuple[int, ...]:
    image = WIDTH if ".crossattention.self.key" in name or ".self.value" in name else HIDDEN
    if ".attention.self.value" in name:
        image = HIDDEN
    weights = {
        "query_tokens": (1, QUERIES, HIDDEN),
        "temp": (),
        "cls_token": (1, 1, WIDTH),
        "pos_embed": (1, SIDE * SIDE + 1, WIDTH),
        "patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "qkv.weight": (3 * WIDTH, WIDTH),
        "fc1.weight": (MLP, WIDTH),
        "fc1.bias": (MLP,),
        "fc2.weight": (WIDTH, MLP),
        "attn.proj.weight": (WIDTH, WIDTH),
        "word_embeddings.weight": (words, HIDDEN),
        "predictions.decoder.weight": (words, HIDDEN),
        "predictions.decoder.bias": (words,),
        "predictions.bias": (words,),
        "position_embeddings.weight": (POSITIONS, HIDDEN),
        "vision_proj.weight": (EMBED, HIDDEN),
        "text_proj.weight": (EMBED, HIDDEN),
        "vision_proj.bias": (EMBED,),
        "text_proj.bias": (EMBED,),
        "itm_head.weight": (2, HIDDEN),
        "itm_head.bias": (2,),
        "lm_head.weight": (VOCABULARY, 48),
        "embed_tokens.weight": (VOCABULARY, 32),
    }
    for kind, width in LANGUAGE.items():
        weights |= {f"{kind}_proj.weight": (width, HIDDEN), f"{kind}_proj.bias": (width,)}
    for end, shape in weights.items():
        if name.endswith(end):
            return shape
    if name.startswith(("visual_encoder.", "ln_vision.")):
        return (WIDTH,)
    if ".intermediate" in name:
        return (INNER, HIDDEN) if name.endswith("weight") else (INNER,)
    if ".layer." in name and ".output" in name and "attention" not in name and "dense.w" in name:
        return (HIDDEN, INNER)
    return (HIDDEN, image) if name.endswith("weight") and "LayerNorm" not in name else (HIDDEN,)


def lavis_state(kind: str, words: int = WORDS, seed: int = 3) -> dict[str, Tensor]:
    """Random parameters under LAVIS's names; a frozen image encoder's matrices are fp16."""
    draws = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name in keys(kind):
        if name.endswith("position_ids"):
            count = POSITIONS if "text_branch" in KINDS[kind] else 512
            state[name] = torch.arange(count)[None]
            continue
        shape = _shape(name, words)
        value = torch.randn(shape, generator=draws) * 0.2
        if "orm" in name.split(".")[-2] if "." in name else False:
            value = value + float(name.endswith("weight"))
        if name == "ln_vision.weight":
            value = value + 1
        state[name] = value if name != "temp" else torch.tensor(0.05)
    tied = "Qformer.cls.predictions."
    if f"{tied}bias" in state:
        state[f"{tied}decoder.weight"] = state["Qformer.bert.embeddings.word_embeddings.weight"]
        state[f"{tied}decoder.bias"] = state[f"{tied}bias"]
    return state


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The image encoder's matrices in fp16, as LAVIS holds a frozen one."""
    ends = ("patch_embed.proj", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    return {
        name: value.half()
        if name.startswith("visual_encoder.") and name.rpartition(".")[0].endswith(ends)
        else value
        for name, value in state.items()
    }


def write_lavis(folder: Path, kind: str, **settings: int) -> Path:
    """A file of LAVIS, with what its trainer saves beside the model."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}.pth"
    state = lavis_state(kind, **settings)
    torch.save({"model": state, "optimizer": {}, "config": {"run": {}}, "epoch": 4}, path)
    return path


def eva_tokens(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    """The tokens of LAVIS's ViT by its definition: before `ln_vision`, [B, S, E]."""
    own = {n.removeprefix("visual_encoder."): v.to(pixels.dtype) for n, v in state.items()}
    norm, linear = torch.nn.functional.layer_norm, torch.nn.functional.linear
    x = torch.nn.functional.conv2d(
        pixels, own["patch_embed.proj.weight"], own["patch_embed.proj.bias"], stride=PATCH
    )
    x = torch.cat([own["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
    x = x + own["pos_embed"]
    for number in range(BLOCKS):
        b = {n.removeprefix(f"blocks.{number}."): v for n, v in own.items()}
        y = norm(x, (WIDTH,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        bias = torch.cat([b["attn.q_bias"], torch.zeros_like(b["attn.q_bias"]), b["attn.v_bias"]])
        q, k, v = linear(y, b["attn.qkv.weight"], bias).chunk(3, dim=-1)  # of one head
        y = (q @ k.transpose(1, 2) * WIDTH**-0.5).softmax(-1) @ v
        x = x + linear(y, b["attn.proj.weight"], b["attn.proj.bias"])
        y = norm(x, (WIDTH,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        y = torch.nn.functional.gelu(linear(y, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + linear(y, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x
