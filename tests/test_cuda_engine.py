"""The CUDA engine on a CPU, through the shim: every family's logits are those of the native engine's exact mode, within
the roundings of 16 bits, whatever shares a pass.

Launches on a GPU, graphs and speed are not here: benchmarks/gpu has them.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache as remember
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import advise, tiny_checkpoint
from helpers.cuda_on_cpu import agrees, cuda_library, open_on_cpu
from helpers.engine_cases import CASES
from helpers.engines import last_rows, text
from torch import Tensor

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.kernels.cuda_calls import AttentionCall, Call, CallLibrary
from amq.model import open as model_open
from amq.runtime import cuda_engine, loading
from amq.runtime.cuda_buffers import StepPlaces
from amq.runtime.cuda_engine import CudaEngine, open_cuda
from amq.runtime.decoder_spec import DecoderSpec, Mixture
from amq.runtime.engine import Segment
from amq.runtime.families import Unsupported, read_spec
from amq.runtime.native_engine import open_native
from amq.runtime.paged_engine import PagedSlot
from amq.runtime.settings import Sampling

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 28
"""A prompt of three launches of eight rows, and four tokens decoded one by one."""


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


def errors(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row, root mean squares over the vocabulary, relative to the row's."""
    return (found - expected).double().square().mean(-1).sqrt() / expected.double().square().mean(-1).sqrt()


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float16, layers: int = 2) -> bool:
    return bool(errors(found, expected).max() <= agrees(layers, dtype))


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_the_native_engine(folder: Callable[[str], Path], name: str) -> None:
    """Of a prompt in one pass, and of tokens decoded one by one behind it.

    A router that is nearly undecided may choose another expert after a rounding, which a recurrent state remembers: of
    mixtures the median row counts.
    """
    tokens, split = text(LENGTH), LENGTH - 4
    expected = open_native(folder(name), "fp32", context=256).all_logits(tokens)
    engine = open_on_cpu(folder(name))
    slot = engine.open(tokens, 0)
    found = [engine.forward([Segment(slot, tokens[:split], every=True)])]
    found += [engine.forward([Segment(slot, [token])]).clone() for token in tokens[split:]]
    engine.close(slot)
    of_rows = errors(torch.cat(found), expected)
    assert (of_rows.median() if mixes(folder(name)) else of_rows.max()) <= agrees(2, torch.float16)


def mixes(folder: Path) -> bool:
    checkpoint = open_checkpoint(folder, verify=False)
    names = {*checkpoint.other_names, *checkpoint.record.formats}
    return bool(read_spec(checkpoint.config, "config.json", names).parts(Mixture))


NEW = 6
"""Tokens that sequences decode on their own."""


def greedy(engine: CudaEngine, prompt: list[int], count: int) -> list[int]:
    slot = engine.open(prompt, count, reuse=False)
    part, found = prompt, []
    while len(found) < count:
        part = [int(engine.forward([Segment(slot, part)])[0].argmax())]
        found += part
    engine.close(slot)
    return found


SHARING = ("llama", "gemma3", "qwen3_5", "lfm2", "qwen3_moe")
"""Plain, with windows and norms behind operators, recurrent, with short convolutions, of experts."""


@pytest.mark.parametrize("name", SHARING)
def test_sequences_of_different_lengths_share_passes(folder: Callable[[str], Path], name: str) -> None:
    """Rows of a pass belong to whoever is there, up to eight of them, on either side of a page's edge."""
    texts = {i: text(length, i) for i, length in enumerate((66, 1, 21, 64, 65, 5, 8, 63))}
    native = open_native(folder(name), "fp32", context=256)
    alone = {i: native.all_logits(tokens)[-1] for i, tokens in texts.items()}
    engine = open_on_cpu(folder(name), max_sequences=8)
    slots = {i: engine.open(tokens, 0, reuse=False) for i, tokens in texts.items()}
    found = last_rows(engine, slots, texts, ((60, 59), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1), (1, 1)))
    assert found.keys() == texts.keys()
    of_rows = torch.stack([errors(found[i], alone[i]) for i in texts])
    assert (of_rows.median() if mixes(folder(name)) else of_rows.max()) <= agrees(2, torch.float16)


