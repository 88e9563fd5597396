"""Surrogates: regressors from a point (format indices) to loss, behind one interface.

`rbf` is the paper's: cubic radial basis functions with a linear tail (scipy). The tail has dim + 1 coefficients, so below
dim + 2 distinct points it cannot be fitted and a constant tail is used, which is logged. `mlp` is scikit-learn's.
"""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np

from amq.errors import AmqError

log = logging.getLogger(__name__)


class Surrogate(Protocol):
    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        """x: [n, variables], y: float [n]."""

    def predict(self, x: np.ndarray) -> np.ndarray:
        """x: [n, variables] → float [n]."""


class RbfSurrogate:
    """Cubic RBF interpolation. Beyond `neighbours` points each prediction uses its nearest ones only (cost is cubic)."""

    def __init__(self, neighbours: int = 2000) -> None:
        self._neighbours = neighbours

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        from scipy.interpolate import RBFInterpolator

        self._columns = np.ptp(x, axis=0) > 0  # a constant column makes the system singular
        points, first = np.unique(x[:, self._columns], axis=0, return_index=True)
        dimension = int(self._columns.sum())
        rank = np.linalg.matrix_rank(np.column_stack([np.ones(len(points)), points])) if len(points) > dimension else 0
        degree = 1 if rank == dimension + 1 else 0
        if degree == 0:
            log.warning(
                "rbf: %d evaluations cannot carry a linear tail in %d dimensions; a constant tail is used", len(points), dimension
            )
        neighbours = self._neighbours if len(points) > self._neighbours else None
        self._model = RBFInterpolator(points.astype(float), y[first], kernel="cubic", degree=degree, neighbors=neighbours)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._model(x[:, self._columns].astype(float))


class MlpSurrogate:
    """A small multi-layer perceptron on standardised inputs and targets."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        from sklearn.compose import TransformedTargetRegressor
        from sklearn.neural_network import MLPRegressor
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        network = MLPRegressor((64, 64), alpha=1e-2, max_iter=2000, tol=1e-5, random_state=self._seed, solver="lbfgs")
        self._model = TransformedTargetRegressor(make_pipeline(StandardScaler(), network), transformer=StandardScaler())
        self._model.fit(x.astype(float), y)

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self._model.predict(x.astype(float))


SURROGATES = ("rbf", "mlp")


def make_surrogate(name: str, seed: int) -> Surrogate:
    if name == "rbf":
        return RbfSurrogate()
    if name == "mlp":
        return MlpSurrogate(seed)
    raise AmqError(f"unknown surrogate {name!r}: expected one of {', '.join(SURROGATES)}")
