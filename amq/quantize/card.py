"""The model card: what was done to the model, how good it is, and how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import amq
from amq.checkpoint.record import QuantizationRecord
from amq.quantize.log import ExpertsOutcome, OuterOutcome, PerplexityFigures, QuantizationLog
from amq.util.extras import DISTRIBUTION, install_hint
from amq.util.files import write_text

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [amq, quantized, mixed-bit]
---
# {name}

{model}, {count} quantized by [amq](https://pypi.org/project/{distribution}/) {version} (method `{method}`,
group size {group_size}) to {bits:.3f} bits per weight on average, scales and zero points counted.
{outer}{rotated}{unusable}
| format | linears |
|---|---|
{formats}
{experts}
| in memory | MiB |
|---|---|
{memory}
{perplexity}
## Run it

```
{install}
python -m amq.generate {name} --prompt "Why is the sky blue?"
python -m amq.serve {name}
python -m amq.eval {name}
```

```python
import amq  # registers the format with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

Without `import amq` transformers fills the linears with random numbers and only warns.

`configuration.json` says which linear has which format, `quantization.json` how each of them came out. Made with
{windows} calibration windows of {window_length} tokens of `{calibration}`, seed {seed}.{tuning}
"""


def write_card(folder: Path, name: str, record: QuantizationRecord, log: QuantizationLog) -> None:
    """Writes README.md; log: its quantization.json."""
    settings = log.settings
    counts = Counter(linear.format for linear in log.linears.values())
    memory = [(i.name, i.bytes) for i in log.memory.items if i.bytes]
    memory.append(("**total**", log.memory.total))
    text = TEMPLATE.format(
        name=name,
        model=settings.model,
        count=_count(log),
        version=amq.__version__,
        method=settings.method,
        distribution=DISTRIBUTION,
        install=install_hint("models,serve"),
        group_size=record.group_size,
        bits=log.bits_per_weight,
        outer=_outer(log),
        rotated=_rotated(log),
        unusable=_unusable(log.not_quantized),
        formats="\n".join(f"| {fmt} | {counts[fmt]} |" for fmt in sorted(counts)),
        experts=_experts(log.experts),
        memory="\n".join(f"| {item} | {size / 2**20:.1f} |" for item, size in memory),
        perplexity=_perplexity(log.perplexity),
        windows=settings.windows,
        window_length=settings.window_length,
        calibration=settings.calibration,
        seed=settings.seed,
        tuning=_tuning(log),
    )
    write_text(folder / "README.md", text)


def _count(log: QuantizationLog) -> str:
    """`its 14 linears`, experts and what is outside the blocks besides."""
    experts = sum(sum(layer.formats.values()) for layer in log.experts.values())
    parts = [f"its {len(log.linears)} linears" + (f" ({experts} of them of experts)" if experts else "")]
    if log.head:
        parts.append("its head")
    if log.embeddings or (log.head and log.head.embedding):
        parts.append("its embeddings" if len(log.embeddings) > 1 else "its embedding")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def _outer(log: QuantizationLog) -> str:
    return "".join(_outer_line(found) for found in ([log.head] if log.head else []) + list(log.embeddings))


def _outer_line(found: OuterOutcome) -> str:
    what = f"`{found.name}` and the embedding tied to it are one" if found.embedding else f"`{found.name}` is an"
    return f"Counted in that, {what} {found.format} weight of {found.bytes / 2**20:.1f} MiB.\n"


def _experts(layers: dict[str, ExpertsOutcome]) -> str:
    """layers: {layer and role: its experts}."""
    known = [(e.least_error, e.most_error) for e in layers.values() if e.least_error is not None]
    if not known:
        return ""
    roles = "\n".join(
        f"| `{name}` | {', '.join(f'{count} {fmt}' for fmt, count in e.formats.items())} | {_range(e)} |"
        for name, e in layers.items()
    )
    return f"\n| experts | formats | relative error |\n|---|---|---|\n{roles}\n"


def _range(experts: ExpertsOutcome) -> str:
    if experts.least_error is None or experts.most_error is None:
        return "kept"
    return f"{experts.least_error:.3f} to {experts.most_error:.3f}"


def _rotated(log: QuantizationLog) -> str:
    widths = [linear.rotation for linear in log.linears.values() if linear.rotation]
    if not widths:
        return ""
    return (
        f"{len(widths)} of the linears are stored rotated: their inputs pass through a Walsh–Hadamard matrix of "
        f"{widths[0]} features, which amq's kernels do and other programs do not.\n"
    )


def _unusable(reasons: dict[str, str]) -> str:
    """reasons: {linear: why it could not be quantized}."""
    if not reasons:
        return ""
    name, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} more linears are not counted in that and stay in 16 bits, such as `{name}`: {reason}. "
        "`quantization.json` lists them.\n"
    )


def _tuning(log: QuantizationLog) -> str:
    if log.tuning is None:
        return ""
    return (
        f"\nScales, zero points and norms were tuned for {log.settings.tune:g} minutes on text that the model wrote "
        f"({log.tuning.steps} steps): `tuning` in `quantization.json`.\n"
    )


def _perplexity(figures: PerplexityFigures | None) -> str:
    if figures is None:
        return ""
    rows = "\n".join(f"| {n} | {'broken' if v is None else f'{v:.3f}'} |" for n, v in figures.rows.items())
    head = f"perplexity on {figures.tokens} tokens of `{figures.text}`, windows of {figures.window_length}"
    head += f" that begin with `{' '.join(figures.window_prefix)}`" if figures.window_prefix else ""
    return f"\n| {head} | |\n|---|---|\n{rows}\n"
