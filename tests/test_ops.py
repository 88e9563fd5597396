"""`amq.kernels.ops.linear`, backends and `QuantizedLinear`: what they accept, compute, refuse, and say when they
refuse."""

from __future__ import annotations

import copy
import io
import logging
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers.packed import SYNTHETIC, assert_same_bits, random_packed
from helpers.reference import MODES, UNIT, make_weight, product, random_x, rounding_bound, seen_by
from torch import nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import backends, ops
from amq.kernels import cpu as native
from amq.kernels.backends import BACKENDS
from amq.kernels.modules import QuantizedLinear
from amq.packing import PackedWeight, PreparedWeight

pytestmark = pytest.mark.usefixtures("one_thread")

HALVES = (torch.bfloat16, torch.float16)
HOST = [backend.name for backend in BACKENDS.values() if backend.device != "cuda"]
"""Those that multiply without a GPU."""
every_backend = pytest.mark.parametrize("backend", HOST)
every_mode = pytest.mark.parametrize("mode", MODES)


def prepared(name: str = "int3", rows: int = 33, backend: str = "cpu", group_size: int = 32) -> PreparedWeight:
    return backends.prepare(make_weight(name, rows, 100, group_size).packed, backend)


@every_mode
@every_backend
def test_any_shape_and_memory_layout(backend: str, mode: str) -> None:
    """1-D, 2-D, 3-D, transposed, every other row, every other feature, no rows at all."""
    weight = prepared(backend=backend)
    linear = partial(ops.linear, weights=[weight], activations=mode)
    x = random_x(6, 100)
    expected = linear(x)
    assert expected.shape == (6, 33) and expected.dtype == torch.float32
    assert_same_bits(linear(x.view(2, 3, 100)).view(6, 33), expected)
    assert_same_bits(linear(x.T.contiguous().T), expected)
    assert_same_bits(linear(x.repeat_interleave(2, 0)[::2]), expected)
    assert_same_bits(linear(x.repeat_interleave(2, 1)[:, ::2]), expected)
    assert_same_bits(linear(x[0].expand(2, 100)), linear(x[0].repeat(2, 1)))
    assert linear(x[0]).shape == (33,)
    assert linear(x[:0]).shape == (0, 33) and linear(x[:0].view(3, 0, 100)).shape == (3, 0, 33)
    assert torch.equal(x, random_x(6, 100)), "x was written to"


@every_mode
@every_backend
def test_backends_agree(backend: str, mode: str) -> None:
    """Fused, with bias, in every format: against torch on the dequantized weights."""
    weights, x = [make_weight(name, 33, 100, 64) for name in FORMATS], random_x(3, 100)
    bias = torch.randn(33 * len(FORMATS))
    y = ops.linear(x, [backends.prepare(w.packed, backend) for w in weights], bias, mode)
    dense, seen = torch.cat([w.dense for w in weights]), seen_by(mode, x, 64)
    truth, allowed = product(seen, dense)[0] + bias, rounding_bound(seen, dense) + UNIT * bias.abs()
    assert ((y - truth).abs() <= allowed + UNIT * truth.abs()).all()  # adding the bias rounds once more


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@every_mode
@every_backend
def test_half_precision_is_rounded_once(backend: str, mode: str, dtype: torch.dtype) -> None:
    """In and out in 16 bits, float32 in between."""
    weight, x = prepared(backend=backend), torch.randn(5, 100).to(dtype)
    bias = torch.randn(33).to(dtype)
    y = ops.linear(x, [weight], bias, mode)
    assert y.dtype == dtype
    assert torch.equal(y, ops.linear(x.float(), [weight], bias.float(), mode).to(dtype))
    assert torch.equal(ops.linear(x, [weight], bias.float(), mode), y)


@every_backend
def test_linears_without_rows(backend: str) -> None:
    empty, x = backends.prepare(random_packed(FORMATS["int3"], 1, 100, 32).rows(0, 0), backend), random_x(2, 100)
    assert ops.linear(x, [empty]).shape == (2, 0)
    both = ops.linear(x, [empty, prepared(backend=backend)], activations="fp32")
    assert torch.equal(both, ops.linear(x, [prepared(backend=backend)], activations="fp32"))


