"""llama.cpp through `xllamacpp`, whose wheel is ready to run and knows the newest families: its server, without HTTP.

Prompts and decode are timed by the server itself. Its wheel is compiled for AVX2, so that a build of llama.cpp for the
machine can be faster: `amq.bench.peers.llama_cpp` measures one that llama-cpp-python compiled, whose quantizer makes
the files of this one too.

Several sequences are as many requests at once, of which the slowest counts.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from amq.bench.cases import Case
from amq.bench.machine import OtherWork, memory
from amq.bench.peers import llama_cpp
from amq.bench.peers.base import Package, Peer
from amq.bench.peers.bindings import MICRO_BATCH, PAD
from amq.errors import AmqError

NAME = "xllamacpp"
PACKAGE = Package("xllamacpp", "xllamacpp", "2026.10", "pip install xllamacpp")
SLOTS, POSITIONS = 4, 1024
"""Sequences and positions of each that there is room for at least, so that few cases need another server."""


@dataclass(frozen=True)
class Configuration:
    """repacked: rows interleaved in memory, where the kind of block allows. flash: flash attention."""

    repacked: bool
    flash: bool

    def __str__(self) -> str:
        return f"{'repacked' if self.repacked else 'as stored'}, flash attention {'on' if self.flash else 'off'}"


CONFIGURATIONS = [Configuration(repacked, flash) for repacked in (True, False) for flash in (True, False)]


class XllamaCpp:
    """A GGUF file in xllamacpp's server on the CPU; made inside a worker."""

    def __init__(self, path: str, threads: int, configuration: Configuration, seed: int) -> None:
        import gguf

        self._path, self._threads, self._configuration, self._seed = path, threads, configuration, seed
        self._room = (0, 0)
        self._server: Any = None
        reader = gguf.GGUFReader(path)
        self._vocabulary = len(reader.fields["tokenizer.ggml.tokens"].data)
        self._make_room(SLOTS, POSITIONS)

    def facts(self) -> dict[str, Any]:
        import xllamacpp

        system = " ".join(xllamacpp.get_system_info().replace(" = 1", "").replace("|", "").split())
        return {"version": PACKAGE.version(), "description": system, "vocab_size": self._vocabulary}

    def memory(self) -> dict[str, int]:
        return memory()

    def measure(self, case: Case, repetition: int) -> dict[str, Any]:
        """Seconds of one case, as `OwnEngine.measure`."""
        import numpy as np

        self._make_room(case.sequences, case.positions + 1)
        random, count = (
            np.random.default_rng((self._seed, repetition)),
            case.depth + (1 if case.decode else case.tokens),
        )
        prompts = random.integers(self._vocabulary, size=(case.sequences, count)).tolist()
        if not case.decode and case.depth:
            raise AmqError(f"{case.name}: xllamacpp's server does not time a part of a prompt")
        # The first token comes with the prompt: so many passes follow as tokens are counted.
        new = case.tokens + 1 if case.decode else 1
        others = OtherWork()
        with ThreadPoolExecutor(case.sequences) as pool:
            answers = list(pool.map(lambda prompt: self._ask(prompt, new), prompts))
        seconds = max(answer["predicted_ms" if case.decode else "prompt_ms"] for answer in answers) / 1e3
        return {"seconds": seconds, "others": others.share()}

    def log_likelihood(self, windows: list[list[int]], unscored: int) -> float:
        raise AmqError("xllamacpp's server tells no probabilities of a text that is given")

    def _ask(self, prompt: list[int], new: int) -> dict[str, Any]:
        """The server's timings of one request."""
        asked = {
            "prompt": prompt, "n_predict": new, "ignore_eos": True, "cache_prompt": False, "temperature": 0,
            "samplers": ["top_k"], "top_k": 1,
        }  # fmt: skip
        answer = self._server.handle_completions(asked)
        timings = answer.get("timings")
        if timings is None or (timings["prompt_n"], timings["predicted_n"]) != (len(prompt), new):
            raise AmqError(f"xllamacpp answered a prompt of {len(prompt)} tokens, {new} more wanted, with {answer}")
        return timings

    def _make_room(self, sequences: int, positions: int) -> None:
        """A server with so many slots, each of at least so many positions."""
        if sequences <= self._room[0] and positions <= self._room[1]:
            return
        import xllamacpp

        self._server = None  # before the next one takes as much memory
        self._room = (max(sequences, self._room[0]), -(-max(positions, self._room[1]) // PAD) * PAD)
        flash = xllamacpp.llama_flash_attn_type
        parameters = xllamacpp.CommonParams()
        parameters.verbosity = 0
        parameters.model.path, parameters.warmup, parameters.fit_params = self._path, False, False
        parameters.n_parallel, parameters.n_ctx = self._room[0], self._room[0] * self._room[1]
        parameters.n_ubatch, parameters.cache_ram_mib = MICRO_BATCH, 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = self._threads
        parameters.no_extra_bufts = not self._configuration.repacked
        parameters.flash_attn_type = (
            flash.LLAMA_FLASH_ATTN_TYPE_ENABLED if self._configuration.flash else flash.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        self._server = xllamacpp.Server(parameters)


PEER = Peer(
    NAME, PACKAGE, XllamaCpp, CONFIGURATIONS, f"a decoded token of {NAME} includes choosing the likeliest",
    llama_cpp.PEER.quantizer,
)  # fmt: skip
