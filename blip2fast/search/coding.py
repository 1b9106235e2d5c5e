"""Small codes of image features, from which an upper bound of every similarity is read.

The similarity of an image and a text is the largest product of one of its Q query features with the
text's feature (paper, section 3.1). To compute it for all images reads all features. A code keeps
of each query feature f, minus the mean of that query over the images, its coordinates c on the P
principal axes as 8-bit integers, and two lengths: r of what the axes leave out, and e of what the
rounding of c loses. For a text with coordinates a on the axes and a rest of length |t'|

    f . t  <=  mean . t + c . a + r |t'| + e |a|        (Cauchy-Schwarz, twice)

So the bound is one product of 8-bit integers of width P + 2, whose sums are exact: the lengths are
coordinates like the others. A small slack bounds what rounding a loses; a fine bound takes a in two
halves of 8 bits, for twice the products.

Shapes: N images, Q queries, D feature width, P axes, W = P + 2 code width, B texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 127  # of an 8-bit code or weight
_FINE = 127 * 128  # of a weight in two halves, 128 * high + low
# products of 16-bit features summed in fp32, and the norms below
_ROUNDING = 1e-5
_LEAST = 1e-9  # of a unit
# images per block: the products of a block stay in a core's cache
_BLOCK = 4096


@dataclass(frozen=True)
class Basis:
    """What codes are made with.

    Attributes:
        mean: [Q, D] fp32, the mean feature of each query.
        axes: [D, P] fp32, orthonormal.
        steps: [W] fp32, value of one unit of each coordinate and of the two lengths.
    """

    mean: Tensor
    axes: Tensor
    steps: Tensor

    @classmethod
    def fit(cls, features: Tensor, width: int) -> Basis:
        """The basis of a sample of features, [n, Q, D].

        Args:
            features: unit-normalised.
            width: W, at least 3; no more than D + 2 is used.
        """
        if width < 3:
            raise ValueError(f"a code of width {width}: expected at least 3")
        features = features.float()
        mean = features.mean(0)
        centred = (features - mean).flatten(0, 1)
        _, vectors = torch.linalg.eigh((centred.T @ centred).double())
        axes = vectors.flip(1)[:, : min(width - 2, features.shape[2])].float().contiguous()
        coordinates = centred @ axes
        steps = _steps(coordinates)
        rest = _length(centred - coordinates @ axes.T) + _ROUNDING
        _, error = _rounded_coordinates(coordinates, steps)
        # a clipped coordinate loses many times what rounding does
        lengths = torch.stack([rest.amax(), 10 * error.amax()])
        return cls(mean, axes, torch.cat([steps, _steps(lengths[None])]))

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of features [n, Q, D].

        Returns:
            codes: [n, Q, W] int8.
            losses: [3] fp32: how much the longest of either length exceeds its code, and the
                longest vector of coordinates, in units.
        """
        centred = features.float() - self.mean
        coordinates = centred @ self.axes
        rest = _length(centred - coordinates @ self.axes.T) + _ROUNDING
        rounded, error = _rounded_coordinates(coordinates, self.steps[:-2])
        lengths = torch.stack([rest, error], -1)
        units = (lengths / self.steps[-2:]).ceil().clamp_max(_LARGEST)
        excess = (lengths - units * self.steps[-2:]).flatten(0, -2).amax(0).clamp_min(0)
        codes = torch.cat([rounded, units], -1).to(torch.int8)
        return codes, torch.cat([excess, rounded.norm(dim=-1).amax()[None]])


def _steps(values: Tensor) -> Tensor:
    """A unit for each column of values, with room for images outside of the sample.

    What exceeds it makes the bound of its own image looser, not wrong.
    """
    return (values.abs().amax(0) * 1.2 / _LARGEST).clamp_min(_LEAST)


