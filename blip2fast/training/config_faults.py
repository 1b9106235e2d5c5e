"""Finds contradictions within a run's configuration, independent of the machine."""

from __future__ import annotations

from blip2fast._choices import LOSSES, RECALL_KS
from blip2fast.evaluation.caption_metrics import METRICS, score_name
from blip2fast.training.config import RunConfig


def contradictions(config: RunConfig) -> list[str]:
    """All contradictions in a configuration, one sentence each."""
    faults: list[str] = []
    data, optim = config.data, config.optim
    if (data.features is None) == (data.images is None):
        faults.append("data: give either features (a cache) or images (a folder), not both or none")
    if data.images is not None and data.image_encoder is None:
        faults.append("data.images needs data.image_encoder, the frozen model that reads them")
    if data.features is not None and (data.image_encoder or data.eval_images):
        faults.append("data.features is a cache: image_encoder and eval_images go with data.images")
    if data.images is not None and data.eval_features is not None:
        faults.append("data.images has eval_images for its evaluation, not eval_features")
    held_out = data.eval_features if data.features is not None else data.eval_images
    if (data.eval_records is None) != (held_out is None):
        kind = "eval_features" if data.features is not None else "eval_images"
        faults.append(f"data: eval_records and {kind} go together, but one is missing")
    if data.max_skipped is not None and data.on_error == "raise":
        faults.append(f"data.max_skipped {data.max_skipped} goes with data.on_error: skip")
    if config.eval_every and data.eval_records is None:
        faults.append(f"eval_every is {config.eval_every}, but data.eval_records is not set")
    if optim.min_lr > optim.lr:
        faults.append(f"optim.min_lr {optim.min_lr} is above optim.lr {optim.lr}")
    if optim.warmup_steps >= optim.max_steps:
        faults.append(
            f"optim.warmup_steps {optim.warmup_steps} leaves none of optim.max_steps "
            f"{optim.max_steps} for the decay"
        )
    if config.allow_other_frozen and config.init_from is None:
        faults.append("allow_other_frozen is about init_from, which is not set")
    if config.init_text_from is not None:
        if config.init_from is None:
            faults.append("init_text_from completes init_from, which is not set")
        if not config.model.text_conditioned:
            faults.append("init_text_from is for model.text_conditioned: true, which is not set")
    faults += _best_faults(config) + _encoder_faults(config) + _lora_faults(config)
    if config.resume and config.overwrite:
        faults.append("resume continues an earlier run, and overwrite deletes it: set one of them")
    return faults + _stage_faults(config) + offload_faults(config)


def _encoder_faults(config: RunConfig) -> list[str]:
    """Settings that contradict the training of the image encoder."""
    section, data = config.image_encoder, config.data
    faults: list[str] = []
    if section.train:
        if data.features is not None:
            faults.append(
                "image_encoder.train: data.features are the tokens of a frozen encoder: give "
                "data.images and data.image_encoder instead"
            )
        if config.zero_stage == 3 or config.offload == "zero3":
            faults.append(
                "image_encoder.train needs zero_stage 0, 1 or 2: stage 3 partitions the language "
                "model (offload: stream keeps it on the host)"
            )
        if section.quantization != "none" or section.compile:
            faults.append(
                "image_encoder.quantization and compile are for a frozen encoder, and train is true"
            )
    elif section.layer_decay != 1.0 or section.gradient_checkpointing:
        faults.append("image_encoder.layer_decay and gradient_checkpointing need train: true")
    if data.features is not None and (section.quantization != "none" or section.compile):
        faults.append(
            "image_encoder.quantization and compile are for an encoder in the loop, and "
            "data.features is a cache (blip2fast features has them too)"
        )
    return faults


def _lora_faults(config: RunConfig) -> list[str]:
    language = config.language_model
    if language is None or language.lora is None:
        return []
    faults = []
    if config.offload not in ("none", "auto") or config.zero_stage == 3:
        what = f"offload {config.offload!r}" if config.offload != "none" else "zero_stage 3"
        faults.append(
            f"language_model.lora with {what}: adapters need the whole language model on the "
            "device: offload none or auto, zero_stage 0, 1 or 2"
        )
    if language.lora.target_modules == []:
        faults.append("language_model.lora.target_modules is empty: leave it out for peft's choice")
    return faults


