"""Fisher scores: what each weight in each format will cost, from a few backward passes.

With labels sampled from the full-precision model's own next-token distribution, g[t] the gradient of their summed
log-likelihood at a linear's output for token t, x[t] its input and δW = W − Ŵ the bank's error, the score is

    ⅛ · Σ over runs of (Σ over t in the run of g[t] · δW x[t])² / (tokens that have a loss)          nats per token

of which the score is the geometric mean over runs of RUNS positions. Errors of neighbours act on the same later tokens
by attention, and add up there or cancel: what runs of one position leave out. The whole window would be the quadratic
form itself, of which there are too few draws; long runs have less bias, short ones less noise.
At the positions of a window's prefix (BOS) no label is drawn, since no loss counts there. Their x stay in the sum, as
what later tokens read there is wrong with δW too. An expert's sum is over the tokens that are routed to it; one that no
token of a pass reaches scores 0 there. What an embedding adds at token t is the row of its δW, scaled as its module
scales it, in the place of δW x[t], and g[t] the gradient at its output, from every block that reads it. For the head
the sum over labels is done instead of sampled: with p the probabilities and δz = δW h the error of the logits,

    ⅛ · mean over tokens of Σ p δz² − (Σ p δz)²

and a head that is tied to the embedding has the sum of both.
For small errors the Jensen–Shannon divergence is an eighth of the Fisher quadratic form, so scores are in loss units.
What it leaves out: terms between linears, terms between tokens (an error that attention hands on from many tokens adds
up, in v most of all), and saturation (the loss cannot exceed ln 2); the search's fit takes in what it can.

`gradient_passes` gives two other scores of linears from the same x and g, which other systems allocate bits by:

    trace     mean over scored tokens of ‖g[t]‖² ‖x[t]‖² / numel · ‖δW‖²          (HAWQ-V2, arXiv 1911.03852)
    taylor    |Σ over t of g[t] · δW x[t]| / (tokens that have a loss), g of the text's own next tokens

The first is the trace of the Fisher matrix of one token, which a linear has exactly, without Hutchinson's probes. The
second wants other labels, since the mean gradient of drawn ones is zero: its passes are passes of their own. A third is
Fisher's score of what a layer keeps of a sequence: keys and values in the place of outputs, their rounding in that of
δW x[t], for every kind of cache below 16 bits (`amq.proxy.caches`).

Weights need no gradients. The passes of a group go through the model together, block by block: once without a graph,
keeping the hidden state after every block, and then back, rebuilding one block's graph at a time. So each block's
weights are in memory twice per group, and each error is dequantized once for as many passes as `memory` holds the
activations of. What a pass gives does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.kernels.dense import dequantize_into
from amq.model.backward import drawn_likelihood, states_of_blocks, watch
from amq.model.blocks import TOKENS, BlockRunner
from amq.model.inventory import EMBEDDING, EXPERT, HEAD, Inventory, LinearSpec, embedding_weight, get_linear, get_weight
from amq.model.paging import holding, pager_of
from amq.model.states import StateStore
from amq.proxy.caches import CODED, Kept, change, watch_keys
from amq.proxy.resident import BankReader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Table = dict[str, dict[str, float]]
"""{linear: {format: cost}}"""
FISHER, TRACE, TAYLOR, CACHE = "fisher", "trace", "taylor", "cache"
DRAWN = (FISHER, TRACE, CACHE)
"""Scores of labels that the model draws; those of the others are the text's."""
RUNS = (1, 16, 64)
"""Positions whose contributions are summed before they are squared; see above."""
TOGETHER = 4
"""Passes of a group in a model that is in memory: what a killed search computes again. All, where every group reads the
model from disk twice."""


def fisher_passes(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    formats: Sequence[str],
    seed: int,
    start: int = 0,
    unscored: int = 0,
    memory: int = 256 << 20,
    runs: Sequence[int] = RUNS,
) -> Iterator[Table]:
    """One table per window (a pass), from window `start` on; their mean is the cost table.

    model: full-precision causal LM. windows: int64 [passes, length]. Pass i depends on `seed` and i only.
    inventory: what is scored is its `weights`, all of them in the bank, each in those of `formats` that it has there.
    unscored: leading positions of every window that have no loss, `Corpus.unscored`.
    memory: bytes that hidden states, the activations of one block and the head's errors may take, each for itself.
    runs: positions in a run, for each of those whose geometric mean a score is.
    """
    scores = Scores(model, inventory, bank, tuple(formats), unscored, memory, tuple(runs))
    for one in scores.passes(windows, seed, start, (FISHER,)):
        yield scores.table(one, FISHER)


