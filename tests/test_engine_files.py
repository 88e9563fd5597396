"""What files say to the native engine: sizes are bounded, tensors have the model's shapes, and nothing is guessed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.engines import text, transformers_logits
from helpers.tiny_models import ARCHITECTURES
from safetensors.torch import load_file, save_file

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.kernels.cpu import cpu_module
from amq.runtime.engine import Segment
from amq.runtime.families import Unsupported, read_spec
from amq.runtime.loading import load
from amq.runtime.native_engine import MAX_ROWS, open_native
from amq.runtime.native_weights import NativeWeights
from amq.util.tensors import hashes_metadata, open_file

pytestmark = pytest.mark.usefixtures("one_thread")

Tensors = dict[str, torch.Tensor]
FIRST = "model.layers.0"
Q = f"{FIRST}.self_attn.q_proj"
NORM, LAST = f"{FIRST}.input_layernorm.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one block, read-only: hidden 64, 4 heads of 16 and 2 of keys (qwen3: of 32), intermediate 96."""
    base, options = tmp_path_factory.mktemp("whole"), {"num_hidden_layers": 1}
    made = {
        "llama": ARCHITECTURES["llama"].build(**options),
        "untied": ARCHITECTURES["llama"].build(tie_word_embeddings=False, **options),
        "biased": ARCHITECTURES["llama"].build(attention_bias=True, mlp_bias=True, **options),
        "qwen3": ARCHITECTURES["qwen3"].build(**options),
        "opt": ARCHITECTURES["opt"].build(**options),
    }
    return {name: tiny_checkpoint(model, base / name) for name, model in made.items()}


