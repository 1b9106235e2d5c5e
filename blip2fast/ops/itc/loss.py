"""The image-text contrastive loss with its hard negatives, from one sweep over all pairs.

arXiv 2301.12597, section 3.1, as LAVIS trains it. Shapes: b images on this rank, N on all ranks,
Q queries, D feature width.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from blip2fast.kernels.cuda_needs import capability_of
from blip2fast.kernels.itc import noise, statistics
from blip2fast.kernels.itc.config import SAVE_BUDGET_BYTES
from blip2fast.kernels.itc.interface import (
    BEST_INDEX,
    LSE,
    NEGATIVE_INDEX,
    POSITIVE_COUNT,
    POSITIVE_LSE,
    POSITIVE_SUM,
    SUM,
    UNIFORM_INDEX,
    index_dtype,
)
from blip2fast.kernels.precision import wide_dtype
from blip2fast.ops.calls import ITCCall
from blip2fast.ops.collectives import (
    GradMode,
    exchange,
    gather_detached,
    gather_with_grad,
    rank,
    world_size,
)
from blip2fast.ops.dispatch import choose
from blip2fast.ops.itc.sweep import BACKENDS

Negatives = Literal["sample", "none"]
Side = tuple[Tensor, Tensor]


class ITCOutput(NamedTuple):
    """The contrastive loss of this rank's b pairs, and the sweep's other results.

    Attributes:
        loss: Scalar, fp32 (fp64 for fp64 features); only it carries a gradient.
        lse_i2t, lse_t2i: `[b]`, log-sum-exp of `similarity / temp` of image i with all texts, and
            of text i with all images.
        negative_image: `[b]` int64, the hard negative image of text i, as an index into the global
            batch; sampled from the softmax over the text's row, positives excluded.
        negative_text: `[b]` int64, the hard negative text of image i, sampled from the image's row.
        accuracy_i2t, accuracy_t2i: Scalars, fraction of rows whose top match is a positive.
        without_negative: `[b]` bool, true for a row without a negative (the whole batch is
            positive, or its similarities are NaN, and then so is the loss); its index is -1.
    """

    loss: Tensor
    lse_i2t: Tensor
    lse_t2i: Tensor
    negative_image: Tensor
    negative_text: Tensor
    accuracy_i2t: Tensor
    accuracy_t2i: Tensor
    without_negative: Tensor


def itc_loss(
    image_features: Tensor,
    text_features: Tensor,
    temp: Tensor,
    *,
    label_smoothing: float = 0.1,
    image_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    grad_mode: GradMode = "local",
    negatives: Negatives = "sample",
    generator: torch.Generator | None = None,
    philox: Tensor | None = None,
    legacy_epsilon: float = 0.0,
    save_budget_bytes: int = SAVE_BUDGET_BYTES,
    products: torch.dtype | None = None,
    impl: str = "auto",
) -> ITCOutput:
    """Symmetric cross-entropy over the global batch, and one hard negative per row.

    `sim = einsum("iqd,jd->ijq", image_features, all_text_features).amax(-1) / temp` and, on one
    rank without image ids, `(cross_entropy(sim, eye, s) + cross_entropy(sim.T, eye, s)) / 2`,
    without materialising `[b, N, Q]`, or `[b, N]` above `save_budget_bytes`. Image features never
    leave their rank: texts are gathered, and a text's row needs only a few statistics of each
    rank's images, merged through log-sum-exp.

    Every rank of the group must call it, with the same b and the same options.

    Args:
        image_features: `[b, Q, D]`, normalised over D; fp16, bf16, fp32 or fp64.
        text_features: `[b, D]`, likewise, of the same type.
        temp: Scalar temperature above 0; it gets a gradient. With several ranks, that is this
            rank's part of the gradient of the summed loss.
        label_smoothing: s, 0 to 1: a target is `(1 - s) * positives / count + s / N`.
        image_ids: `[b]` integers; pairs with the same id are positives of each other.
        group: The ranks whose pairs are each other's negatives; None: all.
        grad_mode: `"local"`: gathered features carry no gradient (as in LAVIS), so an image or a
            text gets its gradient from its own row alone. `"full"`: from all rows.
        negatives: `"sample"`, or `"none"`: indices are then -1 and `without_negative` true.
        generator: Draws the seed of the negatives; by default the device's own.
        philox: `[2]` int64 seed and offset (`ops.philox.philox_state`), instead of `generator`.
            Negatives then depend only on it and on the features: they are the same on every
            backend, up to rounding ties, and on any number of ranks that pass the same state.
        legacy_epsilon: Add this to every negative's softmax weight; the first LAVIS release: 1e-4.
        save_budget_bytes: Save similarities and query indices for the backward pass (5 bytes a
            pair) if they fit this budget; otherwise recompute them.
        products: Cast fp32 features to this dtype, fp16 or bf16, before the matmul, and gradients
            back to fp32. For normalised features fp16 is as precise as TF32: both have ten bits of
            mantissa, and no element is above 1. None: no cast.
        impl: `"auto"`, `"reference"`, `"chunked"`, `"triton"` or `"cuda"`.

    Returns:
        An `ITCOutput`.

    Raises:
        ValueError: a shape, type, device or option does not fit; or negatives are requested from a
            batch of 1 pair. A row whose ids leave it no negative is not an error, on any device.
        NotImplementedError: the requested backend does not support the call; says why.
    """
    _check_features(image_features, text_features, temp, image_ids, philox)
    _check_options(label_smoothing, grad_mode, negatives, legacy_epsilon, philox, generator)
    _check_products(products, image_features)
    b, Q, D = image_features.shape
    dtype, ranks = wide_dtype(image_features.dtype), world_size(group)
    N, first = b * ranks, rank(group) * b
    device = image_features.device
    call = ITCCall(
        images=b,
        texts=N,
        queries=Q,
        width=D,
        dtype=products or image_features.dtype,
        device=device.type,
        legacy_epsilon=legacy_epsilon,
        ids=image_ids is not None,
        gpu=device.index,
        capability=capability_of(device),
    )
    impl = choose("itc_loss", BACKENDS, call, impl)
    row_ids = column_ids = None
    if image_ids is not None:
        # kernels read ids with stride 1
        row_ids = image_ids.to(torch.int64).contiguous()
        column_ids = gather_detached(row_ids, group)
    sampling = negatives == "sample"
    if sampling:
        if N == 1:
            raise ValueError(
                "negatives: a batch of 1 pair has none; use a larger batch, or negatives='none'"
            )
        philox = _philox(generator, device) if philox is None else philox
    learning = torch.is_grad_enabled() and any(
        x.requires_grad for x in (image_features, text_features, temp)
    )
    pair_bytes = dtype.itemsize + index_dtype(Q).itemsize
    # an exported graph has symbolic sizes: it cannot test whether they fit
    save = learning and not torch.compiler.is_exporting()
    rows, columns, row_index, column_index, _, _ = torch.ops.blip2fast.itc_sweep(
        image_features,
        _gather_texts(text_features, group),
        temp.to(dtype).reshape(()),
        row_ids,
        column_ids,
        philox if sampling else None,
        first,
        grad_mode == "local",
        sampling and legacy_epsilon > 0,
        save and b * N * pair_bytes <= save_budget_bytes,
        products,
        impl,
    )
    by_image, by_text = (rows, row_index), _merge_ranks((columns, column_index), group)
    loss = (
        _cross_entropy(rows, label_smoothing, N) + _cross_entropy(by_text[0], label_smoothing, N)
    ) / 2
    with torch.no_grad():
        negative_text, negative_image = _negatives(
            (by_image, by_text), philox, N, first, legacy_epsilon if sampling else 0.0
        )
        return ITCOutput(
            loss=loss,
            lse_i2t=rows[LSE].detach(),
            lse_t2i=by_text[0][LSE].detach(),
            negative_image=negative_image,
            negative_text=negative_text,
            accuracy_i2t=_accuracy(row_index[BEST_INDEX], first, row_ids, column_ids),
            accuracy_t2i=_accuracy(by_text[1][BEST_INDEX], first, row_ids, column_ids),
            without_negative=(negative_image < 0) | (negative_text < 0),
        )


def _gather_texts(text: Tensor, group: ProcessGroup | None) -> Tensor:
    if world_size(group) == 1:
        return text
    # the parts of a text's gradient are summed across ranks, in fp32
    return gather_with_grad(text.to(wide_dtype(text.dtype)), group).to(text.dtype)


def _merge_ranks(columns: Side, group: ProcessGroup | None) -> Side:
    """Merge each rank's partial statistics into those of this rank's b texts over all images."""
    ranks = world_size(group)
    if ranks == 1:
        return columns
    values, index = (
        exchange(part.unflatten(1, (ranks, -1)).movedim(1, 0).contiguous(), group)
        for part in columns
    )
    return statistics.join(values, index)


def _cross_entropy(values: Tensor, smoothing: float, N: int) -> Tensor:
    on_positives = values[POSITIVE_SUM] * ((1 - smoothing) / values[POSITIVE_COUNT].detach())
    return (values[LSE] - on_positives - values[SUM] * (smoothing / N)).mean()


def _negatives(
    sides: tuple[Side, Side], philox: Tensor | None, N: int, first: int, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sampled negative of each row and of each column of this rank."""
    drawn = [index[NEGATIVE_INDEX] for _, index in sides]
    if epsilon > 0 and philox is not None:
        values = sides[0][0]
        coins = noise.coins(philox, first, values.shape[1], values.dtype)
        for k, (values, index) in enumerate(sides):
            # softmax + epsilon is a mixture of the softmax and a uniform distribution
            from_softmax = -torch.expm1(values[POSITIVE_LSE] - values[LSE])
            alike = epsilon * (N - values[POSITIVE_COUNT])
            kept = coins[k] * (from_softmax + alike) < from_softmax
            drawn[k] = torch.where(kept, drawn[k], index[UNIFORM_INDEX])
    return drawn[0], drawn[1]


