"""Loss as a power of the number of parameters (Kaplan et al. 2020, equation 1.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """loss = factor * size ** -exponent, fitted between two sizes; in parameters and nats."""

    factor: float
    exponent: float
    smallest: float
    largest: float

    @classmethod
    def fit(cls, sizes: Sequence[float], losses: Sequence[float]) -> Self:
        """Least squares on the logarithms of two or more points."""
        slope, intercept = np.polyfit(np.log(sizes), np.log(losses), 1)
        return cls(float(np.exp(intercept)), -float(slope), min(sizes), max(sizes))

    def __call__(self, sizes: Sequence[float] | np.ndarray) -> np.ndarray:
        return self.factor * np.asarray(sizes, dtype=float) ** -self.exponent
