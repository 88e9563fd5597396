"""Routers and sums of mixtures of kernels/cuda on the shim: choices against csrc/cpu/decoder_router.cpp itself, sums
against float64.

AMQ_TEST_CUDA_LIBRARY names another build: test_cuda_sanitizers.py runs parts of this file that way.
"""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_shim.build import chosen_build, runtime_library
from helpers import unchanged
from torch import Tensor

from amq.errors import AmqError
from amq.formats import native_header
from amq.kernels import cuda
from amq.kernels.cuda_calls import Call, ChooseCall, CombineCall, ExpertRows

U = torch.finfo(torch.float32).eps / 2
LANES, MOST_ROWS = 32, 8
EPSILON = 1e-6
ROUTER = """
#include <algorithm>
#include "decoder_router.cpp"

extern "C" void choose(int experts, int top_k, int sigmoid, int normalized, int groups, int top_groups, float epsilon,
                       float scale, const float* correction, const float* expert_scale, int rows, const float* scores,
                       int stride, int* choice, float* weights) {
    amq::Router router;
    router.weight.out_features = experts;
    router.correction = correction;
    router.expert_scale = expert_scale;
    router.score = sigmoid ? amq::Score::sigmoid : amq::Score::softmax;
    router.top_k = top_k;
    router.normalized = normalized;
    router.epsilon = epsilon;
    router.scale = scale;
    router.groups = groups;
    router.top_groups = top_groups;
    amq::ExpertChoice chooser(router);
    for (int i = 0; i < rows; ++i) chooser.choose(scores + i * stride, choice + i * top_k, weights + i * top_k);
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> cuda.Library:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim")))


@pytest.fixture(scope="session")
def router() -> Any:
    """The CPU engine's, compiled by itself."""
    runtime_library("libstdc++.so")

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "amq_formats.h").write_text(native_header())
        (folder / "router.cpp").write_text(ROUTER)
        command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-Icsrc/cpu", f"-I{folder}", f"{folder}/router.cpp"]
        subprocess.run([*command, "-o", str(folder / "router.so")], cwd=unchanged.ROOT, check=True)

    inputs = unchanged.inputs_of(["csrc/cpu/*.h", "csrc/cpu/decoder_router.cpp"], ROUTER, native_header())
    return ctypes.CDLL(str(unchanged.built("router", inputs, build) / "router.so")).choose