def gradient_passes(
    model: PreTrainedModel,
    inventory: Inventory,
    bank: BankReader,
    windows: Tensor,
    formats: Sequence[str],
    seed: int,
    kinds: Sequence[str],
    unscored: int = 0,
    memory: int = 256 << 20,
    start: int = 0,
) -> Iterator[dict[str, Table]]:
    """{kind: table} per window, of the scores `kinds`: `DRAWN` ones together, or `TAYLOR` alone; see above.

    The other arguments are those of `fisher_passes`, of which `FISHER` here is the table; `CACHE` is {layers.N: {kind:
    cost}}. Raises AmqError where the inventory has a head or embeddings, of whose scores only Fisher's are known, and
    for `CACHE` as `watch_keys` does.
    """
    assert set(kinds) <= set(DRAWN) or set(kinds) == {TAYLOR}, "labels are either drawn or the text's"
    if inventory.outer and not set(kinds) <= {FISHER, CACHE}:
        raise AmqError(
            f"the scores {' and '.join(kinds)} are of the blocks' linears: leave out {inventory.outer[0].name}"
        )
    scores = Scores(model, inventory, bank, tuple(formats), unscored, memory, RUNS)
    for one in scores.passes(windows, seed, start, tuple(kinds)):
        yield {kind: scores.table(one, kind) for kind in kinds}


def add_pass(total: Table, table: Table, done: int) -> Table:
    """The mean of `done` passes, `total`, with one more; the first one's own where there was none."""
    if not done:
        return table
    return {n: {f: (total[n][f] * done + row[f]) / (done + 1) for f in row} for n, row in table.items()}


@dataclass
class Pass:
    """One window and what it has given so far. gradient: at the current boundary, [1, length, hidden_size].

    kinds: the scores that are wanted; table: Fisher's, more: of the others.
    """

    tokens: Tensor
    generator: torch.Generator
    kinds: tuple[str, ...] = (FISHER,)
    table: Table = field(default_factory=dict)
    more: dict[str, Table] = field(default_factory=dict)
    gradient: Tensor | None = None
    looked_up: dict[str, list[LookedUp]] = field(default_factory=dict)


@dataclass
class LookedUp:
    """One look into an embedding: ids int64 [1, length], and the gradient at what came out, summed over blocks."""

    ids: Tensor
    gradient: Tensor


Captured = list[tuple[LinearSpec, Tensor, Tensor]]
"""(linear, inputs [rows, in_features], output gradients [rows, out_features]), one for each time that it ran."""


