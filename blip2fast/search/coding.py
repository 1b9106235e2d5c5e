"""Small codes of image features, from which an upper bound of every similarity is read.

The similarity of an image and a text is the largest product of one of its Q query features with the
text's feature (paper, section 3.1). To compute it for all images reads all features. A code keeps
of each query feature f, minus the mean of that query over the images, its coordinates c on the P
principal axes as 8-bit integers, and one more, r, the length of what the axes leave out. For a text
t with coordinates a on the axes and a rest of length |t'|

    f . t  <=  mean . t + c . a + r |t'| + slack        (Cauchy-Schwarz on the rest)

where the slack bounds what rounding c and a to 8 bits loses. So the bound is one product of 8-bit
integers of width P + 1, whose sums are exact: the rest is a coordinate like the others.

Shapes: N images, Q queries, D feature width, P axes, W = P + 1 code width, B texts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 127  # of an 8-bit code or weight
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
        steps: [W] fp32, value of one unit of each coordinate; the last of the rest.
    """

    mean: Tensor
    axes: Tensor
    steps: Tensor

    @classmethod
    def fit(cls, features: Tensor, width: int) -> Basis:
        """The basis of a sample of features, [n, Q, D].

        Args:
            features: unit-normalised.
            width: W, at least 2; no more than D + 1 is used.
        """
        if width < 2:
            raise ValueError(f"a code of width {width}: expected at least 2")
        features = features.float()
        mean = features.mean(0)
        centred = (features - mean).flatten(0, 1)
        _, vectors = torch.linalg.eigh((centred.T @ centred).double())
        axes = vectors.flip(1)[:, : min(width - 1, features.shape[2])].float().contiguous()
        coordinates = centred @ axes
        rest = _rest(centred, coordinates, axes)
        # room for images outside of the sample; what exceeds it makes the bound looser, not wrong
        largest = torch.cat([coordinates.abs().amax(0), rest.amax()[None]]) * 1.2
        return cls(mean, axes, (largest / _LARGEST).clamp_min(_LEAST))

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of features [n, Q, D].

        Returns:
            codes: [n, Q, W] int8.
            losses: [3] fp32: the longest error of the coordinates, how much the longest rest
                exceeds its code, and the longest vector of coordinates, in units.
        """
        centred = features.float() - self.mean
        coordinates = centred @ self.axes
        rest = _rest(centred, coordinates, self.axes)
        rounded = (coordinates / self.steps[:-1]).round().clamp(-_LARGEST, _LARGEST)
        error = (coordinates - rounded * self.steps[:-1]).norm(dim=-1).amax()
        units = (rest / self.steps[-1]).ceil().clamp_max(_LARGEST)
        excess = (rest - units * self.steps[-1]).amax().clamp_min(0)
        codes = torch.cat([rounded, units[..., None]], -1).to(torch.int8)
        return codes, torch.stack([error, excess, rounded.norm(dim=-1).amax()])


def _rest(centred: Tensor, coordinates: Tensor, axes: Tensor) -> Tensor:
    """Length of what the axes leave out of each vector, rounded up."""
    return _length(centred - coordinates @ axes.T) + _ROUNDING


def bounds_of_texts(basis: Basis, codes: Tensor, losses: Tensor, texts: Tensor) -> Tensor:
    """Upper bounds of the similarity, max over Q of f . t.

    Args:
        codes, losses: from `Basis.encode`, of N images.
        texts: [B, D].

    Returns:
        [B, N] fp32; no similarity of stored features exceeds its bound.
    """
    N, Q, W = codes.shape
    texts = texts.float()
    exact, across = _weights(basis, texts)
    unit = _unit(exact.abs().amax(1))
    weights, lost = _rounded(exact, unit, losses)
    slack = lost + losses[0] * _length(texts @ basis.axes) + losses[1] * across + _ROUNDING
    # [Q, B]; in units, rounded up
    offset = (basis.mean @ texts.T / unit).ceil().to(torch.int32)
    columns = weights.T.contiguous()
    bounds = torch.empty(len(texts), N)
    for start in range(0, N, _BLOCK):
        block = codes[start : start + _BLOCK]
        # one product reads the codes once for all texts
        sums = torch._int_mm(block.reshape(-1, W), columns).view(len(block), Q, -1)
        best = sums.add_(offset).amax(1)
        bounds[:, start : start + len(block)] = (best * unit + slack).T
    return bounds


def bounds_of_images(basis: Basis, codes: Tensor, losses: Tensor, images: Tensor) -> Tensor:
    """Upper bounds of the similarity of images, mean over Q of f_q . h_q.

    Args:
        codes, losses: from `Basis.encode`, of N images.
        images: [B, Q, D].

    Returns:
        [B, N] fp32.
    """
    N, Q, _ = codes.shape
    flat = codes.reshape(N, -1)
    bounds = torch.empty(len(images), N)
    for row, image in enumerate(images.float()):
        exact, across = _weights(basis, image)
        # one unit for all queries, whose products are summed
        unit = _unit(exact.abs().amax())
        weights, lost = _rounded(exact, unit.expand(Q), losses)
        slack = lost + losses[0] * _length(image @ basis.axes) + losses[1] * across + _ROUNDING
        constant = slack.sum() + (basis.mean * image).sum()
        column = weights.flatten()[:, None].contiguous()
        for start in range(0, N, _BLOCK):
            sums = torch._int_mm(flat[start : start + _BLOCK], column).squeeze(1)
            bounds[row, start : start + len(sums)] = (sums * unit + constant) / Q
    return bounds


def _weights(basis: Basis, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of codes for directions [B, D], [B, W], and the length of each one's rest, [B]."""
    along = directions @ basis.axes
    across = _length(directions - along @ basis.axes.T) + _ROUNDING
    return torch.cat([along, across[:, None]], 1) * basis.steps, across


def _unit(largest: Tensor) -> Tensor:
    """The value of a unit of weights up to `largest`, which the largest does not exceed."""
    return (largest * (1 + _ROUNDING) / _LARGEST).clamp_min(_LEAST)


def _rounded(exact: Tensor, unit: Tensor, losses: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [B, W] in units [B], int8, and a bound of what their rounding loses, [B]."""
    wanted = exact / unit[:, None]
    # of the rest, rounding up loses nothing
    weights = torch.cat([wanted[:, :-1].round(), wanted[:, -1:].ceil()], 1)
    weights = weights.clamp(-_LARGEST, _LARGEST)
    lost = _length((wanted - weights)[:, :-1]) * losses[2] * unit
    return weights.to(torch.int8), lost


def _length(vectors: Tensor) -> Tensor:
    """Length of each vector, rounded up."""
    return vectors.norm(dim=-1) * (1 + _ROUNDING)
