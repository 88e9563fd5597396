"""Surrogates: regressors from a point (format indices) to loss, behind one interface; one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from amq.util.lazy import Registry

if TYPE_CHECKING:
    import numpy as np


class Surrogate(Protocol):
    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """x: [n, variables], y: float [n]."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        """x: [n, variables] → float [n]."""


SURROGATES: Registry[Callable[[int], Surrogate]] = Registry(
    "surrogate",
    {"rbf": "amq.search.surrogates.rbf:RbfSurrogate", "mlp": "amq.search.surrogates.mlp:MlpSurrogate"},
)
"""Each is made with a seed."""