def _best_faults(config: RunConfig) -> list[str]:
    if config.keep_best is None:
        return []
    if config.data.eval_records is None:
        return [
            f"keep_best {config.keep_best!r} needs held-out data, but data.eval_records is not set"
        ]
    known = ["loss"]
    if config.stage == 1:
        losses = [name for name in LOSSES if name in config.optim.losses]
        known += [f"loss_{name}" for name in losses] + ["accuracy_i2t", "accuracy_t2i"]
        known += [f"accuracy_{name}" for name in losses if name != "itc"]
        recalls = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in RECALL_KS]
        known += recalls
        if config.eval_scores and "itm" in config.optim.losses:
            known += [f"rerank_{name}" for name in recalls]
    elif config.data.task != "sequence":
        known.append("exact")
        if config.eval_scores:
            of_captions = [score_name(metric) for metric in METRICS]
            known += ["vqa_accuracy"] if config.data.task == "vqa" else of_captions
    if config.keep_best in known:
        return []
    return [f"keep_best {config.keep_best!r}: no such metric; there are {', '.join(known)}"]


def _stage_faults(config: RunConfig) -> list[str]:
    faults: list[str] = []
    if config.stage == 1:
        if "itc" not in config.optim.losses:
            faults.append(
                f"optim.losses {list(config.optim.losses)} lacks itc: ITM's negatives are drawn "
                "from its similarities"
            )
        if config.optim.grad_cache and config.optim.accumulation == 1:
            faults.append(
                "optim.grad_cache with optim.accumulation 1: a step is one pass, whose pairs are "
                "compared anyway; set accumulation above 1"
            )
        if config.language_model is not None:
            faults.append("language_model belongs to stage 2, but stage is 1")
        if config.data.task != "caption":
            faults.append(f"data.task {config.data.task!r} belongs to stage 2, but stage is 1")
        if config.model.text_conditioned is not None:
            faults.append("model.text_conditioned belongs to stage 2, but stage is 1")
        if config.model.tokenizer is None:
            faults.append("model.tokenizer: stage 1 reads texts in the Q-Former and needs one")
    else:
        if config.optim.losses != LOSSES:
            faults.append("optim.losses belongs to stage 1, but stage is 2")
        if config.optim.grad_cache:
            faults.append("optim.grad_cache belongs to stage 1, but stage is 2")
        if config.language_model is None:
            faults.append("language_model: stage 2 needs one (language_model.path)")
        if config.data.positives != "image":
            faults.append("data.positives belongs to stage 1, but stage is 2")
        faults += [
            f"model.{name} belongs to stage 1, but stage is 2"
            for name in ("bert", "embed_dim")
            if getattr(config.model, name) is not None
        ]
        if bool(config.model.text_conditioned) != (config.model.tokenizer is not None):
            faults.append("model.tokenizer belongs to stage 1 or text_conditioned, which needs it")
        prompt = config.language_model.prompt if config.language_model else ""
        if config.data.task == "caption" and "{}" in prompt:
            faults.append("language_model.prompt has a {} for questions, but data.task is caption")
        if config.data.task == "sequence" and prompt and "{}" not in prompt:
            faults.append("language_model.prompt has no {} for the records' prompts (data.task)")
    return faults


def offload_faults(config: RunConfig) -> list[str]:
    """Settings that contradict `config.offload`."""
    faults: list[str] = []
    offload = config.offload
    if offload != "none" and config.stage == 1:
        faults.append(f"offload {offload!r} is for stage 2's language model, but stage is 1")
    if offload in ("stream", "auto"):
        if config.zero_stage == 3:
            faults.append(
                f"offload {offload!r} needs zero_stage 0, 1 or 2, not 3: streamed blocks are "
                "whole in every process (offload: zero3 partitions them)"
            )
        if config.offload_param != "none":
            faults.append(
                f"offload {offload!r} decides where the language model is: remove offload_param "
                f"{config.offload_param!r}"
            )
    if offload == "zero3" and config.zero_stage in (1, 2):
        faults.append(
            f"offload 'zero3' stands for zero_stage 3, but zero_stage is {config.zero_stage}: "
            "leave it out"
        )
    if offload in ("none", "zero3"):
        for name, default in (("stream_storage", "as_is"), ("stream_buffers", 2)):
            value = getattr(config, name)
            if value != default:
                faults.append(f"{name} {value!r} belongs to offload: stream, not {offload!r}")
    return faults
