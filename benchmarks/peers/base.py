"""What a peer is: another library's linear over quantized (or plain) weights, fed with cheap random weights.

A peer builds R linears of one shape whose contents are all distinct, multiplies one x with each of them once per `run`,
and knows what its first linear should have computed. Nothing here imports torch: a worker process
(`worker.py`) loads one library only, so that the others' thread pools do not disturb it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

GROUP_SIZE = 128
"""Weights per scale wherever the library lets us choose; ggml's types have blocks of their own."""


@dataclass(frozen=True)
class Product:
    """R = `count` linears [out_features, in_features] and an x of `tokens` rows, on `threads` threads."""

    out_features: int
    in_features: int
    tokens: int
    count: int
    threads: int
    seed: int = 0

    def random(self, *stream: int) -> np.random.Generator:
        """The random numbers of this problem, or of one part of it."""
        return np.random.Generator(np.random.SFC64([self.seed, *stream]))


class Runner(ABC):
    """The R linears, ready to run.

    reference: float32 [out_features, in_features]: what the library's own format says its first linear holds.
    detail: what else a reader of the result should know, such as a layout that the library chose.
    """

    reference: np.ndarray
    detail: str = ""

    @abstractmethod
    def run(self) -> None:
        """x times every linear, once each."""

    @abstractmethod
    def first(self) -> np.ndarray:
        """What the last `run` computed with the first linear: float32 [tokens, out_features]."""


class Peer(ABC):
    """One library in one of its formats.

    name: `library-format`.
    rival: the name of ours (`amq.formats.FORMATS`) that it is compared with; empty for unquantized baselines.
    """

    name: str
    rival: str

    @abstractmethod
    def unsupported_reason(self) -> str | None:
        """None where it can run here, else the reason; imports nothing."""

    @abstractmethod
    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of one linear's weight, before the library's own repacking where that pads."""

    @abstractmethod
    def build(self, problem: Product, x: np.ndarray) -> Runner:
        """x: float32 [tokens, in_features]."""


def random_scales(random: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 in [0.005, 0.015): no zero, nothing that overflows."""
    return (random.random(shape, dtype=np.float32) + np.float32(0.5)) * np.float32(0.01)


def missing_module(*names: str) -> str | None:
    """The reason why not all of these modules can be imported, without importing them."""
    from importlib.util import find_spec

    absent = [name for name in names if find_spec(name) is None]
    return f"no module named {', '.join(absent)}" if absent else None
