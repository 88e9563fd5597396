"""GGUF files: what a token reads of one, and which ones a peer may run beside a model of ours."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amq.bench.contender import PeerMissing
from amq.bench.peers.base import Quantizer
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.model.open import ALIASES, alias_file
from amq.util.extras import needs
from amq.util.files import cache_dir, make_folder, read_json, write_atomic

log = logging.getLogger(__name__)

AUTO = "auto"
EQUAL = 0.06
"""A peer's bytes per token are called ours where they differ by no more than this share: blocks of 32 with a scale take
4.5 bits for 4, our groups of 128 4.25, which is 5.9 % apart."""
EXPERTS, PER_LAYER = "_exps.", "per_layer_token_embd.weight"
"""Names of tensors: a part of those of routed experts; an embedding beside that of the tokens."""
TENSOR = re.compile(r"\[ *\d+/ *\d+\] +")
SIZE = re.compile(r"size += +([\d.]+) Mi?B(?: -> +([\d.]+) Mi?B)?")
TOTAL = re.compile(r"quant size += +([\d.]+) Mi?B")


@dataclass(frozen=True)
class Tensor:
    """kind: its type; those that the gguf package does not know have their number."""

    kind: str
    weights: int
    bytes: int


@dataclass(frozen=True)
class Header:
    """tensors: by name. used, experts: those that a token is routed to, and all of a layer."""

    tensors: Mapping[str, Tensor]
    used: int
    experts: int

    def read_per_token(self, sizes: Mapping[str, float]) -> float:
        """Bytes that one token reads of tensors of these sizes: of experts those that it is routed to, of embeddings
        none, but where one is the head too."""
        looked_up = ("token_embd.weight",) if "output.weight" in sizes else ()
        return sum(
            size * self.used / self.experts if EXPERTS in name else size
            for name, size in sizes.items()
            if name not in (*looked_up, PER_LAYER)
        )

    @property
    def weight_bytes(self) -> int:
        return int(self.read_per_token({name: tensor.bytes for name, tensor in self.tensors.items()}))


def read_header(file: Path) -> Header:
    """Of any file, also one with types that the gguf package does not know: the weights are not looked at."""
    with needs("models", "--peers"):
        import gguf

    class Reader(gguf.GGUFReader):
        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            parts = [field.parts for field in fields]
            self.entries = [
                (str(bytes(name), "utf-8"), int(kind[0]), int(dims.prod()), start_offs + int(at[0]))
                for _, name, _, dims, kind, at in parts
            ]

    try:
        reader = Reader(file)
        arch = str(reader.fields["general.architecture"].contents())
        used, experts = (_number(reader, f"{arch}.expert_{key}", 1) for key in ("used_count", "count"))
    except Exception as error:  # it raises ValueError, IndexError, … for a damaged file
        raise AmqError(f"{file} is not a readable GGUF file: {type(error).__name__}: {error}") from error
    entries = sorted(reader.entries, key=lambda entry: entry[3])
    ends = [at for *_, at in entries[1:]] + [file.stat().st_size]
    tensors = {}
    for (name, number, weights, at), end in zip(entries, ends, strict=True):
        kind = next((known for known in gguf.GGMLQuantizationType if known.value == number), None)
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[kind] if kind is not None else (1, 0)
        size = weights // per_block * block_bytes if kind is not None else end - at
        tensors[name] = Tensor(f"type {number}" if kind is None else kind.name, weights, size)
    return Header(tensors, used, experts)


def _number(reader: Any, key: str, default: int) -> int:
    return int(reader.fields[key].contents()) if key in reader.fields else default


class Quantizing:
    """A quantizer, for a worker."""

    def __init__(self, quantizer: Quantizer) -> None:
        self._quantizer = quantizer

    def quantize(self, source: str, output: str, kind: str, threads: int) -> None:
        self._quantizer.quantize(source, output, kind, threads)

    def plan(self, source: str, kind: str) -> str:
        return self._quantizer.plan(source, kind)


def gguf_files(quantizer: Quantizer, model: str, gguf: str, wanted: int, threads: int) -> list[Path]:
    """What a peer may run: the file that `gguf` names; or of the model's own GGUF the type that `gguf` names; or, for
    `auto`, its types of which a token reads as many bytes as `wanted`. Raises PeerMissing where there is none.
    """
    if Path(gguf).suffix == ".gguf":
        if not Path(gguf).is_file():
            raise AmqError(f"--gguf {gguf} does not exist: expected a GGUF file, `{AUTO}`, or a type such as Q4_0")
        return [Path(gguf)]
    if reason := quantizer.package.unsupported_reason():
        raise PeerMissing(f"its files are made by {quantizer.package.project}, or named with --gguf FILE; {reason}")
    try:
        source = source_of(model)
        with ChildProcess(Quantizing, quantizer) as worker:
            kinds = nearest(planned_sizes(worker, quantizer, source), wanted) if gguf == AUTO else [gguf.upper()]
            return [_quantized(worker, quantizer, source, kind, threads) for kind in kinds]
    except (AmqError, ChildFailed) as error:
        raise PeerMissing(f"no file could be made: {error}; name one with --gguf FILE") from error


def nearest(sizes: Mapping[str, float], wanted: int) -> list[str]:
    """The types whose bytes are within EQUAL of `wanted`, the nearest first; where none is, the nearest alone."""
    kinds = sorted(sizes, key=lambda kind: abs(sizes[kind] - wanted))
    return [kind for kind in kinds if abs(sizes[kind] / wanted - 1) <= EQUAL] or kinds[:1]


def planned_sizes(worker: ChildProcess, quantizer: Quantizer, source: Path) -> dict[str, float]:
    """{type: bytes that a token would read}, of all that the quantizer knows."""
    header = read_header(source)
    return {kind: _planned(worker.call("plan", str(source), kind), header) for kind in quantizer.kinds}


def _planned(text: str, header: Header) -> float:
    """Bytes per token by the log of a dry run.

    It rounds the sizes of tensors to 0.01 MiB, which is much of a small one: they divide the total, which is exact.
    """
    parts = [(part.split()[0], SIZE.search(part)) for part in TENSOR.split(text)[1:]]
    sizes = {name: float(found[2] or found[1]) for name, found in parts if found}
    total = TOTAL.search(text)
    if set(sizes) != set(header.tensors) or total is None:
        raise AmqError("what the quantizer says of its dry run is not understood here")
    return float(total[1]) * 2**20 * header.read_per_token(sizes) / sum(sizes.values())


def _quantized(worker: ChildProcess, quantizer: Quantizer, source: Path, kind: str, threads: int) -> Path:
    """The file of that type, kept in the cache."""
    maker = f"{quantizer.package.project}-{quantizer.package.version()}"
    output = cache_dir() / "bench" / f"{source.stem}-{source.stat().st_size}-{maker}-{kind}.gguf"
    if not output.is_file():
        log.info("quantizing %s to %s with %s", source.name, kind, maker)
        write_atomic(output, lambda temporary: worker.call("quantize", str(source), str(temporary), kind, threads))
    return output


def source_of(model: str) -> Path:
    """The GGUF that a model, or the model that a checkpoint was made from, is known to come from; else an export of
    the checkpoint, kept in the cache."""
    name, log_file = model, Path(model) / "quantization.json"
    if log_file.is_file():
        name = read_json(log_file).get("model", {}).get("name", "")
    if name in ALIASES:
        return alias_file(name)
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    if not log_file.is_file():
        raise AmqError(f"no GGUF of {model} is known, and it is no checkpoint that could be exported as one")
    from amq.export import export

    made = log_file.stat().st_mtime_ns
    folder = cache_dir() / "bench" / f"{Path(model).resolve().name}-{made}"
    if not folder.is_dir():
        make_folder(folder.parent)
        log.info("exporting %s as GGUF", model)
        export(model, to="gguf", output=folder)
    return folder / "model.gguf"
