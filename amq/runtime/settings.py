"""How a model is loaded to run, and how its next token is chosen: what generate, serve and bench share."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from amq.errors import AmqError
from amq.kernels.names import ACTIVATIONS, BACKENDS
from amq.model.settings import ModelSettings
from amq.model.shape import CACHES
from amq.util.settings import Settings, flag

WRITE, DRAW = "what to write", "how to choose tokens"
AUTO_CACHE = "auto"
"""As `--cache`: what the checkpoint says."""
MAX_LOGPROBS = 20
"""OpenAI's limit of `top_logprobs`."""
MAX_BIAS = 100
"""OpenAI's limit of `logit_bias`: so much forbids a token, or leaves no other."""


@dataclass(frozen=True, kw_only=True)
class RuntimeSettings(ModelSettings):
    backend: str | None = flag(None, "what multiplies the quantized linears (default: the fastest)", choices=BACKENDS)
    activations: str | None = flag(
        None, "int8 or fp32 (exact); default: int8 on backend cpu, else fp32", choices=ACTIVATIONS
    )
    cache: str = flag(
        AUTO_CACHE,
        "keys and values: auto (what the checkpoint says, else float16), float16, int8 (half of its memory); on a CPU "
        "also float32, k8v4 (keys in int8, values in 4 bits) and int4 (both in 4 bits)",
        choices=(AUTO_CACHE, *CACHES),
    )
    threads: int | None = flag(None, "CPU threads (default: torch's choice)", least=1, metavar="N")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.threads:
            from amq.util.limits import processors  # imports torch

            if self.threads > (most := processors()):
                raise AmqError(
                    f"--threads {self.threads}: this process may use {most} of the machine's processors (those that it "
                    f"may run on, and its container's share of their time), and more threads wait for each other: give "
                    f"at most {most}, or leave it out"
                )

    @property
    def loading(self) -> dict[str, Any]:
        """The keyword arguments of `amq.runtime.load` that are among these settings."""
        return {field.name: getattr(self, field.name) for field in fields(LoadSettings) if hasattr(self, field.name)}


@dataclass(frozen=True, kw_only=True)
class LoadSettings(RuntimeSettings):
    """What `amq.runtime.load` takes.

    backend: a name in `amq.kernels.backends.BACKENDS`; None takes the fastest that runs the model's formats on the
        device.
    activations: `int8` (faster on a CPU) or `fp32` (exact); see `amq.kernels.ops.linear`. None takes int8 on backend
        cpu, and fp32 on every other one: on a GPU memory is the limit, and exact products take no longer. Triton and
        reference refuse int8.
    dtype: of everything that is not quantized and of the activations between linears: `auto` (float32 on a CPU, the
        checkpoint's own elsewhere), float32, bfloat16 or float16.
    device: where everything but packed weights goes; those are prepared there when they are first used.
    cache: what keys and values are kept in. `auto` takes what the checkpoint says of each layer, and where it says
        nothing float16, float32 where the native engine multiplies exactly. The native engine has all kinds, the CUDA
        engine float16 and int8.
    context: positions that a sequence may have; None takes the model's own, or less where memory is set aside for it.
    max_sequences: that run at once.
    threads: on the CPU; None leaves torch's number, lowered to what a container's limits allow.
    trust_remote_code: see `amq.model.open.load_model`.
    prompt_cache: bytes of what was computed for prompts that are kept on disk; None: none. The native engine alone has
        it. Whoever loads calls the engine's `shutdown` at the end.
    prompt_cache_folder: where; None: `prompts` in the user's cache.
    state_cache: bytes of snapshots of recurrent states, from which conversations go on; None:
        `amq.runtime.state_pool.room_for` says. For models with such a state in the native engine alone.
    """

    context: int | None = flag(None, "", least=1)
    max_sequences: int = flag(1, "", least=1)
    prompt_cache: int | None = flag(None, "", least=1)
    prompt_cache_folder: Path | None = None
    state_cache: int | None = flag(None, "", least=1)