def _rounded_coordinates(coordinates: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates in units, rounded, and the length of what that loses."""
    rounded = (coordinates / steps).round().clamp(-_LARGEST, _LARGEST)
    return rounded, _length(coordinates - rounded * steps) + _ROUNDING


def bounds_of_texts(
    basis: Basis, codes: Tensor, losses: Tensor, texts: Tensor, fine: bool = True
) -> Tensor:
    """Upper bounds of the similarity, max over Q of f . t.

    Args:
        codes, losses: from `Basis.encode`, of N images.
        texts: [B, D].
        fine: tighter, for twice the products.

    Returns:
        [B, N] fp32; no similarity of stored features exceeds its bound.
    """
    N, Q, W = codes.shape
    texts = texts.float()
    exact, along, across = _weights(basis, texts)
    unit = _unit(exact.abs().amax(1), fine)
    halves, lost = _rounded(exact, unit, losses)
    slack = lost + losses[0] * across + losses[1] * along + _ROUNDING
    # [Q, B]; in units, rounded up
    offset = (basis.mean @ texts.T / unit).ceil().to(torch.int32)
    high, low = (half.T.contiguous() for half in halves)
    bounds = torch.empty(len(texts), N)
    for start in range(0, N, _BLOCK):
        block = codes[start : start + _BLOCK]
        rows = block.reshape(-1, W)
        sums = torch._int_mm(rows, low)
        if fine:
            # of one column each: a product of two takes longer than both
            sums.add_(torch._int_mm(rows, high), alpha=128)
        best = sums.view(len(block), Q, -1).add_(offset).amax(1)
        bounds[:, start : start + len(block)] = (best * unit + slack).T
    return bounds


def bounds_of_images(
    basis: Basis, codes: Tensor, losses: Tensor, images: Tensor, fine: bool = True
) -> Tensor:
    """Upper bounds of the similarity of images, mean over Q of f_q . h_q.

    Args:
        codes, losses: from `Basis.encode`, of N images.
        images: [B, Q, D].
        fine: as in `bounds_of_texts`.

    Returns:
        [B, N] fp32.
    """
    N, Q, _ = codes.shape
    flat = codes.reshape(N, -1)
    bounds = torch.empty(len(images), N)
    for row, image in enumerate(images.float()):
        exact, along, across = _weights(basis, image)
        # one unit for all queries, whose products are summed
        unit = _unit(exact.abs().amax(), fine)
        halves, lost = _rounded(exact, unit.expand(Q), losses)
        slack = lost + losses[0] * across + losses[1] * along + _ROUNDING
        constant = slack.sum() + (basis.mean * image).sum()
        columns = torch.stack([half.flatten() for half in (halves if fine else halves[1:])], 1)
        for start in range(0, N, _BLOCK):
            sums = torch._int_mm(flat[start : start + _BLOCK], columns).double()
            products = sums[:, 0] * 128 + sums[:, 1] if fine else sums[:, 0]
            bounds[row, start : start + len(sums)] = (products * unit + constant) / Q
    return bounds


def _weights(basis: Basis, directions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, W] of codes for directions [B, D], and their lengths on and off the axes."""
    coordinates = directions @ basis.axes
    along = _length(coordinates) + _ROUNDING
    across = _length(directions - coordinates @ basis.axes.T) + _ROUNDING
    weights = torch.cat([coordinates, across[:, None], along[:, None]], 1) * basis.steps
    return weights, along, across


def _unit(largest: Tensor, fine: bool) -> Tensor:
    """The value of a unit of weights up to `largest`, which the largest does not exceed."""
    return (largest * (1 + _ROUNDING) / (_FINE if fine else _LARGEST)).clamp_min(_LEAST)


def _rounded(exact: Tensor, unit: Tensor, losses: Tensor) -> tuple[list[Tensor], Tensor]:
    """Weights [B, W] in units [B], high and low halves as int8, and what rounding loses, [B].

    Weights up to 127 are their low half.
    """
    wanted = exact / unit[:, None]
    # of lengths, rounding up loses nothing
    weights = torch.cat([wanted[:, :-2].round(), wanted[:, -2:].ceil()], 1).clamp(-_FINE, _FINE)
    lost = _length((wanted - weights)[:, :-2]) * losses[2] * unit
    if weights.abs().amax() <= _LARGEST:
        high = torch.zeros_like(weights)
    else:
        high = torch.floor((weights + 64) / 128)
    return [high.to(torch.int8), (weights - 128 * high).to(torch.int8)], lost


def _length(vectors: Tensor) -> Tensor:
    """Length of each vector, rounded up."""
    return vectors.norm(dim=-1) * (1 + _ROUNDING)
