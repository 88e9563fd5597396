"""A GGUF file → a folder of float32 safetensors in the cache, made once and compared with its hashes at every use.

Weights go from file to file one by one, in the transformers library's order and names, so that a conversion takes the
memory of two tensors whatever the model's size. Architectures that are not translated here
(`amq.model.gguf.families`) are loaded whole by transformers, as long as nothing in the file is known to be
lost on that way.

Folders are named after the content of the file and `VERSION`. A conversion that a killed process left half done is
removed by the next one, see `amq.util.temporary`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from amq.errors import AmqError
from amq.model.gguf.config import Translation, family_of, translate, unbuildable
from amq.model.gguf.families import readable
from amq.model.gguf.file import GgufFile, GgufTensor, Strings, parts_of, read_model
from amq.model.gguf.rope import TENSORS as ROPE_TENSORS
from amq.model.gguf.rope import check_frequencies
from amq.model.gguf.weights import Weights
from amq.model.weight_files import weight_files
from amq.util.extras import needs
from amq.util.files import cache_dir, is_disk_full, write_json
from amq.util.folders import cache_folder
from amq.util.limits import check_memory
from amq.util.records import MOST, read_record, shorten, to_json
from amq.util.tensor_stream import write_stream
from amq.util.tensors import HASHES, tensor_hash, verify_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

VERSION = 3
"""Of what a conversion makes: raised when its result changes. 1 dropped rotary scaling and had no hashes; 2 left LFM2
and Gemma 4 to transformers."""
MANIFEST = "conversion.json"
MOST_STEM = 80
OLD_TEMPORARY, OLD_SECONDS = re.compile(r"\..*-[0-9a-f]{32}\.[a-z0-9_]{8}"), 3600
OWN_TOKENIZERS = {
    "llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "phi3", "gemma2", "gemma3", "stablelm", "starcoder2", "nemotron",
}  # fmt: skip
"""Translated architectures whose tokenizers get the class that transformers has for the model; it finds none for the
others, whose tokenizers need no more than what the file says."""
PIECE = 1 << 20
"""Elements that one thread dequantizes at a time."""
LOST = ("rope.scaling.", "rope.scale_linear")
"""Keys that transformers' whole-model path is known to drop."""


@dataclass(frozen=True)
class Manifest:
    """conversion.json; files: {name: BLAKE2b} of all files but the weights, which have hashes of their own."""

    version: int
    files: dict[str, str]


def gguf_folder(path: Path) -> Path:
    """The cached folder of the model that `path` is a file of, converted now unless it is there and whole."""
    paths = parts_of(path)
    stem = re.sub(r"-00001-of-\d{5}$", "", paths[0].stem)[:MOST_STEM]
    folder = cache_dir() / "models" / f"{stem}-v{VERSION}-{_digest(paths)}"
    if (folder / MANIFEST).is_file():
        try:
            check_conversion(folder)
        except AmqError as error:
            log.warning("the cached conversion of %s is damaged and is made again: %s", path.name, error)
        else:
            return folder
    with needs("models", f"reading {path.name}"):
        import gguf  # noqa: F401
        import transformers  # noqa: F401
    log.info("dequantizing %s once into %s", path.name, folder)
    _convert(paths, folder)
    return folder


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(bytes.fromhex(_file_hash(path)))
    return digest.hexdigest()


def _file_hash(path: Path) -> str:
    digest = hashlib.blake2b()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError as error:
        raise AmqError(f"{path} cannot be read: {error}") from None
    return digest.hexdigest()


def check_conversion(folder: Path) -> None:
    """Raises AmqError naming the file or tensor of a converted folder that is not what was written."""
    manifest = read_record(folder / MANIFEST, Manifest)
    weights = {path.name for path in weight_files(folder)}
    for name, expected in manifest.files.items():
        if name != Path(name).name or not (folder / name).is_file():
            raise AmqError(f"{folder / name} is missing")
        if _file_hash(folder / name) != expected:
            raise AmqError(f"{folder / name} is not what was written (its hash differs)")
    for name in sorted(weights):
        verify_file(folder / name)


def _convert(paths: Sequence[Path], folder: Path) -> None:
    file = read_model(paths)
    _check_types(file)
    if folder.parent.is_dir():
        _remove_old(folder.parent)

    def write(whole: Path) -> None:
        if family_of(file) is not None:
            _stream(file, whole)
        else:
            _whole_model(file, paths, whole)
        _save_tokenizer(file, paths[0], whole)
        others = [path for path in sorted(whole.iterdir()) if path.suffix != ".safetensors"]
        write_json(whole / MANIFEST, to_json(Manifest(VERSION, {p.name: _file_hash(p) for p in others})))

    cache_folder(folder, write, lambda: _is_whole(folder))