@dataclass(frozen=True)
class Sampling(Settings):
    """How the next token is chosen and when a text ends.

    temperature: 0 takes the likeliest token (of equals the lowest id); else logits are divided by it and a token drawn.
    top_k, top_p: draw from the k likeliest tokens (0: all), and from the likeliest that together have probability p.
    min_p: draw from tokens at least min_p times as likely as the likeliest.
    repetition_penalty: logits of tokens in the prompt and the new text are divided by it, negative ones multiplied.
    presence_penalty, frequency_penalty: taken from a new token's logit once, and as often as it occurred.
    seed: of the draws; None draws differently every time.
    max_new_tokens: the model's context ends a text too. 0 reads the prompt and chooses nothing.
    stop: texts that end the generation where they appear; they are not part of the output.
    logprobs: None, or of how many of the likeliest tokens log probabilities are wanted beside the chosen one's.
    ignore_end: go on after the model's end tokens, for benchmarks.
    stop_token_ids: end tokens of this text besides the model's.
    min_tokens: before so many new tokens no end token is chosen and no stop text looked for.
    logit_bias: (token, from −100 to 100: added to its logit), each token once.
    shown_special: special tokens that become text; the others are left out of it.
    prompt_logprobs: None, or as `logprobs` for the tokens of the prompt but the first; it is then read as a whole.
    Raises AmqError for a value out of range.
    """

    temperature: float = flag(0.0, "0 takes the likeliest token", DRAW, least=0, metavar="T")
    top_k: int = flag(0, "draw from the K likeliest tokens; 0: from all", DRAW, least=0, most=2**31 - 1, metavar="K")
    top_p: float = flag(1.0, "draw from the likeliest that make up P", DRAW, above=0, most=1, metavar="P")
    min_p: float = flag(0.0, "leave out tokens below P times the likeliest", DRAW, least=0, most=1, metavar="P")
    repetition_penalty: float = flag(1.0, "above 1: repeat less", DRAW, least=0.01, most=100, metavar="R")
    presence_penalty: float = flag(0.0, "above 0: fewer words that came before", DRAW, least=-2, most=2, metavar="P")
    frequency_penalty: float = flag(0.0, "above 0: fewer words that came often", DRAW, least=-2, most=2, metavar="P")
    seed: int | None = flag(None, "of the draws, to repeat them", DRAW, least=-(2**63), most=2**63 - 1, metavar="N")
    max_new_tokens: int = flag(256, "tokens to generate at most", WRITE, least=0, metavar="N")
    stop: tuple[str, ...] = flag((), "ends the text; may be repeated", WRITE, metavar="TEXT")
    logprobs: int | None = flag(None, "", least=0, most=MAX_LOGPROBS)
    ignore_end: bool = False
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = flag(0, "", least=0)
    logit_bias: tuple[tuple[int, float], ...] = ()
    shown_special: tuple[int, ...] = ()
    prompt_logprobs: int | None = flag(None, "", least=0, most=MAX_LOGPROBS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise AmqError(f"stop must be a tuple of texts that are not empty, got {self.stop!r}")
        for name in ("stop_token_ids", "shown_special"):
            tokens = getattr(self, name)
            if not isinstance(tokens, tuple) or not all(_is_token(token) for token in tokens):
                raise AmqError(f"{name} must be a tuple of token ids, got {tokens!r}")
        _check_bias(self.logit_bias)


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_bias(bias: object) -> None:
    pairs = bias if isinstance(bias, tuple) else (None,)
    fit = all(isinstance(pair, tuple) and len(pair) == 2 and _is_token(pair[0]) for pair in pairs)
    if not fit or len({pair[0] for pair in pairs}) < len(pairs):
        raise AmqError(f"logit_bias must be a tuple of (token id, bias), each token once, got {bias!r}")
    for token, added in pairs:
        number = isinstance(added, (int, float)) and not isinstance(added, bool)
        if not number or not -MAX_BIAS <= added <= MAX_BIAS:
            raise AmqError(f"logit_bias of token {token} must be from {-MAX_BIAS} to {MAX_BIAS}, got {added!r}")
