"""Starts a peer in the strongest way in which it runs a model here, which short trials find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from amq.bench.cases import Case
from amq.bench.contender import Contender, PeerMissing
from amq.bench.peers import PEERS
from amq.bench.peers.base import Peer
from amq.bench.peers.gguf import gguf_files, read_header
from amq.bench.settings import BenchSettings
from amq.bench.worker import ChildFailed, ChildProcess
from amq.errors import AmqError
from amq.util.progress import Progress

PROMPT, DECODE = Case(False, 256), Case(True, 24)
"""What a trial runs."""
REPETITIONS = 3


def open_peer(name: str, settings: BenchSettings, progress: Progress, weight_bytes: int) -> Contender:
    """weight_bytes: that a token reads of ours. Raises PeerMissing with the reason where the peer cannot run."""
    peer = PEERS[name]
    if settings.device != "cpu":
        raise PeerMissing(f"the model runs on {settings.device}, and {name} is measured on CPUs only")
    if reason := peer.package.unsupported_reason():
        raise PeerMissing(reason)
    files = gguf_files(peer.quantizer, settings.model, settings.gguf, weight_bytes, settings.thread_count)
    return open_strongest(peer, settings, progress, files)


def open_strongest(peer: Peer, settings: BenchSettings, progress: Progress, files: Sequence[Path]) -> Contender:
    """The fastest of the files in the first configuration that runs any of them, then the fastest configurations of it,
    for prompts and for decode. Raises PeerMissing with the reasons where none runs."""
    trials: list[dict[str, Any]] = []
    left, chosen = list(files), None
    with progress.stage(f"{peer.name}'s ways", len(files) - 1 + len(peer.configurations)) as step:
        for configuration in peer.configurations:
            tried = []
            for file in left:
                tried.append(_trial(peer, file, settings, configuration))
                step(f"{file.stem}, {configuration}")
            trials += tried
            working = [trial for trial in tried if "failed" not in trial]
            if working and chosen is None:
                chosen = max(working, key=lambda trial: trial[PROMPT.name] * trial[DECODE.name])["file"]
                left = [file for file in left if file.name == chosen]
    if chosen is None:
        reasons = "; ".join(f"{trial['file']}, {trial['configuration']}: {trial['failed']}" for trial in trials)
        raise PeerMissing(f"{peer.name} runs in no way that was tried: {reasons}")
    return _start(peer, settings, left[0], trials)


def _trial(peer: Peer, file: Path, settings: BenchSettings, configuration: Any) -> dict[str, Any]:
    """{engine, file, configuration, pp256, tg24}: the best of a few repetitions in tokens/s; or `failed` in place of
    figures."""
    result: dict[str, Any] = {"engine": peer.name, "file": file.name, "configuration": str(configuration)}
    try:
        with ChildProcess(peer.make, str(file), settings.thread_count, configuration, settings.seed) as worker:
            for case in (PROMPT, DECODE):
                seconds = [worker.call("measure", case, i)["seconds"] for i in range(REPETITIONS)]
                result[case.name] = case.tokens / min(seconds)
    except (AmqError, ChildFailed) as error:
        return {**result, "failed": str(error).splitlines()[-1]}
    return result


def _start(peer: Peer, settings: BenchSettings, file: Path, trials: list[dict[str, Any]]) -> Contender:
    """One process where one configuration is the fastest for both kinds of case."""
    by_name = {str(configuration): configuration for configuration in peer.configurations}
    working = [trial for trial in trials if trial["file"] == file.name and "failed" not in trial]
    ways = {case.decode: max(working, key=lambda trial: trial[case.name])["configuration"] for case in (PROMPT, DECODE)}
    started: dict[str, ChildProcess] = {}
    try:
        for way in set(ways.values()):
            started[way] = ChildProcess(peer.make, str(file), settings.thread_count, by_name[way], settings.seed)
        workers = {decode: started[way] for decode, way in ways.items()}
        sizes = {"file_bytes": file.stat().st_size, "weight_bytes": read_header(file).weight_bytes}
        facts = {**sizes, "file": file.name, **workers[True].call("facts")}
    except (AmqError, ChildFailed) as error:
        for worker in started.values():
            worker.close()
        raise PeerMissing(f"{file.name}: {error}") from error
    return Contender(peer.name, facts, workers, ways, peer.counted, trials)
