"""The paper's surrogate: cubic radial basis functions with a linear tail (scipy).

The tail has dim + 1 coefficients, so below dim + 2 distinct points it cannot be fitted and a constant tail is used,
which is logged.
"""

from __future__ import annotations

import logging
import warnings

import numpy as np

from amq.util.extras import needs

log = logging.getLogger(__name__)

MOST = 2000
"""Points that are interpolated, the last ones: solving costs n³, 0.6 s at 2,000 and 20 s at 6,000."""


class RbfSurrogate:
    """Cubic RBF interpolation; nothing in it is random."""

    def __init__(self, seed: int) -> None:
        pass

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        with needs("search", "--surrogate rbf"):
            from scipy.interpolate import RBFInterpolator

        x, y = x[-MOST:], y[-MOST:]
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