X = torch.zeros(2, 100)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    (
        (torch.zeros(2, 99), {}, r"q_proj: x must be \[..., 100\], got \[2, 99\]"),
        (torch.tensor(1.0), {}, r"q_proj: x must be \[..., 100\], got \[\]"),
        (X.int(), {}, "q_proj: x must be float32 or bfloat16 or float16 for backend cpu, got torch.int32; convert it"),
        (X.double(), {}, r"got torch.float64; convert it with x.to\(torch.float32\)"),
        (X.to("meta"), {}, "q_proj: x is on meta, its weight on cpu; move one of them"),
        (X, {"activations": "int7"}, "q_proj: activations must be one of fp32, int8, got 'int7'"),
        (X, {"bias": torch.zeros(32)}, r"q_proj: bias must be .* \[33\] on cpu, got torch.float32 \[32\] on cpu"),
        (X, {"bias": torch.zeros(1, 33)}, r"bias must be .* got torch.float32 \[1, 33\]"),
        (X, {"bias": torch.zeros(33).double()}, r"bias must be .* got torch.float64 \[33\]"),
        (X, {"bias": torch.zeros(33, device="meta")}, r"bias must be .* on meta"),
        (X.clone().requires_grad_(), {}, "q_proj: a prepared weight has no gradient: call it under torch.no_grad"),
    ),
)
def test_input_errors_name_the_linear(x: torch.Tensor, options: dict, message: str) -> None:
    with pytest.raises(AmqError, match=message):
        ops.linear(x, [prepared()], name="q_proj", **options)


def test_gradients_may_be_off_instead() -> None:
    x = random_x(2, 100).requires_grad_()
    with torch.no_grad():
        y = ops.linear(x, [prepared()])
    assert not y.requires_grad


def test_weight_errors_name_the_linear() -> None:
    refused = partial(ops.linear, X, name="mlp")
    with pytest.raises(AmqError, match="mlp: expected at least one weight, got none"):
        refused([])
    with pytest.raises(AmqError, match="mlp: fused linears must share group_size; expected 32, got 64"):
        refused([prepared(), prepared(group_size=64)])
    with pytest.raises(AmqError, match="mlp: fused linears must share backend; expected cpu, got reference"):
        refused([prepared(), prepared(backend="reference")])
    other = backends.prepare(make_weight("int3", 33, 64, 32).packed)
    with pytest.raises(AmqError, match="mlp: fused linears must share in_features; expected 100, got 64"):
        refused([prepared(), other])
    with pytest.raises(AmqError, match="unknown backend 'gpu': expected one of cpu, cuda, triton, reference"):
        refused([replace(prepared(), backend="gpu")])


