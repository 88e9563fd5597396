"""The model card: what was done to the model, how good it is, and how to run it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import amq
from amq.checkpoint.record import QuantizationRecord
from amq.quantize.log import HeadOutcome, PerplexityFigures, QuantizationLog
from amq.util.extras import DISTRIBUTION, install_hint
from amq.util.files import write_text

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [amq, quantized, mixed-bit]
---
# {name}

{model}, its {count} linears quantized by [amq](https://pypi.org/project/{distribution}/) {version} (method `{method}`,
group size {group_size}) to {bits:.3f} bits per weight on average, scales and zero points counted.
{head}{unusable}
| format | linears |
|---|---|
{formats}

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
{windows} calibration windows of {window_length} tokens of `{calibration}`, seed {seed}.
"""


def write_card(folder: Path, name: str, record: QuantizationRecord, log: QuantizationLog) -> None:
    """Writes README.md; log: its quantization.json."""
    settings = log.settings
    counts = Counter(record.configuration.formats.values())
    memory = [(i.name, i.bytes) for i in log.memory.items if i.bytes]
    memory.append(("**total**", log.memory.total))
    text = TEMPLATE.format(
        name=name,
        model=settings.model,
        count=len(record.configuration.formats),
        version=amq.__version__,
        method=settings.method,
        distribution=DISTRIBUTION,
        install=install_hint("models,serve"),
        group_size=record.group_size,
        bits=log.bits_per_weight,
        head=_head(log.head),
        unusable=_unusable(log.not_quantized),
        formats="\n".join(f"| {fmt} | {counts[fmt]} |" for fmt in sorted(counts)),
        memory="\n".join(f"| {item} | {size / 2**20:.1f} |" for item, size in memory),
        perplexity=_perplexity(log.perplexity),
        windows=settings.windows,
        window_length=settings.window_length,
        calibration=settings.calibration,
        seed=settings.seed,
    )
    write_text(folder / "README.md", text)


def _head(head: HeadOutcome | None) -> str:
    if head is None:
        return ""
    what = "lm_head and the embedding tied to it are one" if head.embedding else "lm_head is an"
    return f"Besides them, the {what} {head.format} weight of {head.bytes / 2**20:.1f} MiB.\n"


def _unusable(reasons: dict[str, str]) -> str:
    """reasons: {linear: why it could not be quantized}."""
    if not reasons:
        return ""
    name, reason = next(iter(reasons.items()))
    return (
        f"{len(reasons)} more linears are not counted in that and stay in 16 bits, such as `{name}`: {reason}. "
        "`quantization.json` lists them.\n"
    )


def _perplexity(figures: PerplexityFigures | None) -> str:
    if figures is None:
        return ""
    rows = "\n".join(f"| {n} | {'broken' if v is None else f'{v:.3f}'} |" for n, v in figures.rows.items())
    head = f"perplexity on {figures.tokens} tokens of `{figures.text}`, windows of {figures.window_length}"
    head += f" that begin with `{' '.join(figures.window_prefix)}`" if figures.window_prefix else ""
    return f"\n| {head} | |\n|---|---|\n{rows}\n"
