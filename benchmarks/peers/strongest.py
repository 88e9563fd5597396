"""Which GGUF file llama.cpp and its relatives are to run, and the strongest way in which each runs it here."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

from .llama_cpp import CONFIGURATIONS, NAME, LlamaCpp, Quantizer, unsupported_reason

log = logging.getLogger(__name__)

AUTO = "Q4_0"
"""llama.cpp's fastest 4-bit type on CPUs, what `--gguf auto` makes."""
TRIALS = (Case(False, 256), Case(True, 24))
TRIAL_REPETITIONS = 3
EXPERTS, PER_LAYER = "_exps.", "per_layer_token_embd.weight"
"""Names of tensors: a part of those of routed experts; an embedding beside that of the tokens."""


@dataclass(frozen=True)
class GgufEngine:
    """A library that runs GGUF files.

    make: (path, threads, configuration, seed) → what a worker measures with. configurations: its ways to run a file.
    counted: what differs in what is counted of it.
    """

    name: str
    make: Callable[[str, int, Any, int], Any]
    configurations: Sequence[Any]
    counted: str


LLAMA_CPP = GgufEngine(
    NAME, LlamaCpp, CONFIGURATIONS, "a decoded token of llama.cpp (as of llama-bench) chooses nothing"
)


def open_peer(settings: BenchSettings, progress: Progress, gguf: str) -> Contender:
    """llama.cpp through llama-cpp-python, as `open_strongest` opens it.

    gguf: a .gguf file, `auto`, or a type of llama.cpp's quantizer.
    """
    if settings.device != "cpu":
        raise PeerMissing(f"the model runs on {settings.device}, and llama.cpp is measured on CPUs only")
    if reason := unsupported_reason():
        raise PeerMissing(reason)
    return open_strongest(LLAMA_CPP, settings, progress, gguf_file(settings.model, gguf, settings.thread_count))


def open_strongest(engine: GgufEngine, settings: BenchSettings, progress: Progress, file: Path) -> Contender:
    """Tries all configurations and starts the strongest; raises PeerMissing with the reason where none runs."""
    trials = []
    with progress.stage(f"{engine.name}'s ways", len(engine.configurations)) as step:
        for configuration in engine.configurations:
            trials.append(_trial(engine, file, settings.thread_count, configuration, settings.seed))
            step(str(configuration))
    working = [trial for trial in trials if "failed" not in trial]
    if not working:
        reasons = "; ".join(f"{trial['configuration']}: {trial['failed']}" for trial in trials)
        raise PeerMissing(f"{engine.name} runs {file.name} in no way that was tried: {reasons}")
    chosen = {case.decode: engine.configurations[trials.index(_fastest(working, case))] for case in TRIALS}
    return _start(engine, settings, file, chosen, trials)


def _start(
    engine: GgufEngine, settings: BenchSettings, file: Path, chosen: dict[bool, Any], trials: list[dict[str, Any]]
) -> Contender:
    """chosen: the configuration for prompts (False) and decode (True); the same one gets one process."""
    started: dict[Any, ChildProcess] = {}
    try:
        for configuration in set(chosen.values()):
            arguments = (str(file), settings.thread_count, configuration, settings.seed)
            started[configuration] = ChildProcess(engine.make, *arguments)
        workers = {decode: started[configuration] for decode, configuration in chosen.items()}
        facts = {**weights(file), "file": str(file), **workers[True].call("facts")}
    except (AmqError, ChildFailed) as error:
        for worker in started.values():
            worker.close()
        raise PeerMissing(f"{file.name}: {error}") from error
    ways = {decode: str(configuration) for decode, configuration in chosen.items()}
    return Contender(engine.name, facts, workers, ways, engine.counted, trials)


def _fastest(trials: list[dict[str, Any]], case: Case) -> dict[str, Any]:
    return max(trials, key=lambda trial: trial[case.name])


def _trial(engine: GgufEngine, file: Path, threads: int, configuration: Any, seed: int) -> dict[str, Any]:
    """{configuration, pp256, tg24}: the best of a few repetitions in tokens/s; or {configuration, failed}."""
    result: dict[str, Any] = {"configuration": str(configuration)}
    try:
        with ChildProcess(engine.make, str(file), threads, configuration, seed) as worker:
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
    """Bytes of the file, and of the weights that one token reads: of experts those that it is routed to, of embeddings
    none, but where one is the head too."""
    import gguf

    try:
        reader = gguf.GGUFReader(file)
        sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
        arch = str(reader.fields["general.architecture"].contents())
        used, experts = (_number(reader, f"{arch}.expert_{key}", 1) for key in ("used_count", "count"))
    except Exception as error:  # the reader raises ValueError, IndexError, … for a damaged file
        raise AmqError(f"{file} is not a readable GGUF file: {type(error).__name__}: {error}") from error
    looked_up = ("token_embd.weight",) if "output.weight" in sizes else ()
    read = sum(
        size * used // experts if EXPERTS in name else size
        for name, size in sizes.items()
        if name not in (*looked_up, PER_LAYER)
    )
    return {"file_bytes": file.stat().st_size, "weight_bytes": read}


def _number(reader: Any, key: str, default: int) -> int:
    return int(reader.fields[key].contents()) if key in reader.fields else default