def _accuracy(
    best: Tensor, first: int, row_ids: Tensor | None, column_ids: Tensor | None
) -> Tensor:
    if row_ids is None or column_ids is None:
        return (best == torch.arange(best.shape[0], device=best.device) + first).float().mean()
    return ((row_ids == column_ids[best.clamp(min=0)]) & (best >= 0)).float().mean()


def _philox(generator: torch.Generator | None, device: torch.device) -> Tensor:
    drawn = torch.randint(0, 2**63 - 1, (2,), generator=generator, device=device)
    drawn[1].zero_()
    return drawn


def _check_features(
    image: Tensor,
    text: Tensor,
    temp: Tensor,
    image_ids: Tensor | None,
    philox: Tensor | None,
) -> None:
    if image.dim() != 3 or 0 in image.shape:
        raise ValueError(
            f"image_features: expected [b, Q, D], none of them 0, got shape {tuple(image.shape)}"
        )
    b, _, D = image.shape
    if text.shape != (b, D):
        raise ValueError(
            f"text_features: expected [b, D] = {[b, D]} to go with image_features "
            f"{tuple(image.shape)}, got {tuple(text.shape)}"
        )
    if not image.is_floating_point() or image.dtype != text.dtype:
        raise ValueError(
            f"features: expected one floating type for both, got {image.dtype} for images and "
            f"{text.dtype} for texts"
        )
    if temp.numel() != 1 or not temp.is_floating_point():
        raise ValueError(
            f"temp: expected a floating-point scalar, got {temp.dtype} {tuple(temp.shape)}"
        )
    # a tensor with values on the host: elsewhere the check would wait for the device
    plain = type(temp) in (Tensor, nn.Parameter) and not torch.compiler.is_compiling()
    if plain and temp.device.type == "cpu" and float(temp.detach()) <= 0:
        raise ValueError(f"temp: expected above 0, got {float(temp.detach()):g}")
    if image_ids is not None and (image_ids.shape != (b,) or image_ids.is_floating_point()):
        raise ValueError(
            f"image_ids: expected {b} integers, got {image_ids.dtype} {tuple(image_ids.shape)}"
        )
    others = {"text_features": text, "temp": temp, "image_ids": image_ids, "philox": philox}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != image.device:
            raise ValueError(f"{name}: expected on {image.device}, got {tensor.device}")