@dataclass(frozen=True)
class Router:
    experts: int
    top_k: int
    sigmoid: bool = False
    normalized: bool = True
    groups: int = 1
    top_groups: int = 1
    correction: bool = False
    expert_scale: bool = False
    scale: float = 1.0

    def tensors(self) -> dict[str, Tensor | None]:
        generator = torch.Generator().manual_seed(3)
        correction, scale = torch.randn(2, self.experts, generator=generator)
        return {
            "correction": correction if self.correction else None,
            "expert_scale": scale.exp() if self.expert_scale else None,
        }

    def numbers(self) -> dict[str, int | float]:
        names = ("experts", "top_k", "sigmoid", "normalized", "groups", "top_groups", "scale")
        return {**{name: getattr(self, name) for name in names}, "epsilon": EPSILON}

    def bound(self) -> float:
        """Of a weight, relative: a sum of the scores over a lane and over lanes where the CPU has one in double, a
        division, and what is added up, divided and multiplied of the chosen ones, twice where they are normalized."""
        return (-(-self.experts // LANES) + 5 + 1 + 2 * (self.top_k + 1) + 3) * U


ROUTERS = {
    "gpt-oss": Router(32, 4),
    "qwen3": Router(128, 8, correction=False),
    "qwen3-next": Router(512, 10, normalized=False),
    "deepseek": Router(256, 8, sigmoid=True, groups=8, top_groups=4, correction=True, scale=2.5),
    "glm": Router(64, 6, sigmoid=True, correction=True),
    "gemma": Router(40, 8, expert_scale=True),
    "pairs": Router(90, 32, groups=45, top_groups=17),
    "all": Router(5, 5, normalized=False, scale=0.5),
    "one": Router(1, 1),
}
every_router = pytest.mark.parametrize("kind", ROUTERS.values(), ids=ROUTERS)


def scores_of(kind: Router, rows: int) -> Tensor:
    """Rows by turns of numbers that differ and of few that do, which leave many equal; some floats behind each."""
    generator = torch.Generator().manual_seed(rows)
    scores = 2 * torch.randn(rows, kind.experts, generator=generator)
    scores[1::2] = scores[1::2].round()
    return torch.nn.functional.pad(scores, (0, 3), value=torch.nan)


def by_cpu(router: Any, kind: Router, scores: Tensor) -> tuple[Tensor, Tensor]:
    rows, k = len(scores), kind.top_k
    choice, weights = torch.empty(rows, k, dtype=torch.int32), torch.empty(rows, k)
    address, real = (lambda t: ctypes.c_void_p(t.data_ptr() if t is not None else None)), ctypes.c_float
    held = kind.tensors()
    router(
        *(
            kind.experts,
            k,
            kind.sigmoid,
            kind.normalized,
            kind.groups,
            kind.top_groups,
            real(EPSILON),
            real(kind.scale),
        ),
        *(address(held["correction"]), address(held["expert_scale"]), rows, address(scores), scores.stride(0)),
        *(address(choice), address(weights)),
    )
    return choice, weights


def choose(library: cuda.Library, kind: Router, scores: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    """Choices and weights of all rows, with a row behind them that nobody writes."""
    choice = torch.full((len(scores) + 1, kind.top_k), -7, dtype=torch.int32)
    weights = torch.full((len(scores) + 1, kind.top_k), -7.0)
    fields = {"rows": len(scores), "scores": scores, "score_stride": scores.stride(0), "choice": choice}
    library.calls.run(Call(ChooseCall, {**kind.numbers(), **kind.tensors(), **fields, "weights": weights, **more}), 0)
    assert (choice[-1] == -7).all() and (weights[-1] == -7).all()
    return choice[:-1], weights[:-1]


def equal(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x.nan_to_num(7), y.nan_to_num(7)) for x, y in zip(a, b, strict=True))


@every_router
def test_choices_of_the_cpu_engine(library: cuda.Library, router: Any, kind: Router) -> None:
    for rows in (1, 8, 19):
        scores = scores_of(kind, rows)
        choice, weights = choose(library, kind, scores)
        expected, their_weights = by_cpu(router, kind, scores)
        assert torch.equal(choice, expected)
        assert ((weights - their_weights).abs() <= kind.bound() * their_weights.abs()).all()


@every_router
def test_rows_do_not_depend_on_each_other(library: cuda.Library, kind: Router) -> None:
    scores = scores_of(kind, 11)
    together = choose(library, kind, scores)
    for row in range(11):
        assert equal(choose(library, kind, scores[row : row + 1]), tuple(t[row : row + 1] for t in together))


@pytest.mark.parametrize("name", ("qwen3", "deepseek", "pairs"))
def test_scores_that_are_no_numbers(library: cuda.Library, router: Any, name: str) -> None:
    """The first experts are chosen then, with NaN for weights; an infinity that leaves numbers is like any other."""
    kind, inf = ROUTERS[name], torch.inf
    scores = scores_of(kind, 8)
    scores[0, 5] = scores[1, 0] = torch.nan
    scores[2, 7], scores[3, 7], scores[4, : kind.experts] = inf, -inf, -inf
    scores[5, : kind.experts] = inf
    scores[6, : kind.experts] = 0
    choice, weights = choose(library, kind, scores)
    expected, their_weights = by_cpu(router, kind, scores)
    assert torch.equal(choice, expected) and torch.equal(weights.isnan(), their_weights.isnan())
    assert weights[0].isnan().all() and choice[0].tolist() == list(range(kind.top_k))
    for row in (3, 6, 7):
        assert equal(choose(library, kind, scores[row : row + 1]), (choice[row : row + 1], weights[row : row + 1]))
        assert weights[row].isfinite().all()


def groups_of(choice: Tensor) -> list[tuple[int, list[int]]]:
    """Experts that were chosen and their entries, by the CPU's plainest means."""
    entries = list(enumerate(choice.flatten().tolist()))
    experts = sorted({expert for _, expert in entries if expert >= 0})
    return [(expert, [i for i, other in entries if other == expert]) for expert in experts]


@pytest.mark.parametrize("rows", (1, 3, 8))
@pytest.mark.parametrize("name", ("gpt-oss", "qwen3", "pairs", "one"))
def test_experts_are_listed_with_their_rows(library: cuda.Library, name: str, rows: int) -> None:
    """Empty rows choose nothing; a row that is no number chooses the first experts like any other."""
    kind = ROUTERS[name]
    scores = scores_of(kind, rows)
    for positions in (None, torch.arange(rows, dtype=torch.int32) - 1, torch.full((rows,), -1, dtype=torch.int32)):
        most = rows * kind.top_k
        listed, n_groups = (ExpertRows * (most + 1))(), torch.full((2,), -7, dtype=torch.int32)
        listed[most].expert = -7
        memory = torch.frombuffer(listed, dtype=torch.uint8)
        if rows == 8:
            scores[7, 0] = torch.nan
        choice, weights = choose(library, kind, scores, positions=positions, groups_out=memory, n_groups=n_groups)
        empty = torch.zeros(rows, dtype=torch.bool) if positions is None else positions < 0
        assert (choice[empty] == -1).all() and (weights[empty] == 0).all()
        if not empty.all():
            assert equal((choice[~empty], weights[~empty]), choose(library, kind, scores[~empty]))
        found = [(group.expert, list(group.entries[: group.count])) for group in listed[: n_groups[0]]]
        assert found == groups_of(choice) and n_groups[1] == -7 and listed[most].expert == -7


def combine_call(rows: int, features: int, top_k: int, gated: bool, shared: bool, norms: str) -> dict[str, Any]:
    """Outputs of experts that were not chosen are not numbers, and nor is what lies behind a gate."""
    generator = torch.Generator().manual_seed(rows + features)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    outputs, weights = normal(rows * top_k, features), normal(rows, top_k)
    weights[0, top_k // 2] = 0
    outputs[top_k // 2] = torch.nan
    gates = torch.full((rows, 5), torch.nan)
    gates[:, 4] = normal(rows)
    return {
        "rows": rows, "features": features, "top_k": top_k, "outputs": outputs, "weights": weights, "epsilon": EPSILON,
        "shared": normal(rows, features) if shared else None, "shared_gate": gates[:, 4] if gated else None,
        "gate_stride": 5, "routed_post_norm": normal(features) if "routed" in norms else None,
        "shared_post_norm": normal(features) if "shared" in norms else None,
    }  # fmt: skip


def combine(library: cuda.Library, fields: dict[str, Any]) -> Tensor:
    y = torch.full((fields["rows"] + 1, fields["features"]), -7.0)
    library.calls.run(Call(CombineCall, {**fields, "y": y}), 0)
    assert (y[-1] == -7).all()
    return y[:-1]


def reference(fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """float64 [rows, features], and what roundings of float32 are relative to: the same with all terms positive."""
    rows, features = fields["rows"], fields["features"]
    weights = fields["weights"].double()
    outputs = fields["outputs"].double().nan_to_num(0).view(rows, -1, features)
    routed, size = (torch.einsum("rk,rkf->rf", f(weights), f(outputs)) for f in (lambda t: t, torch.abs))

    def normed(x: Tensor, size: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
        if weight is None:
            return x, size
        factor = weight.double() / (x.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        return x * factor, size * factor.abs()

    y, size = normed(routed, size, fields["routed_post_norm"])
    if fields["shared"] is not None:
        shared, shared_size = normed(
            fields["shared"].double(), fields["shared"].double().abs(), fields["shared_post_norm"]
        )
        gate = fields["shared_gate"]
        gate = 1 if gate is None else gate.double().sigmoid()[:, None]
        y, size = y + gate * shared, size + gate * shared_size
    return y, size


COMBINED = {
    "plain": (8, 300, 8, False, False, ""),
    "one-row": (1, 1100, 10, False, False, ""),
    "shared": (3, 256, 1, False, True, ""),
    "gated": (2, 700, 9, True, True, ""),
    "gemma": (5, 1100, 8, False, True, "routed shared"),
    "routed-norm": (2, 40, 3, False, False, "routed"),
    "shared-norm": (2, 515, 4, True, True, "shared"),
}
every_sum = pytest.mark.parametrize("name", COMBINED)


@every_sum
def test_sums_of_experts(library: cuda.Library, name: str) -> None:
    fields = combine_call(*COMBINED[name])
    y, (expected, size) = combine(library, fields), reference(fields)
    # Of top_k products; of a norm's sum in a thread, over lanes and over warps, and its division, root and products;
    # of the gate and what it is multiplied with.
    roundings = fields["top_k"] + (fields["features"] / 256 + 5 + 8 + 6) + 6
    assert ((y - expected).abs() <= roundings * U * size).all()


@every_sum
def test_rows_are_summed_by_themselves(library: cuda.Library, name: str) -> None:
    fields = combine_call(*COMBINED[name])
    together, k = combine(library, fields), fields["top_k"]
    for row in range(fields["rows"]):
        one = {"rows": 1, "outputs": fields["outputs"][row * k : (row + 1) * k], "weights": fields["weights"][row]}
        for field in ("shared", "shared_gate"):
            one[field] = None if fields[field] is None else fields[field][row:]
        assert torch.equal(combine(library, {**fields, **one})[0], together[row])


def test_weights_that_are_no_numbers_count(library: cuda.Library) -> None:
    fields = combine_call(*COMBINED["plain"])
    expected = combine(library, fields)
    fields["weights"][4, 2] = torch.nan
    y = combine(library, fields)
    assert y[4].isnan().all() and torch.equal(y[:4], expected[:4]) and torch.equal(y[5:], expected[5:])


def test_orders_of_threads_change_no_bit(library: cuda.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, fields = ROUTERS["deepseek"], combine_call(*COMBINED["gemma"])
    scores, found = scores_of(kind, 9), []
    for order in ("forward", "reverse", "random:7"):
        monkeypatch.setenv("AMQ_SHIM_ORDER", order)
        found.append((*choose(library, kind, scores), combine(library, fields)))
    assert equal(found[0], found[1]) and equal(found[0], found[2])


def test_nothing_to_do(library: cuda.Library) -> None:
    """No rows are none, whatever else the call says."""
    for kind in (ChooseCall, CombineCall):
        library.calls.run(Call(kind, {}), 0)


@pytest.mark.parametrize(
    ("changes", "more", "status"),
    (
        ({"experts": 513}, {}, -6),
        ({"top_k": 33}, {}, -6),
        ({"groups": 3}, {}, -6),
        ({"groups": 32}, {}, -6),
        ({"groups": 4, "top_groups": 5}, {}, -6),
        ({"groups": 8, "top_groups": 1, "top_k": 5}, {}, -6),
        ({}, {"score_stride": 31}, -6),
        ({}, {"choice": None}, -6),
        ({}, {"n_groups": torch.zeros(1, dtype=torch.int32)}, -6),
        ({}, {"rows": -1}, -1),
        ({}, {"rows": 9, "groups_out": torch.zeros(1), "n_groups": torch.zeros(1)}, -1),
    ),
)  # fmt: skip
def test_refused_choices(library: cuda.Library, changes: dict[str, int], more: dict[str, Any], status: int) -> None:
    with pytest.raises(AmqError, match=rf"ChooseCall: the kernels refuse the call \({status}: "):
        choose(library, replace(ROUTERS["gpt-oss"], **changes), torch.zeros(8, 600), **more)


@pytest.mark.parametrize(
    ("name", "value", "status"), (("features", 0, -6), ("outputs", None, -6), ("shared", None, -6), ("rows", -2, -1))
)
def test_refused_sums(library: cuda.Library, name: str, value: int | None, status: int) -> None:
    fields = combine_call(*COMBINED["gemma"])
    call = Call(CombineCall, {**fields, "y": torch.zeros(5, 1100)})
    setattr(call.struct, name, value)
    with pytest.raises(AmqError, match=rf"refuse the call \({status}: "):
        library.calls.run(call, 0)
