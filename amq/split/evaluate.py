"""`amq split eval`: what a run has gained, and what the quantized cut costs where the tuned model is run split.

Three perplexities on the same windows, those that the run held out of its own text or another text's: of the model as
it was, tuned, and tuned with its hidden states quantized at the cut as the run's policy does at its end. The last two
are the adapter's, which is loaded as any user loads it, by peft. To aq-sgd every window is new, so it sends float16.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.inventory import embedding_weight
from amq.model.open import load_model, model_fingerprint
from amq.model.perplexity import exp, negative_log_likelihood
from amq.model.text import fixed_windows, load_corpus
from amq.split import quantizer
from amq.split.data import windows_of
from amq.split.model import targets_of
from amq.split.party import stream_name
from amq.split.policy import FORWARD, Policy, below
from amq.split.records import (
    ADAPTER,
    BASE,
    EVALUATION,
    QUANTIZED,
    RUN,
    TUNED,
    EvaluationRow,
    SplitEvaluation,
    SplitRun,
)
from amq.split.settings import SplitEvalSettings
from amq.split.state import States
from amq.split.terms import Terms
from amq.util.extras import needs
from amq.util.limits import fit_threads
from amq.util.progress import Progress


def run_evaluate(settings: SplitEvalSettings, progress: Progress) -> SplitEvaluation:
    """Measures, and writes evaluation.json into the run's folder."""
    folder = Path(settings.run)
    evaluation = evaluate_run(
        folder, settings.text, settings.max_tokens, model=settings.model, device=settings.device, progress=progress
    )
    evaluation.write(folder / EVALUATION)
    return evaluation


def evaluate_run(
    folder: Path, text: str | None = None, max_tokens: int = 8192, *, model: str | None = None, device: str = "cpu",
    base: bool = True, progress: Progress | None = None,
) -> SplitEvaluation:  # fmt: skip
    """The perplexities of a finished run, without writing them.

    text: None for what the run held out of its own. model: where it is now, if elsewhere. base: of the untuned one too.
    Raises AmqError for a run that is not finished, and for a model that is not the run's.
    """
    run = SplitRun.read(folder / RUN)
    terms = Terms.parse(run.terms, str(folder / RUN))
    if not (folder / ADAPTER).is_dir():
        raise AmqError(f"{folder} has no {ADAPTER}: the run is {run.status}; go on with `amq split train … --resume`")
    with needs("split", "amq split eval"):
        from peft import PeftModel
    fit_threads()
    loaded = load_model(model or run.model, terms.dtype, device)
    if model_fingerprint(loaded.model) != terms.model:
        raise AmqError(f"{model or run.model} is another model than the run's: its weights or its config differ")
    corpus = load_corpus(text or run.text, loaded.tokenizer, loaded.embedding_rows)
    if text is None:
        windows = windows_of(corpus, terms.window_length, terms.samples)[1]
        windows = windows[: max(1, max_tokens // terms.window_length)]
    else:
        windows = fixed_windows(corpus, terms.window_length, max_tokens)
    losses: dict[str, tuple[float, float | None]] = {}
    with (progress or Progress()).stage("eval", 2 + base) as step:
        if base:
            losses[BASE] = negative_log_likelihood(loaded.model, windows, corpus.unscored), None
            step(BASE)
        with warnings.catch_warnings():  # of what peft uses of transformers
            warnings.simplefilter("ignore", FutureWarning)
            tuned: Any = PeftModel.from_pretrained(loaded.model, str(folder / ADAPTER)).get_base_model().eval()
        losses[TUNED] = negative_log_likelihood(tuned, windows, corpus.unscored), None
        step(TUNED)
        losses[QUANTIZED] = quantized_loss(tuned, windows, terms, States(folder), corpus.unscored)
        step(QUANTIZED)
    rows = (
        EvaluationRow(name=name, perplexity=exp(loss), loss=loss, bits=bits) for name, (loss, bits) in losses.items()
    )
    return SplitEvaluation(text=text or f"{run.text}, held out", tokens=windows.numel(), rows=tuple(rows))


def quantized_loss(model: Any, windows: Tensor, terms: Terms, states: States, unscored: int) -> tuple[float, float]:
    """(mean negative log-likelihood, bits per value sent) with every cut quantized as the run's last step has it.

    windows: int64 [n, length]; they go in micro-batches of the run's size.
    """
    runner, state = BlockRunner(model), states.load(terms.steps)
    channels = model.config.get_text_config().hidden_size
    cuts = [terms.cut, *([runner.n_blocks] if terms.labels == "client" else [])]
    policies = [_policy(terms, channels, cut, state) for cut in range(len(cuts))]
    total, sent, values = 0.0, 0, 0
    with torch.no_grad():
        for number, batch in enumerate(windows.to(embedding_weight(model).device).split(terms.windows), 1):
            new = range(-number * terms.windows, len(batch) - number * terms.windows)  # samples that nobody has seen
            hidden, at = runner.hidden(batch, cuts[0]), cuts[0]
            for boundary, policy in zip(cuts, policies, strict=True):
                hidden, at = runner.hidden(batch, boundary, at, hidden), boundary
                hidden, size = _through(hidden, policy, new)
                sent, values = sent + size, values + hidden.numel()
            logits = runner.logits_from(batch, at, hidden).float()
            targets = targets_of(batch, unscored)
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1 - unscored)), 8 * sent / values


def _policy(terms: Terms, channels: int, cut: int, state: dict[str, Tensor]) -> Policy:
    """The policy of hidden states at a cut, as it stood after the last step."""
    kept = below(state, stream_name(cut, True))
    if cut == 0:
        policy = FORWARD[terms.policy](terms, channels, terms.group)
        policy.load(below(kept, "policy"))
    else:  # the server's: of it the client has the table, and of `step` nothing, which finds its target at once
        policy = FORWARD[terms.policy](replace(terms, start_bits=terms.target_bits), channels, terms.group)
        policy.widths = kept.get("table")
    if policy.widths is None:
        policy.begin(terms.steps)
    return policy


def _through(hidden: Tensor, policy: Policy, samples: Sequence[int]) -> tuple[Tensor, int]:
    """Hidden states [batch, length, channels] as they arrive, and the payload's bytes."""
    payload = policy.encode(quantizer.by_channel(hidden), samples)
    levels = None if policy.widths is None else quantizer.levels_of(policy.widths)
    batch, length, channels = hidden.shape
    came = quantizer.unpack(payload, levels, batch * length, channels, min(policy.group, batch * length), "the cut")
    return quantizer.by_window(came, length).to(hidden), len(payload)


def table(evaluation: SplitEvaluation) -> str:
    """For a terminal."""
    lines = [
        f"{evaluation.text}: {evaluation.tokens} tokens",
        f"{'':24}{'perplexity':>12}{'nats/token':>12}{'bits':>8}",
    ]
    for row in evaluation.rows:
        bits = "" if row.bits is None else f"{row.bits:8.2f}"
        lines.append(f"{row.name:24}{row.perplexity:12.4f}{row.loss:12.5f}{bits}")
    return "\n".join(lines)
