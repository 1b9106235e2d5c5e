"""Stage 1 of BLIP-2: the Q-Former learns from image-text pairs (arXiv 2301.12597, section 3.1).

Three losses on frozen image features: contrastive (ITC), matching (ITM), generation (ITG).
Shapes are named as in `stage1_types.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from blip2fast import lavis, losses, stage1_inputs
from blip2fast.gathering import gather_detached, gather_with_grad
from blip2fast.masks import MaskKind, qformer_mask
from blip2fast.qformer import QFormer
from blip2fast.stage1_types import Stage1Config, Stage1Output
from blip2fast.state_dicts import check_state
from blip2fast.text_modules import LMHead, TextEmbeddings, copy_text_ffn_to_queries
from blip2fast.text_packing import pad_text


class Blip2Stage1(nn.Module):
    """The Q-Former with its three stage-1 heads, on a frozen image encoder.

    Args:
        config: Sizes.
        image_encoder: Optional frozen module from images `[B, 3, h, w]` to tokens `[B, S, E]`,
            for `forward(images=...)`. Without it, pass precomputed `image_embeds`.

    Attributes:
        ln_vision: Normalises the image tokens; trained, although the encoder is frozen.
        query_tokens: `[1, Q, C]`, the learned queries.
        temp: The contrastive temperature, learned.
    """

    def __init__(self, config: Stage1Config, image_encoder: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
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
        return f"num_query_tokens={self.config.num_query_tokens}"

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
    ) -> Stage1Output:
        """Compute the three losses of a batch of image-text pairs.

        Args:
            image_embeds: `[B, S, E]`, the frozen encoder's tokens before `ln_vision`.
            input_ids: `[B, T]`, each text as [CLS] words [SEP] padding; or `[T_total]`,
                without padding, together with `cu_seqlens`.
            attention_mask: `[B, T]`, nonzero where a token is real; by default, where
                `input_ids` is not padding.
            image_ids: `[B]` integers; pairs of equal id are positives of one another.
            negatives: `(negative_image, negative_text)`, each `[B]`: indices into the batch of
                all ranks, instead of sampled ones.
            images: `[B, 3, h, w]` for the image encoder, instead of `image_embeds`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
            cu_seqlens: `[B+1]`, where each text starts in a packed `input_ids`.

        Returns:
            A `Stage1Output`.

        Raises:
            ValueError: an input is missing, has the wrong shape, or leaves no negative.
        """
        image_embeds = self._image_tokens(image_embeds, images)
        input_ids, attention_mask = self._text(input_ids, attention_mask, cu_seqlens)
        stage1_inputs.check_pairs(image_embeds, input_ids)
        stage1_inputs.check_training_batch(input_ids, attention_mask, image_ids)
        visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
        longest = stage1_inputs.check_ranks_agree(image_embeds, input_ids, image_ids, visible)
        B = image_embeds.shape[0]

        query_output, itg_logits = self._generation_pass(
            image_embeds, input_ids, attention_mask, visible
        )
        image_features = losses.unit(self.vision_projection(query_output))
        text_features = self.encode_text(input_ids, attention_mask)

        sim_i2t, sim_t2i = losses.itc_logits(
            image_features, text_features, self.temp, self.config.grad_mode
        )
        positives = losses.positive_pairs(B, sim_i2t.shape[1], image_ids, sim_i2t.device)
        loss_itc = losses.itc_loss(sim_i2t, sim_t2i, positives, self.config.label_smoothing)

        if negatives is None:
            negatives = losses.sample_hard_negatives(sim_i2t, sim_t2i, positives)
        itm_logits = self._matching_pass(
            image_embeds, (input_ids, attention_mask), visible, negatives, longest
        )
        loss_itm, itm_labels = losses.itm_loss(itm_logits)

        itg_labels = losses.itg_labels(input_ids, attention_mask)
        loss_itg = losses.itg_loss(itg_logits[:, :-1], itg_labels, self.config.label_smoothing)

        with torch.no_grad():
            predicted = itg_labels != -100
            right = (itg_logits[:, :-1].argmax(-1) == itg_labels) & predicted
            accuracy_itm = (itm_logits.argmax(-1) == itm_labels).float().mean()
            accuracy_itg = right.sum() / predicted.sum()
        return Stage1Output(
            loss=loss_itc + loss_itm + loss_itg,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            loss_itg=loss_itg,
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            itm_logits=itm_logits,
            itg_logits=itg_logits,
            image_features=image_features,
            text_features=text_features,
            query_output=query_output,
            accuracy_i2t=losses.top1_accuracy(sim_i2t, positives),
            accuracy_t2i=losses.top1_accuracy(sim_t2i, positives),
            accuracy_itm=accuracy_itm,
            accuracy_itg=accuracy_itg,
            negative_image=negatives[0],
            negative_text=negatives[1],
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
        image_embeds = self._image_tokens(image_embeds, None)
        states = self.qformer(
            query_embeds=self.query_tokens.expand(image_embeds.shape[0], -1, -1),
            encoder_hidden_states=self.ln_vision(image_embeds),
            encoder_attention_mask=stage1_inputs.check_image_mask(
                image_embeds, image_attention_mask
            ),
        ).last_hidden_state
        return losses.unit(self.vision_projection(states)), states

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Features of texts that saw no image: the projected [CLS] state, normalised.

        Args:
            input_ids: `[B, T]`.
            attention_mask: `[B, T]`, nonzero where a token is real.

        Returns:
            `[B, D]`.
        """
        input_ids, attention_mask = self._text(input_ids, attention_mask, None)
        states = self.qformer(
            query_embeds=self.embeddings(input_ids),
            query_length=0,
            attention_mask=qformer_mask(MaskKind.UNIMODAL, 0, attention_mask),
        ).last_hidden_state
        return losses.unit(self.text_projection(states[:, 0]))

    def match(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Does text i describe image i? Logits `[B, 2]`; class 1 is "match".

        Args:
            image_embeds: `[B, S, E]`, before `ln_vision`.
            input_ids, attention_mask: `[B, T]`.
            image_attention_mask: `[B, S]`, nonzero where an image token is real.
        """
        image_embeds = self._image_tokens(image_embeds, None)
        input_ids, attention_mask = self._text(input_ids, attention_mask, None)
        stage1_inputs.check_pairs(image_embeds, input_ids)
        visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
        return self._match(self.ln_vision(image_embeds), input_ids, attention_mask, visible)

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
        stage1_inputs.check_new_tokens(max_new_tokens, self.config.max_position_embeddings)
        image_embeds = self._image_tokens(image_embeds, None)
        visible = stage1_inputs.check_image_mask(image_embeds, image_attention_mask)
        ids = image_embeds.new_full(
            (image_embeds.shape[0], 1), self.config.bos_token_id, dtype=torch.long
        )
        ended = torch.zeros_like(ids[:, 0], dtype=torch.bool)
        tokens = self.ln_vision(image_embeds)
        for _ in range(max_new_tokens):
            _, states = self._joint_states(
                tokens, ids, torch.ones_like(ids), visible, MaskKind.MULTIMODAL_CAUSAL
            )
            logits = self.lm_head(states[:, -1], self.embeddings.word_embeddings.weight)
            word = logits.argmax(-1).masked_fill(ended, self.config.pad_token_id)
            ids = torch.cat([ids, word[:, None]], dim=1)
            ended = ended | (word == eos_token_id)
            if bool(ended.all()):
                break
        return ids[:, 1:]

    def _generation_pass(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        visible: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """ITG and the image half of ITC in one pass: queries see no text, so they serve both."""
        decoder_ids = torch.cat(
            [torch.full_like(input_ids[:, :1], self.config.bos_token_id), input_ids[:, 1:]], dim=1
        )
        tokens = self.ln_vision(image_embeds)
        query_states, text_states = self._joint_states(
            tokens, decoder_ids, attention_mask, visible, MaskKind.MULTIMODAL_CAUSAL
        )
        logits = self.lm_head(text_states, self.embeddings.word_embeddings.weight)
        return query_states, logits

    def _matching_pass(
        self,
        image_embeds: Tensor,
        text: tuple[Tensor, Tensor],
        visible: Tensor | None,
        negatives: tuple[Tensor, Tensor],
        longest: int,
    ) -> Tensor:
        """ITM logits `[3B, 2]`: own pairs, then with a negative image, then a negative text."""
        B = image_embeds.shape[0]
        negative_image, negative_text = stage1_inputs.check_negatives(negatives, B)
        # an encoder in training needs the gradient of its tokens on other ranks; a frozen one none
        gather = gather_with_grad if image_embeds.requires_grad else gather_detached
        image_neg = gather(image_embeds)[negative_image]
        input_ids, attention_mask = pad_text(*text, longest, self.config.pad_token_id)
        ids_neg = gather_detached(input_ids)[negative_text]
        mask_neg = gather_detached(attention_mask)[negative_text]
        if visible is not None:
            visible = torch.cat([visible, gather_detached(visible)[negative_image], visible])
        tokens, tokens_neg = self.ln_vision(image_embeds), self.ln_vision(image_neg)
        return self._match(
            torch.cat([tokens, tokens_neg, tokens]),
            torch.cat([input_ids, input_ids, ids_neg]),
            torch.cat([attention_mask, attention_mask, mask_neg]),
            visible,
        )

    def _match(
        self, tokens: Tensor, input_ids: Tensor, attention_mask: Tensor, visible: Tensor | None
    ) -> Tensor:
        query_states, _ = self._joint_states(
            tokens, input_ids, attention_mask, visible, MaskKind.BIDIRECTIONAL
        )
        return losses.wide(self.itm_head(query_states)).mean(dim=1)

    def _joint_states(
        self,
        tokens: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        visible: Tensor | None,
        kind: MaskKind,
    ) -> tuple[Tensor, Tensor]:
        """Query states `[B, Q, C]` and text states `[B, T, C]` under a mask kind."""
        Q = self.config.num_query_tokens
        queries = self.query_tokens.expand(tokens.shape[0], -1, -1)
        text = self.embeddings(input_ids)
        states = self.qformer(
            query_embeds=torch.cat([queries.to(text.dtype), text], dim=1),
            query_length=Q,
            attention_mask=qformer_mask(kind, Q, attention_mask),
            encoder_hidden_states=tokens,
            encoder_attention_mask=visible,
        ).last_hidden_state
        return states[:, :Q], states[:, Q:]

    def _image_tokens(self, image_embeds: Tensor | None, images: Tensor | None) -> Tensor:
        width = self.config.encoder_hidden_size
        tokens = stage1_inputs.image_tokens(image_embeds, images, self.image_encoder, width)
        stage1_inputs.check_gathered(self.query_tokens)
        return tokens.to(self.ln_vision.weight.dtype)

    def _text(
        self, input_ids: Tensor | None, attention_mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return stage1_inputs.padded_text(
            input_ids,
            attention_mask,
            cu_seqlens,
            pad_token_id=self.config.pad_token_id,
            vocab_size=self.config.vocab_size,
            max_positions=self.config.max_position_embeddings,
        )
