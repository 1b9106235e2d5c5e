"""The contrastive loss as defined, and features to compute it of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def make_features(
    b: int, Q: int, D: int, dtype: torch.dtype = torch.float64, seed: int = 0, temp: float = 0.07
) -> tuple[Tensor, Tensor, Tensor]:
    """Random unit vectors, a text near one of its image's queries; leaves that want gradients."""
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(b, Q, D, generator=generator, dtype=torch.float64), dim=-1)
    own = image[torch.arange(b), torch.arange(b) % Q]
    text = torch.randn(b, D, generator=generator, dtype=torch.float64) / D**0.5 + 0.5 * own
    text = F.normalize(text, dim=-1)
    scalar = torch.tensor(temp, dtype=torch.promote_types(dtype, torch.float32))
    image, text = image.to(dtype), text.to(dtype)
    return image.requires_grad_(), text.requires_grad_(), scalar.requires_grad_()


def definition(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    ids: Tensor | None = None,
    grad_mode: str = "local",
    label_smoothing: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """LAVIS's formula on one process, in the type of the features, with PyTorch's autograd.

    Returns:
        The loss, and the similarities over temperature, images by texts and texts by images.
    """
    b = len(image)
    ids = torch.arange(b, device=image.device) if ids is None else ids
    positive = (ids[:, None] == ids[None, :]).to(image.dtype)
    target = (1 - label_smoothing) * positive / positive.sum(1, keepdim=True) + label_smoothing / b
    image_all, text_all = (image, text) if grad_mode == "full" else (image.detach(), text.detach())
    i2t = torch.einsum("iqd,jd->ijq", image, text_all).max(-1).values / temp
    t2i = torch.einsum("jd,iqd->jiq", text, image_all).max(-1).values / temp
    loss = -(target * (i2t.log_softmax(1) + t2i.log_softmax(1))).sum(1).mean() / 2
    return loss, i2t, t2i
