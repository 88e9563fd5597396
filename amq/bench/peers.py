"""Which GGUF file llama.cpp is to run, and the strongest way in which it runs it here."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amq.bench import llama_cpp
from amq.bench.cases import Case
from amq.bench.llama_cpp import CONFIGURATIONS, Configuration, LlamaCpp, Quantizer
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.model.open import ALIASES, alias_file
from amq.util.files import cache_dir, read_json, write_atomic

log = logging.getLogger(__name__)

AUTO = "Q4_0"
"""llama.cpp's fastest 4-bit type on CPUs, what `--gguf auto` makes."""
TRIALS = (Case(False, 256), Case(True, 24))
TRIAL_REPETITIONS = 3


class PeerMissing(Exception):
    """Why there is no peer to measure."""


@dataclass
class Peer:
    """llama.cpp, ready.

    chosen: the configuration for prompts (False) and decode (True); workers: a process for each of them.
    trials: what every configuration reached, or why it failed.
    """

    file: Path
    facts: dict[str, Any]
    chosen: dict[bool, Configuration]
    trials: list[dict[str, Any]]
    workers: dict[Configuration, ChildProcess] = field(default_factory=dict)

    def worker(self, decode: bool) -> ChildProcess:
        return self.workers[self.chosen[decode]]

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def open_peer(model: str, device: str, gguf: str, threads: int, seed: int, step: Callable[[str], None]) -> Peer:
    """Tries all configurations and starts the strongest; raises PeerMissing with the reason where none runs.

    gguf: a .gguf file, `auto`, or a type of llama.cpp's quantizer. step: called after each trial.
    """
    if device != "cpu":
        raise PeerMissing(f"the model runs on {device}, and llama.cpp is measured on CPUs only")
    if reason := llama_cpp.unsupported_reason():
        raise PeerMissing(reason)
    file = gguf_file(model, gguf, threads)
    trials = []
    for configuration in CONFIGURATIONS:
        trials.append(_trial(file, threads, configuration, seed))
        step(str(configuration))
    working = [trial for trial in trials if "failed" not in trial]
    if not working:
        reasons = "; ".join(f"{trial['configuration']}: {trial['failed']}" for trial in trials)
        raise PeerMissing(f"llama.cpp runs {file.name} in no way that was tried: {reasons}")
    chosen = {case.decode: CONFIGURATIONS[trials.index(_fastest(working, case))] for case in TRIALS}
    peer = Peer(file, {**weights(file), "file": str(file)}, chosen, trials)
    try:
        for configuration in set(chosen.values()):
            peer.workers[configuration] = ChildProcess(LlamaCpp, str(file), threads, configuration, seed)
        peer.facts |= peer.worker(True).call("facts")
    except (AmqError, ChildFailed) as error:
        peer.close()
        raise PeerMissing(f"{file.name}: {error}") from error
    return peer


def _fastest(trials: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    return max(trials, key=lambda trial: trial[case.name])


def _trial(file: Path, threads: int, configuration: Configuration, seed: int) -> dict[str, Any]:
    """{configuration, pp256, tg24}: the best of a few repetitions in tokens/s; or {configuration, failed}."""
    result: dict[str, Any] = {"configuration": str(configuration)}
    try:
        with ChildProcess(LlamaCpp, str(file), threads, configuration, seed) as worker:
            for case in TRIALS:
                seconds = [worker.call("measure", case, i)["seconds"] for i in range(TRIAL_REPETITIONS)]
                result[case.name] = case.tokens / min(seconds)
    except (AmqError, ChildFailed) as error:
        return {"configuration": str(configuration), "failed": str(error).splitlines()[-1]}
    return result


def gguf_file(model: str, gguf: str, threads: int) -> Path:
    """The file that `--gguf` names, or the model's own quantized by llama.cpp, kept in the cache."""
    if Path(gguf).suffix == ".gguf":
        if not Path(gguf).is_file():
            raise AmqError(f"--gguf {gguf} does not exist: expected a GGUF file, `auto`, or a type such as {AUTO}")
        return Path(gguf)
    kind = AUTO if gguf == "auto" else gguf.upper()
    source = _source(model)
    output = cache_dir() / "bench" / f"{source.stem}-{source.stat().st_size}-{kind}.gguf"
    if not output.is_file():
        log.info("quantizing %s to %s with llama.cpp", source.name, kind)

        def write(temporary: Path) -> None:
            with ChildProcess(Quantizer) as worker:
                worker.call("quantize", str(source), str(temporary), kind, threads)

        try:
            write_atomic(output, write)
        except ChildFailed as error:
            raise PeerMissing(f"llama.cpp could not quantize {source.name} to {kind}: {error}") from error
    return output


def _source(model: str) -> Path:
    """The GGUF that a model, or the model that a checkpoint was made from, is known to come from."""
    name, log_file = model, Path(model) / "quantization.json"
    if log_file.is_file():
        name = read_json(log_file).get("model", {}).get("name", "")
    if name in ALIASES:
        return alias_file(name)
    if Path(name).suffix == ".gguf" and Path(name).is_file():
        return Path(name)
    raise PeerMissing(
        f"no GGUF is known for {name or model}: name one with --gguf FILE "
        "(`python -m amq.export DIR --to gguf` makes one)"
    )


def weights(file: Path) -> dict[str, int]:
    """Bytes of the file, and of the weights that one token reads: all, but the embedding only where it is the head too.

    A dense model is assumed: of experts, all would be counted.
    """
    import gguf

    try:
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(file).tensors}
    except Exception as error:  # the reader raises ValueError, IndexError, … for a damaged file
        raise AmqError(f"{file} is not a readable GGUF file: {type(error).__name__}: {error}") from error
    looked_up = sizes.get("token_embd.weight", 0) if "output.weight" in sizes else 0
    return {"file_bytes": file.stat().st_size, "weight_bytes": sum(sizes.values()) - looked_up}
