"""The native engine on rotated checkpoints: what transformers computes, whatever shares a pass; and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.checkpoints import tiny_checkpoint
from helpers.engine_cases import CASES
from helpers.engine_cases_rotated import ROTATED
from helpers.engines import assert_shared_passes_change_nothing, text, transformers_logits

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime.families import Unsupported, read_spec
from amq.runtime.native_engine import open_native
from amq.runtime.native_weights import NativeWeights
from amq.runtime.paged_engine import MAX_ROWS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Made where a test asks for one first."""

    class Made(dict):
        def __missing__(self, name: str) -> Path:
            build, rotated = ROTATED[name]
            self[name] = tiny_checkpoint(build(), tmp_path_factory.mktemp("rotated") / "model", rotated=rotated)
            return self[name]

    return Made()


@pytest.mark.parametrize("name", ROTATED)
def test_logits_are_those_of_transformers(folders: dict[str, Path], name: str) -> None:
    assert open_checkpoint(folders[name]).record.rotation
    tokens = text(100)
    expected = transformers_logits(folders[name], tokens)
    engine = open_native(folders[name], "fp32", context=512)
    assert (engine.all_logits(tokens) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ROTATED)
def test_a_sequence_does_not_depend_on_what_shares_its_passes(folders: dict[str, Path], name: str) -> None:
    engine = open_native(folders[name], "int8", context=512, max_sequences=4)
    assert_shared_passes_change_nothing(engine, 100, 30)


def test_int8_rounds_what_is_rotated(folders: dict[str, Path]) -> None:
    """As the op does: tests/test_linear_rotated.py."""
    tokens = text(40)
    expected = transformers_logits(folders["llama"], tokens, "int8")
    found = open_native(folders["llama"], "int8", cache="float32").all_logits(tokens)
    # Sums in another order put an activation now and then on the other side of a rounding boundary.
    assert (found - expected).abs().mean() < 3e-3 * expected.abs().mean()


def test_linears_of_one_input_that_are_not_rotated_alike_are_refused(tmp_path: Path) -> None:
    """By name where the record does not say that they share it, and by the module too."""
    folder = tiny_checkpoint(CASES["qwen3_5"](), tmp_path / "model", rotated="in_proj_qkv")
    with pytest.raises(Unsupported, match=r"in_proj_qkv, .*in_proj_z.* share an input, and are not rotated alike"):
        open_native(folder)
    with pytest.raises(AmqError, match="are not rotated alike; the file is damaged"):
        open_native(tiny_checkpoint(CASES["llama"](), tmp_path / "damaged", rotated="q_proj"))


def test_the_module_refuses_rotations_that_do_not_fit(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["llama"], verify=False)
    names = {*checkpoint.other_names, *checkpoint.record.formats}
    weights = NativeWeights(checkpoint, read_spec(checkpoint.config, "config.json", names), 64)
    name = "model.layers.0.self_attn.k_proj"
    for rotation, message in ((0, f"{name}: expected to be rotated as the"), (32, "rotation of 0 or 64, got 32")):
        held = weights.held | {name: (*weights.held[name][:-1], rotation)}
        with pytest.raises(ValueError, match=message):
            cpu_module().Decoder(
                spec=weights.spec, weights=held, context=64, group_size=32, int8=False, cache="float32",
                max_rows=MAX_ROWS, threads=1,
            )  # fmt: skip