def _remove_old(models: Path) -> None:
    """Removes what conversions of an amq without locks left, when nothing has been written there for an hour."""
    for path in models.iterdir():
        if OLD_TEMPORARY.fullmatch(path.name) and time.time() - path.stat().st_mtime > OLD_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        check_conversion(folder)
    except AmqError:
        return False
    return True


def _check_types(file: GgufFile) -> None:
    import gguf

    if not file.tensors:
        raise AmqError(f"{file.path} holds no tensors: expected a model")
    kind = file.keys.get("general.type", "model")
    if kind != "model":
        raise AmqError(f"{file.path} is no model: its general.type is {shorten(kind)}")
    checked: set[str] = set()
    for tensor in file.tensors:
        if tensor.type in checked:
            continue
        checked.add(tensor.type)
        try:
            gguf.dequantize(tensor.read(0, 1), gguf.GGMLQuantizationType[tensor.type])
        except NotImplementedError:
            raise AmqError(
                f"{tensor.path}: tensor {tensor.name} has type {tensor.type}, which cannot be dequantized; use a GGUF "
                "of another type, or the original safetensors"
            ) from None


def dequantized(tensor: GgufTensor) -> np.ndarray:
    """float32 of the tensor's shape, in pieces on as many threads as torch has."""
    import gguf

    kind, columns = gguf.GGMLQuantizationType[tensor.type], tensor.shape[-1]
    result = np.empty((tensor.rows, columns), np.float32)
    step = max(1, PIECE // columns)

    def fill(first: int) -> None:
        last = min(first + step, tensor.rows)
        result[first:last] = gguf.dequantize(tensor.read(first, last), kind)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fill, range(0, tensor.rows, step)))
    return result.reshape(tensor.shape)


def _stream(file: GgufFile, folder: Path) -> None:
    """Config and weights of a family that is translated, tensor by tensor."""
    factors = {t.name: dequantized(t).astype(np.float64) for t in file.tensors if t.name in ROPE_TENSORS}
    translation = translate(file, factors)
    model = _empty_model(file, translation)
    with _named(file):
        weights = Weights(model, translation.family, translation.layers, file.tensors)
    for tensor in file.tensors:
        if tensor.name not in {*factors, *weights.taken} and not weights.leaves(tensor.name):
            raise AmqError(
                f"{tensor.path}: nothing takes the tensor {tensor.name} {list(tensor.shape)}, which changes what the "
                f"model computes: {type(model).__name__} has no place for it; use the original safetensors"
            )
    if missing := weights.missing:
        raise _incomplete(file.path, missing, len({tensor.path for tensor in file.tensors}))
    largest = max(math.prod(shape) for shape in weights.shapes.values())
    check_memory(2 * 4 * largest, f"dequantizing {file.path.name}")
    with _named(file):
        weights.check_shapes()
    write_stream(folder, weights.shapes, lambda name: weights.make(name, dequantized), HASHES, tensor_hash)
    _save_config(model, folder)


@contextmanager
def _named(file: GgufFile) -> Iterator[None]:
    """Puts the file's name before errors about what is in it."""
    try:
        yield
    except AmqError as error:
        raise AmqError(f"{file.path}: {error}") from None


def _empty_model(file: GgufFile, translation: Translation) -> PreTrainedModel:
    """The model without memory, its rotary table compared with what the file says."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.for_model(translation.model_type, **translation.values)
        config.name_or_path = str(file.path.parent)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:  # a config's own checks and a model's constructor raise many types
        raise unbuildable(file, error) from error
    if (rope := translation.rope) is None or not translation.family.turned:
        return model
    rotary = {type(module) for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")}
    if not rotary:
        raise AmqError(f"{file.path}: {type(model).__name__} has no rotary table that could be compared with the file")
    for kind in rotary:
        buffers = dict(kind(config=config).named_buffers())
        name = next((n for n in ("full_attention_inv_freq", "inv_freq") if n in buffers), "")
        if not name:
            raise AmqError(f"{file.path}: the rotary table of {kind.__name__} has no frequencies to compare")
        check_frequencies(buffers[name].double().numpy(), rope, str(file.path))
    return model


def _incomplete(path: Path, missing: Sequence[str], parts: int = 1) -> AmqError:
    what = "it is incomplete" if parts == 1 else f"its {parts} parts are incomplete"
    return AmqError(f"{path} lacks {len(missing)} of the model's weights, such as {missing[0]}: {what}")


def _save_config(model: PreTrainedModel, folder: Path) -> None:
    from transformers import GenerationConfig

    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    GenerationConfig.from_model_config(config).save_pretrained(folder)


def _save_tokenizer(file: GgufFile, path: Path, folder: Path) -> None:
    """As transformers makes it of the file `path`, the first part, which has all keys."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    known = file.architecture in OWN_TOKENIZERS or family_of(file) is None
    kind = AutoTokenizer if known else PreTrainedTokenizerFast
    _by_transformers(path, lambda: kind.from_pretrained(str(path.parent), gguf_file=path.name).save_pretrained(folder))
    _drop_added(folder / "tokenizer.json", file.keys.get("tokenizer.ggml.tokens"))


