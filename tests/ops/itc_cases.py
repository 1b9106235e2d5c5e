"""The contrastive loss as defined, and features to compute it of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blip2fast.kernels.itc import reference
from blip2fast.kernels.itc.interface import LSE, Pairs, Weights

# of a loss's weights, and the features' norm: of 16,384 pairs gradients are below fp16's least
# number, of a scaled loss above its most; the sums over all pairs are in its range
GRADIENT_SIZES = {
    "many pairs": (2.0**-31, 4.0),
    "few pairs": (2.0**-14, 0.25),
    "a scaled loss": (2.0**13, 2.0**-8),
}


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


def check_gradient_of_size(kernels: Any, name: str, local: bool, device: str = "cpu") -> None:
    """The sweep's gradient in fp16 by the operators `kernels` against fp64, to two roundings."""
    (size, norm), (M, N, Q, D) = GRADIENT_SIZES[name], (9, 130, 3, 16)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    # in one direction, so that what vanished by itself would be seen in the sum
    image, text = (
        F.normalize(x + 1, dim=-1).mul(norm).half().to(device)
        for x in (drawn(M, Q, D), drawn(N, D))
    )
    temp = torch.tensor(0.07, device=device)
    rows, columns, _, _, sim, arg = kernels.itc_sweep(image, text, temp, None, None, None, 0, True)
    weights = [(drawn(3, count) * size).to(device) for count in (M, N)]
    sides = (rows[LSE].contiguous(), weights[0], columns[LSE].contiguous(), weights[1])
    found = kernels.itc_sweep_grad(image, text, temp, *sides, None, None, 0, local, sim, arg)
    wide = [x.double() for x in (image, text, temp, *sides)]
    two_sides = (Weights(wide[3], wide[4]), Weights(wide[5], wide[6]))
    saved = sim.double(), arg  # where queries are within rounding either may be the best
    exact = reference.sweep_grad(*wide[:3], Pairs(0, None, None), two_sides, local, saved)
    for x, y in zip(found[:2], exact[:2], strict=True):
        # each gradient rounded, the sum rounded, and the spacing of fp16 near 0
        allowed = torch.finfo(torch.float16).eps * y.abs().max() + 2**-24
        assert bool((x.double() - y).abs().max() <= allowed)
    # exponents of up to 230 in fp32
    torch.testing.assert_close(found[2].double(), exact[2], rtol=3e-5, atol=0)
