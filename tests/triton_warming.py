"""What is compiled at load is all that a model asks of Triton: the keys that Triton compiles for, and compiling.

In a process of its own, which tests/test_triton_compile.py starts (in others Triton may be interpreting); a GPU that is
not there stands for one, as in triton_compile.py. Keys are read where Triton is about to compile, which it then does
not; the last step of a launch, running what was compiled, is left out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from triton_compile import FakeDriver

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import cuda, launch_table, warming
from amq.kernels import gpu_layout as layout
from amq.kernels import triton as launcher
from amq.kernels.compilations import Compilations, compilations
from amq.packing import PreparedWeight
from amq.util.progress import Progress

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

HIDDEN, INNER, VOCABULARY = 4096, 14336, 128256
"""Llama-3.1-8B."""
NARROW = ("int2", "int3", "int4")
ROWS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 100, 255, 256, 512)
CUDA_ROWS = 8


def weight(fmt: str, shape: tuple[int, int], group_size: int = 128, backend: str = "triton") -> PreparedWeight:
    """Of no numbers: its memory is not touched."""
    size = layout.layout_of(FORMATS[fmt], *shape, group_size).nbytes
    return PreparedWeight(backend, FORMATS[fmt], *shape, group_size, torch.empty(size, dtype=torch.uint8))


def mixed_8b(backend: str) -> list[list[PreparedWeight]]:
    """Everything that shares x in a layer of which each linear may have any of NARROW, and the head in int6; and each
    linear by itself, as transformers calls them."""

    def every(*outs: int, features: int = HIDDEN) -> list[list[PreparedWeight]]:
        kinds = {out: [weight(fmt, (out, features), backend=backend) for fmt in NARROW] for out in set(outs)}
        return [list(some) for some in product(*(kinds[out] for out in outs))]

    kv = HIDDEN // 4
    groups = [*every(HIDDEN, kv, kv), *every(HIDDEN), *every(kv), *every(INNER, INNER), *every(INNER)]
    groups += every(HIDDEN, features=INNER)
    return [*groups, [weight("int6", (VOCABULARY, HIDDEN), backend=backend)]]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU to compile for, nothing compiled, no table of measured launches, a CUDA library for 8 rows."""
    triton.runtime.driver.set_active(FakeDriver("89"))
    monkeypatch.setenv("AMQ_CACHE", str(tmp_path))
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "triton"))
    monkeypatch.setattr(cuda, "max_rows", lambda: CUDA_ROWS)
    monkeypatch.setattr(launcher, "_check_data", lambda *_: None)
    kernels = launcher._kernels()
    for kernel in (kernels.gemv, kernels.gemm, kernels.dequantize):
        kernel.device_caches.clear()
    for name, value in vars(Compilations()).items():
        setattr(compilations, name, value)
    yield
    triton.knobs.runtime.jit_cache_hook = None


def keys(calls: list[launcher.Call]) -> set[tuple[str, str]]:
    """What Triton would compile, (kernel, key), if it had compiled nothing."""
    found = set()

    def about_to_compile(fn, key, **_) -> bool:
        found.add((fn.name, key))
        return True

    triton.knobs.runtime.jit_cache_hook = about_to_compile
    for call in calls:
        call.kernel.warmup(*call.arguments, grid=(1,), **call.options)
    triton.knobs.runtime.jit_cache_hook = None
    return found


def products(groups: list[list[PreparedWeight]], rows: int, bias: bool) -> list[launcher.Call]:
    """The launches of products of `groups`, as `launcher.linear` makes them."""
    calls = []
    for group in groups:
        x = torch.empty(rows, group[0].in_features, dtype=torch.float16)
        y = torch.empty(rows, sum(w.out_features for w in group), dtype=torch.float16)
        if rows >= launcher.dense_rows():
            calls += [launcher.dequantize_call(torch.empty(w.out_features, 16, dtype=x.dtype), w) for w in group]
        else:
            calls += launcher.linear_calls(y, x, group, y[0] if bias else None, launcher.measured)
    return calls


@pytest.mark.parametrize(("backend", "per_width"), (("triton", 4), ("cuda", 3)))
def test_everything_that_a_mixed_8b_can_meet(backend: str, per_width: int) -> None:
    """4 kernels for each number of input features, 3 where CUDA kernels take up to 8 rows, and one for each format."""
    groups = mixed_8b(backend)
    # Of warm, every weight comes once and by itself.
    single = [group for group in groups if len(group) == 1]
    warmed = keys(warming.kernel_calls([w for group in single for w in group], torch.float16, ROWS[-1]))
    assert len(warmed) == per_width * 2 + len((*NARROW, "int6"))
    met = set()
    for rows, bias in product(ROWS, (False, True)):
        if backend == "triton" or rows > CUDA_ROWS:
            met |= keys(products(groups, rows, bias))
    assert met == warmed


