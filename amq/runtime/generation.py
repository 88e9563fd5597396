"""Streaming generation with transformers' own `generate`, which runs in a thread and hands over text piece by piece.

Times are taken where the model hands out tokens, so that decoding and printing text are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch

from amq.errors import AmqError
from amq.models import LoadedModel

Prompt = str | Sequence[Mapping[str, str]]
"""Text, or a conversation [{"role": "user", "content": …}, …] that the model's chat template makes a text of."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when it ends.

    temperature: 0 takes the likeliest token; else logits are divided by it and a token is drawn.
    top_k, top_p: draw from the k likeliest tokens (0: all), and from the likeliest that together have probability p.
    seed: of the draws; None leaves torch's generator as it is.
    max_new_tokens: the model's context ends a text too.
    stop: texts that end the generation where they appear.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        ranges = (
            ("temperature", self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
        )
        for name, fits, expected in ranges:
            if not fits:
                raise AmqError(f"{name} must be {expected}, got {getattr(self, name)}")

    def arguments(self) -> dict[str, Any]:
        """For transformers' `generate`; every one is given, so that a model's own generation_config decides nothing."""
        drawn = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        greedy = dict.fromkeys(drawn)
        return {
            "do_sample": self.temperature > 0,
            **(drawn if self.temperature > 0 else greedy),
            "repetition_penalty": 1.0,
            "num_beams": 1,
            "stop_strings": list(self.stop) or None,
        }


@dataclass
class Generation:
    """The text as it comes; iterate over it once. The figures are complete when the iteration has ended.

    prompt_tokens: how many were given. times: of the start and of every new token, seconds (time.perf_counter).
    """

    prompt_tokens: int
    pieces: Iterator[str] = field(repr=False, default=iter(()))
    times: list[float] = field(default_factory=list, repr=False)

    def __iter__(self) -> Iterator[str]:
        return self.pieces

    @property
    def new_tokens(self) -> int:
        return max(len(self.times) - 1, 0)

    @property
    def first_token_seconds(self) -> float:
        """From the start until the first new token was chosen; preparing weights counts where they are used first."""
        return self.times[1] - self.times[0] if self.new_tokens else float("nan")

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.first_token_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first; NaN where there are none."""
        steps = self.new_tokens - 1
        return steps / (self.times[-1] - self.times[1]) if steps > 0 else float("nan")


def generate(loaded: LoadedModel, prompt: Prompt, sampling: Sampling | None = None) -> Generation:
    """Starts to generate when the result is iterated over; leaving the loop early stops the model.

    Raises AmqError for an empty prompt, one that fills the model's context, and a conversation without chat template.
    """
    sampling = sampling or Sampling()
    tokens = encode(loaded, prompt)
    context = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and len(tokens) >= context:
        raise AmqError(f"the prompt has {len(tokens)} tokens, the model's context {context}: give a shorter one")
    new_tokens = min(sampling.max_new_tokens, context - len(tokens)) if context is not None else sampling.max_new_tokens
    generation = Generation(len(tokens))
    generation.pieces = _stream(loaded, tokens, sampling, new_tokens, generation.times)
    return generation


def encode(loaded: LoadedModel, prompt: Prompt) -> list[int]:
    """Token ids of a prompt."""
    if not isinstance(prompt, str):
        if not loaded.tokenizer.chat_template:
            raise AmqError(f"{loaded.name} has no chat template: give plain text (without --chat)")
        chat = loaded.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        return loaded.tokenizer(chat, add_special_tokens=False)["input_ids"]  # the template writes special tokens
    if not prompt:
        raise AmqError("the prompt is empty: give some text")
    return loaded.tokenizer(prompt)["input_ids"]


def _stream(
    loaded: LoadedModel, tokens: Sequence[int], sampling: Sampling, new_tokens: int, times: list[float]
) -> Iterator[str]:
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    class Streamer(TextIteratorStreamer):
        def put(self, value: torch.Tensor) -> None:
            times.append(time.perf_counter())  # the prompt first, then one token at a time
            super().put(value)

    stopped: list[bool] = []
    streamer = Streamer(loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
    inputs = torch.tensor([tokens], device=loaded.model.get_input_embeddings().weight.device)

    def run() -> None:
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        try:
            loaded.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                streamer=streamer,
                max_new_tokens=new_tokens,
                pad_token_id=_padding(loaded),
                tokenizer=loaded.tokenizer,
                stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: bool(stopped)]),
                **sampling.arguments(),
            )
        finally:
            streamer.text_queue.put(streamer.stop_signal)  # a failure must not leave the reader waiting

    with ThreadPoolExecutor(1) as pool:
        future: Future[None] = pool.submit(run)
        try:
            yield from streamer
        finally:
            stopped.append(True)
        future.result()  # raises what the model raised


def _padding(loaded: LoadedModel) -> int:
    """A batch of one is never padded, but transformers warns where nothing is named."""
    ends = loaded.model.generation_config.eos_token_id
    return loaded.tokenizer.pad_token_id or (ends[0] if isinstance(ends, list) and ends else ends) or 0
