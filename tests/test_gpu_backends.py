"""How the GPU backends are chosen and called; the kernels have files of their own. No GPU: the bindings are stood in
for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.reference import make_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import backends, ops, tune
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.kernels.modules import QuantizedLinear
from amq.packing import PreparedWeight

ROWS = 8
"""What the stand-in of the CUDA library takes at most."""


def prepared(backend: str, device: str = "cpu") -> PreparedWeight:
    packed = make_weight("int3", 24, 640, 64).packed
    return PreparedWeight.of(packed, backend, layout.prepare(packed).to(device))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor]]:
    """Stand-ins for both bindings that note (binding, x)."""
    seen: list[tuple[str, Tensor]] = []

    def binding(name: str, x: Tensor, weights: list[PreparedWeight], *_: object) -> Tensor:
        seen.append((name, x))
        return x.new_zeros(len(x), sum(w.out_features for w in weights))

    monkeypatch.setattr(backends.cuda, "max_rows", lambda: ROWS)
    monkeypatch.setattr(backends.cuda, "linear", lambda *a: binding("cuda", *a))
    monkeypatch.setattr(backends.triton, "linear", lambda *a: binding("triton", *a))
    return seen


def test_few_rows_go_to_cuda_and_more_to_triton(calls: list) -> None:
    linear = backends.get_backend("cuda").linear
    for rows, binding in ((1, "cuda"), (ROWS, "cuda"), (ROWS + 1, "triton")):
        x = torch.randn(rows, 640).half()
        assert linear(x, [prepared("cuda")], None, "fp32").shape == (rows, 24)
        assert calls.pop() == (binding, x)
    backends.get_backend("triton").linear(x[:1], [prepared("triton")], None, "fp32")
    assert calls.pop()[0] == "triton"


def test_int8_with_many_rows_computes_with_the_same_activations(calls: list) -> None:
    x = torch.randn(ROWS + 1, 640).half()
    backends.get_backend("cuda").linear(x, [prepared("cuda")], None, "int8")
    binding, given = calls.pop()
    assert binding == "triton" and torch.equal(given, backends.quantize_activations(x.float(), 64).half())


def test_a_bias_gets_the_dtype_of_x(calls: list, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(backends.cuda, "linear", lambda x, weights, bias, activations: seen.append(bias.dtype) or x)
    backends.get_backend("cuda").linear(torch.randn(1, 640).bfloat16(), [prepared("cuda")], torch.zeros(24), "fp32")
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_errors_name_the_linear_and_the_remedy(backend: str) -> None:
    weight, x = prepared(backend), torch.zeros(1, 640)
    with pytest.raises(
        AmqError, match=rf"q: x must be float16 or bfloat16 for backend {backend}, got torch.float32; conv"
    ):
        ops.linear(x, [weight], activations="fp32", name="q")
    with pytest.raises(AmqError, match=rf"q: backend {backend} multiplies on cuda, its weight is on cpu; move"):
        ops.linear(x.half(), [weight], activations="fp32", name="q")
    if backend == "triton":
        with pytest.raises(AmqError, match="q: backend triton takes activations fp32, not int8"):
            ops.linear(x.half(), [weight], activations="int8", name="q")
        with pytest.raises(AmqError, match="int8 does not go with backend triton: take --backend cpu or cuda"):
            backends.check_activations("triton", "int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_prepared_for_one(caplog: pytest.LogCaptureFixture) -> None:
    packed = make_weight("int3", 24, 640, 64).packed
    for backend in ("cuda", "triton"):
        with pytest.raises(AmqError, match=f"backend {backend} cannot run int3: "):
            backends.prepare(packed, backend)
    assert backends.choose_backend(FORMATS, "cuda") == "reference"
    assert "backend cuda is passed over: int2: " in caplog.text and "backend triton is passed over" in caplog.text


def test_choose_backend_on_a_gpu(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def able(name: str, reason: str | None) -> None:
        old = backends.BACKENDS[name]
        fields = {field: getattr(old, field) for field in old.__dataclass_fields__} | {
            "unsupported_reason": lambda fmt: reason
        }
        monkeypatch.setitem(backends.BACKENDS, name, backends.Backend(**fields))

    able("cuda", None)
    assert backends.choose_backend(FORMATS, "cuda") == "cuda" and not caplog.records
    able("cuda", "it is Tuesday")
    able("triton", None)
    assert backends.choose_backend(FORMATS, "cuda") == "triton"
    assert caplog.messages == ["backend cuda is passed over: int2: it is Tuesday"]


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_a_gpu_computes_exactly_unless_told_otherwise(backend: str) -> None:
    """The op and the module, which would ask Triton for int8 if they had the CPU's default."""
    size = prepared(backend).nbytes
    with FakeTensorMode():
        data = torch.empty(size, dtype=torch.uint8, device="cuda")
        weight = PreparedWeight(backend, FORMATS["int3"], 24, 640, 64, data)
        assert ops.linear(torch.empty(2, 640, dtype=torch.float16, device="cuda"), [weight]).shape == (2, 24)
    assert QuantizedLinear(prepared(backend)).activations == "fp32"
    assert QuantizedLinear(prepared("cpu")).activations == "int8"
    assert QuantizedLinear(prepared("cuda"), activations="int8").activations == "int8"