def test_without_warming_the_order_of_formats_makes_no_kernel() -> None:
    """A fused launch depends on the set of widths."""
    made = {fmt: weight(fmt, (64, 512)) for fmt in NARROW}
    fused = [[made[fmt] for fmt in some] for some in product(NARROW, repeat=3)]
    assert len(keys(products(fused, 1, False))) == 2 ** len(NARROW) - 1
    assert len(keys(products([*fused, *([w] for w in made.values())], 16, True))) == 2 ** len(NARROW) - 1


def test_a_model_keeps_its_kernels_when_another_is_loaded() -> None:
    """The other one takes them too where they have its widths, in its own dtype, and all that it meets is compiled."""
    first, second = ([[weight(fmt, (64, 512))] for fmt in names] for names in (("int2", "int3"), ("int3", "int4")))
    before = keys(warming.kernel_calls([w for (w,) in first], torch.float16, 1))
    other = keys(warming.kernel_calls([w for (w,) in second], torch.float16, 1))
    assert (len(before), len(other), len(before & other)) == (1, 2, 1)
    assert keys(products(first, 1, False)) == before
    assert keys(products([*second, [second[0][0], second[1][0]]], 1, False)) == other
    assert keys(warming.kernel_calls([weight("int4", (64, 512))], torch.float16, 1)) == other - before


def test_a_measured_launch_is_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        launch_table, "look_up", lambda key: [0, 16, 1, 2, 1] if key.startswith("triton rows<=1 ") else 0
    )
    one = [weight("int3", (64, 512))]
    warmed = keys(warming.kernel_calls(one, torch.float16, 4))
    assert len(warmed) == 2 and keys(products([one], 1, False)) | keys(products([one], 3, False)) == warmed
    assert any("'num_warps': 2" in key for _, key in warmed)


def test_another_dtype_of_biases_is_another_kernel() -> None:
    one = [weight("int3", (64, 512))]
    plain, wide = (keys(warming.kernel_calls(one, torch.float16, 1, bias)) for bias in (None, torch.float32))
    assert plain.isdisjoint(wide) and len(plain) == len(wide) == 1


class Shown(Progress):
    def __init__(self) -> None:
        self.steps = 0

    def stage(self, name: str, total: int):
        from contextlib import nullcontext

        def step(note: str = "") -> None:
            self.steps += 1

        self.total = total
        return nullcontext(step)


def test_warm_compiles_once_and_what_comes_later_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With progress where it takes longer than its patience, and nothing anew from then on; Triton keeps it on disk."""
    monkeypatch.setattr(warming, "PATIENCE", 0.0)
    one, shown = weight("int3", (64, 512)), Shown()
    assert warming.warm([[one], [one, one]], torch.float16, 1, looked_up=[one], progress=shown) == 2
    assert shown.steps == shown.total == 2 and list((tmp_path / "triton").rglob("*.cubin"))
    assert warming.warm([[one]], torch.float16, 1, looked_up=[one], progress=Progress()) == 0

    class Compiled:
        """Launches without the last step."""

        def __init__(self, kernel) -> None:
            self.kernel = kernel

        def __getitem__(self, grid) -> Callable:
            return lambda *args, **kwargs: self.kernel.warmup(*args, grid=grid, **kwargs)

    def run(some: PreparedWeight) -> None:
        x = torch.empty(1, some.in_features, dtype=torch.float16)
        for call in products([[some]], 1, False):
            launcher._launch(call._replace(kernel=Compiled(call.kernel)), 1, x)

    run(one)
    assert not caplog.records
    run(weight("int3", (64, 64), 32))
    (message,) = caplog.messages
    assert "compiled a kernel while the model was in use" in message
    assert "1 rows of torch.float16, WIDTHS (3,), K 64, GROUP_SIZE 32" in message


def test_a_kernel_that_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_, **__) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(type(launcher._kernels().gemv), "warmup", fails)
    with pytest.raises(AmqError, match=r"Triton cannot compile for cpu: no compiler; Triton needs a C compiler \(CC\)"):
        warming.warm([[weight("int3", (64, 512))]], torch.float16, 1, progress=Progress())
