"""Stage 1 written from the paper on transformers' own modules: six separate, padded passes.

The oracle of the tests: slow, obvious, and sharing no code with the package but the weights.
Dropout off, one process.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Blip2QFormerModel

from blip2fast.stage1.model import Blip2Stage1


class TextbookStage1(nn.Module):
    """The same function as `Blip2Stage1`, from a copy of its weights."""

    def __init__(self, model: Blip2Stage1) -> None:
        super().__init__()
        self.config = model.config
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(p.detach().clone())
                for name, p in model.named_parameters()
                if not name.startswith("qformer.")
            }
        )
        self.qformer = Blip2QFormerModel(model.config.qformer_config())
        self.qformer.load_state_dict(model.qformer.state_dict())
        self.to(next(model.parameters()).dtype).eval()

    def w(self, name: str) -> Tensor:
        return self.weights[name.replace(".", "/")]

    def twin(self, name: str) -> Tensor:
        """The parameter that the model has under this name."""
        if name.startswith("qformer."):
            return self.qformer.get_parameter(name.removeprefix("qformer."))
        return self.w(name)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.w(f"{name}.weight"), self.w(f"{name}.bias"))

    def embed(self, ids: Tensor) -> Tensor:
        words = F.embedding(ids, self.w("embeddings.word_embeddings.weight"))
        return words + self.w("embeddings.position_embeddings.weight")[: ids.shape[1]]

    def image_pass(self, tokens: Tensor) -> Tensor:
        queries = self.w("query_tokens").expand(len(tokens), -1, -1)
        return self.qformer(query_embeds=queries, encoder_hidden_states=tokens).last_hidden_state

    def text_pass(self, ids: Tensor, mask: Tensor) -> Tensor:
        output = self.qformer(query_embeds=self.embed(ids), query_length=0, attention_mask=mask)
        return output.last_hidden_state

    def joint_pass(self, tokens: Tensor, ids: Tensor, mask: Tensor, causal: bool) -> Tensor:
        B, T = ids.shape
        Q = self.config.num_query_tokens
        queries = self.w("query_tokens").expand(B, -1, -1)
        visible = torch.cat([mask.new_ones(B, Q), mask], dim=1)
        if causal:
            square = torch.ones(Q + T, Q + T, dtype=torch.bool, device=mask.device)
            square[:Q, Q:] = False
            for t in range(T):
                square[Q + t, Q + t + 1 :] = False
            visible = visible[:, None, None, :].bool() & square
        return self.qformer(
            query_embeds=torch.cat([queries, self.embed(ids)], dim=1),
            query_length=Q,
            attention_mask=visible,
            encoder_hidden_states=tokens,
        ).last_hidden_state

    def forward(
        self,
        image_embeds: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor | None = None,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        B, Q = len(image_embeds), self.config.num_query_tokens
        smoothing = self.config.label_smoothing
        eps = self.config.ln_vision_eps
        tokens = F.layer_norm(
            image_embeds,
            image_embeds.shape[-1:],
            self.w("ln_vision.weight"),
            self.w("ln_vision.bias"),
            eps,
        )

        image_features = F.normalize(
            self.linear(self.image_pass(tokens), "vision_projection"), dim=-1
        )
        cls = self.text_pass(input_ids, attention_mask)[:, 0]
        text_features = F.normalize(self.linear(cls, "text_projection"), dim=-1)
        loss_itc = self.contrast(image_features, text_features, image_ids, smoothing)

        if negatives is None:
            negatives = self.drawn_negatives(image_features, text_features)
        negative_image, negative_text = negatives
        matching = []
        for images, texts in [
            (torch.arange(B), torch.arange(B)),
            (negative_image, torch.arange(B)),
            (torch.arange(B), negative_text),
        ]:
            states = self.joint_pass(tokens[images], input_ids[texts], attention_mask[texts], False)
            matching.append(self.linear(states[:, :Q], "itm_head").mean(dim=1))
        labels = torch.tensor([1] * B + [0] * 2 * B, device=tokens.device)
        loss_itm = F.cross_entropy(torch.cat(matching), labels)

        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.config.bos_token_id
        text = self.joint_pass(tokens, decoder_ids, attention_mask, True)[:, Q:]
        hidden = F.gelu(self.linear(text, "lm_head.transform.dense"))
        hidden = F.layer_norm(
            hidden,
            hidden.shape[-1:],
            self.w("lm_head.transform.LayerNorm.weight"),
            self.w("lm_head.transform.LayerNorm.bias"),
            self.config.layer_norm_eps,
        )
        logits = hidden @ self.w("embeddings.word_embeddings.weight").T + self.w("lm_head.bias")
        log_p = logits[:, :-1].log_softmax(-1)
        target = decoder_ids[:, 1:]
        nll = -log_p.gather(-1, target[..., None])[..., 0]
        per_token = (1 - smoothing) * nll - smoothing * log_p.mean(-1)
        real = attention_mask[:, 1:].bool()
        loss_itg = per_token[real].sum() / real.sum()
        return {
            "loss": loss_itc + loss_itm + loss_itg,
            "loss_itc": loss_itc,
            "loss_itm": loss_itm,
            "loss_itg": loss_itg,
        }

    def contrast(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_ids: Tensor | None,
        smoothing: float,
    ) -> Tensor:
        B = len(image_features)
        ids = torch.arange(B) if image_ids is None else image_ids
        positive = (ids[:, None] == ids[None, :]).to(image_features)
        target = (1 - smoothing) * positive / positive.sum(1, keepdim=True) + smoothing / B
        both = self.similarities(image_features, text_features)
        return -(target * both.log_softmax(-1)).sum(-1).mean()

    def similarities(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        # every other feature is a constant to the one whose row it stands in
        i2t = torch.einsum("iqd,jd->ijq", image_features, text_features.detach()).amax(-1)
        t2i = torch.einsum("jd,iqd->jiq", text_features, image_features.detach()).amax(-1)
        return torch.stack([i2t, t2i]) / self.w("temp")

    @torch.no_grad()
    def drawn_negatives(
        self, image_features: Tensor, text_features: Tensor
    ) -> tuple[Tensor, Tensor]:
        """An image for each text and a text for each image, by their similarity, never its own."""
        i2t, t2i = self.similarities(image_features, text_features).float().softmax(-1) + 1e-4
        image, text = (
            torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0] for weights in (t2i, i2t)
        )
        return image, text