def _drop_added(path: Path, tokens: Any) -> None:
    """Drops special tokens that a class of transformers has by default and the file has not: no embedding is theirs."""
    if not isinstance(tokens, Strings) or not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf-8"))
    kept = [token for token in saved["added_tokens"] if token["id"] < tokens.length]
    if len(kept) < len(saved["added_tokens"]):
        path.write_text(json.dumps({**saved, "added_tokens": kept}, ensure_ascii=False, indent=2), encoding="utf-8")


def _by_transformers(path: Path, action: Callable[[], Any]) -> Any:
    try:
        return action()
    except Exception as error:  # gguf and transformers raise many types for a file that they cannot read
        if is_disk_full(error):
            raise
        raise AmqError(f"{path} cannot be converted by transformers: {type(error).__name__}: {error}") from error


def _whole_model(file: GgufFile, paths: Sequence[Path], folder: Path) -> None:
    """An architecture that only transformers translates: the whole model in memory, twice."""
    from transformers import AutoModelForCausalLM

    path, architecture = file.path, file.architecture
    if architecture not in (others := _loaded_by_transformers()):
        raise AmqError(
            f"{path}: the architecture {architecture} is not read; amq translates {', '.join(readable())}, and "
            f"transformers loads {', '.join(others)}: use the original safetensors"
        )
    if len(paths) > 1:
        raise AmqError(f"{path}: {architecture} is not read in parts; join them with llama-gguf-split --merge")
    _check_whole_model(file)
    log.warning(
        "%s: the architecture %s is not translated by amq but by transformers, which takes the model's memory twice "
        "and may leave keys out", path.name, architecture,
    )  # fmt: skip
    check_memory(2 * 4 * sum(t.numel for t in file.tensors), f"dequantizing {path.name}")
    model, info = _by_transformers(
        path,
        lambda: AutoModelForCausalLM.from_pretrained(
            str(path.parent), gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        ),
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise _incomplete(path, missing)
    kept = {name for name, _ in model.named_parameters()}  # a shared parameter only under its first name
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors = {n: t for n, t in model.state_dict().items() if n in kept or n not in every}
    if odd := [name for name, tensor in tensors.items() if tensor.dtype != torch.float32]:
        raise AmqError(f"{path}: transformers left {odd[0]} as {tensors[odd[0]].dtype}, expected float32")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    write_stream(folder, shapes, lambda name: tensors[name].contiguous(), HASHES, tensor_hash)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    _save_config(model, folder)


def _loaded_by_transformers() -> list[str]:
    """llama.cpp's architectures that transformers itself loads and amq does not translate."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    no_model = {"general", "tokenizer", "mistral"}
    known = {name.replace("_", "-") if name == "minimax_m2" else name for name in GGUF_SUPPORTED_ARCHITECTURES}
    own = {*readable(), "qwen2_moe", "qwen3_moe", "gpt_oss"}
    return sorted(known - no_model - own)


def _check_whole_model(file: GgufFile) -> None:
    """Bounds the sizes that transformers builds a model of, and refuses what it is known to drop."""
    prefix = f"{file.architecture}."
    for name, value in file.keys.items():
        if not name.startswith(prefix):
            continue
        key = name.removeprefix(prefix)
        if isinstance(value, int) and not -MOST <= value <= MOST:
            raise AmqError(f"{file.path}: {name} is {shorten(value)}, expected at most {MOST}")
        if key == "block_count" and (not isinstance(value, int) or value > len(file.tensors)):
            raise AmqError(f"{file.path}: {name} is {shorten(value)}, the file has {len(file.tensors)} tensors")
        if key.startswith(LOST) and value not in ("none", 1.0) and key != "rope.scaling.finetuned":
            raise AmqError(f"{file.path}: transformers would drop the key {name}: use the original safetensors")
    for tensor in file.tensors:
        if tensor.name in ROPE_TENSORS:
            raise AmqError(
                f"{file.path}: transformers would drop the tensor {tensor.name}: use the original safetensors"
            )
