"""`amq quantize --tune MINUTES`: what a finished quantization stores beside its codes is tuned end to end.

Blocks are quantized one after the other, each for the sake of its own outputs. Here scales, zero points, norms and
biases of all of them (`amq.quantize.tunable`) move together, by Adam, so that the whole model's next-token
distributions come nearer to those of the full-precision model (`amq.quantize.distill`). Codes stay: nothing is stored
that was not there, and no kernel is concerned.

The minutes are of wall clock, from the full-precision model's first pass over the windows to the last check. How fast
the model is decides how many windows there are and how many steps; the rate rises for the first tenth of the time and
falls to nothing at its end. Windows that are kept apart are measured at the start, in between, and at the end: the best
that was seen is what is kept, which is the start itself if nothing was better, and a loss above the start's ends it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from amq.configuration import Configuration
from amq.errors import AmqError
from amq.formats import n_groups
from amq.model.blocks import TOKENS
from amq.model.calibration import STATE_BYTES
from amq.model.inventory import EMBEDDING, embedding_weight, get_weight
from amq.model.opened import OpenModel
from amq.model.own_text import SELF
from amq.model.paging import pager_of
from amq.model.text import WindowSampler
from amq.packing import PackedWeight
from amq.quantize.distill import Distillation, activation_bytes
from amq.quantize.log import Tuning
from amq.quantize.plan import model_width
from amq.quantize.settings import QuantizeSettings
from amq.quantize.tunable import FLOAT, Tunable
from amq.util.limits import free_on
from amq.util.progress import Progress, Step

if TYPE_CHECKING:
    from torch import nn

RATE = 3e-3
"""Of Adam: about what a step moves a group's outermost weights by, in codes. On SmolLM2 in int2, 16 steps of 256 tokens
each, three times as much ended above the start."""
RISE = 0.1
"""Of the time, in which the rate goes up."""
HELD_OUT = 8
"""Windows that are measured and not tuned on."""
LEARNING = 1 / 6
"""Of the time, at most, for the full-precision model's passes: there is a window for every step or so then."""
STEP_PASSES = 5
"""What a step takes, in forward passes, before one was timed."""
BETWEEN = 8
"""Checks are this many times as far apart as they take."""
SHARE = 2
"""Activations may take one part in so many of the memory that is free."""
LOGIT_COPIES = 8
"""Of a chunk of logits, in float32: both models', their logarithms, the divergence and its gradients."""
PERCENT = 100