def _check_options(
    label_smoothing: float,
    grad_mode: str,
    negatives: str,
    legacy_epsilon: float,
    philox: Tensor | None,
    generator: torch.Generator | None,
) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: expected 0 to 1, got {label_smoothing}")
    for name, value, known in (
        ("grad_mode", grad_mode, get_args(GradMode)),
        ("negatives", negatives, get_args(Negatives)),
    ):
        if value not in known:
            raise ValueError(f"{name}: expected one of {list(known)}, got {value!r}")
    if legacy_epsilon < 0:
        raise ValueError(f"legacy_epsilon: expected 0 or more, got {legacy_epsilon}")
    if philox is not None and (philox.shape != (2,) or philox.dtype != torch.int64):
        raise ValueError(
            f"philox: expected [2] int64, seed and offset, got {philox.dtype} {tuple(philox.shape)}"
        )
    if philox is not None and generator is not None:
        raise ValueError("generator: has no use beside philox, which is the seed; pass one of them")


def _check_products(products: torch.dtype | None, features: Tensor) -> None:
    if products is None:
        return
    if products not in (torch.float16, torch.bfloat16) or features.dtype != torch.float32:
        raise ValueError(
            f"products: expected None, or torch.float16 or torch.bfloat16 with fp32 features; got "
            f"{products} with {features.dtype} features"
        )


