"""Stage 1 of BLIP-2: the Q-Former learns from image-text pairs (arXiv 2301.12597, section 3.1).

Three losses on frozen image features: contrastive (ITC), matching (ITM), generation (ITG), in two
passes over token buffers without padding (`stage1_passes.py`). The keys and values of an image are
computed once for both. Shapes are named as in `stage1_types.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast.kernels.philox import philox_state, with_offset
from blip2fast.ops import itc_loss, lm_cross_entropy
from blip2fast.ops.collectives import rank
from blip2fast.ops.dispatch import describe_choices
from blip2fast.packed_pass import Dropout
from blip2fast.qformer.checks import check_state
from blip2fast.qformer.fused_linear import describe
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.packed import PackedQFormer
from blip2fast.stage1 import contrast as stage1_contrast
from blip2fast.stage1 import inputs as stage1_inputs
from blip2fast.stage1 import lavis, losses
from blip2fast.stage1.config import LOSSES, Stage1Config, Stage1Output, check_losses
from blip2fast.stage1.contrast import StepContrast, first_pass
from blip2fast.stage1.generation import generate, padded_logits
from blip2fast.stage1.modules import LMHead, TextEmbeddings, copy_text_ffn_to_queries
from blip2fast.stage1.negatives import NegativeExchange
from blip2fast.stage1.passes import PackedTexts, images_of_pairs, matching_pass
from blip2fast.stage1_matching import encode_image, encode_text, match, match_logits

# beyond every offset of a dropout mask: negatives and masks share a step's seed
_NEGATIVES_OFFSET = 2**31


class Blip2Stage1(nn.Module):
    """The Q-Former with its three stage-1 heads, on a frozen image encoder.

    Args:
        config: Sizes.
        image_encoder: Optional frozen module from images `[B, 3, h, w]` to tokens `[B, S, E]`,
            for `forward(images=...)`. Without it, pass precomputed `image_embeds`.
        losses: Which of "itc", "itm" and "itg" a step computes and adds up. ITC is always one of
            them: ITM's negatives come from its similarities.

    Attributes:
        ln_vision: Normalises the image tokens; trained, although the encoder is frozen.
        query_tokens: `[1, Q, C]`, the learned queries.
        temp: The contrastive temperature, learned.

    Raises:
        ValueError: `losses` without ITC, or with another name.
    """

    def __init__(
        self,
        config: Stage1Config,
        image_encoder: nn.Module | None = None,
        losses: Sequence[str] = LOSSES,
    ) -> None:
        super().__init__()
        self.config = config
        self.losses = check_losses(losses)
        self._image_form = ""
        C = config.hidden_size
        self.ln_vision = nn.LayerNorm(config.encoder_hidden_size, eps=config.ln_vision_eps)
        self.query_tokens = nn.Parameter(torch.empty(1, config.num_query_tokens, C))
        nn.init.normal_(self.query_tokens, std=config.initializer_range)
        self.embeddings = TextEmbeddings(config)
        self.qformer = QFormer(config.qformer_config())
        self.vision_projection = nn.Linear(C, config.embed_dim)
        self.text_projection = nn.Linear(C, config.embed_dim)
        self.itm_head = nn.Linear(C, 2)
        self.lm_head = LMHead(config)
        self.temp = nn.Parameter(torch.tensor(config.initial_temp))
        copy_text_ffn_to_queries(self.qformer)

        self._attach_image_encoder(image_encoder)

    def _attach_image_encoder(self, image_encoder: nn.Module | None) -> None:
        self.image_encoder = image_encoder
        if image_encoder is not None:
            image_encoder.requires_grad_(False).eval()

    @classmethod
    def from_lavis_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        config: Stage1Config | Mapping[str, Any],
        image_encoder: nn.Module | None = None,
    ) -> Blip2Stage1:
        """Build the model from a LAVIS stage-1 checkpoint (its `["model"]` dict).

        Args:
            state_dict: Parameters under LAVIS's names.
            config: Sizes; as a mapping, keys are fields of `Stage1Config`.
            image_encoder: As in the constructor.

        Returns:
            The model, in fp32, or fp64 if the state dict is.

        Raises:
            ValueError: an unknown config key; a tensor that is missing, unknown, or of a shape
                that is not the config's.
        """
        if not isinstance(config, Stage1Config):
            config = Stage1Config.from_dict(config)
        model = cls(config)
        renamed = lavis.from_lavis(state_dict)
        check_state("LAVIS state dict", renamed, model.state_dict())
        if any(value.dtype == torch.float64 for value in renamed.values()):
            model.double()
        model.load_state_dict(renamed)
        model._attach_image_encoder(image_encoder)
        return model

    def to_lavis_state_dict(self) -> dict[str, Tensor]:
        """Every trained tensor under LAVIS's name, temperature and generation head included.

        The image encoder is not part of it, and the tied output embedding is there once, as
        `Qformer.bert.embeddings.word_embeddings.weight`.
        """
        own = (
            item for item in self.state_dict().items() if not item[0].startswith("image_encoder.")
        )
        return {lavis.to_lavis_name(name): value for name, value in own}

    def train(self, mode: bool = True) -> Blip2Stage1:
        """Set training mode; the frozen image encoder stays in evaluation mode."""
        super().train(mode)
        if self.image_encoder is not None:
            self.image_encoder.eval()
        return self

    def gradient_checkpointing_enable(self) -> None:
        """Trade time for memory: recompute the Q-Former's layers in the backward pass."""
        self.qformer.recompute_layers()

    def extra_repr(self) -> str:
        how = describe(self.qformer, self._image_form)
        sizes = f"num_query_tokens={self.config.num_query_tokens}, losses={self.losses}"
        return "\n".join([f"{sizes}, {how}", *describe_choices()])

    def forward(
        self,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
        *,
        images: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        contrast: StepContrast | None = None,
    ) -> Stage1Output:
        """Compute the three losses of a batch of image-text pairs.

        Args:
            image_embeds: `[B, S, E]`, the frozen encoder's tokens before `ln_vision`.
            input_ids: `[B, T]`, each text as [CLS] words [SEP] padding; or `[T_total]`,
                without padding, together with `cu_seqlens`. Texts on the CPU are packed there,
                which spares an accelerator's host the wait for their lengths.
            attention_mask: `[B, T]`, nonzero where a token is real; by default, where
                `input_ids` is not padding.
            image_ids: `[B]` integers; pairs of equal id are positives of one another.
            negatives: `(negative_image, negative_text)`, each `[B]`: indices into the batch of
                all ranks, instead of sampled ones.
            images: `[B, 3, h, w]` for the image encoder, instead of `image_embeds`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
            cu_seqlens: `[B+1]`, where each text starts in a packed `input_ids`; on the CPU, so
                that the host need not wait for the device.
            contrast: ITC of all batches of an optimizer step, of `step_contrast`, instead of this
                one's; ITM's negatives stay those of this batch.

        Returns:
            A `Stage1Output`.

        Raises:
            ValueError: an input is missing, has the wrong shape, or leaves no negative.
        """
        image_embeds = self.image_tokens(image_embeds, images)
        texts = self.packed_texts(input_ids, attention_mask, cu_seqlens)
        stage1_inputs.check_pairs(image_embeds, texts)
        stage1_inputs.check_training_batch(texts, image_ids)
        visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
        sizes = stage1_inputs.sizes_of_ranks(image_embeds, texts, image_ids, visible)
        philox = philox_state(device=image_embeds.device) if contrast is None else contrast.philox

        packed = PackedQFormer(self.qformer, self.computing_dtype(image_embeds.device))
        keys_values = packed.image_keys_values(image_embeds, self.ln_vision)
        self._image_form = packed.image_form
        with_itg = "itg" in self.losses
        first = first_pass(self, packed, keys_values, texts, visible, philox, with_itg)
        # a device has the first pass to do while its host waits, and no collective has begun
        longest = stage1_inputs.check_ranks_agree(sizes)
        features = first.image_features, first.text_features
        # beside the contrast of a whole step, that of this batch is there for negatives alone
        with torch.set_grad_enabled(torch.is_grad_enabled() and contrast is None):
            itc = itc_loss(
                *features,
                self.temp,
                label_smoothing=self.config.label_smoothing,
                image_ids=image_ids,
                grad_mode=self.config.grad_mode,
                negatives="sample" if negatives is None else "none",
                philox=with_offset(philox, _NEGATIVES_OFFSET),
                products=stage1_contrast.products(packed.dtype, image_embeds.device),
            )
        if negatives is None:
            stage1_inputs.check_some_negative(itc.without_negative, image_ids)
            negatives = itc.negative_image, itc.negative_text
        else:
            negatives = stage1_inputs.check_negatives(negatives, texts.count)
        loss_itc = itc.loss if contrast is None else contrast.loss_of(*features, self.temp)
        found = {"loss": loss_itc, "loss_itc": loss_itc}
        if "itm" in self.losses:
            found["itm_logits"] = self._matching_logits(
                packed, image_embeds, keys_values, texts, visible, negatives, longest, philox
            )
            found["loss_itm"], found["accuracy_itm"] = losses.itm_loss(
                found["itm_logits"], negatives
            )
            found["loss"] = found["loss"] + found["loss_itm"]
        if with_itg:
            found["loss_itg"], found["accuracy_itg"] = self._generation_loss(
                first.itg_states, first.labels
            )
            found["loss"] = found["loss"] + found["loss_itg"]
        output = Stage1Output(
            image_features=first.image_features,
            text_features=first.text_features,
            query_output=first.query_output,
            accuracy_i2t=(contrast or itc).accuracy_i2t,
            accuracy_t2i=(contrast or itc).accuracy_t2i,
            negative_image=negatives[0],
            negative_text=negatives[1],
            **found,
        )
        length = attention_mask.shape[1] if attention_mask is not None else texts.longest
        return output.when_asked(
            lambda: losses.itc_logits(*features, self.temp, self.config.grad_mode),
            lambda: padded_logits(self, image_embeds, texts, length, visible),
        )

    def encode_image(
        self,
        image_embeds: Tensor,
        image_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Queries that saw the image alone.

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.

        Returns:
            `(image_features [B, Q, D], query_output [B, Q, C])`; the features are normalised.
        """
        return encode_image(self, image_embeds, image_attention_mask)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Features of texts that saw no image: the projected [CLS] state, normalised.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, nonzero where a token is real.

        Returns:
            `[B, D]`.
        """
        return encode_text(self, input_ids, attention_mask)

    def match(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """Does text i describe its image? Logits `[B, 2]`; class 1 is "match".

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            input_ids, attention_mask: `[B, T]`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
            image_index: `[B]`, the image of each text, where `image_embeds` `[images, S, E]` holds
                each image once: its keys and values then serve all its texts. Default: image i.
        """
        return match(
            self, image_embeds, input_ids, attention_mask, image_attention_mask, image_index
        )

    @torch.no_grad()
    def generate(
        self,
        image_embeds: Tensor,
        eos_token_id: int,
        max_new_tokens: int = 30,
        image_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Caption images with the generation head, greedily.

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            eos_token_id: [SEP]; a text ends there.
            max_new_tokens: Most tokens to write, [SEP] included.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.

        Returns:
            `[B, <= max_new_tokens]` token ids, padded after the end token.

        Raises:
            ValueError: `max_new_tokens` is below 1 or over the position table.
        """
        return generate(self, image_embeds, eos_token_id, max_new_tokens, image_attention_mask)

    def computing_dtype(self, device: torch.device) -> torch.dtype:
        """The precision of products: autocast's where it is on, else the parameters'."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.query_tokens.dtype

    def _generation_loss(self, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """ITG's loss and accuracy from the rows that predict a word, `[K, C]`."""
        hidden = self.lm_head.transform(states)
        words = self.embeddings.word_embeddings.weight
        loss, right = lm_cross_entropy(
            hidden,
            words,
            self.lm_head.bias,
            labels,
            label_smoothing=self.config.label_smoothing,
        )
        return loss, right / max(len(labels), 1)

    def _matching_logits(
        self,
        packed: PackedQFormer,
        image_embeds: Tensor,
        keys_values: list[Tensor | None],
        texts: PackedTexts,
        visible: Tensor | None,
        negatives: tuple[Tensor, Tensor],
        longest: int,
        philox: Tensor,
    ) -> Tensor:
        """ITM logits `[3B, 2]`: own pairs, then with a negative image, then a negative text."""
        B, device = texts.count, image_embeds.device
        # a row without a negative (-1) stands beside itself, and the loss leaves it out
        own = torch.arange(B, device=device) + rank() * B
        images, chosen = NegativeExchange.several(
            [torch.where(index < 0, own, index.long()) for index in negatives], B
        )
        words, lengths = texts.padded(longest, self.config.pad_token_id)
        words, lengths = chosen.rows(words), chosen.rows(lengths)
        keys_values, visible, index = images_of_pairs(
            packed, image_embeds, self.ln_vision, keys_values, visible, images
        )
        pairs = matching_pass(texts, (words, lengths), self.config.num_query_tokens, index, visible)
        states, _ = packed(
            self.query_tokens[0],
            self.embeddings(pairs.ids, pairs.positions),
            keys_values,
            pairs.packed,
            Dropout.of(self.qformer, philox, 1),
        )
        return match_logits(self, states)

    def image_tokens(self, image_embeds: Tensor | None, images: Tensor | None = None) -> Tensor:
        """`[B, S, E]` tokens, given or computed by the image encoder, checked."""
        width = self.config.encoder_hidden_size
        tokens = stage1_inputs.image_tokens(image_embeds, images, self.image_encoder, width)
        stage1_inputs.check_gathered(self.query_tokens)
        return tokens

    def packed_texts(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> PackedTexts:
        """The texts of `forward` without padding, checked, on the model's device."""
        texts = stage1_inputs.packed_texts(
            input_ids,
            attention_mask,
            cu_seqlens,
            pad_token_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_position_embeddings,
        )
        return texts.to(self.query_tokens.device)