@pytest.fixture
def copy(whole: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(whole[name], tmp_path / "copy"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def replace_tensors(folder: Path, change: Callable[[Tensors], Any]) -> Path:
    """Writes the tensors again with right hashes, as whoever made the checkpoint could."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=hashes_metadata(tensors))
    return folder


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **values}}


WRAP = 1 << 60
SIZES: dict[str, tuple[dict[str, Any], str]] = {
    "heads wrap": ({"num_attention_heads": 4 + WRAP, "head_dim": 16}, "num_attention_heads from 1"),
    "heads wrap thrice": ({"num_attention_heads": 4 + 3 * (WRAP >> 2), "head_dim": 64}, "num_attention_heads from 1"),
    "both wrap": ({"num_attention_heads": 4 + 2 * WRAP, "num_key_value_heads": 2 + WRAP}, "from 1 to"),
    "vocabulary wraps": ({"vocab_size": 256 + (1 << 56)}, "vocab_size from 1"),
    "beyond 64 bits": ({"hidden_size": 1 << 70}, "config.json"),
    "more heads": ({"num_attention_heads": 8, "head_dim": 16}, r"q_proj as \[64, 64\], expected \[128, 64\]"),
    "more rows": ({"vocab_size": 257}, r"embed_tokens.weight as F32 \[256, 64\], expected .* \[257, 64\]"),
    "fewer rows": ({"vocab_size": 255}, r"embed_tokens.weight as F32 \[256, 64\], expected .* \[255, 64\]"),
    "wide heads": ({"head_dim": 1 << 20}, "expected heads of at most 65536 features, got 1048576"),
    "too many layers": ({"num_hidden_layers": 10**6, "layer_types": None}, "num_hidden_layers"),
    "one more layer": ({"num_hidden_layers": 2, "layer_types": None}, "lacks the linear model.layers.1"),
    "text": ({"intermediate_size": "96"}, r"intermediate_size: expected `int \| null`, got `str`"),
    "null": ({"hidden_size": None}, "hidden_size: expected `int`, got `null`"),
    "half a size": ({"hidden_size": 64.5}, "hidden_size: expected `int`, got `float`"),
    "zero": ({"num_attention_heads": 0}, "num_attention_heads from 1"),
    "negative": ({"num_key_value_heads": -2}, "num_key_value_heads from 1"),
    "odd groups": ({"num_key_value_heads": 3}, "num_key_value_heads to divide num_attention_heads 4, got 3"),
    "epsilon": ({"rms_norm_eps": 1e300}, "rms_norm_eps from 0"),
    "no number": ({"rms_norm_eps": float("nan")}, "rms_norm_eps from 0"),
    "short layer_types": ({"layer_types": []}, "layer_types of all 1 layers, got 0"),
    "odd layer_types": ({"layer_types": [5]}, r"layer_types\[0\]: expected `str`"),
    "window": ({"layer_types": ["sliding_attention"], "sliding_window": -3}, "sliding_window from 0"),
    "window text": ({"layer_types": ["sliding_attention"], "sliding_window": "x"}, "sliding_window: expected `int"),
    "kind": ({"model_type": ["llama"]}, "model_type: expected `str"),
    "tied": ({"tie_word_embeddings": "yes"}, "tie_word_embeddings: expected `bool"),
    "rope list": ({"rope_parameters": [1]}, "rope_parameters: expected `object"),
    "rope base": (rope(rope_theta="x"), "rope_theta: expected `float"),
    "rope base null": (rope(rope_theta=None) | {"rope_theta": None}, "rope_theta is null"),
    "rope base huge": (rope(rope_theta=1e300), "rope_theta from 1"),
    "rope factor": (rope(rope_type="linear", factor="2"), "factor: expected `float"),
    "rope without factor": (rope(rope_type="yarn"), "kind yarn"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_of_config_json_are_bounded_and_named(copy: Callable[[str], Path], case: str) -> None:
    values, message = SIZES[case]
    folder = edit(copy("llama"), lambda config: config.update(values))
    with pytest.raises(AmqError, match=message) as raised:
        open_native(folder, verify=False)
    assert not isinstance(raised.value, Unsupported) and str(folder) in str(raised.value)
    with pytest.raises(AmqError):
        load(folder)


def put(name: str, value: Any) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


TENSORS: dict[str, tuple[str, Callable[[Tensors], Any], str]] = {
    "norm of 1": ("llama", put(NORM, torch.ones(1)), rf"{NORM} as F32 \[1\], expected F32 or F16 or BF16 \[64\]"),
    "last norm of 1": ("llama", put(LAST, torch.ones(1)), rf"{LAST} as F32 \[1\]"),
    "norm of 0": ("llama", put(NORM, torch.ones(0)), rf"{NORM} as F32 \[0\]"),
    "norm of 2 dimensions": ("llama", put(NORM, torch.ones(8, 8)), rf"{NORM} as F32 \[8, 8\]"),
    "norm of integers": ("llama", put(NORM, torch.ones(64, dtype=torch.int64)), rf"{NORM} as I64"),
    "norm of booleans": ("llama", put(NORM, torch.ones(64, dtype=torch.bool)), rf"{NORM} as BOOL"),
    "complex norm": ("llama", put(NORM, torch.ones(64, dtype=torch.complex64)), rf"{NORM} as C64"),
    "no norm": ("llama", lambda tensors: tensors.pop(NORM), f"lacks the tensor {NORM}"),
    "q_norm of 1": ("qwen3", put(f"{FIRST}.self_attn.q_norm.weight", torch.ones(1)), r"q_norm.weight as F32 \[1\]"),
    "no k_norm": ("qwen3", lambda t: t.pop(f"{FIRST}.self_attn.k_norm.weight"), "lacks the tensor .*k_norm"),
    "bias of 1": ("biased", put(f"{Q}.bias", torch.ones(1)), rf"{Q}.bias as F32 \[1\], expected .* \[64\]"),
    "no bias": ("biased", lambda tensors: tensors.pop(f"{Q}.bias"), f"lacks the tensor {Q}.bias"),
    "bias of none": ("llama", put(f"{Q}.bias", torch.ones(64)), f"holds the tensor {Q}.bias, which the model .* no"),
    "one layer more": ("llama", put("model.layers.1.input_layernorm.weight", torch.ones(64)), "holds the tensor"),
    "embedding transposed": ("llama", put(EMBEDDING, lambda t: t.T.contiguous()), r"F32 \[64, 256\], expected"),
    "embedding flat": ("llama", put(EMBEDDING, lambda t: t.flatten()), r"F32 \[16384\], expected"),
    "embedding of integers": ("llama", put(EMBEDDING, lambda t: t.view(torch.int32)), r"I32 \[256, 64\], expected"),
    "head of one row": ("untied", put("lm_head.weight", lambda t: t[:1].clone()), r"lm_head.weight as F32 \[1, 64\]"),
    "no head": ("untied", lambda tensors: tensors.pop("lm_head.weight"), "lacks the tensor lm_head.weight"),
    "scale of floats": ("llama", put(f"{Q}.scale", lambda t: t.float()), rf"{Q}.scale must be F16 .*got F32"),
    "codes a row short": ("llama", put(f"{Q}.qweight", lambda t: t[:-1].clone()), r"qweight must be U8 \[64, .*\[63"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_have_the_shape_that_the_model_wants(copy: Callable[[str], Path], case: str) -> None:
    name, change, message = TENSORS[case]
    folder = replace_tensors(copy(name), change)
    with pytest.raises(AmqError, match=message) as raised:
        open_native(folder)
    assert not isinstance(raised.value, Unsupported)
    with pytest.raises(AmqError):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("layers.0.final_layer_norm", torch.ones(64, dtype=torch.int64), r"I64 \[64\]"),
        ("layers.0.final_layer_norm", torch.ones(64, dtype=torch.bool), r"BOOL \[64\]"),
        ("layers.0.final_layer_norm", torch.ones(64, dtype=torch.complex64), r"C64 \[64\]"),
        ("layers.0.final_layer_norm", torch.ones(1), r"F32 \[1\]"),
        ("embed_tokens", torch.ones(64, 256), r"F32 \[64, 256\]"),
    ],
)
def test_other_families_compare_their_tensors_too(
    whole: dict[str, Path], copy: Callable[[str], Path], name: str, value: torch.Tensor, found: str
) -> None:
    """What runs in transformers, which casts whatever it finds."""
    name = f"model.decoder.{name}.weight"
    folder = replace_tensors(copy("opt"), put(name, value))
    with pytest.raises(AmqError, match=rf"{name}: the model's config.json makes it floats .*has {found}"):
        load(folder)


def test_a_tensor_that_no_block_has_is_for_transformers(copy: Callable[[str], Path]) -> None:
    with pytest.raises(Unsupported, match="no place for the tensor score"):
        open_native(replace_tensors(copy("llama"), put("score.weight", torch.ones(3))))


def test_a_tied_model_with_a_head_of_its_own_runs_what_the_files_hold(copy: Callable[[str], Path]) -> None:
    """As transformers does since 5: what lies in the files goes before tie_word_embeddings."""
    tokens, folder = text(20), copy("untied")
    own = open_native(folder, "fp32").all_logits(tokens)
    edit(folder, lambda config: config.update(tie_word_embeddings=True))
    found = open_native(folder, "fp32").all_logits(tokens)
    assert torch.equal(found, own)
    expected = transformers_logits(folder, tokens)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_tied_model_may_have_its_head_only(copy: Callable[[str], Path]) -> None:
    tokens, folder = text(20), copy("llama")
    tied = open_native(folder, "fp32").all_logits(tokens)
    replace_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": tensors.pop(EMBEDDING)}))
    assert torch.equal(open_native(folder, "fp32").all_logits(tokens), tied)
    expected = transformers_logits(folder, tokens)
    assert (tied - expected).abs().max() < 1e-4 * expected.abs().max()


def described(folder: Path) -> NativeWeights:
    checkpoint = open_checkpoint(folder, verify=False)
    names = {*checkpoint.other_names, *checkpoint.record.formats}
    return NativeWeights(checkpoint, read_spec(checkpoint.config, "config.json", names), 64)


def decoder(model: NativeWeights, **changed: Any) -> Any:
    how = {
        "spec": model.spec,
        "weights": model.held,
        "context": 64,
        "group_size": 32,
        "int8": False,
        "cache": "float32",
    }
    return cpu_module().Decoder(**how | changed, max_rows=MAX_ROWS, threads=1)


def test_the_module_compares_every_length_with_the_model(whole: dict[str, Path]) -> None:
    model = described(whole["qwen3"])
    assert decoder(model).page_bytes > 0
    assert {"rope.0.cos", "rope.0.sin", NORM, LAST, Q, "model.embed_tokens", "lm_head"} <= model.held.keys()
    for name, (kind, (address, size), *others) in model.held.items():
        for wrong in ((address, size - 4), (address, size + 4), (0, size)):
            with pytest.raises(ValueError, match="expected"):
                decoder(model, weights=model.held | {name: (kind, wrong, *others)})
    for name in ("hidden", "vocabulary"):
        for value in (0, 1 << 31, model.spec.vocabulary + (1 << 56)):
            with pytest.raises(ValueError, match=f"{name}: expected at"):
                decoder(model, spec=replace(model.spec, **{name: value}))
    with pytest.raises(ValueError, match="context: expected at most"):
        decoder(model, context=1 << 31)
    with pytest.raises(ValueError, match="steps: expected at least 1"):
        decoder(model, spec=replace(model.spec, steps=()))


def test_the_module_compares_the_lengths_of_a_pass(whole: dict[str, Path]) -> None:
    model = described(whole["llama"])
    made = decoder(model)
    tokens, pages = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    cache, logits = torch.zeros(made.page_bytes, dtype=torch.uint8), torch.zeros(1, 256)
    memory = [(t.data_ptr(), t.nbytes) for t in (tokens, pages, logits, cache)]
    nothing = (0, 0)

    def run(sizes: dict[int, int], rows: int = 3, position: int = 0, wanted: tuple[int, ...] = (2,)) -> None:
        at = [(address, sizes.get(i, size)) for i, (address, size) in enumerate(memory)]
        made.forward(at[0], [(rows, position, at[1], False, 0, [])], list(wanted), at[2], at[3], nothing, 1)

    run({})
    assert logits.isfinite().all() and logits.any()
    for sizes, options, message in (
        ({0: 8}, {}, "tokens: expected at least 12 bytes, got 8"),
        ({1: 0}, {}, "pages: expected at least 4 bytes, got 0"),
        ({2: 1020}, {}, "logits: expected at least 1024 bytes, got 1020"),
        ({3: made.page_bytes - 1}, {}, f"cache: expected at least {made.page_bytes} bytes"),
        ({}, {"position": 62}, "position: expected within the context of 64"),
        ({}, {"position": (1 << 63) - 1}, "position: expected within the context of 64"),
        ({}, {"rows": 1 << 62}, "tokens of a segment: expected at most"),
        ({}, {"wanted": (3,)}, "wanted row: expected one of the pass, got 3"),
        ({}, {"wanted": (0,) * 9}, "wanted rows: expected at most those of the pass"),
    ):
        with pytest.raises(ValueError, match=message):
            run(sizes, **options)


def test_a_second_thread_is_refused(whole: dict[str, Path]) -> None:
    """While one thread is in a pass; what that thread computes is right, and the engine serves on afterwards."""
    engine = open_native(whole["llama"], "fp32", context=512, max_sequences=2)
    tokens = text(300)
    expected = engine.all_logits(tokens)
    slot = engine.open(text(5), 10)
    inside, leave = threading.Event(), threading.Event()
    run, found = engine._run, []

    def slow(*arguments: Any) -> None:
        inside.set()
        assert leave.wait(60)
        run(*arguments)

    engine._run = slow
    worker = threading.Thread(target=lambda: found.append(engine.all_logits(tokens)))
    worker.start()
    assert inside.wait(60)
    for call in (
        lambda: engine.forward([Segment(slot, [1])]),
        lambda: engine.all_logits([1, 2]),
        lambda: engine.open([1], 1),
        lambda: engine.close(slot),
    ):
        with pytest.raises(AmqError, match="in use by another thread: one thread at a time"):
            call()
    leave.set()
    worker.join(60)
    engine._run = run
    assert torch.equal(found[0], expected) and slot.length == 0
    assert engine.forward([Segment(slot, [1])]).isfinite().all()
    engine.close(slot)


OUT_OF_MEMORY = """
import json, resource, struct, sys
from pathlib import Path
from amq.util.tensors import open_file
from amq.errors import AmqError
path, size = Path(sys.argv[1]), 1 << 36
header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
with open(path, "wb") as file:  # a sparse file
    file.write(struct.pack("<Q", len(header)) + header)
    file.truncate(8 + len(header) + size)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 28), resource.RLIM_INFINITY))
try:
    open_file(path)
except AmqError as error:
    print(error)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_no_memory_is_not_called_damage(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", OUT_OF_MEMORY, tmp_path / "large.safetensors"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert "there is no memory to map" in result.stdout and "large.safetensors" in result.stdout, result.stderr
    assert "damaged" not in result.stdout
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"x" * 100)
    with pytest.raises(AmqError, match="damaged or cut short"):
        open_file(damaged)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", "a\0b", "x" * 5000, "..", "sub/x"])
def test_an_index_names_files_of_its_folder(copy: Callable[[str], Path], name: str) -> None:
    folder = copy("llama")
    os.rename(folder / "model.safetensors", folder.parent / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: name}}))
    with pytest.raises(AmqError, match=str(folder)):
        open_checkpoint(folder)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}', "{", "[" * 100_000])
def test_an_index_that_is_none(copy: Callable[[str], Path], index: str) -> None:
    folder = copy("llama")
    os.rename(folder / "model.safetensors", folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(AmqError, match="index.json"):
        open_checkpoint(folder)