@pytest.mark.parametrize("name, activations", (("llama", "fp32"), ("llama", "int8"), ("qwen3_moe", "fp32")))
def test_a_row_does_not_depend_on_the_rows_beside_it(
    folder: Callable[[str], Path], name: str, activations: str
) -> None:
    """To the bit: who norms it, how inputs of linears are staged and blocks are shared out differ with the rows."""
    engine = open_on_cpu(folder(name), max_sequences=4, activations=activations)
    texts = [text(length, seed) for seed, length in enumerate((9, 3, 5, 4))]

    def decoded(rows: int) -> Tensor:
        """Logits of the last two tokens of all texts, `rows` sequences in a pass."""
        found = []
        for begin in range(0, len(texts), rows):
            slots = [(engine.open(tokens, 0, reuse=False), tokens) for tokens in texts[begin : begin + rows]]
            for slot, tokens in slots:
                engine.forward([Segment(slot, tokens[:-2])])
            passes = [[Segment(slot, [tokens[i]]) for slot, tokens in slots] for i in (-2, -1)]
            found.append(torch.stack([engine.forward(segments).clone() for segments in passes], 1))
            for slot, _ in slots:
                engine.close(slot)
        return torch.cat(found)

    assert torch.equal(decoded(4), decoded(1))


@pytest.mark.parametrize("name", ("llama", "lfm2", "qwen3_moe"))
def test_sequences_decode_on_their_own(folder: Callable[[str], Path], name: str) -> None:
    """The GPU's own greedy text is the one that the host chooses from its logits, with others that come and go."""
    engine = open_on_cpu(folder(name), max_sequences=3)
    prompts = [text(length, seed) for seed, length in enumerate((12, 62, 5))]
    expected = [greedy(engine, prompt, NEW) for prompt in prompts]
    slots, found = [], []
    for prompt in prompts:
        slots.append(engine.open(prompt, NEW, reuse=False))
        found.append([int(engine.forward([Segment(slots[-1], prompt)])[0].argmax())])
        engine.begin(slots[-1], found[-1][0], Sampling(), 0, NEW - 1)
        for slot, token in engine.step().items():
            found[slots.index(slot)].append(token)
    while any(len(tokens) < NEW for tokens in found):
        for slot, token in engine.step().items():
            found[slots.index(slot)].append(token)
    assert found == expected
    for slot, prompt, tokens in zip(slots, prompts, found, strict=True):
        engine.end(slot)
        assert slot.length == len(prompt) + NEW - 1 and slot.tokens == [*prompt, *tokens[:-1]]
        engine.close(slot)


def own_text(engine: CudaEngine, slot: PagedSlot, token: int, count: int) -> list[int]:
    """`token`, and what the engine chooses behind it, `count` in all; other slots may decode beside it."""
    engine.begin(slot, token, Sampling(), 0, count - 1)
    found = [token]
    while len(found) < count:
        found += [token for own, token in engine.step().items() if own is slot]
    engine.end(slot)
    return found


def test_a_sequence_that_begins_again_is_given_no_token_of_before(folder: Callable[[str], Path]) -> None:
    engine = open_on_cpu(folder("llama"))
    prompt, other = text(12), text(2, 7)
    slot = engine.open(prompt, NEW + 10, reuse=False)
    token = int(engine.forward([Segment(slot, prompt)])[0].argmax())
    engine.begin(slot, token, Sampling(), 0, 5)
    assert engine.step() == {}  # a pass is under way, whose token nobody reads
    engine.end(slot)
    first = int(engine.forward([Segment(slot, other)])[0].argmax())
    found = own_text(engine, slot, first, NEW)
    engine.close(slot)
    assert found == greedy(engine, [*prompt, token, *other], NEW)


