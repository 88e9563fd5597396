"""The CUDA engine on a CPU, through the shim: every family's logits are those of the native engine's exact mode, within
the roundings of 16 bits, whatever shares a pass.

Launches on a GPU, graphs and speed are not here: benchmarks/gpu has them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache as remember
from pathlib import Path

import pytest
import torch
from cuda_shim.build import build_shim, sanitizer_environment
from helpers.checkpoints import tiny_checkpoint
from helpers.cuda_on_cpu import BUILD, agrees, cuda_library, open_on_cpu
from helpers.engine_cases import CASES
from helpers.engines import last_rows, text
from helpers.nested import run_nested
from torch import Tensor

from amq.errors import AmqError
from amq.kernels.cuda_calls import Call
from amq.runtime.cuda_engine import CudaEngine
from amq.runtime.engine import Segment
from amq.runtime.families import FAMILIES
from amq.runtime.native_engine import open_native
from amq.runtime.settings import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 70
"""More than a page, and than the windows of most cases."""


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cuda_library(tmp_path_factory.mktemp("shim")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @remember
    def made(name: str) -> Path:
        return tiny_checkpoint(CASES[name](), tmp_path_factory.mktemp("case") / name)

    return made


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float16, layers: int = 2) -> bool:
    """Root mean squares over all logits."""
    error = (found - expected).double().square().mean().sqrt()
    return bool(error <= agrees(layers, dtype) * expected.double().square().mean().sqrt())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_native_engine(folder: Callable[[str], Path], name: str) -> None:
    """Of a prompt in one pass, and of tokens decoded one by one behind it."""
    tokens = text(LENGTH)
    expected = open_native(folder(name), "fp32", context=256).all_logits(tokens)
    engine = open_on_cpu(folder(name))
    split = LENGTH - 8
    slot = engine.open(tokens, 0)
    found = [engine.forward([Segment(slot, tokens[:split])])]
    found += [engine.forward([Segment(slot, [token])]).clone() for token in tokens[split:]]
    engine.close(slot)
    assert close(torch.cat(found), expected[split - 1 :])