WRONG_DATA = {
    "one byte": (
        lambda data: data[:1].expand(len(data)),
        r"one dimension, contiguous and on cpu, got .* strides \[0\]",
    ),
    "every other": (lambda data: data.repeat_interleave(2)[::2], r"contiguous and on cpu, got .* strides \[2\]"),
    "backwards in memory": (lambda data: data.view(2, -1).T, "of one dimension"),
    "floats": (lambda data: data.float(), "must be uint8, .* got torch.float32"),
    "signed": (lambda data: data.view(torch.int8), "must be uint8, .* got torch.int8"),
    "two dimensions": (lambda data: data.view(1, -1), "of one dimension"),
    "elsewhere": (lambda data: data.to("meta"), "x is on cpu, its weight on meta"),
    "short": (lambda data: data[:-1], r"bytes of an? .*expected \d+, got \d+"),
    "long": (lambda data: torch.cat([data, data]), r"bytes of an? .*expected \d+, got \d+"),
    "empty": (lambda data: data[:0], "bytes of an? .*got 0"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
@every_backend
def test_data_of_a_weight_is_what_its_shape_says(backend: str, case: str) -> None:
    """Through both bindings, before anything is read by an address."""
    change, message = WRONG_DATA[case]
    good = prepared("int4", 34, backend)
    bad = replace(good, data=change(good.data))
    with pytest.raises(AmqError, match=f"mlp: .*{message}"):
        ops.linear(X, [bad], name="mlp")
    with pytest.raises(AmqError, match=f"torch.ops.amq.linear: .*{message}"):
        torch.ops.amq.linear(X, [bad.data], ["int4"], [34], 32, None, "fp32", backend)
    if case != "elsewhere":  # a second weight, behind a good one
        with pytest.raises(AmqError, match=f"mlp: .*{message}"):
            ops.linear(X, [good, bad], name="mlp")


@every_backend
def test_the_op_checks_what_linear_checks(backend: str) -> None:
    good = prepared("int4", 33, backend)
    arguments = dict(x=X, weights=[good.data], formats=["int4"], out_features=[33], group_size=32, bias=None)
    arguments |= dict(activations="fp32", backend=backend)
    assert torch.equal(torch.ops.amq.linear(**arguments), ops.linear(X, [good], activations="fp32"))
    for change, message in (
        ({"bias": torch.ones(1)}, r"bias must be .* \[33\] on cpu, got torch.float32 \[1\]"),
        ({"bias": torch.ones(33).expand(2, 33)}, r"bias must be .* \[33\]"),
        ({"bias": torch.ones(33, dtype=torch.int32)}, "bias must be float32, bfloat16 or float16"),
        ({"activations": "int4"}, "activations must be one of fp32, int8, got 'int4'"),
        ({"activations": ""}, "activations must be one of"),
        ({"group_size": 64}, r"bytes of an? .*expected \d+, got \d+"),
        ({"group_size": 48}, "group size 48 is not supported"),
        ({"group_size": 0}, "group size 0 is not supported"),
        ({"group_size": -(1 << 62)}, "is not supported"),
        ({"out_features": [1 << 62]}, "torch.ops.amq.linear: "),
        ({"out_features": [-1]}, "torch.ops.amq.linear: "),
        ({"formats": ["int8"]}, r"bytes of an? .*expected \d+, got \d+"),
        ({"formats": ["int99"]}, "unknown format 'int99'"),
        ({"formats": []}, "expected at least one weight, a format and a number of rows for each"),
        ({"weights": []}, "expected at least one weight"),
        ({"out_features": [33, 33]}, "expected at least one weight"),
        ({"backend": "gpu"}, "unknown backend 'gpu'"),
        ({"x": X.double()}, "x must be float32"),
        ({"x": torch.tensor(1.0)}, "x"),
        ({"x": torch.zeros(2, 68)}, r"bytes of an? .*expected \d+, got \d+"),
    ):
        with pytest.raises(AmqError, match=message):
            torch.ops.amq.linear(**(arguments | change))


def test_prepare_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AmqError, match="unknown backend 'gpu': expected one of cpu, cuda, triton, reference"):
        backends.prepare(random_packed(FORMATS["int3"], 4, 64, 32), "gpu")
    ternary = random_packed(SYNTHETIC[0], 4, 64, 32)
    with pytest.raises(AmqError, match="backend cpu cannot run ternary: format ternary .* is not compiled into"):
        backends.prepare(ternary)
    assert backends.prepare(ternary, "reference").nbytes == ternary.nbytes
    monkeypatch.setattr(native, "check_compiled", lambda fmt: None)  # as if it were in formats.py
    with pytest.raises(AmqError, match="cpu cannot run ternary: tiles hold dense bitstreams only, not 3 levels"):
        backends.prepare(ternary)


def test_prepare_checks_the_tensors() -> None:
    packed = random_packed(FORMATS["int3"], 4, 64, 32)
    scattered = replace(packed, scale=packed.scale.T.contiguous().T)
    with pytest.raises(AmqError, match=r"prepare int3: scale must be contiguous, got strides \[1, 4\]; call"):
        backends.prepare(scattered)
    with pytest.raises(AmqError, match="prepare int3: qweight must be on cpu, got meta"):
        backends.prepare(replace(packed, qweight=packed.qweight.to("meta")))
    part = packed.rows(1, 3)  # a view into the middle of the tensors
    assert torch.equal(backends.prepare(part).data, backends.prepare(copy.deepcopy(part)).data)


def test_choose_backend(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert backends.choose_backend(FORMATS) == "cpu"
    assert not caplog.records
    monkeypatch.setitem(FORMATS, "ternary", SYNTHETIC[0])
    with caplog.at_level(logging.WARNING):
        assert backends.choose_backend(["int3", "ternary"]) == "reference"
    assert "backend cpu is passed over: ternary: format ternary" in caplog.text
    assert "rebuild it with `pip install -e .`" in caplog.text
    with pytest.raises(AmqError, match="unknown format 'int99'"):
        backends.choose_backend(["int99"])


def test_check_activations() -> None:
    for backend, mode in (("cpu", "int8"), ("cpu", "fp32"), ("reference", "fp32")):
        backends.check_activations(backend, mode)
    with pytest.raises(
        AmqError, match="--activations int8 does not go with backend reference: take --backend cpu or cuda"
    ):
        backends.check_activations("reference", "int8")
    with pytest.raises(AmqError, match="activations must be one of fp32, int8, got 'int4'"):
        backends.check_activations("cpu", "int4")
    with pytest.raises(AmqError, match="unknown backend 'gpu'"):
        backends.check_activations("gpu", "fp32")


def test_availability_lists_everything_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    """And `amq formats` prints it."""
    from amq.cli import VERBS

    module = native.cpu_module()
    rows = backends.availability()
    assert {isa for backend, isa, _ in rows if backend == "cpu"} == {*module.isas(), *module.missing()}
    assert [backend for backend, _, _ in rows].count("reference") == 1
    for backend, isa, reasons in rows:
        assert list(reasons) == list(FORMATS)
        if BACKENDS[backend].device != "cuda":
            assert set(reasons.values()) == {module.missing().get(isa) if backend == "cpu" else None}
        elif not torch.cuda.is_available():
            assert all(reasons.values())
    assert VERBS["formats"]([]) == 0
    printed = capsys.readouterr().out
    table = printed.split("\n\n")[1].splitlines()[1:]
    assert [line.split()[:2] for line in table] == [[backend, isa] for backend, isa, _ in rows]
    assert [line.split()[1] for line in table if "(used by default)" in line] == [module.isa()]


@every_mode
@every_backend
def test_opcheck(backend: str, mode: str) -> None:
    """torch's own check of schema, aliasing, fake tensors and tracing."""
    weights = [prepared("int3", 33, backend), prepared("int4", 17, backend)]
    for shape, dtype, bias in (((100,), torch.float32, None), ((2, 3, 100), torch.bfloat16, torch.randn(50))):
        x = torch.randn(shape).to(dtype)
        arguments = ([w.data for w in weights], ["int3", "int4"], [33, 17], 32, bias, mode, backend)
        torch.library.opcheck(torch.ops.amq.linear.default, (x, *arguments))


def test_fake_tensors_have_the_right_shape() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    linear = QuantizedLinear(prepared())
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = linear(torch.empty(4, 5, 100, dtype=torch.float16))
    assert y.shape == (4, 5, 33) and y.dtype == torch.float16 and y.device.type == "cpu"


class Mlp(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        up, down = random_packed(FORMATS["int3"], 64, 100, 32), random_packed(FORMATS["int6"], 20, 64, 32)
        self.up = QuantizedLinear.from_packed(up, torch.randn(64), activations=mode)
        self.down = QuantizedLinear.from_packed(down, activations=mode)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile: no C++ compiler on PATH")
@every_mode
def test_compiled_equals_eager(mode: str) -> None:
    """Without a graph break, and again with another number of rows."""
    torch.manual_seed(0)
    model = Mlp(mode)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for rows in (3, 8):
            x = torch.randn(rows, 100)
            assert_same_bits(compiled(x), model(x))


@every_backend
def test_module_keeps_no_prepared_bytes_in_its_state(backend: str) -> None:
    packed = make_weight("int3", 33, 100, 32).packed
    linear = QuantizedLinear.from_packed(packed, torch.randn(33), backend)
    assert list(linear.state_dict()) == ["bias"] and not linear.bias.requires_grad
    assert list(QuantizedLinear.from_packed(packed, backend=backend).state_dict()) == []
    linear.load_state_dict({"bias": torch.zeros(33)})
    x = random_x(3, 100)
    assert torch.equal(linear(x), ops.linear(x, [linear.weight], torch.zeros(33)))
    assert repr(linear) == (
        "QuantizedLinear(in_features=100, out_features=33, bias=True, format=int3, group_size=32, "
        f"backend={backend}, activations={backends.default_activations(backend)})"
    )


@every_mode
def test_module_survives_copies_and_moves(mode: str) -> None:
    """deepcopy, pickle, .to(dtype), .to(device): the codes stay bytes, the result the same."""
    linear = QuantizedLinear.from_packed(make_weight("int5", 33, 100, 32).packed, torch.randn(33), activations=mode)
    x = random_x(3, 100)
    expected = linear(x)
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    for other in (copy.deepcopy(linear), torch.load(file, weights_only=False), copy.deepcopy(linear).to("cpu").float()):
        assert other.data.data_ptr() != linear.data.data_ptr()
        assert other.weight.data is other.data
        assert_same_bits(other(x), expected)
    half = copy.deepcopy(linear).to(torch.bfloat16)
    assert half.data.dtype == torch.uint8 and half.bias.dtype == torch.bfloat16
    assert torch.equal(half(x.bfloat16()), ops.linear(x.bfloat16(), [linear.weight], half.bias, mode))
    away = copy.deepcopy(linear).to("meta")
    assert away.weight.data.device.type == "meta"
    with pytest.raises(AmqError, match="linear: x is on cpu, its weight on meta"):
        away(x)


def test_module_names_itself_in_errors() -> None:
    linear = QuantizedLinear(prepared(), name="model.layers.7.mlp.up_proj")
    with pytest.raises(AmqError, match=r"model.layers.7.mlp.up_proj: x must be \[..., 100\]"):
        linear(torch.zeros(1, 99))


def test_module_does_not_share_bytes_with_the_packed_weight() -> None:
    packed = copy.deepcopy(make_weight("int4", 33, 100, 32).packed)
    linear, x = QuantizedLinear.from_packed(packed), random_x(2, 100)
    expected = linear(x)
    for tensor in (packed.qweight, packed.scale, packed.zero_point):
        tensor.zero_()
    assert_same_bits(linear(x), expected)


def test_packed_weight_on_reference_needs_no_even_address() -> None:
    """fp16 scales follow the codes' bytes, whose number may be odd."""
    packed = PackedWeight(FORMATS["int8"], 3, 32, torch.zeros(1, 3, dtype=torch.uint8), *torch.ones(2, 1, 1).half())
    y = ops.linear(torch.ones(1, 3), [backends.prepare(packed, "reference")], activations="fp32")
    assert y.tolist() == [[-3.0]]
