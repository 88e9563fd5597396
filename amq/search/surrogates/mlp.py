"""scikit-learn's multi-layer perceptron as a surrogate."""

from __future__ import annotations

import numpy as np

from amq.util.extras import needs


class MlpSurrogate:
    """A small multi-layer perceptron on standardised inputs and targets."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def fit(self, x: np.ndarray, y: np.ndarray) -> None:
        with needs("search", "--surrogate mlp"):
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
