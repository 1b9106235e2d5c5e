"""Least squares with the terms that the mathematics has, and how far points are from the fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fit:
    """`cost(x) = sum of coefficients[i] * x ** powers[i]`.

    Attributes:
        powers: Of the size, ascending.
        coefficients: Of each.
        residual: The largest distance of a fitted point, relative to its cost.
    """

    powers: tuple[int, ...]
    coefficients: tuple[float, ...]
    residual: float

    @classmethod
    def of(cls, points: Mapping[int, float], powers: Sequence[int]) -> Fit:
        """Fit costs by size; relative distances are squared, so that small costs count as well.

        Raises:
            ValueError: as many points as terms, or fewer, which any fit would meet.
        """
        if len(points) <= len(powers):
            raise ValueError(
                f"{len(points)} points for {len(powers)} terms: give more, or the residual says "
                "nothing"
            )
        sizes, costs = (np.array(list(x), np.float64) for x in (points, points.values()))
        terms = np.stack([sizes**power for power in powers], 1)
        # columns of similar length: powers of a large size are far apart
        scaled = terms / costs[:, None]
        lengths = np.linalg.norm(scaled, axis=0)
        found = np.linalg.lstsq(scaled / lengths, np.ones(len(costs)), rcond=None)[0] / lengths
        residual = float(np.abs(terms @ found / costs - 1).max())
        return cls(tuple(powers), tuple(found.tolist()), residual)

    def at(self, size: float) -> float:
        """The cost at a size."""
        pairs = zip(self.coefficients, self.powers, strict=True)
        return sum(each * size**power for each, power in pairs)

    def distance(self, size: float, cost: float) -> float:
        """Of a point from the fit, relative to its cost."""
        return abs(self.at(size) / cost - 1)

    def as_dict(self) -> dict[str, Any]:
        """For a result file; `Fit(**)` takes it back."""
        return asdict(self)
