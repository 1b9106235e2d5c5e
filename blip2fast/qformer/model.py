"""The Q-Former of BLIP-2 (arXiv 2301.12597, section 3.1), a drop-in for transformers' ones."""

from os import PathLike
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    Blip2QFormerConfig,
    InstructBlipQFormerConfig,
    InstructBlipVideoQFormerConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from blip2fast.qformer.layers import (
    QFormerEmbeddings,
    QFormerEncoder,
    QFormerLayer,
    QFormerMultiHeadAttention,
)
from blip2fast.qformer.masks import pad_ragged, prepare_mask
from blip2fast.qformer.plain import describe_called, input_dtype

QFORMER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "blip-2": Blip2QFormerConfig,
    "blip_2_qformer": Blip2QFormerConfig,
    "instructblip": InstructBlipQFormerConfig,
    "instructblip_qformer": InstructBlipQFormerConfig,
    "instructblipvideo": InstructBlipVideoQFormerConfig,
    "instructblipvideo_qformer": InstructBlipVideoQFormerConfig,
}


class QFormer(PreTrainedModel):
    """Queries (and text) that attend to each other and, in some layers, to image tokens.

    Drop-in replacement for `transformers.Blip2QFormerModel` and, given their configs, for
    `InstructBlipQFormerModel` and `InstructBlipVideoQFormerModel`: same configs, parameter names,
    arguments, outputs and checkpoint files. The config class selects one of two forms:

    * `Blip2QFormerConfig`: takes embeddings only. The text feed-forward networks exist if
      `config.use_qformer_text_input`.
    * `InstructBlipQFormerConfig`, `InstructBlipVideoQFormerConfig`: has its own word and position
      embeddings, so it also takes `input_ids`; always has text feed-forward networks.

    Beyond transformers, it supports variable-length image tokens, encoder masks together with text
    rows, pairwise masks `[B, L, L]`, and attention weights from any `attn_implementation`. Fully
    masked rows give zeros. `forward` does not synchronise with the device.

    Args:
        config: sizes; see `transformers.Blip2QFormerConfig`.
    """

    config_class = Blip2QFormerConfig
    base_model_prefix = "qformer"
    main_input_name = "query_embeds"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules: ClassVar = ["QFormerLayer", "QFormerEmbeddings"]
    # Keys of a full BLIP-2 checkpoint that are not part of the Q-Former.
    _keys_to_ignore_on_load_unexpected: ClassVar = [
        r"(^|\.)(vision_model|language_model|language_projection|vision_projection)\.",
        r"(^|\.)(text_projection|itm_head)\.|(^|\.)query_tokens$|^embeddings\.",
    ]
    # `attentions` also receives the cross-attention weights, in layer order. This matches
    # transformers, where the pattern ".attention" matches both kinds of block.
    _can_record_outputs: ClassVar = {
        "hidden_states": QFormerLayer,
        "attentions": [OutputRecorder(QFormerMultiHeadAttention, index=1, layer_name=".attention")],
        "cross_attentions": [
            OutputRecorder(QFormerMultiHeadAttention, index=1, layer_name=".crossattention")
        ],
    }

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.has_embeddings = isinstance(
            config, InstructBlipQFormerConfig | InstructBlipVideoQFormerConfig
        )
        self.has_text = self.has_embeddings or config.use_qformer_text_input
        if self.has_embeddings:
            self.main_input_name = "input_ids"
            self.embeddings = QFormerEmbeddings(config)
        else:
            self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.encoder = QFormerEncoder(config, self.has_text)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | PathLike[str] | None,
        *model_args: Any,
        config: PreTrainedConfig | str | PathLike[str] | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Loads a saved Q-Former, or the Q-Former of a saved BLIP-2 or InstructBLIP model.

        Args:
            pretrained_model_name_or_path: folder or hub name; the `model_type` in its config
                selects the config class.
            model_args: as in `transformers.PreTrainedModel.from_pretrained`, as are the arguments
                below.
            config: the config to use instead of the saved one.
            ignore_mismatched_sizes: re-initialise tensors whose shapes differ instead of raising.
            output_loading_info: also return a loading report.
            kwargs: dtype, hub options, and config fields to override.

        Returns:
            The Q-Former in evaluation mode; with `output_loading_info`, the pair (model, dict).

        Raises:
            ValueError: if the checkpoint's model type has no supported Q-Former, or its tensor
                shapes do not match the config.
        """
        where = pretrained_model_name_or_path
        if config is None and where is not None:
            config, kwargs = _read_config(where, kwargs)
        model, report = super().from_pretrained(
            where,
            *model_args,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **kwargs,
        )
        if report["mismatched_keys"] and not ignore_mismatched_sizes:
            name, saved, wanted = min(report["mismatched_keys"])
            raise ValueError(
                f"{str(where)!r} does not fit the config: {name} is {list(saved)} in the file and "
                f"{list(wanted)} in the model ({len(report['mismatched_keys'])} such tensors)"
            )
        return (model, report) if output_loading_info else model

    def extra_repr(self) -> str:
        """Which linear layers are called although inference could read their weights."""
        called = describe_called(self)
        return f"called, not read: {called}" if called else ""

    def recompute_layers(self) -> None:
        """Enable gradient checkpointing under the name this version of transformers uses."""
        renamed = hasattr(self, "activation_checkpointing_enable")  # transformers 5.23
        name = "activation" if renamed else "gradient"
        getattr(self, f"{name}_checkpointing_enable")({"use_reentrant": False})

    def get_input_embeddings(self) -> nn.Module | None:
        """The word embeddings; None if the Q-Former has none."""
        return self.embeddings.word_embeddings if self.has_embeddings else None

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replaces the word embeddings.

        Raises:
            NotImplementedError: if the Q-Former has none.
        """
        if not self.has_embeddings:
            raise NotImplementedError(
                f"a Q-Former with a {type(self.config).__name__} takes embeddings and owns none"
            )
        self.embeddings.word_embeddings = value

    @capture_outputs
    def forward(
        self,
        query_embeds: Tensor | None = None,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | list[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPoolingAndCrossAttentions:
        """Runs the Q-Former over L = Q + T rows.

        The argument order follows `Blip2QFormerModel`. The InstructBLIP classes of transformers
        use another order, so pass their arguments by name.

        Args:
            query_embeds: `[B, L, C]`, queries first, then embedded text. A batch of 1 is broadcast
                over the images. With `input_ids`, the queries only, `[B, Q, C]`.
            query_length: Q, the number of query rows; only these attend to the image. Default: all
                rows of `query_embeds`. 0: text only.
            attention_mask: `[B, L]` (1: real token), `[B, L, L]` (1: row may see column), or
                `[B, 1 or H, L, L]` (boolean, integer 0/1, or a float added to the scores).
            encoder_hidden_states: image tokens `[B, S, E]`, or one `[S_b, E]` per sample.
            encoder_attention_mask: `[B, S]` (1: real token), `[B]` integers (the number of real
                tokens per sample), or `[B, Q, S]` or `[B, 1 or H, Q, S]` as above.
            input_ids: token ids `[B, T]`, for a Q-Former with embeddings.
            position_ids: `[B, T]` or `[1, T]`, positions of `input_ids`; default 0 to T-1.
            kwargs: `output_attentions`, `output_hidden_states`, `return_dict` as in transformers;
                others are ignored.

        Returns:
            `last_hidden_state` `[B, L, C]`, `pooler_output` `[B, C]` (the first row), and on
            request `hidden_states`, `attentions` and `cross_attentions`. As in transformers,
            `attentions` lists the weights of every block in order, cross-attention included.

        Raises:
            ValueError: on shapes that do not match the config or each other.
        """
        hidden_states, query_length = self._embed(
            query_embeds, query_length, input_ids, position_ids
        )
        if isinstance(encoder_hidden_states, list | tuple):
            if encoder_attention_mask is not None:
                raise ValueError(
                    "encoder_attention_mask is not None beside a list of encoder_hidden_states: "
                    "the list's lengths are the mask, leave the mask out"
                )
            encoder_hidden_states, encoder_attention_mask = pad_ragged(
                encoder_hidden_states, self.config.encoder_hidden_size
            )
        batch = self._check_encoder(hidden_states, query_length, encoder_hidden_states)
        rows, device = hidden_states.shape[1], hidden_states.device
        heads = self.config.num_attention_heads
        mask = prepare_mask(
            attention_mask,
            batch=batch,
            heads=heads,
            rows=rows,
            keys=rows,
            name="attention_mask",
            device=device,
        )
        encoder_mask = None
        if encoder_hidden_states is not None and query_length > 0:
            encoder_hidden_states = encoder_hidden_states.to(hidden_states.dtype)
            encoder_mask = prepare_mask(
                encoder_attention_mask,
                batch=batch,
                heads=heads,
                rows=query_length,
                keys=encoder_hidden_states.shape[1],
                name="encoder_attention_mask",
                device=device,
            )
        output_attentions = kwargs.get("output_attentions", self.config.output_attentions)
        hidden_states = self.encoder(
            hidden_states,
            attention_mask=mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_mask,
            query_length=query_length,
            output_attentions=bool(output_attentions),
        ).last_hidden_state
        return BaseModelOutputWithPoolingAndCrossAttentions(
            last_hidden_state=hidden_states, pooler_output=hidden_states[:, 0]
        )

    def _embed(
        self,
        query_embeds: Tensor | None,
        query_length: int | None,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
    ) -> tuple[Tensor, int]:
        """The first layer's input `[B, L, C]`, and Q, the number of query rows in it."""
        if query_embeds is not None:
            _check_rows("query_embeds", query_embeds, self.config.hidden_size)
        if input_ids is not None:
            self._check_ids(input_ids, position_ids, query_embeds, query_length)
        elif query_embeds is None:
            raise ValueError("query_embeds is None: give embeddings (or input_ids where owned)")
        if query_length is None:
            query_length = 0 if query_embeds is None else query_embeds.shape[1]

        if self.has_embeddings or query_embeds is None:
            hidden_states = self.embeddings(
                input_ids=input_ids, position_ids=position_ids, query_embeds=query_embeds
            )
        else:
            query_embeds = query_embeds.to(input_dtype(self.layernorm, query_embeds))
            hidden_states = self.dropout(self.layernorm(query_embeds))

        rows = hidden_states.shape[1]
        if not 0 <= query_length <= rows:
            raise ValueError(f"query_length is {query_length}, but query_embeds has {rows} rows")
        if rows > query_length and not self.has_text:
            raise ValueError(
                f"{rows - query_length} of {rows} rows are text (query_length {query_length}), but "
                "this Q-Former has no text feed-forward networks: set use_qformer_text_input=True "
                "in its config"
            )
        return hidden_states, query_length

    def _check_ids(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        query_embeds: Tensor | None,
        query_length: int | None,
    ) -> None:
        if not self.has_embeddings:
            raise ValueError(
                f"input_ids given, but a Q-Former with a {type(self.config).__name__} owns no "
                "embeddings: embed the tokens outside and pass them in query_embeds"
            )
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            raise ValueError(
                f"input_ids has shape {list(input_ids.shape)}; expected [B, T], not empty"
            )
        table = self.config.max_position_embeddings
        if position_ids is None and input_ids.shape[1] > table:
            raise ValueError(
                f"input_ids holds {input_ids.shape[1]} tokens a row, but the position table ends "
                f"at {table} (max_position_embeddings): truncate the text"
            )
        batch, text = input_ids.shape
        if position_ids is not None and position_ids.shape not in ((batch, text), (1, text)):
            raise ValueError(
                f"position_ids has shape {list(position_ids.shape)}; expected [{batch}, {text}] or "
                f"[1, {text}], as input_ids"
            )
        queries = 0 if query_embeds is None else query_embeds.shape[1]
        if query_length not in (None, queries):
            raise ValueError(
                f"query_length is {query_length}, but beside input_ids query_embeds holds the "
                f"queries alone, here {queries}: leave query_length out"
            )
        if query_embeds is not None and query_embeds.shape[0] not in (1, batch):
            raise ValueError(
                f"query_embeds has batch {query_embeds.shape[0]} and input_ids batch {batch}: "
                "they must agree, or query_embeds have batch 1"
            )

    def _check_encoder(
        self, hidden_states: Tensor, query_length: int, encoder_hidden_states: Tensor | None
    ) -> int:
        """Checks the image tokens `[B, S, E]` and returns the batch size of the call."""
        batch = hidden_states.shape[0]
        if encoder_hidden_states is None:
            if query_length > 0:
                raise ValueError(
                    f"encoder_hidden_states is None, but {query_length} queries need image tokens "
                    "to attend to: give them, or query_length=0 for text alone"
                )
            return batch
        _check_rows("encoder_hidden_states", encoder_hidden_states, self.config.encoder_hidden_size)
        images = encoder_hidden_states.shape[0]
        if batch != images and 1 not in (batch, images):
            raise ValueError(
                f"encoder_hidden_states has batch {images} and the rows have batch {batch}: "
                "they must agree, or one of them be 1"
            )
        return max(batch, images) if query_length > 0 else batch


_HUB_ARGUMENTS = {
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
}


def _read_config(
    where: str | PathLike[str], kwargs: dict[str, Any]
) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """The saved config with overrides from `kwargs`, and the remaining `kwargs`."""
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS & kwargs.keys()}
    saved, _ = PreTrainedConfig.get_config_dict(where, **hub)
    model_type = saved.get("model_type")
    if model_type not in QFORMER_CONFIGS:
        raise ValueError(
            f"{str(where)!r} holds a model of type {model_type!r}, not one of "
            f"{sorted(QFORMER_CONFIGS)}; reach a Q-Former inside another model by loading that "
            "model with transformers and calling blip2fast.patch(model)"
        )
    config_class = QFORMER_CONFIGS[model_type]
    changes = {
        key: kwargs[key] for key in kwargs.keys() & config_class().to_dict().keys() - {"dtype"}
    }
    config = config_class.from_pretrained(where, **hub, **changes)
    return config, {key: value for key, value in kwargs.items() if key not in changes}


def _check_rows(name: str, states: Tensor, width: int) -> None:
    if not states.is_floating_point():
        raise ValueError(
            f"{name} holds {states.dtype}, expected floating-point states [B, tokens, {width}]; "
            "token ids go into input_ids=..., by name"
        )
    if states.ndim != 3 or states.shape[-1] != width or 0 in states.shape:
        shape = list(states.shape)
        what = "is empty" if 0 in shape else f"has shape {shape}"
        raise ValueError(f"{name} {what}; expected [B, tokens, {width}], here {shape}")
