"""`amq split eval`: what a run has gained, and what the quantized cut costs where the tuned model is run split.

Three perplexities on the same windows, those that the run held out of its own text or another text's: of the model as
it was, tuned, and tuned with its hidden states quantized at the cut as the run's policy does at its end. The last two
are the adapter's, which is loaded as any user loads it, by peft.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amq.errors import AmqError
from amq.model.blocks import BlockRunner
from amq.model.open import load_model, model_fingerprint
from amq.model.perplexity import exp, negative_log_likelihood
from amq.model.text import fixed_windows, load_corpus
from amq.split import quantizer
from amq.split.data import windows_of
from amq.split.model import targets_of
from amq.split.policy import FORWARD, Policy
from amq.split.records import ADAPTER, EVALUATION, RUN, EvaluationRow, SplitEvaluation, SplitRun
from amq.split.settings import SplitEvalSettings
from amq.split.state import States
from amq.split.terms import Terms
from amq.util.extras import needs
from amq.util.limits import fit_threads
from amq.util.progress import Progress

BASE, TUNED, QUANTIZED = "base", "tuned", "tuned, quantized cut"


def run_evaluate(settings: SplitEvalSettings, progress: Progress) -> SplitEvaluation:
    """Measures, and writes evaluation.json into the run's folder. Raises AmqError for a run that is not finished."""
    folder = Path(settings.run)
    run = SplitRun.read(folder / RUN)
    terms = Terms.parse(run.terms, str(folder / RUN))
    if not (folder / ADAPTER).is_dir():
        raise AmqError(f"{folder} has no {ADAPTER}: the run is {run.status}; go on with `amq split train … --resume`")
    with needs("split", "amq split eval"):
        from peft import PeftModel
    fit_threads()
    loaded = load_model(settings.model or run.model, terms.dtype, settings.device)
    if model_fingerprint(loaded.model) != terms.model:
        raise AmqError(
            f"{settings.model or run.model} is another model than the run's: its weights or its config differ"
        )
    corpus = load_corpus(settings.text or run.text, loaded.tokenizer, loaded.embedding_rows)
    if settings.text is None:
        windows = windows_of(corpus, terms.window_length, terms.samples)[1]
        windows = windows[: max(1, settings.max_tokens // terms.window_length)]
    else:
        windows = fixed_windows(corpus, terms.window_length, settings.max_tokens)
    model: Any = loaded.model
    with progress.stage("eval", 3) as step:
        base = negative_log_likelihood(model, windows, corpus.unscored)
        step(BASE)
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER)).get_base_model().eval()
        tuned = negative_log_likelihood(model, windows, corpus.unscored)
        step(TUNED)
        cut, bits = quantized_loss(model, windows, terms, States(folder), corpus.unscored)
        step(QUANTIZED)
    losses = ((BASE, base, None), (TUNED, tuned, None), (QUANTIZED, cut, bits))
    rows = tuple(EvaluationRow(name=name, perplexity=exp(loss), loss=loss, bits=b) for name, loss, b in losses)
    evaluation = SplitEvaluation(text=settings.text or f"{run.text}, held out", tokens=windows.numel(), rows=rows)
    evaluation.write(folder / EVALUATION)
    return evaluation


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
        for batch in windows.split(terms.windows):
            hidden, at = runner.hidden(batch, cuts[0]), cuts[0]
            for boundary, policy in zip(cuts, policies, strict=True):
                hidden, at = runner.hidden(batch, boundary, at, hidden), boundary
                hidden, size = _through(hidden, policy)
                sent, values = sent + size, values + hidden.numel()
            logits = runner.logits_from(batch, at, hidden).float()
            targets = targets_of(batch, unscored)
            total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / (len(windows) * (windows.shape[1] - 1 - unscored)), 8 * sent / values


def _policy(terms: Terms, channels: int, cut: int, state: dict[str, Tensor]) -> Policy:
    """The policy of hidden states at a cut, as it stood after the last step."""
    prefix = f"stream.{cut}.1."
    kept = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if cut == 0:
        policy = FORWARD[terms.policy](terms, channels, terms.group)
        policy.load({name.removeprefix("policy."): t for name, t in kept.items() if name.startswith("policy.")})
    else:  # the server's: of it the client has the table, and of `step` nothing, which finds its target at once
        policy = FORWARD[terms.policy](replace(terms, start_bits=terms.target_bits), channels, terms.group)
        policy.widths = kept.get("table")
    if policy.widths is None:
        policy.begin(terms.steps)
    return policy


def _through(hidden: Tensor, policy: Policy) -> tuple[Tensor, int]:
    """Hidden states [batch, length, channels] as they arrive, and the payload's bytes."""
    batch, length, channels = hidden.shape
    x = hidden.reshape(-1, channels).t().float().contiguous()
    payload = policy.encode(x, range(-batch, 0))  # no samples that were seen
    levels = None if policy.widths is None else (1 << policy.widths).to(torch.int32)
    came = quantizer.unpack(payload, levels, batch * length, channels, min(policy.group, batch * length), "the cut")
    return came.t().reshape(batch, length, channels).to(hidden.dtype), len(payload)


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