@pytest.mark.parametrize("backend", ("cuda", "triton"))
def test_the_op_traces_on_fake_gpu_tensors(backend: str) -> None:
    """Shape, dtype and device come out right without a GPU, so torch.compile can plan with the op."""
    size = prepared(backend).nbytes
    with FakeTensorMode():
        data = torch.empty(size, dtype=torch.uint8, device="cuda")
        weight = PreparedWeight(backend, FORMATS["int3"], 24, 640, 64, data)
        x = torch.empty(2, 5, 640, dtype=torch.bfloat16, device="cuda")
        y = ops.linear(x, [weight, weight], activations="fp32", name="qk")
    assert (y.shape, y.dtype, y.device.type) == ((2, 5, 48), torch.bfloat16, "cuda")


def test_prepared_for_either_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    records = {name: backends.BACKENDS[name] for name in ("cuda", "triton")}
    packed = make_weight("int4", 24, 640, 128).packed
    assert torch.equal(*(record.prepare(packed) for record in records.values()))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_prepared_size(fmt) -> None:
    """The packed size where slabs and tiles fill; near it for real models' other widths."""
    for rows, in_features, more in ((4096, 4096, 1), (4096, 14336, 1), (4096, 11008, 1.02), (1536, 576, 1.4)):
        size = layout.layout_of(fmt, rows, in_features, 128).nbytes
        assert 1 <= size / fmt.stored_bytes(rows, in_features, 128) <= more


def test_tune_measures_and_remembers(
    monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """The fastest candidate is what the launchers use from then on; one that does not run is left out and named."""
    times = iter((3.0, 2.0, 1.0))

    def timed(product: object, x: Tensor, weights: list) -> float:
        time = next(times, 5.0)
        if time == 2.0:
            raise AmqError("out of resource: shared memory")
        return time

    monkeypatch.setattr(tune, "DEVICE", "cpu")
    monkeypatch.setattr(tune, "OUT_FEATURES", 16)
    monkeypatch.setattr(tune, "microseconds", timed)
    monkeypatch.setattr(tuning, "_gpu", lambda: "Test GPU/2")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU/2")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(L2_cache_size=1 << 16))
    for binding in (backends.cuda, backends.triton):
        monkeypatch.setattr(binding, "unsupported_reason", lambda fmt: None)
    assert tune.main(["--in-features", "1024", "--rows", "1", "--formats", "int3"]) == 0
    paper = backends.triton.choose(1, 16, 1024, 3)
    best = backends.triton.measured(1, 16, 1024, 3)
    assert best != paper and (best.slabs_per_step, best.num_warps) == (paper.slabs_per_step, paper.num_warps)
    assert backends.triton.measured(1, 16, 2048, 3) == backends.triton.choose(1, 16, 2048, 3)
    assert backends.triton.dense_rows() == 2 * tune.DENSE_ROWS[-1]  # equally fast: the gemm keeps everything
    assert backends.cuda._warps(1024) == 1
    assert "is left out: out of resource: shared memory" in caplog.text
    assert "3 entries in" in capsys.readouterr().out
    tuning._entries.cache_clear()


def test_warps_follow_the_table(monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Slabs shared out evenly; what was measured on this GPU goes before that; a broken table is named."""
    assert [backends.cuda._warps(k) for k in (64, 1024, 4096, 11008, 14336)] == [1, 2, 4, 4, 4]
    monkeypatch.setattr(tuning, "_gpu", lambda: "Test GPU/1")
    path = tuning.save("Test GPU/1", {tuning.cuda_key(4096): {"parameters": 8, "microseconds": 1.5}}, {"torch": "0"})
    assert path.parent == cache / "gpu" and path.name == "Test-GPU-1.json"
    tuning.save("Test GPU/1", {tuning.cuda_key(1024): {"parameters": 1, "microseconds": 1.5}}, {"torch": "0"})
    assert [backends.cuda._warps(k) for k in (64, 1024, 4096)] == [1, 1, 8]
    path.write_text("[]")
    tuning._entries.cache_clear()
    with pytest.raises(
        AmqError, match="Test-GPU-1.json: expected schema .* got 'list': delete it, and run `python -m amq.kernels"
    ):
        backends.cuda._warps(4096)
    tuning._entries.cache_clear()
