"""Surrogates: regressors from a point (format indices) to loss, behind one interface.

`rbf` is the paper's: cubic radial basis functions with a linear tail (scipy). The tail has dim + 1 coefficients, so
below dim + 2 distinct points it cannot be fitted and a constant tail is used, which is logged. `mlp` is
scikit-learn's.
"""

from __future__ import annotations

import logging
import warnings
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
    """Cubic RBF interpolation through the last `most` points (solving costs n³: 0.6 s at 2,000, 20 s at 6,000)."""

    def __init__(self, most: int = 2000) -> None:
        self._most = most

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        from scipy.interpolate import RBFInterpolator

        x, y = x[-self._most :], y[-self._most :]
        self._columns = np.ptp(x, axis=0) > 0  # a constant column makes the system singular
        points, first = np.unique(x[:, self._columns], axis=0, return_index=True)
        dimension = int(self._columns.sum())
        tail = np.column_stack([np.ones(len(points)), points])
        degree = 1 if len(points) > dimension + 1 and np.linalg.matrix_rank(tail) == dimension + 1 else 0
        if degree == 0:
            log.warning(
                "rbf: %d evaluations cannot carry a linear tail in %d dimensions; a constant tail is used",
                len(points), dimension,
            )  # fmt: skip
        with warnings.catch_warnings():  # scipy warns of what was just logged
            warnings.simplefilter("ignore", UserWarning)
            self._model = RBFInterpolator(points.astype(float), y[first], kernel="cubic", degree=degree)

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

        network = MLPRegressor(
            hidden_layer_sizes=(64, 64), alpha=1e-2, max_iter=2000, tol=1e-5, random_state=self._seed, solver="lbfgs"
        )
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