class Tuner:
    """Made and taught while the model is in full precision, and run when all of it is quantized.

    configuration: what is quantized, and how. stored: dtype of norms and biases in the checkpoint. clock: seconds.
    Raises AmqError for a model that is not in memory as a whole, or that cannot write the text.
    """

    def __init__(
        self, settings: QuantizeSettings, opened: OpenModel, configuration: Configuration, stored: torch.dtype,
        progress: Progress | None = None, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._model, self._inventory, self._clock = opened.model, opened.inventory, clock
        self._minutes = settings.tune or 0.0
        self._left = 60 * self._minutes
        if pager_of(self._model) is not None:
            raise AmqError(
                f"--tune takes all weights of {settings.model} in memory at once, and they are read block by block: do "
                "without --tune, or use a machine with more memory (and --load memory)"
            )
        self._settings, self._stored = settings, stored
        sampler = self._sampler(opened, progress)
        self._windows, self._held_out = sampler.take(settings.windows), sampler.take(HELD_OUT)
        inventory = self._inventory
        looked_up = {s.name for s in inventory.outer if s.kind == EMBEDDING}
        self._tuned = [s for s in inventory.weights if s.name in configuration.quantized and s.name not in looked_up]
        self._vectors = [
            o.name for o in inventory.others
            if o.kind == "norm_or_bias" and o.name.rpartition(".")[2] in ("weight", "bias")
            and o.name not in opened.usable.loaded
        ]  # fmt: skip
        outside = [*self._vectors, *(f"{s.name}.weight" for s in self._tuned)]
        self._outside = [name for name in outside if not name.startswith(f"{inventory.blocks_path}.")]
        self._group_size = configuration.group_size
        began = clock()
        self._activations = activation_bytes(self._model, self._windows[:1], self._parameters())
        self._pass = clock() - began
        room = free_on(settings.device) // SHARE
        self._segments = min(inventory.n_blocks, max(1, math.ceil(self._activations / max(1, room))))
        self._distillation = Distillation(self._model, self._outside, sampler.corpus.unscored, self._segments)
        self._learned: list[int] = []
        self._measured: list[int] = []

    def _sampler(self, opened: OpenModel, progress: Progress | None) -> WindowSampler:
        settings = self._settings
        count = settings.windows + HELD_OUT
        try:
            return opened.sampler(SELF, settings.window_length, settings.seed, count, progress)
        except AmqError as error:
            raise AmqError(f"--tune takes text that the model writes itself: {error}") from None

    def _parameters(self) -> list[nn.Parameter]:
        names = (spec.name for spec in self._tuned)
        return [*(get_weight(self._model, n) for n in names), *(self._model.get_parameter(n) for n in self._vectors)]

    def plan(self) -> str:
        """A line of the plan."""
        cut = "" if self._segments == 1 else f", in {self._segments} segments that memory holds the activations of"
        return (
            f"plan: then {self._minutes:g} minutes of tuning on text that the model wrote ({SELF}): "
            f"about {STEP_PASSES * self._pass:.1f} s for a step{cut}"
        )

    @property
    def kept_bytes(self) -> int:
        """What is held from `learn` on."""
        size = embedding_weight(self._model).element_size() * model_width(self._model, self._inventory)
        states = (len(self._windows) + HELD_OUT) * self._windows.shape[1] * size
        copies = (self._model.get_parameter(name) for name in self._outside)
        return min(states, STATE_BYTES) + sum(copy.nbytes for copy in copies)

    @property
    def working_bytes(self) -> int:
        """What `run` takes besides."""
        groups = sum(s.out_features * n_groups(s.in_features, self._group_size) for s in self._tuned)
        vectors = sum(self._model.get_parameter(name).numel() for name in self._vectors)
        largest = max(s.numel for s in self._tuned)
        head = cast("nn.Linear", self._model.get_output_embeddings())
        logits = LOGIT_COPIES * FLOAT * TOKENS * head.weight.shape[0]
        return Tunable.working_bytes(groups, vectors, largest) + logits + self._activations // self._segments

    def learn(self, progress: Progress | None = None) -> None:
        """Runs the model, which is in full precision, on the windows: on as many as there is time for."""
        began = self._clock()
        with (progress or Progress()).stage("full precision", len(self._windows)) as step:
            self._measured = [self._distillation.learn(window) for window in self._held_out]
            for window in self._windows:
                self._learned.append(self._distillation.learn(window))
                step()
                if self._clock() - began > LEARNING * self._left:
                    break
        self._left -= self._clock() - began

    def run(
        self, packed: Mapping[str, PackedWeight], progress: Progress | None = None
    ) -> tuple[dict[str, PackedWeight], Tuning]:
        """The weights and what to say of it; norms and biases are changed in the model.

        packed: {weight: as it was quantized}, of all; the model holds them dequantized.
        """
        began = self._clock()
        tuned = {spec.name: packed[spec.name] for spec in self._tuned}
        fractional = self._settings.zero_points == "fractional"
        state = Tunable(self._model, tuned, self._vectors, self._stored, fractional)
        course = _Course(state, self._distillation, self._measured, self._clock)
        with (progress or Progress()).stage("tune", PERCENT) as step:
            self._descend(course, began + self._left, step)
        course.finish()
        log = Tuning(
            text=SELF, windows=len(self._learned), held_out=len(self._measured), start=finite(course.start),
            best=finite(course.best), steps=course.steps, best_step=course.best_step,
            seconds=round(60 * self._minutes - self._left + self._clock() - began, 1), end=course.end,
        )  # fmt: skip
        return {**packed, **state.packed()}, log

    def _descend(self, course: _Course, deadline: float, bar: Step) -> None:
        """Steps until the time is over or the loss has left the ground."""
        clock, order = self._clock, list[int]()
        generator = torch.Generator().manual_seed(self._settings.seed)
        began, took, shown = clock(), STEP_PASSES * self._pass, 0
        while not course.end and (now := clock()) + took + course.check_seconds <= deadline:
            if not order:
                order = [self._learned[i] for i in torch.randperm(len(self._learned), generator=generator).tolist()]
            share = min(1.0, (now + took - began) / max(deadline - course.check_seconds - began, took))
            course.step(order.pop(), rate(share))
            took = clock() - now
            if clock() + 2 * (took + course.check_seconds) <= deadline:
                course.check_now_and_then()
            while shown < int(PERCENT * share):
                shown += 1
                bar(course.text())


class _Course:
    """How tuning goes: losses, the best that was seen, and why it ended, if it did.

    best_step: 0 for the weights as they were quantized.
    """

    def __init__(
        self, state: Tunable, distillation: Distillation, held_out: Sequence[int], clock: Callable[[], float]
    ) -> None:
        self._state, self._distillation, self._held_out, self._clock = state, distillation, held_out, clock
        self._kept = state.snapshot()
        self.steps = self.best_step = self._checked = 0
        self.end, self.check_seconds = "", 0.0
        self.start = self.best = self._measure()
        if not math.isfinite(self.start):
            self.end = "the divergence of the quantized model is not finite"

    def step(self, window: int, rate: float) -> None:
        with self._state.tracked():
            loss = self._distillation.backward(window)
        self.steps += 1
        if math.isfinite(loss):
            self._state.step(rate)
        else:
            self.end = f"it diverged: the loss was not finite at step {self.steps}"

    def check_now_and_then(self) -> None:
        """`check`, if steps have taken long enough since the last one."""
        if self._clock() - self._last >= BETWEEN * self.check_seconds:
            self.check()

    def check(self) -> None:
        """Measures the held-out windows, and keeps what is the best so far."""
        loss, self._checked = self._measure(), self.steps
        if loss < self.best:
            self.best, self.best_step, self._kept = loss, self.steps, self._state.snapshot()
        elif not loss <= self.start:
            self.end = f"it diverged: {loss:.4f} nats per token on held-out windows at step {self.steps}"

    def finish(self) -> None:
        """The last check; the model gets the best that was seen."""
        if not self.end and self._checked < self.steps:
            self.check()
        self.end = self.end or "the time was over"
        if self.best_step != self.steps:
            self._state.restore(self._kept)

    def text(self) -> str:
        return f"step {self.steps}, {self.start:.4f} → {self.best:.4f} nats per token on held-out windows"

    def _measure(self) -> float:
        began = self._clock()
        loss = self._distillation.loss(self._held_out)
        self._last = self._clock()
        self.check_seconds = self._last - began
        return loss


def rate(share: float) -> float:
    """Adam's rate at a share of the time, above 0 and up to 1: it rises, and falls as a cosine does."""
    return RATE * min(1.0, share / RISE) * (1 + math.cos(math.pi * share)) / 2


def finite(loss: float) -> float | None:
    """As JSON has it."""
    return loss if math.isfinite(loss) else None
