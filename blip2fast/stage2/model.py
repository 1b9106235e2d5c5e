"""Stage 2 of BLIP-2: images as soft prompts of a frozen language model (arXiv 2301.12597, 3.2).

    image tokens [B, S, E] -> ln_vision -> Q-Former -> language_projection -> prompts [B, Q, L]
    language model reads [prompts, text embeddings] and is trained to write the text

Shapes: B images, Q queries, T text tokens, S image tokens, E image token width, C hidden width,
L language model width, V words.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blip2fast.frozen.recompute import is_unfrozen, recompute_encoder
from blip2fast.ops.checks import describe
from blip2fast.ops.dispatch import describe_choices
from blip2fast.qformer.checks import (
    check_gathered,
    check_image_mask,
    check_recompute,
    check_state,
    image_tokens,
)
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.plain import input_dtype
from blip2fast.stage1.model import Blip2Stage1
from blip2fast.stage2.config import Stage2Config, Stage2Output
from blip2fast.stage2.convert import (
    TransformersModel,
    VisionModel,
    VisionTokens,
    config_from_transformers,
    first_tensor,
    trained_from_stage1,
    trained_from_transformers,
    transformers_model,
)
from blip2fast.stage2.frozen_state import FrozenState
from blip2fast.stage2.generation import write
from blip2fast.stage2.language_model import (
    Targets,
    embedding_width,
    freeze,
    is_encoder_decoder,
    match_embedding_scale,
    predictable,
    recompute_layers,
    text_loss,
    use_activation,
    without_dropout,
)
from blip2fast.stage2.lora import has_lora, set_adapter_dropout
from blip2fast.stage2.packing import LEAST_SAVING, check_packable, not_packable_reasons
from blip2fast.stage2.sequence import check_counts, instruction, read_sequence
from blip2fast.stage2.text import Stage2Text
from blip2fast.stage2.token_rows import IGNORED

FROZEN = ("language_model.", "image_encoder.")


class Blip2Stage2(nn.Module):
    """A Q-Former and a projection that turn images into soft prompts of a frozen language model.

    The language model and the image encoder are frozen and stay in evaluation mode (no dropout;
    `config.llm_dropout` enables the language model's dropout in training). The language model
    propagates gradients to its inputs only. What is unfrozen afterwards is trained with the rest:
    the encoder (`FrozenImageEncoder.unfreeze`), and the language model's adapters
    (`blip2fast.stage2.lora.add_lora`).

    Args:
        config: Sizes and text settings.
        language_model: Any `transformers` `AutoModelForCausalLM` or `AutoModelForSeq2SeqLM`. It is
            frozen in place.
        image_encoder: Optional frozen module from images [B, 3, h, w] to tokens [B, S, E], for
            `images=...`. Without it, pass precomputed `image_embeds`.

    Attributes:
        ln_vision: Normalises the image tokens; trained, although the encoder is frozen.
        query_tokens: [1, Q, C], the learned queries.
        qformer: The Q-Former, without its text branch unless `config.text_conditioned`.
        language_projection: Linear, C to L.
    """

    # Hugging Face's Trainer looks for it when it loads a checkpoint
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None

    def __init__(
        self,
        config: Stage2Config,
        language_model: PreTrainedModel,
        image_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        width = embedding_width(language_model)
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.num_query_tokens, config.hidden_size)
        )
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.qformer = QFormer(config.qformer_config())
        self.language_projection = nn.Linear(config.hidden_size, width)
        if config.match_embedding_scale:
            match_embedding_scale(self.language_projection, language_model)
        if config.pack_padding:
            check_packable(language_model)
        self.language_model = language_model
        self.image_encoder = image_encoder
        freeze(language_model)
        if config.llm_activation is not None:
            use_activation(language_model, config.llm_activation)
        if image_encoder is not None:
            freeze(image_encoder)
        self._frozen_state = FrozenState(self, FROZEN)
        self.register_load_state_dict_post_hook(self._frozen_state.forgive)
        self.train()

    @classmethod
    def from_stage1(
        cls,
        stage1: Blip2Stage1 | Mapping[str, Tensor],
        language_model: PreTrainedModel,
        config: Stage2Config | None = None,
        image_encoder: nn.Module | None = None,
    ) -> Blip2Stage2:
        """Start from a stage-1 model's `ln_vision`, queries and Q-Former; the rest is new.

        Args:
            stage1: The model or its state dict. Its heads are dropped, and so is its text branch
                unless `config.text_conditioned`.
            language_model, image_encoder: As in the constructor; the encoder defaults to that of
                the stage-1 model.
            config: Required with a state dict; defaults to the stage-1 model's sizes otherwise.

        Raises:
            ValueError: no config for a state dict; a tensor that is missing or has another shape.
        """
        if isinstance(stage1, Blip2Stage1):
            config = config or Stage2Config.from_stage1(stage1.config)
            image_encoder = image_encoder or stage1.image_encoder
            stage1 = stage1.state_dict()
        elif config is None:
            raise ValueError("a stage-1 state dict does not tell all sizes; pass config=...")
        model = cls(config, language_model, image_encoder)
        wanted = {
            name: value
            for name, value in model.trainable_state_dict().items()
            if not name.startswith("language_projection.")
        }
        model._load("stage-1 state", trained_from_stage1(stage1, wanted), wanted)
        return model

    @classmethod
    def from_transformers(cls, model: TransformersModel) -> Blip2Stage2:
        """Convert a transformers BLIP-2 or InstructBLIP.

        The language and vision models are shared, not copied. transformers stores `ln_vision` as
        the vision model's `post_layernorm`, with the epsilon of the vision configuration; both are
        preserved.

        Raises:
            ValueError: an unsupported Q-Former (a BLIP-2 one with text input, or with another
                activation).
        """
        stage2 = cls(
            config_from_transformers(model.config),
            model.language_model,
            VisionTokens(model.vision_model),
        )
        trained = trained_from_transformers(model)
        for name in ("ln_vision", "qformer", "language_projection"):
            stage2.get_submodule(name).to(first_tensor(trained, name))
        stage2.query_tokens.data = stage2.query_tokens.data.to(trained["query_tokens"])
        stage2.load_trainable_state_dict(trained)
        return stage2

    def to_transformers(
        self, image_token_id: int, vision_model: VisionModel | None = None
    ) -> TransformersModel:
        """Convert to a transformers model: InstructBLIP if text-conditioned, else BLIP-2.

        The language model is shared; the trained part and the vision model are copied.

        Args:
            image_token_id: A token of the language model that no text uses; transformers uses it
                as the placeholder of soft prompts.
            vision_model: The transformers vision model; not needed after `from_transformers`.

        Raises:
            ValueError: no vision model, one of another width, or a language model whose embedding
                width is not its hidden size, which transformers' BLIP-2 cannot express; or one
                with LoRA adapters that are not merged.
        """
        if has_lora(self.language_model):
            raise ValueError(
                "the language model has LoRA adapters, which transformers' BLIP-2 does not have: "
                "merge them first (blip2fast.stage2.lora.merge_lora)"
            )
        if vision_model is None and isinstance(self.image_encoder, VisionTokens):
            vision_model = self.image_encoder.vision_model
        if vision_model is None:
            raise ValueError(
                "transformers' BLIP-2 holds its vision model; pass vision_model=Blip2VisionModel"
            )
        trained = self.trainable_state_dict()
        return transformers_model(
            self.config, self.language_model, vision_model, trained, image_token_id
        )

    def train(self, mode: bool = True) -> Blip2Stage2:
        """Set training mode; frozen parts stay in evaluation mode, except with `llm_dropout`."""
        super().train(mode)
        self.language_model.train(mode and self.config.llm_dropout)
        set_adapter_dropout(self.language_model, mode)
        if self.image_encoder is not None:
            self.image_encoder.train(mode and is_unfrozen(self.image_encoder))
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As of any module, without the frozen models' tensors, which have files of their own.

        What is trained in them or was added to them, such as adapters, is there; with
        `keep_vars=True`, which programs that record a model use, so is everything.
        `load_state_dict` takes state dicts with and without them.
        """
        state = super().state_dict(*args, **kwargs)
        if not kwargs.get("keep_vars", False):
            for name in self._left_out(state, kwargs.get("prefix", "")):
                del state[name]
        return state

    def _left_out(self, state: Mapping[str, Tensor], prefix: str) -> list[str]:
        inside = (name.removeprefix(prefix) for name in state if name.startswith(prefix))
        return [prefix + name for name in self._frozen_state.left_out(self, inside)]

    def extra_repr(self) -> str:
        config = self.config
        if config.pack_padding:
            padding = f"padding removed where that saves {LEAST_SAVING:.0%}: samples share rows"
        else:
            reasons = not_packable_reasons(self.language_model)
            padding = f"padding kept: {'; '.join(reasons) if reasons else 'pack_padding is off'}"
        dropout = "as it was trained" if config.llm_dropout else "none"
        how = (
            f"num_query_tokens={config.num_query_tokens}, "
            f"text_conditioned={config.text_conditioned}, language model: dropout {dropout}, "
            f"{padding}"
        )
        return "\n".join([how, *describe_choices()])

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Trade time for memory: recompute the layers of all parts that pass gradients on.

        Args:
            settings: Those of Hugging Face's `Trainer`; only its defaults are accepted.

        Raises:
            ValueError: another setting, or a language model whose layers cannot be recomputed.
        """
        check_recompute(settings)
        recompute_layers(self.language_model)
        self.qformer.recompute_layers()
        recompute_encoder(self.image_encoder)

    # the name in transformers 5.23
    activation_checkpointing_enable = gradient_checkpointing_enable

    def text(self, tokenizer: Any, seed: int = 0, qformer_tokenizer: Any = None) -> Stage2Text:
        """A `Stage2Text` for this model and its configuration.

        Raises:
            ValueError: `qformer_tokenizer` is missing for a text-conditioned Q-Former, or given for
                one that is not.
        """
        if self.config.text_conditioned != (qformer_tokenizer is not None):
            given = "none" if qformer_tokenizer is None else "one"
            wanted = self.config.text_conditioned
            raise ValueError(f"qformer_tokenizer: text_conditioned is {wanted}, got {given}")
        return Stage2Text(
            tokenizer,
            is_encoder_decoder(self.language_model),
            prompt=self.config.prompt,
            end_text=self.config.end_text,
            max_txt_len=self.config.max_txt_len,
            seed=seed,
            image_marker=self.config.image_marker,
            num_query_tokens=self.config.num_query_tokens,
            qformer_tokenizer=qformer_tokenizer,
        )

    def forward(
        self,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        *,
        images: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        image_counts: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        return_logits: bool = False,
    ) -> Stage2Output:
        """The language-modelling loss of texts given their images.

        Decoder-only: `input_ids` is the text, padded on the right, and `labels` the same tokens
        with -100 where the loss ignores them (default: at padding only); label t is predicted
        from all positions before token t, the first one from the last soft prompt.
        Encoder-decoder: the encoder reads prompts and `input_ids`, the decoder predicts `labels`.

        With `image_counts`, a sample may have any number of images at any position in its text
        (`Stage2Text` with an `image_marker`): `input_ids` holds one `IMAGE_PLACE` per soft prompt,
        and the images are a flat list, sample by sample. For a batch without images the Q-Former
        runs on a dummy image, so that every parameter has a (zero) gradient on every process.

        Args:
            image_embeds: [B, S, E], the frozen encoder's tokens before `ln_vision`; [N, S, E]
                with `image_counts`.
            input_ids: [B, T] text tokens, without soft prompts or with their placeholders.
            attention_mask: [B, T], nonzero where a token is real; by default everywhere.
            labels: [B, T]; for an encoder-decoder, [B, T'] decoder labels.
            decoder_input_ids, decoder_attention_mask: [B, T'], encoder-decoder only; by default
                the labels, shifted by the language model.
            images: [B, 3, h, w] for the image encoder, instead of `image_embeds`.
            image_attention_mask: [B, S], nonzero where an image token is real.
            image_counts: [B], the number of images of each sample; they sum to N.
            qformer_input_ids, qformer_attention_mask: [B, T''], the instructions for a
                text-conditioned Q-Former, one per sample, used for all its images.
            return_logits: Also return the logits of all positions; otherwise logits are computed
                only at positions with labels.

        Raises:
            ValueError: an input is missing, has the wrong shape, does not fit the language model,
                or leaves no token to predict.
        """
        if input_ids is None:
            raise ValueError("input_ids: expected [B, T] text tokens, got none")
        prompts, query_output = self._encode_images(
            image_counts,
            image_embeds,
            images=images,
            image_attention_mask=image_attention_mask,
            qformer_input_ids=qformer_input_ids,
            qformer_attention_mask=qformer_attention_mask,
        )
        loss, logits, words = text_loss(
            self.language_model,
            read_sequence(self.language_model, prompts, input_ids, attention_mask, image_counts),
            input_ids,
            Targets(labels, decoder_input_ids, decoder_attention_mask),
            in_place=image_counts is not None,
            return_logits=return_logits,
            without_padding=self.config.pack_padding,
        )
        output = Stage2Output(loss=loss, logits=logits, query_output=query_output, prompts=prompts)
        return output.set_counts({"loss": words})

    def num_target_words(self, batch: Mapping[str, Tensor]) -> int:
        """Number of words over which the loss of a batch with `labels` is a mean."""
        labels = batch["labels"]
        if "image_counts" in batch and not is_encoder_decoder(self.language_model):
            labels = predictable(labels)
        return int((labels != IGNORED).sum())

    def encode_image(
        self,
        image_embeds: Tensor | None = None,
        *,
        images: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Soft prompts of images.

        Args:
            image_embeds, images, image_attention_mask: As in `forward`.
            qformer_input_ids, qformer_attention_mask: As in `forward`, one instruction per image.

        Returns:
            `(prompts [B, Q, L], query_output [B, Q, C])`.
        """
        check_gathered(self.query_tokens)
        tokens = image_tokens(
            image_embeds, images, self.image_encoder, self.config.encoder_hidden_size
        )
        states = self.qformer(
            query_embeds=self.query_tokens.expand(tokens.shape[0], -1, -1),
            encoder_hidden_states=self.ln_vision(tokens.to(input_dtype(self.ln_vision, tokens))),
            encoder_attention_mask=check_image_mask(tokens, image_attention_mask),
            **instruction(self.config, tokens.shape[0], qformer_input_ids, qformer_attention_mask),
        ).last_hidden_state
        query_output = states[:, : self.config.num_query_tokens]
        # the Q-Former and the projection may have different dtypes
        dtype = input_dtype(self.language_projection, query_output)
        prompts = self.language_projection(query_output.to(dtype))
        return prompts, query_output

    def _encode_images(
        self, image_counts: Tensor | None, image_embeds: Tensor | None, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """`encode_image` of a batch, or with `image_counts`, of the flat list of its images.

        Each sample's instruction is repeated for each of its images. If no sample has an image, the
        Q-Former runs on a blank one and the result is dropped, so that every parameter has a (zero)
        gradient on every process.

        Args:
            image_counts: [B], or None: one image per sample.
            image_embeds, inputs: Arguments of `encode_image`.

        Raises:
            ValueError: mismatched numbers of images, samples and instructions.
        """
        if image_counts is None:
            return self.encode_image(image_embeds, **inputs)
        images = image_embeds if inputs["images"] is None else inputs["images"]
        N = 0 if images is None else len(images)
        check_counts(image_counts, len(image_counts), N)
        for name in ("qformer_input_ids", "qformer_attention_mask"):
            rows = inputs[name]
            if rows is None:
                continue
            if len(rows) != len(image_counts):
                raise ValueError(
                    f"{name}: expected one instruction for each of {len(image_counts)} samples, "
                    f"got {describe(rows)}"
                )
            repeated = rows.repeat_interleave(image_counts, dim=0, output_size=N)
            inputs[name] = repeated if N else rows[:1]
        if N:
            return self.encode_image(image_embeds, **inputs)
        inputs |= {"images": None, "image_attention_mask": None}
        blank = self._blank_tokens()
        prompts, query_output = self.encode_image(blank, **inputs)
        return prompts[:0], query_output[:0]

    def _blank_tokens(self) -> Tensor:
        """Tokens of an image that is not there; through the encoder, if it is trained."""
        encoder = self.image_encoder
        size = getattr(encoder, "image_size", None)
        if encoder is not None and size is not None and is_unfrozen(encoder):
            tokens: Tensor = encoder(self.query_tokens.new_zeros(1, 3, size, size))
            return tokens
        return self.query_tokens.new_zeros(1, 1, self.config.encoder_hidden_size)

    @torch.no_grad()
    def generate(
        self,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        images: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        image_counts: Tensor | None = None,
        qformer_input_ids: Tensor | None = None,
        qformer_attention_mask: Tensor | None = None,
        prompts: Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Generate text after the soft prompts and an optional text prompt.

        The soft prompts are computed once for all beams and samples. `input_ids` may be padded on
        either side; padding does not affect the result. Under DeepSpeed ZeRO-3 the trained
        parameters must be gathered around this call (`deepspeed.zero.GatheredParameters`).

        Args:
            image_embeds, images, image_attention_mask, image_counts: As in `forward`.
            qformer_input_ids, qformer_attention_mask: As in `forward`.
            input_ids, attention_mask: [B, T] text to continue (decoder-only) or to encode; by
                default an empty text: the model's bos token, or eos for an encoder.
            prompts: [B, Q, L] ([N, Q, L]) from `encode_image`, instead of images, to avoid encoding
                them again.
            generate_kwargs: For `transformers`' `generate`: `max_new_tokens` (default 30),
                `num_beams`, `do_sample`, `top_p`, `length_penalty`, `eos_token_id`, ...

        Returns:
            [B * num_return_sequences, <= max_new_tokens] new tokens only; or transformers' output
            object, with `return_dict_in_generate`.

        Raises:
            ValueError: invalid inputs, as in `forward`; `max_length` or `min_length`, which count
                soft prompts in some models but not in others.
        """
        if prompts is None:
            prompts, _ = self._encode_images(
                image_counts,
                image_embeds,
                images=images,
                image_attention_mask=image_attention_mask,
                qformer_input_ids=qformer_input_ids,
                qformer_attention_mask=qformer_attention_mask,
            )
        elif image_embeds is not None or images is not None:
            raise ValueError("give images, image_embeds or their prompts, not two of them")
        with without_dropout(self.language_model):
            return write(
                self.language_model,
                prompts,
                input_ids,
                attention_mask,
                image_counts=image_counts,
                **generate_kwargs,
            )

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """All parameters except the frozen ones of the language model and the image encoder."""
        return (
            p
            for name, p in self.named_parameters()
            if p.requires_grad or not name.startswith(FROZEN)
        )

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """State dict of the trained part: `ln_vision`, queries, Q-Former and projection.

        And what is unfrozen of the image encoder and the language model. Under ZeRO-3, gather
        `trainable_parameters()` around this call.
        """
        unfrozen = {name for name, p in self.named_parameters() if p.requires_grad}
        return {
            name: value
            for name, value in self.state_dict().items()
            if name in unfrozen or not name.startswith(FROZEN)
        }

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Load a state dict from `trainable_state_dict`.

        Raises:
            ValueError: a tensor that is missing, unexpected, or has another shape.
        """
        self._load("trained state", state, self.trainable_state_dict())

    def _load(self, what: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
        check_state(what, state, wanted)
        self.load_state_dict(dict(state), strict=False)