class Scores:
    """Scores of groups of passes, put into their tables."""

    def __init__(
        self,
        model: PreTrainedModel,
        inventory: Inventory,
        bank: BankReader,
        formats: tuple[str, ...],
        unscored: int,
        memory: int,
        runs: tuple[int, ...],
    ) -> None:
        self._model, self._runner, self._inventory, self._bank = model, BlockRunner(model), inventory, bank
        self._unscored, self._memory, self._runs = unscored, memory, runs
        known = {s.name: {f.name for f in bank.formats_of(s.name)} for s in inventory.weights}
        self._formats = {name: [fmt for fmt in formats if fmt in own] for name, own in known.items()}
        self._head = next((s for s in inventory.outer if s.kind == HEAD), None)
        embeddings = {s.name: s for s in inventory.outer if s.kind == EMBEDDING}
        tied = {s.tied: s for s in inventory.outer if s.tied}
        self._embeddings = {**embeddings, **tied}  # name of the module → the item that its score belongs to

    def zeros(self, name: str) -> dict[str, float]:
        """The scores of a weight that took no part."""
        return dict.fromkeys(self._formats[name], 0.0)

    def passes(self, windows: Tensor, seed: int, start: int, kinds: tuple[str, ...]) -> Iterator[Pass]:
        """Those of `windows` from `start` on, done, in groups; arguments as for `fisher_passes`."""
        device = embedding_weight(self._model).device
        together = len(windows) if pager_of(self._model) is not None else TOGETHER
        for first in range(start, len(windows), together):
            group = [
                Pass(windows[i : i + 1].to(device), torch.Generator(device).manual_seed(seed * 1_000_003 + i), kinds)
                for i in range(first, min(first + together, len(windows)))
            ]
            with StateStore(self._memory) as store:
                self.run(group, store)
            yield from group

    def table(self, one: Pass, kind: str) -> Table:
        """What a pass gave, of every weight."""
        found = one.table if kind == FISHER else one.more.get(kind, {})
        if kind == CACHE:
            return found
        table = {s.name: found.get(s.name) or self.zeros(s.name) for s in self._inventory.weights}
        if kind == TAYLOR:  # the sum over a window's tokens, whose sign is that of the window's labels
            table = {name: {fmt: abs(sum_) for fmt, sum_ in row.items()} for name, row in table.items()}
        return table

    def run(self, passes: Sequence[Pass], store: StateStore) -> None:
        states_of_blocks(self._runner, [one.tokens for one in passes], store)
        self._score_head(passes, store)
        for block in reversed(range(self._runner.n_blocks)):
            with holding(self._model, block):
                waiting: list[tuple[Pass, Captured]] = []
                size = 0
                for index, one in enumerate(passes):
                    captured = self._back(one, block, store.pop((index, block)) if block else None)
                    waiting.append((one, captured))
                    size += _nbytes(captured)
                    if index + 1 == len(passes) or size + size // len(waiting) > self._memory:
                        self._score_block(block, waiting)
                        waiting, size = [], 0
        self._score_embeddings(passes)

    def _score_head(self, passes: Sequence[Pass], store: StateStore) -> None:
        """The gradients at the last boundary, and the head's own scores."""
        errors = self._head_errors()
        for index, one in enumerate(passes):
            final = store.pop((index, self._runner.n_blocks))[0]
            sums = {} if self._head is None else self.zeros(self._head.name)
            gradients = [torch.zeros_like(final[: self._unscored])]
            following = one.tokens[0, self._unscored + 1 :].split(TOKENS)
            for number, chunk in enumerate(final[self._unscored :].split(TOKENS)):
                labels = following[number] if number < len(following) else following[-1][:0]
                gradients.append(self._head_chunk(chunk, one, labels, errors, sums))
            one.gradient = torch.cat(gradients).unsqueeze(0)
            if self._head is not None:
                count = len(final) - self._unscored
                one.table[self._head.name] = {fmt: total / count / 8 for fmt, total in sums.items()}

    def _head_errors(self) -> Errors | None:
        """For one format after the other, all of them kept where `memory` holds them."""
        if self._head is None:
            return None
        size = 4 * self._head.numel * len(self._formats[self._head.name])
        weight = get_weight(self._model, self._head.name)
        return Errors(self._bank, self._head.name, weight, keep=size <= self._memory)

    def _head_chunk(
        self, chunk: Tensor, one: Pass, following: Tensor, errors: Errors | None, sums: dict[str, float]
    ) -> Tensor:
        """Gradient of Σ_t ln p(y_t) at final hidden states [tokens, hidden_size], with y_t ~ p, or, of a pass for
        `TAYLOR`, the text's tokens `following`, int64 [tokens], of which its last chunk has one less; adds to the
        head's sums."""
        with torch.enable_grad(), ExitStack() as hooks:
            seen: list[tuple[Tensor, Tensor]] = []
            if self._head is not None:
                head = get_linear(self._model, self._head.name)
                handle = head.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
                hooks.callback(handle.remove)
            hidden = chunk.detach().requires_grad_()
            logits = self._runner.logits(hidden)
            log_probabilities = logits.float().log_softmax(-1)
            if TAYLOR in one.kinds:
                likelihood = log_probabilities[: len(following)].gather(1, following.unsqueeze(1)).sum()
            else:
                likelihood = drawn_likelihood(log_probabilities, one.generator)
            (gradient,) = torch.autograd.grad(likelihood, hidden, retain_graph=bool(seen))
            if errors is None:
                return gradient
            ((x, output),) = seen
            # what follows the head (scaling, soft-capping) acts on each logit alone: its derivative is a factor
            (factor,) = torch.autograd.grad(logits.sum(), output)
        with torch.no_grad():
            p, x, factor = log_probabilities.exp(), x[0].float(), factor[0].float()
            for fmt in sums:
                change = (x @ errors.get(fmt).t()).mul_(factor)
                mean = (p * change).sum(-1)
                # Σ p (δz − mean)² rather than the difference of two nearly equal sums
                sums[fmt] += float((p * change.sub_(mean.unsqueeze(-1)).square_()).sum(dtype=torch.float64))
        return gradient

    def _back(self, one: Pass, block: int, entry: Tensor | None) -> Captured:
        """Reruns one block with a graph; moves the pass's gradient before it and returns what its linears saw."""
        looks: list[tuple[str, Tensor, Tensor]] = []

        def look(name: str, ids: Tensor, output: Tensor) -> Tensor:
            leaf = output.detach().requires_grad_()
            looks.append((name, ids, leaf))
            return leaf.clone()  # models write into what an embedding gives, which a leaf forbids

        with torch.enable_grad(), ExitStack() as hooks:
            ran = watch(self._model, self._inventory.in_block(block), hooks)
            for name in self._embeddings:
                module = self._model.get_submodule(name)
                hooks.callback(module.register_forward_hook(lambda m, args, out, n=name: look(n, args[0], out)).remove)
            kept = hooks.enter_context(watch_keys(self._model)) if CACHE in one.kinds else []
            entry = None if entry is None else entry.detach().requires_grad_()
            result = self._runner.hidden(one.tokens, block + 1, block, entry)
            wanted = [output for *_, output in ran] + [leaf for *_, leaf in looks]
            wanted += [tensor for _, *pair, _ in kept for tensor in pair]
            wanted += [] if entry is None else [entry]
            found = torch.autograd.grad(result, wanted, one.gradient, allow_unused=True)
        one.gradient = None if entry is None else found[-1]
        self._score_caches(one, kept, found[len(ran) + len(looks) :])
        for (name, ids, _), g in zip(looks, found[len(ran) :], strict=False):
            if g is not None:
                _add(one.looked_up.setdefault(name, []), ids, g)
        return [
            (spec, x.flatten(0, -2), g.flatten(0, -2))
            for (spec, x, _), g in zip(ran, found, strict=False)
            if g is not None
        ]

    @torch.no_grad()
    def _score_block(self, block: int, waiting: Sequence[tuple[Pass, Captured]]) -> None:
        """Adds the scores of what the passes captured in a block; each error is dequantized once."""
        by_linear: dict[LinearSpec, list[tuple[Pass, Tensor, Tensor]]] = {}
        for one, captured in waiting:
            for spec, x, g in captured:
                by_linear.setdefault(spec, []).append((one, x, g))
        for spec, seen in by_linear.items():
            errors = Errors(self._bank, spec.name, get_weight(self._model, spec.name))
            for fmt in self._formats[spec.name]:
                error = errors.get(fmt)
                for one, x, g in seen:
                    change = x.float() @ error.t()  # [rows, out_features]
                    self._add_score(one, spec, fmt, change.mul_(g).sum(-1))
                    if TRACE in one.kinds:
                        self._add_trace(one, spec, fmt, x, g, error)

    @torch.no_grad()
    def _score_caches(self, one: Pass, kept: Sequence[Kept], gradients: Sequence[Tensor | None]) -> None:
        """Adds the scores of what layers keep; gradients: of keys and values, in turn."""
        scored = one.tokens.shape[1] - self._unscored
        for place, (layer, key, value, has_biases) in enumerate(kept):
            own = [g for g in gradients[2 * place : 2 * place + 2] if g is not None]
            if len(own) == 2:
                one.more.setdefault(CACHE, {})[f"layers.{layer}"] = {
                    kind: squares(change(kind, key, value, own, has_biases), self._runs) / scored / 8 for kind in CODED
                }

    @torch.no_grad()
    def _score_embeddings(self, passes: Sequence[Pass]) -> None:
        for name, spec in self._embeddings.items():
            module = self._model.get_submodule(name)
            errors = Errors(self._bank, spec.name, get_weight(self._model, name))
            for fmt in self._formats[spec.name]:
                error = errors.get(fmt)
                for one in passes:
                    for look in one.looked_up.get(name, ()):
                        change = _rows(module, error, look.ids)
                        self._add_score(one, spec, fmt, (change * look.gradient).flatten(0, -2).sum(-1))

    def _add_score(self, one: Pass, spec: LinearSpec, fmt: str, change: Tensor) -> None:
        """change: that of the log-likelihood, to first order, by each token's error, [rows]."""
        scored = one.tokens.shape[1] - self._unscored
        if TAYLOR in one.kinds:
            row = one.more.setdefault(TAYLOR, {}).setdefault(spec.name, self.zeros(spec.name))
            row[fmt] += float(change.sum(dtype=torch.float64)) / scored
            return
        row = one.table.setdefault(spec.name, self.zeros(spec.name))
        runs = (1,) if spec.kind == EXPERT else self._runs  # an expert's rows are not neighbours in the window
        row[fmt] += squares(change.float(), runs) / scored / 8

    def _add_trace(self, one: Pass, spec: LinearSpec, fmt: str, x: Tensor, g: Tensor, error: Tensor) -> None:
        """x, g: [rows, in_features] and [rows, out_features]; error: of the weight in this format."""
        rows = x.float().square().sum(-1) * g.float().square().sum(-1)
        whole = float(rows.sum(dtype=torch.float64)) / (one.tokens.shape[1] - self._unscored) / spec.numel
        row = one.more.setdefault(TRACE, {}).setdefault(spec.name, self.zeros(spec.name))
        row[fmt] += whole * float(error.square().sum(dtype=torch.float64))


