"""How the GPU backends are chosen, and what they say without a GPU. What they compute is in test_cuda.py and
triton_interpreter.py, which run the kernels on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.reference import make_weight
from torch._subclasses.fake_tensor import FakeTensorMode

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import backends, ops
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.kernels.modules import QuantizedLinear
from amq.packing import PreparedWeight


def prepared(backend: str, device: str = "cpu") -> PreparedWeight:
    packed = make_weight("int3", 24, 640, 64).packed
    return PreparedWeight.of(packed, backend, layout.prepare(packed).to(device))


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


def test_choose_backend_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    def able(name: str, reason: str | None) -> backends.Backend:
        return replace(backends.BACKENDS[name], unsupported_reason=lambda fmt: reason)

    def where(**reasons: str | None) -> list[backends.Backend]:
        """The backends on a machine where those named run everything, or nothing for a reason."""
        return [able(name, reasons[name]) if name in reasons else old for name, old in backends.BACKENDS.items()]

    assert backends.choose_backend(FORMATS, "cuda", where(cuda=None)) == "cuda" and not caplog.records
    assert backends.choose_backend(FORMATS, "cuda", where(cuda="it is Tuesday", triton=None)) == "triton"
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


def test_prepared_for_either_is_the_same() -> None:
    records = {name: backends.BACKENDS[name] for name in ("cuda", "triton")}
    packed = make_weight("int4", 24, 640, 128).packed
    assert torch.equal(*(record.prepare(packed) for record in records.values()))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)
def test_prepared_size(fmt) -> None:
    """The packed size where slabs and tiles fill; near it for real models' other widths."""
    for rows, in_features, more in ((4096, 4096, 1), (4096, 14336, 1), (4096, 11008, 1.02), (1536, 576, 1.4)):
        size = layout.layout_of(fmt, rows, in_features, 128).nbytes
        assert 1 <= size / fmt.stored_bytes(rows, in_features, 128) <= more


def test_launch_parameters_follow_the_table(cache: Path) -> None:
    """What was measured on this GPU is looked up; a broken table is named."""
    gpu = "Test GPU/1"
    path = tuning.save(gpu, {tuning.DENSE_KEY: {"parameters": 8, "microseconds": 1.5}}, {"torch": "0"})
    assert path.parent == cache / "gpu" and path.name == "Test-GPU-1.json"
    tuning.save(gpu, {"another": {"parameters": 1, "microseconds": 1.5}}, {"torch": "0"})
    assert [tuning.look_up(key, gpu) for key in (tuning.DENSE_KEY, "another", "a third")] == [8, 1, None]
    path.write_text("[]")
    tuning._entries.cache_clear()
    with pytest.raises(
        AmqError,
        match="Test-GPU-1.json: expected schema .* got 'list': delete it, and run `python benchmarks/gpu/tune",
    ):
        tuning.look_up(tuning.DENSE_KEY, gpu)
    tuning._entries.cache_clear()