def test_a_pass_that_fails_leaves_nothing_behind(folder: Callable[[str], Path]) -> None:
    """Of nine sequences eight share a pass that runs, and is not read, when the other one's fails."""
    engine = open_on_cpu(folder("llama"), max_sequences=9)
    expected = greedy(engine, text(12), NEW)
    slots = [engine.open(text(3, seed), 8, reuse=False) for seed in range(9)]
    for slot in slots:
        engine.forward([Segment(slot, text(3))])
        engine.begin(slot, 1, Sampling(), 0, 8)
    engine.step()

    def fails() -> Tensor:
        raise AmqError("CUDA error")

    rows = engine._own._passes[1]
    works, rows._runs = rows._runs, dict.fromkeys(rows._runs, fails)
    with pytest.raises(AmqError, match="CUDA error"):
        engine.step()
    rows._runs = works
    assert [slot.length for slot in slots] == [5] * 8 + [4]  # the last one was not fed
    for slot in slots:
        engine.end(slot)
        engine.close(slot)
    slot = engine.open(text(12), NEW, reuse=False)
    token = int(engine.forward([Segment(slot, text(12))])[0].argmax())
    assert own_text(engine, slot, token, NEW) == expected


def test_experts_have_no_kernels_for_many_rows(folder: Callable[[str], Path]) -> None:
    """They are multiplied 8 rows at a time; compiling for their shapes takes seconds of a start."""
    weights = open_on_cpu(folder("qwen3_moe"))._weights
    experts = {name for name in weights.prepared if ".experts." in name}
    many = {id(weight) for weight in weights.of_many_rows()}
    assert experts and many == {id(weight) for name, weight in weights.prepared.items() if name not in experts}


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")
def test_logits_of_a_whole_text(folder: Callable[[str], Path]) -> None:
    """Of more rows than one product of the head has."""
    tokens = text(100)
    expected = open_native(folder("llama"), "fp32", context=256).all_logits(tokens)
    assert close(open_on_cpu(folder("llama")).all_logits(tokens), expected)


def test_a_page_that_another_sequence_filled_too(folder: Callable[[str], Path]) -> None:
    """Of two equal texts one page is kept; the other may be a third sequence's while both go on."""
    engine = open_on_cpu(folder("llama"), max_sequences=3)
    prompt, count = text(60), 24
    expected = greedy(engine, prompt, count)
    slots = [engine.open(prompt, count) for _ in range(2)]
    found = {slot: [int(engine.forward([Segment(slot, prompt)])[0].argmax())] for slot in slots}
    for slot, tokens in found.items():
        engine.begin(slot, tokens[0], Sampling(), 0, count - 1)
    while len(found[slots[0]]) < count:
        if len(found[slots[0]]) == 8:  # the first page is full
            assert slots[0].pages[0] == slots[1].pages[0]
            third = engine.open(text(100, 7), 0)
            engine.forward([Segment(third, text(100, 7))])
        for slot, token in engine.step().items():
            found[slot].append(token)
    assert list(found.values()) == [expected, expected]
    for slot in slots:
        engine.end(slot)
    first, second = (engine.forward([Segment(slot, [1])]).clone() for slot in slots)
    assert torch.equal(first, second)  # they attend to all that was computed on the way


