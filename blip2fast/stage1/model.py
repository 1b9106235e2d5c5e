"""Stage 1 of BLIP-2: the Q-Former learns from image-text pairs (arXiv 2301.12597, section 3.1).

Three losses on frozen image features: contrastive (ITC), matching (ITM), generation (ITG), in two
passes over token buffers without padding (`passes.py`). Both passes share the image keys and
values, which are computed once. Shapes are named as in `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from blip2fast._choices import LOSSES
from blip2fast.frozen.recompute import is_unfrozen, recompute_encoder
from blip2fast.kernels.philox import philox_state, with_offset
from blip2fast.kernels.precision import wide
from blip2fast.kernels.qformer_attention.layout import MaskKind
from blip2fast.ops import itc_loss, lm_cross_entropy
from blip2fast.ops.dispatch import describe_choices
from blip2fast.ops.itc.loss import ITCOutput
from blip2fast.ops.tracing import has_tangents, is_traced, is_transformed
from blip2fast.qformer.checks import (
    check_gathered,
    check_image_mask,
    check_recompute,
    check_state,
    image_tokens,
)
from blip2fast.qformer.fused_linear import describe_fusion
from blip2fast.qformer.masks import qformer_mask
from blip2fast.qformer.model import QFormer
from blip2fast.qformer.packed import called_node, describe_node
from blip2fast.qformer.plain import input_dtype
from blip2fast.stage1 import lavis, losses
from blip2fast.stage1.config import Stage1Config, Stage1Output, check_losses
from blip2fast.stage1.contrast import StepContrast, product_dtype
from blip2fast.stage1.generation import generate
from blip2fast.stage1.inputs import (
    check_negatives,
    check_new_tokens,
    check_pairs,
    check_ranks_agree,
    check_training_batch,
    packed_texts,
    padded_texts,
    sizes_of_ranks,
)
from blip2fast.stage1.modules import (
    LMHead,
    TextEmbeddings,
    copy_text_ffn_to_queries,
    is_called_head,
    temp_as_it_is,
    tied_words,
    with_scalar_temp,
)
from blip2fast.stage1.padded import PaddedReader
from blip2fast.stage1.passes import ProjectedImages, Reader
from blip2fast.stage1.texts import PackedTexts, PaddedTexts

# larger than any dropout offset: negative sampling and dropout share a step's seed
_NEGATIVES_OFFSET = 2**31


class Blip2Stage1(nn.Module):
    """The Q-Former with the ITC, ITM and ITG heads, on a frozen image encoder.

    Args:
        config: Sizes.
        image_encoder: Optional module from images `[B, 3, h, w]` to tokens `[B, S, E]`, for
            `forward(images=...)`; it is frozen here, and trained if it is unfrozen afterwards
            (`FrozenImageEncoder.unfreeze`). Without it, pass precomputed `image_embeds`.
        losses: Which of "itc", "itm" and "itg" a step computes and sums. ITC is required: ITM
            samples its negatives from ITC's similarities.

    Attributes:
        ln_vision: Normalises the image tokens; trained, although the encoder is frozen.
        query_tokens: `[1, Q, C]`, the learned queries.
        temp: [1], the learned contrastive temperature. LAVIS and the files of runs hold a scalar,
            and scalars are loaded, but FSDP shards none. `half`, `bfloat16` and `to` leave it in
            fp32: an AdamW step is smaller than the spacing of 16-bit floats at its value.
        exact_temp: [1], the fp32 value used in the losses if an engine stores `temp` in 16 bits;
            None: use `temp` itself.

    Raises:
        ValueError: `losses` lacks ITC or contains an unknown name.
    """

    # Hugging Face's Trainer looks for it when it loads a checkpoint
    _keys_to_ignore_on_save: ClassVar[list[str] | None] = None

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
        self.temp = nn.Parameter(torch.tensor([config.initial_temp]))
        self.exact_temp: Tensor | None = None
        copy_text_ffn_to_queries(self.qformer)
        self.register_load_state_dict_pre_hook(temp_as_it_is)

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
            ValueError: an unknown config key; a tensor that is missing, unexpected, or whose shape
                does not match the config.
        """
        if not isinstance(config, Stage1Config):
            config = Stage1Config.from_dict(config)
        model = cls(config)
        renamed = lavis.from_lavis(state_dict)
        check_state("LAVIS state dict", renamed, with_scalar_temp(model.state_dict()))
        if any(value.dtype == torch.float64 for value in renamed.values()):
            model.double()
        model.load_state_dict(renamed)
        model._attach_image_encoder(image_encoder)
        return model

    def to_lavis_state_dict(self) -> dict[str, Tensor]:
        """Every trained tensor under its LAVIS name, including temperature and generation head.

        The image encoder is excluded. The tied output embedding is stored once, as
        `Qformer.bert.embeddings.word_embeddings.weight`.
        """
        whole = with_scalar_temp(self.state_dict())
        own = (item for item in whole.items() if not item[0].startswith("image_encoder."))
        return {lavis.to_lavis_name(name): value for name, value in own}

    def train(self, mode: bool = True) -> Blip2Stage1:
        """Set training mode; an image encoder that is frozen stays in evaluation mode."""
        super().train(mode)
        if self.image_encoder is not None:
            self.image_encoder.train(mode and is_unfrozen(self.image_encoder))
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Blip2Stage1:
        before = self.temp.detach()
        super()._apply(fn, recurse)
        if self.temp.dtype.itemsize == 2 < before.dtype.itemsize:
            self.temp.data = before.to(self.temp.device, torch.float32)
        return self

    def temperature(self) -> Tensor:
        """The temperature used in the losses, a scalar, with gradient to `temp`.

        Its value is that of `exact_temp`, or of `temp` if that is None.
        """
        if self.exact_temp is None:
            return self.temp.reshape(())
        wide_temp = self.temp.to(self.exact_temp.dtype)
        return (self.exact_temp + (wide_temp - wide_temp.detach())).reshape(())

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Trade time for memory: recompute the layers in the backward pass.

        Args:
            settings: Those of Hugging Face's `Trainer`; only its defaults are accepted.

        Raises:
            ValueError: another setting.
        """
        check_recompute(settings)
        self.qformer.recompute_layers()
        recompute_encoder(self.image_encoder)

    # the name in transformers 5.23
    activation_checkpointing_enable = gradient_checkpointing_enable

    def extra_repr(self) -> str:
        why = self._why_padded()
        how = describe_fusion(self.qformer, self._image_form)
        how = f"the Q-Former called on padded texts ({why})" if why else how
        if is_called_head(self.lm_head, getattr(self.embeddings.word_embeddings, "weight", None)):
            how += ", generation head called"
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
                which avoids a device synchronisation for their lengths.
            attention_mask: `[B, T]`, nonzero where a token is real; defaults to
                `input_ids` not being padding.
            image_ids: `[B]` integers; pairs with equal ids are positives of each other.
            negatives: `(negative_image, negative_text)`, each `[B]`: indices into the global
                batch to use instead of sampled negatives; -1 for none.
            images: `[B, 3, h, w]` for the image encoder, instead of `image_embeds`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
            cu_seqlens: `[B+1]`, the start of each text in packed `input_ids`; on the CPU, to avoid
                a device synchronisation.
            contrast: From `step_contrast`: ITC over all micro-batches of an optimizer step instead
                of this batch only. ITM negatives are still sampled from this batch.

        Returns:
            A `Stage1Output`.

        Raises:
            ValueError: an input is missing, has the wrong shape, or is a batch of 1 on 1 process.
        """
        image_embeds = self.image_tokens(image_embeds, images)
        texts = self.packed_texts(input_ids, attention_mask, cu_seqlens)
        check_pairs(image_embeds, texts)
        check_training_batch(texts, image_ids)
        visible = check_image_mask(image_embeds, image_attention_mask)
        # where shapes must not depend on values, every rank has texts of the same padded length
        static = isinstance(texts, PaddedTexts)
        sizes = None if static else sizes_of_ranks(image_embeds, texts, image_ids, visible)
        philox = philox_state(device=image_embeds.device) if contrast is None else contrast.philox

        reader = self._reader(repeatable=contrast is not None)
        read = reader.images(image_embeds, visible)
        self._image_form = reader.image_form
        with_itg = "itg" in self.losses
        bos = self.config.bos_token_id if with_itg else None
        first = reader.first_pass(read, texts, philox, bos)
        features = self._image_features(first.queries), self._text_features(first.cls)
        temp = self.temperature()
        # the device runs the first pass while the host waits here; no collective has started yet
        longest = texts.longest if sizes is None else check_ranks_agree(sizes)
        itc = self._contrastive_loss(
            features,
            temp,
            image_ids,
            "sample" if negatives is None else "none",
            with_offset(philox, _NEGATIVES_OFFSET),
            product_dtype(reader.dtype, image_embeds.device),
            # if the whole step's contrast is given, this batch's ITC only provides the negatives
            learning=contrast is None,
        )
        if negatives is None:
            negatives = itc.negative_image, itc.negative_text
        else:
            negatives = check_negatives(negatives, texts.count)
        loss_itc = itc.loss if contrast is None else contrast.loss_of(*features, temp)
        found = {"loss": loss_itc, "loss_itc": loss_itc}
        words = len(first.labels) if first.words is None else first.words
        if "itm" in self.losses:
            pairs = reader.second_pass(read, texts, negatives, philox, longest=longest)
            found["itm_logits"] = self._matching_logits(pairs)
            found["loss_itm"], found["accuracy_itm"] = losses.itm_loss(
                found["itm_logits"], negatives, itc.loss
            )
            found["loss"] = found["loss"] + found["loss_itm"]
        if with_itg:
            found["loss_itg"], found["accuracy_itg"] = self._generation_loss(
                first.itg, first.labels, words
            )
            found["loss"] = found["loss"] + found["loss_itg"]
        output = Stage1Output(
            image_features=features[0],
            text_features=features[1],
            query_output=first.queries,
            accuracy_i2t=(contrast or itc).accuracy_i2t,
            accuracy_t2i=(contrast or itc).accuracy_t2i,
            negative_image=negatives[0],
            negative_text=negatives[1],
            **found,
        )
        of_itm = losses.counted_pairs(negatives).sum() if "itm" in self.losses else 0
        output.set_counts(
            {
                **dict.fromkeys(("loss_itc", "accuracy_i2t", "accuracy_t2i"), texts.count),
                **dict.fromkeys(("loss_itm", "accuracy_itm"), of_itm),
                **dict.fromkeys(("loss_itg", "accuracy_itg"), words),
            }
        )
        if isinstance(texts, PaddedTexts):
            return output
        length = attention_mask.shape[1] if attention_mask is not None else texts.longest
        return output.set_lazy(
            lambda: losses.itc_logits(*features, temp, self.config.grad_mode),
            lambda: self._padded_logits(image_embeds, texts, length, visible),
        )

    def encode_image(
        self,
        image_embeds: Tensor,
        image_attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Image features from a pass of the queries over the image, without text.

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.

        Returns:
            `(image_features [B, Q, D], query_output [B, Q, C])`; the features are normalised.
        """
        image_embeds = self.image_tokens(image_embeds)
        visible = check_image_mask(image_embeds, image_attention_mask)
        reader = self._reader()
        read = reader.images(image_embeds, visible)
        states = reader.image_queries(read, philox_state(device=image_embeds.device))
        return self._image_features(states), states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Text features: the normalised projection of the unimodal [CLS] state.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, nonzero where a token is real.

        Returns:
            `[B, D]`.
        """
        texts = self.packed_texts(input_ids, attention_mask)
        states = self._reader().text_cls(texts, philox_state(device=texts.ids.device))
        return self._text_features(states)

    def project_images(
        self, image_embeds: Tensor, image_attention_mask: Tensor | None = None
    ) -> ProjectedImages:
        """Image tokens with their keys and values, which serve any number of calls of `match`.

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
        """
        image_embeds = self.image_tokens(image_embeds)
        visible = check_image_mask(image_embeds, image_attention_mask)
        return self._reader().images(image_embeds, visible)

    def match(
        self,
        image_embeds: Tensor | ProjectedImages,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        *,
        image_index: Tensor | None = None,
    ) -> Tensor:
        """ITM logits `[B, 2]` of image-text pairs; class 1 is "match".

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`; or from `project_images`.
            input_ids, attention_mask: `[B, T]`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real; for images that
                are projected already, give it to `project_images`.
            image_index: `[B]`, the image index of each text into `image_embeds` `[images, S, E]`,
                so that texts of one image share its keys and values. Default: text i, image i.
        """
        read = image_embeds
        if not isinstance(read, ProjectedImages):
            read = self.project_images(read, image_attention_mask)
        texts = self.packed_texts(input_ids, attention_mask)
        if image_index is None:
            check_pairs(read.tokens, texts)
        reader = self._reader()
        philox = philox_state(device=read.tokens.device)
        states = reader.match(read, texts, image_index, philox)
        return self._matching_logits(states)

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
            eos_token_id: [SEP], which ends a text.
            max_new_tokens: Maximum number of tokens to generate, including [SEP].
            image_attention_mask: `[B, S]`, nonzero where an image token is real.

        Returns:
            `[B, <= max_new_tokens]` token ids, padded after the end token.

        Raises:
            ValueError: `max_new_tokens` is below 1 or exceeds the position table.
        """
        check_new_tokens(max_new_tokens, self.config.max_position_embeddings)
        image_embeds = self.image_tokens(image_embeds)
        visible = check_image_mask(image_embeds, image_attention_mask)
        reader = self._reader()
        return generate(
            reader,
            self.lm_head,
            tied_words(self.embeddings),
            self.config,
            reader.images(image_embeds, visible),
            eos_token_id,
            max_new_tokens,
        )

    @torch.no_grad()
    def features(
        self,
        philox: Tensor,
        image_embeds: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        *,
        images: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The ITC features of `forward`, without gradient, for `step_contrast`.

        In training mode, dropout masks are drawn from the seed `philox`.

        Args:
            philox: `[2]`, as in `StepContrast`.
            image_embeds, input_ids, attention_mask, image_ids: As in `forward`, as are the others.

        Returns:
            Image features `[B, Q, D]`, text features `[B, D]`, both in `product_dtype`, and the
            temperature, a scalar.
        """
        image_embeds = self.image_tokens(image_embeds, images)
        texts = self.packed_texts(input_ids, attention_mask, cu_seqlens)
        check_pairs(image_embeds, texts)
        visible = check_image_mask(image_embeds, image_attention_mask)
        reader = self._reader(repeatable=True)
        first = reader.first_pass(reader.images(image_embeds, visible), texts, philox)
        image, text = self._image_features(first.queries), self._text_features(first.cls)
        kind = product_dtype(reader.dtype, image_embeds.device) or image.dtype
        return image.to(kind), text.to(kind), self.temperature().detach().clone()

    def num_target_words(self, batch: Mapping[str, Tensor]) -> int:
        """Number of words over which `loss_itg` of a batch of padded texts is a mean."""
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        real = ids != self.config.pad_token_id if mask is None else mask != 0
        return int(real.sum()) - len(ids)

    def _reader(self, repeatable: bool = False) -> Reader | PaddedReader:
        """A reader of the current weights, in the autocast dtype if autocast is enabled.

        Args:
            repeatable: Whether a pass with the same `philox` must have the same dropout.
        """
        check_gathered(self.query_tokens)
        dtype, device = self.query_tokens.dtype, self.query_tokens.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        parts = self.qformer, self.query_tokens, self.embeddings, self.ln_vision, dtype
        why = self._why_padded()
        pad = self.config.pad_token_id
        return PaddedReader(*parts, pad, why, repeatable) if why else Reader(*parts, pad)

    def _why_padded(self) -> str:
        """Why the Q-Former is called on padded texts; empty if its weights are read."""
        if is_traced():
            return "compiled, recorded or transformed"
        node = called_node(self.qformer)
        return "" if node is None else describe_node(self.qformer, node)

    def _image_features(self, states: Tensor) -> Tensor:
        """ITC features `[B, Q, D]` from query states `[B, Q, C]`."""
        return losses.l2_normalize(self.vision_projection(states))

    def _text_features(self, states: Tensor) -> Tensor:
        """ITC features `[B, D]` from [CLS] states `[B, C]`."""
        return losses.l2_normalize(self.text_projection(states))

    def _contrastive_loss(
        self,
        features: tuple[Tensor, Tensor],
        temp: Tensor,
        image_ids: Tensor | None,
        negatives: Literal["sample", "none"],
        philox: Tensor,
        products: torch.dtype | None,
        learning: bool,
    ) -> ITCOutput:
        """ITC of image and text features, with gradient if `learning`; samples negatives."""
        transformed = is_transformed()
        tangents = forward_ad._set_fwd_grad_enabled(False) if has_tangents() else nullcontext()
        learning = torch.is_grad_enabled() and learning and not transformed
        with torch.set_grad_enabled(learning), tangents:
            itc = itc_loss(
                *features,
                temp,
                label_smoothing=self.config.label_smoothing,
                image_ids=image_ids,
                grad_mode=self.config.grad_mode,
                negatives=negatives,
                philox=philox,
                products=products,
            )
        if not transformed:
            return itc
        # the operator has no rule for torch.func
        logits = losses.itc_logits(*features, temp, self.config.grad_mode)
        smoothing = self.config.label_smoothing
        return itc._replace(loss=losses.itc_loss_of_logits(logits, image_ids, smoothing))

    def _matching_logits(self, states: Tensor) -> Tensor:
        """ITM logits of query states `[N, Q, C]`; the head is applied to the mean over queries."""
        return wide(self.itm_head(wide(states).mean(1).to(states.dtype)))

    def _generation_loss(
        self, states: Tensor, labels: Tensor, words: Tensor | int
    ) -> tuple[Tensor, Tensor]:
        """ITG loss and accuracy from the hidden states `[K, C]` that predict a token.

        Args:
            states: `[K, C]`.
            labels: `[K]`, the tokens; -100 for rows that count for nothing.
            words: Number of labels that count.
        """
        weight = tied_words(self.embeddings)
        if is_called_head(self.lm_head, weight) or is_transformed():
            loss, right = losses.itg_loss(
                self.lm_head(states, weight), labels, self.config.label_smoothing
            )
        else:
            loss, right = lm_cross_entropy(
                self.lm_head.transform(states),
                weight,
                self.lm_head.bias,
                labels,
                label_smoothing=self.config.label_smoothing,
            )
        if isinstance(words, Tensor):
            return loss, right / words.clamp(min=1)
        return loss, right / max(words, 1)

    def _padded_logits(
        self, image_embeds: Tensor, texts: PackedTexts, length: int, visible: Tensor | None
    ) -> Tensor:
        """ITG logits `[B, length, V]` from a padded forward pass, padding positions included."""
        B, Q = texts.count, self.config.num_query_tokens
        ids, lengths = texts.padded(length, self.config.pad_token_id)
        ids = torch.cat([torch.full_like(ids[:, :1], self.config.bos_token_id), ids[:, 1:]], 1)
        real = torch.arange(length, device=ids.device) < lengths[:, None]
        text = self.embeddings(ids)
        tokens = image_embeds.to(input_dtype(self.ln_vision, image_embeds))
        queries = self.query_tokens.expand(B, -1, -1).to(text.dtype)
        states = self.qformer(
            query_embeds=torch.cat([queries, text], dim=1),
            query_length=Q,
            attention_mask=qformer_mask(MaskKind.MULTIMODAL_CAUSAL, Q, real),
            encoder_hidden_states=self.ln_vision(tokens),
            encoder_attention_mask=visible,
        ).last_hidden_state
        logits: Tensor = self.lm_head(states[:, Q:], tied_words(self.embeddings))
        return logits

    def image_tokens(self, image_embeds: Tensor | None, images: Tensor | None = None) -> Tensor:
        """Validated image tokens `[B, S, E]`, passed in or computed by the image encoder."""
        width = self.config.encoder_hidden_size
        tokens = image_tokens(image_embeds, images, self.image_encoder, width)
        check_gathered(self.query_tokens)
        return tokens

    def packed_texts(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        cu_seqlens: Tensor | None = None,
    ) -> PackedTexts | PaddedTexts:
        """Validate the texts of `forward`, pack them, and move them to the model's device.

        They stay padded where a program must not depend on their lengths.
        """
        make = padded_texts if is_traced() else packed_texts
        texts = make(
            input_ids,
            attention_mask,
            cu_seqlens,
            pad_token_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_position_embeddings,
        )
        return texts.to(self.query_tokens.device)
