"""The CUDA engine on rotated checkpoints, on a CPU through the shim: the logits of the native engine's exact mode."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.cuda_on_cpu import agrees, cuda_library, open_on_cpu
from helpers.engine_cases import CASES
from helpers.engine_cases_rotated import ROTATED
from helpers.engines import text
from torch import Tensor

from amq.packing import PreparedWeight, dequantize
from amq.rotation import rotate
from amq.runtime.cuda_engine import CudaEngine
from amq.runtime.decoder_spec import Mixture
from amq.runtime.engine import Segment
from amq.runtime.native_engine import open_native

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH, LAST = 28, 4
"""Of a prompt, and of what is decoded behind it one by one."""


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with cuda_library(tmp_path_factory.mktemp("shim")):
        yield


def made(name: str, folder: Path) -> Path:
    build, rotated = ROTATED[name]
    return tiny_checkpoint(build(), folder / "model", rotated=rotated)


def errors(engine: CudaEngine, expected: Tensor) -> Tensor:
    """Of each row of the prompt and of what is decoded: root mean squares, relative to the row's."""
    tokens = text(LENGTH)
    slot = engine.open(tokens, 0)
    found = [engine.forward([Segment(slot, tokens[:-LAST], every=True)]).clone()]
    found += [engine.forward([Segment(slot, [token])]).clone() for token in tokens[-LAST:]]
    engine.close(slot)
    return (torch.cat(found) - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()


@pytest.mark.parametrize("name", ROTATED)
def test_logits_are_those_of_the_native_engine(tmp_path: Path, name: str) -> None:
    """Of mixtures by the median row: a router that is nearly undecided may choose otherwise after a rounding."""
    folder = made(name, tmp_path)
    expected = open_native(folder, "fp32", context=256).all_logits(text(LENGTH))
    engine = open_on_cpu(folder)
    of_rows = errors(engine, expected)
    mixes = bool(engine._weights.spec.parts(Mixture))
    # Each linear has one rounding more, of what is rotated.
    assert (of_rows.median() if mixes else of_rows.max()) <= agrees(4, torch.float16)


def test_many_rows_are_rotated_before_another_product(tmp_path: Path) -> None:
    """On a GPU that is Triton's, on weights as they are stored: here dequantized ones that are not rotated back."""
    folder = made("llama", tmp_path)
    expected = open_native(folder, "fp32", context=256).all_logits(text(LENGTH))
    engine = open_on_cpu(folder)
    packed = {w.data.data_ptr(): engine._weights.checkpoint.packed(key) for key, w in engine._weights.prepared.items()}
    dense = {place: rotate(dequantize(w)) if w.rotation else dequantize(w) for place, w in packed.items()}
    seen = []

    def many(x: Tensor, weights: list[PreparedWeight], y: Tensor) -> None:
        seen.append(len(x))
        y.copy_(torch.cat([x.float() @ dense[weight.data.data_ptr()].T for weight in weights], -1))

    engine._builder._many = many
    assert errors(engine, expected).max() <= agrees(4, torch.float16)
    assert seen


def test_plain_checkpoints_take_no_memory_for_it(tmp_path: Path) -> None:
    assert open_on_cpu(tiny_checkpoint(CASES["llama"](), tmp_path / "model"))._buffers.rotated.numel() == 0
