"""The CUDA kernels on the shim under sanitizers: parts of the files that test them, in one process for each.

Under ASan and UBSan threads run in reverse order; under TSan, which sees races between barriers, at random.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_shim.build import BUILD, build_shim, sanitizer_environment
from helpers.nested import run_nested

TESTS = Path(__file__).parent
CASES = {
    "test_cuda": ("fused or rows_do_not or odd_addresses", "outputs_are or not_finite or one_hot"),
    "test_cuda_attention": ("test_decode and (uneven or gated or many) or long_texts", "positions or another_step"),
    "test_cuda_engine": ("on_their_own and lfm2", "share_passes and (gemma3 or qwen3_moe)"),
    "test_cuda_linear": ("test_experts or test_activations or norm_in_front", "rows_of_a_weight or kinds or stream"),
    "test_cuda_mixture": ("rows_do_not_depend or are_listed or summed_by_themselves or nothing_to_do", ""),
    "test_cuda_rows": (
        "orders",
        "per_layer or softcap or activate or int3 or seven_bits or elements or (dense and x32)",
    ),
    "test_cuda_sample": ("(survivors and ties and 37) or what_is_written or no_numbers", "refusals"),
    "test_cuda_states": ("cuts_and_neighbours and (fused or one-head or wide or 9b)", ""),
}
"""{file: (cases of both, cases under ASan and UBSan alone)}."""


@pytest.mark.parametrize("kind", ("addresses", "races"))
def test_the_kernels(kind: str, tmp_path: Path, subtests: pytest.Subtests) -> None:
    races = kind == "races"
    build = build_shim(tmp_path, sanitize=not races, races=races)
    environment = sanitizer_environment(races=races)
    environment |= {BUILD: str(build), "AMQ_SHIM_ORDER": "random:7" if races else "reverse"}
    wanted = {file: both if races or not more else f"{both} or {more}" for file, (both, more) in CASES.items()}
    chosen = [f"({file}.py and ({names}))" for file, names in wanted.items()]
    files = [str(TESTS / f"{file}.py") for file in CASES]
    names, _ = run_nested(subtests, "-x", *files, "-k", " or ".join(chosen), environment=environment)
    assert {name.split("::")[0].rpartition(".")[2] for name in names} == set(CASES)