def itc_loss_and_grads(
    image_features: Tensor, text_features: Tensor, temp: Tensor, **options: object
) -> tuple[ITCOutput, Tensor, Tensor, Tensor]:
    """The loss and its gradients with respect to the features, in one call.

    For batches that do not fit the encoders' memory: encode in chunks under `no_grad`, call this
    on all features, then re-encode each chunk and call `features.backward(gradient)` (Gao et
    al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021).

    Args:
        image_features, text_features, temp: As for `itc_loss`; treated as leaves, so nothing is
            backpropagated past them.
        options: As for `itc_loss`.

    Returns:
        The output, detached, and the loss's gradients `[b, Q, D]`, `[b, D]` and of the
        temperature, in the types of the inputs.
    """
    leaves = [x.detach().requires_grad_() for x in (image_features, text_features, temp)]
    with torch.enable_grad():
        output = itc_loss(*leaves, **options)  # type: ignore[arg-type]
        d_image, d_text, d_temp = torch.autograd.grad(output.loss, leaves)
    return output._replace(loss=output.loss.detach()), d_image, d_text, d_temp


class ITCLoss(nn.Module):
    """`itc_loss` with a learned temperature.

    Args:
        label_smoothing, grad_mode, impl: As for `itc_loss`.
        initial_temp: Initial value of the learned temperature.

    Attributes:
        temp: Scalar parameter, fp32.
    """

    def __init__(
        self,
        label_smoothing: float = 0.1,
        grad_mode: GradMode = "local",
        initial_temp: float = 0.07,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if initial_temp <= 0:
            raise ValueError(f"initial_temp: expected above 0, got {initial_temp}")
        self.label_smoothing, self.grad_mode, self.impl = label_smoothing, grad_mode, impl
        self.temp = nn.Parameter(torch.tensor(initial_temp))

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        image_ids: Tensor | None = None,
        negatives: Negatives = "sample",
        group: ProcessGroup | None = None,
    ) -> ITCOutput:
        """The loss of normalised features `[b, Q, D]` and `[b, D]`; see `itc_loss`."""
        return itc_loss(
            image_features,
            text_features,
            self.temp,
            label_smoothing=self.label_smoothing,
            image_ids=image_ids,
            group=group,
            grad_mode=self.grad_mode,
            negatives=negatives,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}, grad_mode={self.grad_mode!r}"