def squares(change: Tensor, runs: Sequence[int]) -> float:
    """Geometric mean over `runs` of the summed squares of change [rows] summed over so many rows in a row; the last run
    is what is left."""
    sums = [nn.functional.pad(change, (0, -len(change) % run)).view(-1, run).sum(-1) for run in runs]
    return math.prod(float(s.square_().sum()) ** (1 / len(runs)) for s in sums)


class Errors:
    """W − Ŵ of one weight, float32 [out_features, in_features], in one format after the other.

    keep: all formats stay; else each is written over the one before.
    """

    def __init__(self, bank: BankReader, name: str, weight: Tensor, keep: bool = False) -> None:
        self._bank, self._name, self._weight, self._keep = bank, name, weight, keep
        self._made: dict[str, Tensor] = {}

    def get(self, fmt: str) -> Tensor:
        found = self._made.get(fmt)
        if found is None:
            if self._keep or not self._made:
                found = torch.empty(self._weight.shape, dtype=torch.float32, device=self._weight.device)
            else:
                _, found = self._made.popitem()
            dequantize_into(self._bank.get(self._name, fmt), found)
            self._made[fmt] = found.sub_(self._weight)  # of the other sign: only squares are used
        return found


def _nbytes(captured: Captured) -> int:
    """Of gradients, and of inputs, which linears share."""
    inputs = {(x.data_ptr(), x.nbytes) for _, x, _ in captured}
    return sum(size for _, size in inputs) + sum(g.nbytes for *_, g in captured)


def _add(looks: list[LookedUp], ids: Tensor, gradient: Tensor) -> None:
    """Adds a gradient to that of an earlier block at the same look, or notes a new one."""
    for look in looks:
        if look.ids.shape == ids.shape and look.gradient.shape == gradient.shape and torch.equal(look.ids, ids):
            look.gradient = look.gradient + gradient
            return
    looks.append(LookedUp(ids, gradient))


def _rows(module: nn.Module, error: Tensor, ids: Tensor) -> Tensor:
    """What the embedding `module` would give for `ids` with `error` as its weight, scaled as it scales: float32
    [..., embedding_dim]."""
    rows: Tensor = torch.func.functional_call(module, {"weight": error}, (ids,))
    return rows
