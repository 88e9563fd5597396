"""Attention on the GPU, on a CPU: kernels/cuda/attention.cu through amq/kernels/cuda_calls.py, on the shim.

What a launch reads of the cache is taken as it lies there, so that products are compared with float64 to the error of
float32; that keys and values lie there as they should is a test of its own. AMQ_TEST_CUDA_LIBRARY names another build,
as in test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from cuda_shim.build import chosen_build
from torch import Tensor

from amq.errors import AmqError
from amq.kernels import cuda
from amq.kernels.cuda_calls import KINDS, STORE_KEYS, AttentionCall, Call, CallLibrary

PAGE, CONTEXT = 64, 1024
CACHES = ("fp16", "int8")
NOT_WRITTEN = -12345.0

every_cache = pytest.mark.parametrize("cache", CACHES)


@pytest.fixture(scope="session")
def calls(tmp_path_factory: pytest.TempPathFactory) -> CallLibrary:
    return cuda.Library(chosen_build(tmp_path_factory.mktemp("shim"))).calls


@dataclass(frozen=True)
class Op:
    """An attention of one step; fields as in AttentionCall."""

    n_heads: int = 4
    n_kv_heads: int = 1
    head_dim: int = 64
    rotary: int = 0
    window: int = 0
    gated: bool = False
    keys_are_values: bool = False
    norms: str = ""  # which of q, k and v
    softcap: float = 0.0
    sinks: bool = False
    position_scale: bool = False
    cache: str = "fp16"

    @property
    def q_stride(self) -> int:
        return self.head_dim * (2 if self.gated else 1)

    @property
    def columns(self) -> int:
        kinds = 1 if self.keys_are_values else 2
        return self.n_heads * self.q_stride + kinds * self.n_kv_heads * self.head_dim

    @property
    def group(self) -> int:
        return self.n_heads // self.n_kv_heads

    @property
    def head_bytes(self) -> int:
        return 2 * PAGE * (2 * self.head_dim if self.cache == "fp16" else self.head_dim + 4)


@dataclass
class Model:
    """An op with random weights and a cache of pages in disorder, full of numbers that are none."""

    calls: CallLibrary
    op: Op
    lengths: Sequence[int] = (130,)
    seed: int = 1
    long: Sequence[bool] = ()
    rows: list[Tensor] = field(init=False)  # of each sequence: qkv [length, columns]

    OFFSET = 48  # bytes of a page before this step's part, and behind it

    def __post_init__(self) -> None:
        op, g = self.op, torch.Generator().manual_seed(self.seed)

        def random(*size: int) -> Tensor:
            return torch.randn(*size, generator=g)

        self.rows = [random(length, op.columns) for length in self.lengths]
        self.norm = {name: 1 + 0.2 * random(op.head_dim) for name in op.norms}
        self.angles = [random(2, CONTEXT, op.rotary // 2).mul(2) for _ in range(2)]
        self.cos, self.sin = [a[0].cos().contiguous() for a in self.angles], [a[0].sin() for a in self.angles]
        self.sinks = random(op.n_heads) if op.sinks else None
        self.scales = 1 + 0.5 * torch.rand(CONTEXT, generator=g) if op.position_scale else None
        self.scale = op.head_dim**-0.5
        self.part_bytes = self.calls.size("amq_cuda_cache_bytes", Call(AttentionCall, self.shape_fields()))
        self.page_bytes = self.part_bytes + 2 * self.OFFSET
        pages = [-(-length // PAGE) for length in self.lengths]
        order = torch.randperm(sum(pages), generator=g).int()
        self.tables = torch.full((len(pages), max(pages) + 1), 1 << 30, dtype=torch.int32)
        for slot, own in enumerate(order.split(pages)):
            self.tables[slot, : len(own)] = own
        self.memory = torch.full((sum(pages) * self.page_bytes,), 0xFF, dtype=torch.uint8)

    def shape_fields(self) -> dict[str, object]:
        op = self.op
        return {
            "n_heads": op.n_heads, "n_kv_heads": op.n_kv_heads, "head_dim": op.head_dim, "q_stride": op.q_stride,
            "gated": op.gated, "keys_are_values": op.keys_are_values, "cache_kind": CACHES.index(op.cache),
        }  # fmt: skip

    def call(
        self,
        rows: Sequence[tuple[int, int] | None],
        /,
        function: str = "",
        splits: int = 3,
        dtype: torch.dtype = torch.float32,
        **fields: object,
    ) -> Tensor:
        """Runs rows of (sequence, position); None is an empty one. Returns the output [rows, n_heads · head_dim]."""
        op, n = self.op, len(rows)
        qkv = torch.full((max(n, 1), op.columns + 5), torch.nan)
        for at, row in enumerate(rows):
            if row is not None:
                qkv[at, : op.columns] = self.rows[row[0]][row[1]]
        ints = [[row[i] if row else -(i**2) for row in rows] for i in (0, 1)]
        slots, positions = (torch.tensor(values, dtype=torch.int32) for values in ints)
        is_long = torch.tensor([bool(row and self.long and self.long[row[0]]) for row in rows], dtype=torch.int32)
        out = torch.full((max(n, 1), op.n_heads * op.head_dim + 3), NOT_WRITTEN, dtype=dtype)
        partials = torch.full((max(n, 1), op.n_heads, splits, op.head_dim + 2), torch.nan)
        counters = torch.zeros(max(n, 1), op.n_heads, dtype=torch.int32)
        tables = self.cos if op.rotary else [None, None], self.sin if op.rotary else [None, None]
        second = any(self.long)
        own = {
            "rows": n, "own_keys": 1, "rotary": op.rotary, "window": op.window, "scale": self.scale,
            "softcap": op.softcap, "epsilon": 1e-6, "out_kind": KINDS[dtype], "qkv": qkv, "qkv_stride": qkv.stride(0),
            "cos": [tables[0][0], tables[0][1] if second else None],
            "sin": [tables[1][0], tables[1][1] if second else None],
            "sinks": self.sinks, "position_scale": self.scales, "positions": positions, "slots": slots,
            "long_text": is_long, "tables": self.tables, "table_stride": self.tables.stride(0), "cache": self.memory,
            "page_bytes": self.page_bytes, "cache_offset": self.OFFSET, "out": out, "out_stride": out.stride(0),
            "partials": partials, "counters": counters, "splits": splits,
            **{f"{name}_norm": weight for name, weight in self.norm.items()},
        }  # fmt: skip
        self.calls.run(Call(AttentionCall, self.shape_fields() | own | fields, function=function), 0)
        assert not counters.any()
        assert (out[:, op.n_heads * op.head_dim :] == NOT_WRITTEN).all()
        return out[:n, : op.n_heads * op.head_dim]

    def store(self, sequence: int, count: int, first: int = 0) -> None:
        self.call([(sequence, p) for p in range(first, count)], function=STORE_KEYS)

    # -- the reference, in float64

    def heads(self, sequence: int, name: str, position: int) -> Tensor:
        """[heads, head_dim] of q, k, v or the gates of a row, after norm and rotation."""
        op, row = self.op, self.rows[sequence][position].double()
        q, rest = row.split([op.n_heads * op.q_stride, op.columns - op.n_heads * op.q_stride])
        kv = rest.view(-1, op.n_kv_heads, op.head_dim)
        q = q.view(op.n_heads, -1, op.head_dim)
        x = {"q": q[:, 0], "gate": q[:, -1], "k": kv[0], "v": kv[-1]}[name]
        if name in op.norms:
            x = x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * self.norm[name].double()
        if name in ("q", "k") and op.rotary:
            is_long = bool(self.long and self.long[sequence])
            cos, sin = self.cos[is_long][position].double(), self.sin[is_long][position].double()
            a, b, rest = x.split([op.rotary // 2, op.rotary // 2, op.head_dim - op.rotary], -1)
            x = torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)
        if name == "q":
            x = x * self.scale * (1 if self.scales is None else self.scales[position].double())
        return x

    def cached(self, sequence: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [count, kv heads, head_dim] as they lie in the cache, by attention_cache.cuh."""
        op, size = self.op, 2 if self.op.cache == "fp16" else 1
        found = []
        for page in self.tables[sequence, : -(-count // PAGE)].tolist():
            begin = page * self.page_bytes + self.OFFSET
            heads = self.memory[begin : begin + self.part_bytes].view(op.n_kv_heads, -1)
            keys, values, scales = heads.split(
                [PAGE * op.head_dim * size] * 2 + [op.head_bytes - 2 * PAGE * op.head_dim * size], -1
            )
            both = []
            for index, part in enumerate((keys, values)):
                numbers = part.contiguous().view(torch.float16).double() if size == 2 else part.double() - 128
                if index:
                    numbers = numbers.view(op.n_kv_heads, PAGE // 2, op.head_dim, 2).transpose(2, 3)
                numbers = numbers.reshape(op.n_kv_heads, PAGE, op.head_dim)
                if size == 1:
                    numbers = (
                        numbers * scales.contiguous().view(torch.float32)[:, index * PAGE :][:, :PAGE, None].double()
                    )
                both.append(numbers.transpose(0, 1))
            found.append(both)
        keys, values = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return keys, values

    def reference(self, sequence: int, position: int) -> tuple[Tensor, float]:
        """The row's output and what float32 may be off by.

        Scores: queries of 22 bits, and sums over features in float32, each addition off by half a unit of 2⁻²³ at
        most. An output moves by at most twice that times the largest value, and by the roundings of weights and sums.
        """
        op = self.op
        keys, values = self.cached(sequence, position + 1)
        first = max(0, position - op.window + 1) if op.window else 0
        keys, values = keys[first:].repeat_interleave(op.group, 1), values[first:].repeat_interleave(op.group, 1)
        q = self.heads(sequence, "q", position)
        scores = torch.einsum("hd,phd->hp", q, keys)
        absolute = torch.einsum("hd,phd->hp", q.abs(), keys.abs()).max().item()
        if op.softcap:
            scores = op.softcap * torch.tanh(scores / op.softcap)
        if self.sinks is not None:
            scores = torch.cat([scores, self.sinks.double()[:, None]], -1)
        weights = torch.softmax(scores, -1)[:, : len(keys)]
        out = torch.einsum("hp,phd->hd", weights, values)
        if op.gated:
            out = out * torch.sigmoid(self.heads(sequence, "gate", position))
        # tanh and exp are right to a few units of float32, and so are norm and rotation of the query.
        of_score = absolute * (2**-21 + (op.head_dim + 16) * 2**-24) + 2**-20 * (1 + scores.abs().max().item())
        bound = values.abs().max().item() * (2 * of_score + (len(keys) + 32) * 2**-23)
        return out.flatten(), bound

    def check(self, rows: Sequence[tuple[int, int] | None], out: Tensor) -> None:
        for row, y in zip(rows, out, strict=True):
            if row is None:
                assert not y.any()
                continue
            expected, bound = self.reference(*row)
            if y.dtype != torch.float32:
                bound += expected.abs().max().item() * torch.finfo(y.dtype).eps / 2
            assert (y.double() - expected).abs().max().item() <= bound, row


def decode(model: Model, rows: Sequence[tuple[int, int] | None], **options: object) -> Tensor:
    """The rows after everything before them is in the cache."""
    for row in rows:
        if row is not None and row[1]:
            model.store(row[0], row[1])
    out = model.call(rows, **options)  # type: ignore[arg-type]
    model.check(rows, out)
    return out


OPS = {
    "plain": Op(),
    "llama": Op(8, 2, 128, rotary=128),
    "norms": Op(6, 2, 48, rotary=32, norms="qk"),
    "gated": Op(4, 2, 256, rotary=64, norms="qk", gated=True),
    "gemma": Op(4, 1, 512, rotary=128, norms="qkv", keys_are_values=True, window=70),
    "sinks": Op(8, 1, 64, rotary=64, sinks=True, window=50, softcap=3.0),
    "scaled": Op(16, 1, 16, rotary=8, position_scale=True),
    "uneven": Op(5, 1, 80, rotary=20),
    "many": Op(12, 1, 320, rotary=64, softcap=20.0),
    "single": Op(3, 3, 144, rotary=144, norms="v"),
}
every_op = pytest.mark.parametrize("name", OPS)


@every_op
@every_cache
def test_decode(calls: CallLibrary, name: str, cache: str) -> None:
    """Every option, beside an empty row, at the edges of pages and one more of the window's."""
    lengths = (66, 130, 1, 129)
    model = Model(calls, replace(OPS[name], cache=cache), lengths)
    decode(model, [(0, 65), (1, 129), None, (2, 0), (3, 128)], splits=3)


@pytest.mark.parametrize("position", (0, 1, 15, 16, 49, 50, 63, 64, 65, 127, 128, 300))
def test_positions(calls: CallLibrary, position: int) -> None:
    for window in (0, 50):
        decode(Model(calls, Op(2, 1, 32, window=window), (position + 1,)), [(0, position)], splits=2)


@pytest.mark.parametrize("splits", (1, 3, 32))
@every_cache
def test_splits(calls: CallLibrary, splits: int, cache: str) -> None:
    for window in (0, 1, 100, 300):
        for head_dim in (64, 160):
            op = Op(2, 1, head_dim, window=window, cache=cache)
            decode(Model(calls, op, (400, 200)), [(0, 399), (1, 199)], splits=splits)


@every_op
@every_cache
def test_keys_and_values(calls: CallLibrary, name: str, cache: str) -> None:
    """What lies in the cache is the row's, rounded: half a unit of fp16, or of a 127th of the largest magnitude. It is
    the same whether stored by itself or by attention."""
    model = Model(calls, replace(OPS[name], cache=cache), (66,))
    model.store(0, 66)
    for position in (0, 1, 63, 64, 65):
        for kind, found in zip("kv", model.cached(0, 66), strict=True):
            x = model.heads(0, kind, position)
            largest = x.abs().amax(-1, keepdim=True)
            exact = largest * 2**-20  # of float32
            unit = (x.abs() * 2**-11).clamp(min=2**-25) if cache == "fp16" else largest / 254 * (1 + 2**-20)
            assert ((found[position] - x).abs() <= unit + exact).all()
    before = model.memory.clone()
    model.call([(0, 65)])
    assert torch.equal(model.memory, before)
    whole = model.memory.view(-1, model.page_bytes)
    assert (whole[:, : model.OFFSET] == 0xFF).all() and (whole[:, -model.OFFSET :] == 0xFF).all()


PROMPTS = {
    "window": Op(4, 2, 32, rotary=32, window=40),
    "uneven": Op(5, 1, 16),
    "slices": Op(2, 2, 160, window=90),
    "chunks": Op(12, 1, 64, norms="qk"),
}


@pytest.mark.parametrize("name", PROMPTS)
@every_cache
def test_a_prompt_is_its_tokens(calls: CallLibrary, name: str, cache: str) -> None:
    """The same bits: all tokens in one pass, each in a pass of its own that stores it, a few beside other rows."""
    op, lengths, splits = replace(PROMPTS[name], cache=cache), (135, 19), 2
    model = Model(calls, op, lengths)
    rows = [(1, p) for p in range(19)] + [(0, p) for p in range(130)] + [None] + [(0, p) for p in range(134, 129, -1)]
    model.store(0, 135)
    model.store(1, 19)
    prompt = model.call(rows, stored=1, splits=splits)
    model.check(rows[-30:], prompt[-30:])
    assert torch.equal(model.call(rows[145:152], stored=1, splits=splits), prompt[145:152])
    one_by_one = Model(calls, op, lengths)
    for row in sorted(row for row in rows if row is not None):
        if row[1] % 9 == 0 or row[1] > 120:  # spans get longer at 128
            assert torch.equal(one_by_one.call([row], splits=splits)[0], prompt[rows.index(row)]), row
        else:
            one_by_one.store(row[0], row[1] + 1, row[1])
    assert torch.equal(one_by_one.memory, model.memory)


@pytest.mark.parametrize("order", ("reverse", "random:7"))
@every_cache
def test_rows_and_order_do_not_matter(
    calls: CallLibrary, cache: str, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op = Op(6, 2, 144, rotary=64, norms="qk", cache=cache)
    lengths = (70, 1, 64, 65, 200, 130, 129, 128)
    rows = [(i, length - 1) for i, length in enumerate(lengths)]
    model = Model(calls, op, lengths)
    together = decode(model, rows)
    monkeypatch.setenv("AMQ_SHIM_ORDER", order)
    assert torch.equal(model.call(rows), together)
    for at, row in enumerate(rows):
        assert torch.equal(model.call([row])[0], together[at])


def test_long_texts(calls: CallLibrary) -> None:
    """Rows of two tables of angles in one pass."""
    decode(Model(calls, Op(rotary=64), (70, 30), long=(True, False)), [(0, 69), (1, 29)])


def test_the_cache_of_another_step(calls: CallLibrary) -> None:
    """Queries alone, and what the row of the same position has stored."""
    model = Model(calls, Op(rotary=64, norms="q"), (70,))
    model.store(0, 70)
    before = model.memory.clone()
    rows = [(0, 69)]
    model.rows[0][:, 4 * 64 :] = torch.nan
    out = model.call(rows, own_keys=0)
    model.check(rows, out)
    assert torch.equal(model.memory, before)


@every_cache
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
def test_outputs_of_16_bits(calls: CallLibrary, dtype: torch.dtype, cache: str) -> None:
    decode(Model(calls, Op(cache=cache), (70,)), [(0, 69), None], dtype=dtype)


@every_cache
def test_as_exact_as_float32(calls: CallLibrary, cache: str) -> None:
    """Queries and weights keep what fp16 would drop, whatever the size of queries and of int8 values: within twice the
    error of torch in float32."""
    for size in (1e-6, 1.0, 1e4):
        model = Model(calls, Op(8, 1, 128, cache=cache), (400,))
        model.scale = 0.3 / size
        model.rows[0][:, : 8 * 128] *= size
        model.rows[0][:, 9 * 128 :] *= min(size, 1e3) if cache == "int8" and size > 1 else 1
        model.store(0, 400)
        out = model.call([(0, 399)])
        model.check([(0, 399)], out)
        keys, values = model.cached(0, 400)
        q = model.heads(0, "q", 399)
        weights = torch.softmax(q.float() @ keys[:, 0].float().T, -1)
        exact = torch.softmax(q @ keys[:, 0].T, -1) @ values[:, 0]
        off = ((weights @ values[:, 0].float()).double() - exact).square().mean().sqrt()
        mine = (out[0].view(8, 128).double() - exact).square().mean().sqrt()
        assert mine <= 2 * off


def test_values_that_are_no_numbers_stay_in_their_row(calls: CallLibrary) -> None:
    for cache in CACHES:
        model = Model(calls, Op(cache=cache), (70, 70))
        model.store(0, 69)
        model.store(1, 69)
        model.rows[1][69, 5] = torch.nan
        model.rows[1][69, 2 * 64] = torch.inf
        out = model.call([(0, 69), (1, 69)]).view(2, 4, 64)
        assert out[0].isfinite().all()
        assert out[1, [0, 2]].isnan().all() and out[1, [1, 3]].isfinite().all()


def test_refusals(calls: CallLibrary) -> None:
    model = Model(calls, Op(), (3,))
    rows = [(0, 0)]
    for bad in (
        {"head_dim": 40}, {"head_dim": 528}, {"n_kv_heads": 3}, {"rotary": 66}, {"rotary": 32}, {"window": -1},
        {"q_stride": 32}, {"splits": 0}, {"cache": model.memory[1:]}, {"page_bytes": model.page_bytes + 8},
        {"cache_offset": 8}, {"tables": None}, {"out": None}, {"partials": None}, {"counters": None},
        {"positions": None}, {"slots": None}, {"qkv": None},
    ):  # fmt: skip
        with pytest.raises(AmqError, match=r"\(-6"):
            model.call(rows, **bad)
    for bad in ({"out_kind": 3}, {"cache_kind": 2}):
        with pytest.raises(AmqError, match=r"\(-5"):
            model.call(rows, **bad)
    with pytest.raises(AmqError, match=r"\(-1"):
        model.call(rows, rows=-1)
    with pytest.raises(AmqError, match=r"\(-6"):
        model.call(rows, function=STORE_KEYS, own_keys=0)
    model.call([])
    model.call([], function=STORE_KEYS)
