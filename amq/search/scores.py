"""How good a predictor is: RMSE, Spearman and Kendall between two vectors of one length."""

from __future__ import annotations

import numpy as np


def quality(true: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """true, predicted: float [n] each (a column [n, 1] is refused: it would broadcast).

    Correlations of constants are 0.
    """
    from scipy.stats import kendalltau, spearmanr

    if true.ndim != 1 or true.shape != predicted.shape:
        raise ValueError(f"expected two vectors of one length, got {true.shape} and {predicted.shape}")
    constant = len(true) < 2 or np.ptp(true) == 0 or np.ptp(predicted) == 0
    return {
        "rmse": float(np.sqrt(np.mean((true - predicted) ** 2))),
        "spearman": 0.0 if constant else float(spearmanr(true, predicted).statistic),
        "kendall": 0.0 if constant else float(kendalltau(true, predicted).statistic),
    }