def test_a_context_that_does_not_fit(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Refused where somebody asked for it, else lowered; passes have memory beside the cache."""
    whole = open_on_cpu(folder("llama"), max_sequences=2)
    spec, page = whole._weights.spec, whole.cache_bytes // 8
    free = cuda_engine._spare(spec) + 2 * 3 * page + page
    monkeypatch.setattr(cuda_engine, "free_on", lambda device: free)
    with pytest.raises(AmqError, match="192 tokens fit; give a smaller --context, fewer sequences, --cache int8"):
        open_on_cpu(folder("llama"), max_sequences=2)
    lowered = open_on_cpu(folder("llama"), max_sequences=2, context=None)
    assert lowered.context == 192 and lowered.cache_bytes == 6 * page and "context 192" in lowered.banner
    assert "192 tokens fit, which is the context now" in caplog.text
    free = 0
    with pytest.raises(AmqError, match="0 tokens fit"):
        open_on_cpu(folder("llama"), context=None)


def test_what_the_kernels_refuse_is_left_to_another_path(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are asked for, and passes run, when a model is opened."""
    call = Call(AttentionCall, {"head_dim": 24, "n_heads": 1, "n_kv_heads": 1}, "attention of step 0")

    def places(spec: DecoderSpec, library: CallLibrary, cache: Sequence[str]) -> None:
        library.size("amq_cuda_cache_bytes", call)

    monkeypatch.setattr(StepPlaces, "of", places)
    with pytest.raises(Unsupported, match="CUDA engine does not compute it: attention of step 0: .* out of range"):
        open_on_cpu(folder("llama"))


def test_a_pass_that_fails_is_no_graph_that_fails(folder: Callable[[str], Path]) -> None:
    engine = open_on_cpu(folder("llama"))

    def capture(error: Exception) -> Callable[..., Tensor]:
        def fail(run: Callable[[], Tensor]) -> Tensor:
            raise error

        return fail

    engine._capture = capture(AmqError("CUDA error"))
    with pytest.raises(AmqError, match="CUDA error"):
        engine.captured(lambda: None)
    engine._capture = capture(RuntimeError("not permitted"))
    assert engine.captured(capture) is capture and engine.banner.endswith("no CUDA graphs (not permitted)")


def test_a_decode_pass_is_safe_to_capture(folder: Callable[[str], Path]) -> None:
    """It is calls alone: no Python between them, no operation of torch, nothing that allocates or waits."""
    for name in SHARING:
        engine = open_on_cpu(folder(name))
        passes = engine._builder.build(1, decode=True)
        assert all(isinstance(part, Call) for part in passes.parts)


def test_launches_of_a_layer(tmp_path: Path) -> None:
    """Five for a row or two, and the two norms beyond that; the embedding and the head beside them."""
    engine = open_on_cpu(tiny_checkpoint(CASES["llama"](), tmp_path / "model", head="int8"), max_sequences=8)
    assert engine.launches == {1: (11, 1), 2: (11, 1), 4: (15, 2), 8: (15, 2)}


@pytest.mark.parametrize("name", ("llama", "gemma3", "qwen3_moe"))
def test_other_kinds_of_numbers(folder: Callable[[str], Path], name: str) -> None:
    """bf16 has 8 bits of mantissa, and so have keys and values, or activations, that are rounded to 8 bits."""
    tokens = text(LENGTH)
    expected = open_native(folder(name), "fp32", context=256).all_logits(tokens)[-1:]
    for options in ({"dtype": "bfloat16"}, {"cache": "int8"}, {"activations": "int8"}):
        engine = open_on_cpu(folder(name), **options)
        slot = engine.open(tokens, 0)
        found = engine.forward([Segment(slot, tokens)])
        assert close(found, expected, torch.bfloat16), options
        assert not torch.equal(found, expected)


def test_prompts_through_another_product(folder: Callable[[str], Path], tmp_path: Path) -> None:
    """What multiplies more than 8 rows on a GPU is Triton; here a dequantized weight stands in its place."""
    from amq.packing import dequantize

    scaled = tiny_checkpoint(CASES["granite"](), tmp_path / "model", head="int8")  # a factor behind a quantized head
    for place in (folder("llama-biased"), folder("gemma3"), scaled):
        tokens = text(LENGTH)
        expected = open_native(place, "fp32", context=256).all_logits(tokens)
        engine = open_on_cpu(place)
        dense = {
            weight.data.data_ptr(): dequantize(engine._weights.checkpoint.packed(key))
            for key, weight in engine._weights.prepared.items()
        }
        sizes = []

        def many(x: Tensor, weights, y: Tensor, dense=dense, sizes=sizes) -> None:
            sizes.append(len(x))
            y.copy_(torch.cat([x.float() @ dense[weight.data.data_ptr()].T for weight in weights], -1))

        engine._builder._many = many
        slot = engine.open(tokens, 0)
        assert close(engine.forward([Segment(slot, tokens, every=True)]), expected), place
        assert set(sizes) == ({32, LENGTH} if place is scaled else {32})  # a pass of 28 rows is one of 32


def test_what_does_not_fit_is_refused(folder: Callable[[str], Path]) -> None:
    engine = open_on_cpu(folder("llama"), max_sequences=2)
    slot = engine.open(text(4), 2)
    with pytest.raises(AmqError, match="outside the model's vocabulary"):
        engine.forward([Segment(slot, [engine.vocab_size])])
    with pytest.raises(AmqError, match="room for 64 positions"):
        engine.forward([Segment(slot, text(65))])
    short = open_on_cpu(folder("llama"), context=100)  # its last page has more positions than the context
    with pytest.raises(AmqError, match="room for 100 positions"):
        short.forward([Segment(short.open(text(90), 10), text(101))])
    with pytest.raises(AmqError, match="read its first token"):
        engine.begin(slot, 3, Sampling(), 0, 2)
    engine.forward([Segment(slot, text(4))])
    with pytest.raises(AmqError, match="token id is outside"):
        engine.begin(slot, engine.vocab_size, Sampling(), 0, 2)
    engine.begin(slot, 3, Sampling(), 0, 2)
    with pytest.raises(AmqError, match="decodes on its own"):
        engine.forward([Segment(slot, [1])])
    with pytest.raises(AmqError, match="already"):
        engine.begin(slot, 3, Sampling(), 0, 2)
    engine.end(slot)
    with pytest.raises(AmqError, match="61 passes of a sequence that has room for 60 positions more"):
        engine.begin(slot, 3, Sampling(), 0, 61)
    assert not engine.can_sample(Sampling(repetition_penalty=1.1))
    with pytest.raises(AmqError, match="the CUDA engine keeps keys and values as float16, int8, not as float32"):
        open_on_cpu(folder("llama"), cache="float32")


def test_layers_have_their_own_caches(tmp_path: Path, folder: Callable[[str], Path]) -> None:
    """As a list, or from the checkpoint; kinds that are not here are refused, not replaced."""
    place, tokens, mixed = shutil.copytree(folder("llama"), tmp_path / "model"), text(LENGTH), ("int8", "float16")

    def logits(cache: str | Sequence[str]) -> Tensor:
        engine = open_on_cpu(place, cache=cache)
        slot = engine.open(tokens, 0)
        return engine.forward([Segment(slot, tokens)]).clone()

    sizes = [open_on_cpu(place, cache=kind).cache_bytes for kind in mixed]
    assert open_on_cpu(place, cache=mixed).cache_bytes == sum(sizes) // 2
    found = logits(mixed)
    assert all(not torch.equal(found, logits(kind)) for kind in (*mixed, mixed[::-1]))
    advise(place, {"layers.0": "int8", "layers.1": "float16"})
    assert torch.equal(logits("auto"), found) and "float16+int8 cache" in open_on_cpu(place).banner
    advise(place, {"layers.0-1": "int4"})
    with pytest.raises(AmqError, match="float16, int8, not as int4, which .*model asks for: give one of these as --ca"):
        open_on_cpu(place)
    assert torch.equal(logits(mixed), found)


def test_device_cuda_picks_it(folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU; what the engine does not do is left to another path by name, or refused."""
    place = folder("llama")
    monkeypatch.setattr(loading, "choose_backend", lambda formats, device: "cuda" if device == "cuda:1" else "triton")
    with pytest.raises(AmqError, match="device 'cuda:1' cannot be used here"):
        loading.load(place, device="cuda:1")
    monkeypatch.setattr(model_open, "check_device", lambda device: None)
    monkeypatch.setattr(cuda_engine, "open_cuda", lambda checkpoint, device, *more: open_cuda(checkpoint, "cpu", *more))
    runtime = loading.load(place, device="cuda:1", context=64, cache="int8", dtype="bfloat16", activations="int8")
    assert isinstance(runtime.engine, CudaEngine) and runtime.device == "cuda:1"
    assert "CUDA engine (llama) on cpu: int2+" in runtime.engine.banner
    assert "bfloat16 rounded to int8, int8 cache, context 64" in runtime.engine.banner
    with pytest.raises(AmqError, match="leave --prompt-cache out with --device cuda"):
        loading.load(place, device="cuda:1", prompt_cache=1 << 20)
    settings = loading.LoadSettings.make(device="cuda", dtype="float32")
    checkpoint = open_checkpoint(place, verify=False)
    found, why = loading._load_own(checkpoint, settings)
    assert found is None and why == "the CUDA engine is for device cuda, backend cuda and float16 or bfloat16"
    found, why = loading._load_own(checkpoint, loading.LoadSettings.make(device="cuda"))  # the first GPU is too old
    assert found is None and why == "backend cuda does not run its formats here"
