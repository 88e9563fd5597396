"""Making and measuring the rows of `equal_bytes.py`: each quantization and each measurement in its own process.

Those processes import this file: what needs torch is imported where it is used."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from peers.source import write_source
from provenance import write_results

from amq.bench.own import OwnEngine
from amq.bench.peers import ik_llama, llama_cpp
from amq.bench.peers.gguf import read_header
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.util.files import make_folder, read_json

OURS, AUTOROUND = "amq", "auto-round"
CONFIGURATIONS = {
    llama_cpp.NAME: llama_cpp.Configuration("own choice", True),
    ik_llama.NAME: ik_llama.Configuration(True),
}
ENGINES = {llama_cpp.NAME: llama_cpp.LlamaCpp, ik_llama.NAME: ik_llama.IkLlama}
HEAD = "int8"
"""Of auto-round's rows, which leaves the head in 16 bits: rounded to nearest here, and an untied embedding too."""
AT_ONCE = 4
"""Windows of one call to a peer: it has to answer within `amq.bench.worker.PATIENCE`."""
SLOTS = 8
"""Windows that our engine runs beside each other."""


class Workshop:
    """The folder of one model: its source, its importance matrix, what was made of it.

    Raises AmqError for a GGUF that is not there or of which no source can be made.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self.folder: Path = args.work
        make_folder(self.folder)
        self.source = self.folder / "source.gguf"
        self._facts = self.folder / "source.json"
        given = {"model": Path(args.model).name, "on_grid": args.on_grid, "seed": args.seed}
        if not self._facts.is_file():
            from amq.model.open import ALIASES, alias_file

            file = alias_file(args.model) if args.model in ALIASES else Path(args.model)
            if not file.is_file():
                raise AmqError(f"{args.model} is neither a GGUF file nor one of {', '.join(ALIASES)}")
            weights = write_source(file, self.source, args.on_grid, args.seed)
            write_results(self._facts, {**given, "weights": weights, "types": types(file)})
        self._source = read_json(self._facts)
        if other := [f"{key} {self._source[key]}" for key in given if self._source[key] != given[key]]:
            raise AmqError(f"{self.folder} is of {', '.join(other)}: give another --work")

    def facts(self) -> dict[str, Any]:
        """What all rows have in common, for JSON; makes the importance matrix where it is missing."""
        args = self._args
        return {
            "source": without_provenance(self._source),
            "protocol": {
                "text": Path(args.text).name,
                "tokens": sum(map(len, self.windows)),
                "unscored": self.unscored,
                "calibration": Path(args.calibration).name,
                **{key: getattr(args, key) for key in ("window_length", "windows", "seed", "threads")},
            },
            "importance_matrix": without_provenance(read_json(self._matrix_facts)),
        }  # fmt: skip

    @cached_property
    def _matrix_facts(self) -> Path:
        path = self.folder / "imatrix.json"
        if not path.is_file():
            args, matrix = self._args, self.folder / "imatrix.dat"
            command = ["-m", "peers.imatrix", self.source, matrix, args.calibration, args.windows, args.window_length,
                       args.seed]  # fmt: skip
            write_results(path, self._timed("imatrix", command))
        return path

    @cached_property
    def _corpus(self) -> Any:
        from transformers import AutoConfig, AutoTokenizer

        from amq.model.open import resolve
        from amq.model.text import load_corpus

        folder = resolve(str(self.source))
        rows = AutoConfig.from_pretrained(folder).vocab_size
        return load_corpus(self._args.text, AutoTokenizer.from_pretrained(folder), rows)

    @cached_property
    def windows(self) -> list[list[int]]:
        """Token ids of the text, window by window."""
        from amq.model.text import fixed_windows

        return fixed_windows(self._corpus, self._args.window_length, self._args.max_tokens).tolist()

    @property
    def unscored(self) -> int:
        return self._corpus.unscored

    def row(self, name: str) -> dict[str, Any]:
        """Makes and measures one row: bytes, bits_per_weight, perplexity, made (seconds and peak_bytes of each step),
        and where it lies in the folder.

        Raises AmqError where a step fails; what it printed is in the folder's logs.
        """
        engine, _, kind = name.partition(" ")
        if engine == "full":
            row = self._full()
        elif engine == OURS:
            row = self._ours(name, kind.split(" ")[0])
        elif engine == AUTOROUND:
            row = self._auto_round(name, kind)
        else:
            row = self._gguf(name, engine, kind)
        return {"engine": engine, **row, "bits_per_weight": 8 * row["bytes"] / self._source["weights"]}

    def _full(self) -> dict[str, Any]:
        args, result = self._args, self.folder / "full.json"
        made = self._timed("full precision", [
            "-m", "amq.eval", self.source, "--text", args.text, "--max-tokens", args.max_tokens, "--window-length",
            args.window_length, "--json", result,
        ])  # fmt: skip
        return {
            "bytes": 2 * self._source["weights"], "made": {"evaluate": made},
            "perplexity": read_json(result)["rows"][0]["perplexity"], "path": self.source.name,
        }  # fmt: skip

    def _gguf(self, name: str, engine: str, kind: str) -> dict[str, Any]:
        path, made = self.source, {}
        if kind != "F32":
            path, part = self._place(name, ".gguf"), self.folder / "part.gguf"
            matrix = self._matrix_facts.with_suffix(".dat")
            command = ["-m", "peers.gguf_quantize", engine, self.source, part, kind, matrix, self._args.threads]
            made = {"quantize": self._timed(name, command)}
            part.replace(path)
        found = types(path)
        arguments = (str(path), self._args.threads, CONFIGURATIONS[engine], 0)
        return {
            "bytes": sum(entry["bytes"] for entry in found.values()), "types": found, "made": made,
            "perplexity": self._perplexity(ENGINES[engine], *arguments, at_once=AT_ONCE),
            "path": str(path.relative_to(self.folder)),
        }  # fmt: skip

    def _auto_round(self, name: str, kind: str) -> dict[str, Any]:
        args = self._args
        outer = ["--head", HEAD, *(["--embeddings", HEAD] if self._untied else [])]
        calibration = ["--windows", args.windows, "--window-length", args.window_length, "--calibration",
                       args.calibration, "--seed", args.seed]  # fmt: skip
        flags = ["--uniform", kind, "--method", "autoround", *outer, *calibration, *shlex.split(args.autoround)]
        return self._quantized(name, self._place(name), flags, {}) | {
            "flags": {"quantize": args.autoround},
            "head": HEAD,
        }

    @property
    def _untied(self) -> bool:
        import gguf

        return any(tensor.name == "output.weight" for tensor in gguf.GGUFReader(self.source).tensors)

    def _ours(self, name: str, bits: str) -> dict[str, Any]:
        searched = min(self._searches or [bits], key=lambda b: (abs(float(b) - float(bits)), float(b)))
        run, made = self._search(name, bits, searched)
        configuration = run / "configuration.json"
        if searched != bits:
            configuration = self.folder / f"{run.name} {bits}.json".replace(" ", "-")
            select = ["-m", "amq.search", "select", run, "--target-bits", bits, "--output", configuration]
            made |= {"select": self._timed(f"{name} select", select)}
        text = ["--calibration", self._args.calibration]
        flags = ["--configuration", configuration, *text, *shlex.split(self._args.quantize)]
        given = {"search": self._args.search, "searched": searched, "quantize": self._args.quantize}
        return self._quantized(name, self._place(name), flags, made) | {"flags": given}

    def _search(self, name: str, bits: str, searched: str) -> tuple[Path, dict[str, Any]]:
        """A finished run for the budget `searched`, which rows of other budgets may have made, and what it took."""
        name = name.replace(bits, searched, 1) + " search"
        facts = self.folder / (name.replace(" ", "-") + ".json")
        run = facts.with_suffix("")
        if not facts.is_file():
            run = self._place(name)
            text = ["--calibration", self._args.calibration]
            flags = ["--target-bits", searched, "--output", run, *text, *shlex.split(self._args.search)]
            write_results(facts, self._timed(name, ["-m", "amq.search", self.source, *flags]))
        return run, {"search": without_provenance(read_json(facts))}

    @property
    def _searches(self) -> list[str]:
        return [bits for bits in self._args.searched.split(",") if bits]

    def _quantized(self, name: str, path: Path, flags: Sequence[Any], made: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint of ours by `amq quantize`, and how it runs: with 8-bit activations, and exactly."""
        from amq.checkpoint.store import open_checkpoint
        from amq.eval.checkpoints import weight_bytes

        command = ["-m", "amq.quantize", self.source, "--output", path, "--perplexity", "none", *flags]
        made["quantize"] = self._timed(name, command)
        checkpoint = open_checkpoint(path)
        formats = Counter(checkpoint.record.formats.values())
        return {
            "bytes": weight_bytes(checkpoint), "formats": dict(sorted(formats.items())), "made": made,
            "rotated": len(checkpoint.record.rotation),
            "perplexity": self._own(path),
            "perplexity_exact": self._own(path, activations="fp32"),
            "path": str(path.relative_to(self.folder)),
        }  # fmt: skip

    def _own(self, path: Path, **options: Any) -> float:
        """The perplexity of a checkpoint in our engine."""
        room = {"context": self._args.window_length + 1, "max_sequences": SLOTS, "threads": self._args.threads}
        return self._perplexity(OwnEngine, str(path), 0, room | options, at_once=SLOTS)

    def _perplexity(self, make: Any, *arguments: Any, at_once: int) -> float:
        """By an engine in its own process, on the tokens that `amq.model.perplexity` counts.

        at_once: windows of one call.
        """
        starts = range(0, len(self.windows), at_once)
        parts = [self.windows[start : start + at_once] for start in starts]
        try:
            with ChildProcess(make, *arguments) as worker:
                total = sum(worker.call("log_likelihood", part, self.unscored) for part in parts)
        except ChildFailed as error:
            raise AmqError(f"it does not run: {error}") from error
        return math.exp(min(700.0, -total / sum(len(window) - 1 - self.unscored for window in self.windows)))

    def _place(self, name: str, suffix: str = "") -> Path:
        """Where something of that name is made; what an interrupted run left there is removed."""
        path = self.folder / (name.replace(" ", "-") + suffix)
        if path.is_dir():
            shutil.rmtree(path)
        return path

    def _timed(self, name: str, arguments: Sequence[Any]) -> dict[str, Any]:
        """Runs Python with these arguments and returns seconds, peak_bytes and processor_seconds."""
        log = self.folder / "logs" / (name.replace(" ", "-") + ".txt")
        make_folder(log.parent)
        here = str(Path(__file__).parent)
        variables = {**os.environ, "OMP_NUM_THREADS": str(self._args.threads)}
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [here, variables.get("PYTHONPATH")]))
        start = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, arguments)], stdout=output, stderr=output, env=variables
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            last = (log.read_text(errors="replace").strip().splitlines() or ["nothing was printed"])[-1]
            raise AmqError(f"{name} ended with status {process.returncode}: {last} ({log})")
        return {
            "seconds": round(time.perf_counter() - start, 1), "peak_bytes": 1024 * usage.ru_maxrss,
            "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        }  # fmt: skip


def without_provenance(content: dict[str, Any]) -> dict[str, Any]:
    """A part of other results, which say themselves what made them."""
    return {key: value for key, value in content.items() if key != "provenance"}


def types(file: Path) -> dict[str, dict[str, int]]:
    """{type: {tensors, weights, bytes}} of a GGUF file.

    (ik_llama.cpp itself counts a head that is tied to the embedding twice.)
    """
    found: dict[str, dict[str, int]] = {}
    for tensor in read_header(file).tensors.values():
        entry = found.setdefault(tensor.kind, {"tensors": 0, "weights": 0, "bytes": 0})
        for key, value in (("tensors", 1), ("weights", tensor.weights), ("bytes", tensor.bytes)):
            entry[key] += value
    return dict(sorted(found.items()))
