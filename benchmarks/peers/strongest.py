"""Which GGUF file llama.cpp is to run, and the strongest way in which it runs it here."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from amq.bench.cases import Case
from amq.bench.run import Contender, PeerMissing
from amq.bench.settings import BenchSettings
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.model.open import ALIASES, alias_file
from amq.util.files import cache_dir, read_json, write_atomic
from amq.util.progress import Progress

from .llama_cpp import CONFIGURATIONS, NAME, Configuration, LlamaCpp, Quantizer, unsupported_reason

log = logging.getLogger(__name__)

AUTO = "Q4_0"
"""llama.cpp's fastest 4-bit type on CPUs, what `--gguf auto` makes."""
TRIALS = (Case(False, 256), Case(True, 24))
TRIAL_REPETITIONS = 3


def open_peer(settings: BenchSettings, progress: Progress, gguf: str) -> Contender:
    """Tries all configurations and starts the strongest; raises PeerMissing with the reason where none runs.

    gguf: a .gguf file, `auto`, or a type of llama.cpp's quantizer.
    """
    if settings.device != "cpu":
        raise PeerMissing(f"the model runs on {settings.device}, and llama.cpp is measured on CPUs only")
    if reason := unsupported_reason():
        raise PeerMissing(reason)
    file = gguf_file(settings.model, gguf, settings.thread_count)
    trials = []
    with progress.stage("llama.cpp's ways", len(CONFIGURATIONS)) as step:
        for configuration in CONFIGURATIONS:
            trials.append(_trial(file, settings.thread_count, configuration, settings.seed))
            step(str(configuration))
    working = [trial for trial in trials if "failed" not in trial]
    if not working:
        reasons = "; ".join(f"{trial['configuration']}: {trial['failed']}" for trial in trials)
        raise PeerMissing(f"llama.cpp runs {file.name} in no way that was tried: {reasons}")
    chosen = {case.decode: CONFIGURATIONS[trials.index(_fastest(working, case))] for case in TRIALS}
    return _start(settings, file, chosen, trials)


def _start(
    settings: BenchSettings, file: Path, chosen: dict[bool, Configuration], trials: list[dict[str, Any]]
) -> Contender:
    """chosen: the configuration for prompts (False) and decode (True); the same one gets one process."""
    started: dict[Configuration, ChildProcess] = {}
    try:
        for configuration in set(chosen.values()):
            started[configuration] = ChildProcess(
                LlamaCpp, str(file), settings.thread_count, configuration, settings.seed
            )
        workers = {decode: started[configuration] for decode, configuration in chosen.items()}
        facts = {**weights(file), "file": str(file), **workers[True].call("facts")}
    except (AmqError, ChildFailed) as error:
        for worker in started.values():
            worker.close()
        raise PeerMissing(f"{file.name}: {error}") from error
    counted = "a decoded token of llama.cpp (as of llama-bench) chooses nothing"
    return Contender(NAME, facts, workers, {decode: str(c) for decode, c in chosen.items()}, counted, trials)


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
