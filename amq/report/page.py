"""The page around the charts: summary, tables, settings, and the style sheet (plain CSS, no external fonts).

Every string of the run folder passes `html.escape` here; the charts arrive as ready HTML.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amq.report.charts import MemoryData
from amq.report.data import (
    Run,
    child,
    count_formats,
    number,
    show_bits,
    show_bytes,
    show_loss,
    show_seconds,
)

CSS = """
:root { --ink: #1c2430; --muted: #5d6b7a; --line: #dfe4e9; --accent: #0a4c86; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f8fa; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h3 { font-size: .95rem; margin: 1.2rem 0 .3rem; }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 18px 20px; margin: 18px 0; }
p { margin: .3rem 0; overflow-wrap: anywhere; }
.summary { font-size: 1.05rem; max-width: 80ch; }
.caption, .omitted { color: var(--muted); font-size: .9rem; max-width: 110ch; }
.banner { background: #fff4e5; border: 1px solid #f0c48a; border-radius: 6px; padding: 8px 12px; margin: 0 0 14px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 14px 5px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; color: var(--muted); vertical-align: bottom; }
td.text, th.text { text-align: left; }
th.group { text-align: center; color: var(--ink); padding-left: 0; }
section > details:first-child { margin: 0; }
tr.strong td { font-weight: 600; }
details { margin: .8rem 0 0; }
summary { cursor: pointer; color: var(--accent); }
td.value { text-align: left; white-space: normal; overflow-wrap: anywhere; }
@media (max-width: 600px) {
  main { padding: 18px 8px 40px; } section { padding: 12px 10px; } h1 { font-size: 1.35rem; }
  th, td { padding-right: 10px; }
}
"""
EPSILON = 1e-6
"""Two bits per weight closer than this are the same cost."""


@dataclass(frozen=True)
class Section:
    """One chart on the page: its HTML with a caption and perhaps a table, or the reason why it was omitted."""

    name: str
    heading: str
    chart: str = ""
    caption: str = ""
    table: str = ""
    reason: str = ""


def page(run: Run, sections: Sequence[Section], plotly_js: str) -> str:
    """The whole document."""
    title = f"{escape(run.model)}: searched bits per weight"
    stopped = run.run.get("status") != "finished"
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{CSS}</style>",
        f"<script>{plotly_js}</script>\n</head>\n<body>\n<main>",
        f"<h1>{title}</h1>",
        '<p class="banner">This run was stopped before it finished; the results so far follow.</p>' if stopped else "",
        f'<p class="summary">{summary(run)}</p>',
        comparison(run),
        *(_section(section) for section in sections),
        _settings(run),
        "</main>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def escape(value: object) -> str:
    return html.escape(str(value))


def _section(section: Section) -> str:
    body = section.chart + section.table
    if section.reason:
        body = f'<p class="omitted">Omitted: {escape(section.reason)}.</p>'
    caption = f'<p class="caption">{escape(section.caption.strip())}</p>' if section.caption else ""
    return f'<section id="{section.name}">\n<h2>{escape(section.heading)}</h2>\n{caption}\n{body}\n</section>'


def summary(run: Run) -> str:
    """What was searched, what was chosen, against what, and at what price; escaped HTML."""
    model = child(run.run, "model")
    shape = []
    if number(model.get("parameters")):
        shape.append(_parameters(float(model["parameters"])))
    if model.get("blocks"):
        shape.append(f"{model['blocks']} blocks")
    shape.append(f"{len(run.linears)} linears")
    sentences = [f"{escape(run.model)} ({escape(', '.join(shape))})."]
    chosen = run.configuration or {}
    bits = number(chosen.get("bits_per_weight"))
    if bits is None:
        sentences.append("No configuration has been chosen yet.")
    else:
        sentences += _chosen_sentences(run, chosen, bits)
    return " ".join([*sentences, _price(run)])


def _parameters(count: float) -> str:
    return f"{count / 1e9:.2f} billion parameters" if count >= 1e9 else f"{count / 1e6:.1f} million parameters"


def _chosen_sentences(run: Run, chosen: Mapping[str, Any], bits: float) -> list[str]:
    memory = number(child(chosen, "memory").get("total"))
    aim = _aim(run.settings)
    size = f" ({show_bytes(memory)} with everything)" if memory else ""
    loss, predicted = number(chosen.get("loss")), number(chosen.get("predicted_loss"))
    if loss is not None:
        lost = f" and loses <b>{show_loss(loss)} nats/token</b> against the full-precision model"
    elif predicted is not None:
        lost = f" and is predicted to lose <b>{show_loss(predicted)} nats/token</b> (not evaluated)"
    else:
        lost = "; its loss is unknown"
    sentences = [f"{aim} chosen configuration holds <b>{show_bits(bits)} bits per weight</b>{size}{lost}."]
    uniforms = [row for row in uniform_rows(run) if row["bits_per_weight"] <= bits + EPSILON]
    if not uniforms:
        every = uniform_rows(run)
        cheaper = "No uniform configuration that was evaluated costs as little."
        return [*sentences, cheaper if every else "No uniform configuration was evaluated."]
    best = min(uniforms, key=lambda row: row["loss"])
    ours, theirs, where = paired_losses(chosen, best)
    name = f"The best uniform configuration that costs no more, {escape(best.get('name'))} at"
    name += f" {show_bits(best['bits_per_weight'])} bits, loses {show_loss(theirs)}{where}"
    if ours and theirs is not None:
        same = "" if not where else f" (the chosen one {show_loss(ours)} there)"
        name += f"{same}: {theirs / ours:.2g} times as much" if theirs >= ours else f"{same}, less than the chosen one"
    return [*sentences, name + "."]


def _aim(settings: Mapping[str, Any]) -> str:
    """The budget that was asked for, as the beginning of a sentence."""
    target, memory, loss = (settings.get(key) for key in ("target_bits", "memory", "max_loss"))
    if target is not None:
        return f"For a target of {escape(target)} bits per weight, the"
    if memory is not None:
        return f"For a memory of {escape(memory)}, the"
    return f"For a loss of at most {escape(loss)}, the" if loss is not None else "The"


def _price(run: Run) -> str:
    evaluations, timings = child(run.run, "evaluations"), child(run.run, "timings")
    solver = run.settings.get("solver")
    count = number(evaluations.get("count"))
    words = [f"The {escape(solver)} solver" if solver else "The search"]
    words.append(f"took {count:,.0f} evaluation{'s' * (count != 1)}" if count is not None else "ran")
    total, each = number(timings.get("total")), number(evaluations.get("seconds_each"))
    if each is not None:
        words.append(f"of {show_seconds(each)}")
    if number(evaluations.get("sensitivities")):
        words.append(f"with {evaluations['sensitivities']:,.0f} single-linear sensitivities")
    if total is not None:
        words.append(f"and {show_seconds(total)} in all")
    machine = child(run.run, "machine")
    cpu, threads = machine.get("cpu"), machine.get("threads")
    where = f" on {escape(cpu)}" if cpu else ""
    where += f" ({escape(threads)} thread{'s' * (threads != 1)})" if cpu and threads else ""
    return " ".join(words) + where + "."


def uniform_rows(run: Run) -> list[dict[str, Any]]:
    """The uniform configurations with bits and a loss, cheapest first."""
    return _usable((run.front or {}).get("uniform"))


def _usable(rows: Iterable[dict[str, Any]] | None) -> list[dict[str, Any]]:
    usable = [row for row in rows or [] if None not in (number(row.get("bits_per_weight")), number(row.get("loss")))]
    return sorted(usable, key=lambda row: row["bits_per_weight"])


def paired_losses(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float | None, float | None, str]:
    """Two losses on the same windows: the confirmation ones where both have them; the search chose on the others."""
    pair = number(ours.get("loss_confirm")), number(theirs.get("loss_confirm"))
    if None not in pair:
        return *pair, " on the confirmation windows"
    return number(ours.get("loss")), number(theirs.get("loss")), ""


def comparison(run: Run) -> str:
    """Each uniform configuration beside the best front point that costs no more; then the whole front."""
    front = _usable((run.front or {}).get("front"))
    rows = []
    for uniform in uniform_rows(run):
        within = [row for row in front if row["bits_per_weight"] <= uniform["bits_per_weight"] + EPSILON]
        best = min(within, key=lambda row: row["loss"], default=None)
        cells = [uniform.get("name"), *_losses(uniform)]
        if best is None:
            rows.append([*cells, *["–"] * 4])
            continue
        ours, theirs, _ = paired_losses(best, uniform)
        rows.append([*cells, *_losses(best), _change(ours, theirs)])
    if not rows and not front:
        return ""
    heads = ["", "bits", "loss", "confirm", "bits", "loss", "confirm", "loss"]
    groups = (("uniform", 4), ("best searched with no more bits", 3), ("change", 1))
    parts = ['<section id="comparison">\n<h2>Uniform and searched configurations</h2>']
    note = 'Loss in nats/token; "confirm" is measured on windows held out of the search'
    note += ", which --refine looked at too." if run.settings.get("refine") else "."
    parts.append(f'<p class="caption">{note}</p>')
    none = '<p class="omitted">No uniform configuration was evaluated.</p>'
    parts.append(table(heads, rows, groups=groups) if rows else none)
    if front:
        parts.append(_front_table(front))
    return "\n".join([*parts, "</section>"])


def _front_table(front: Sequence[Mapping[str, Any]]) -> str:
    """Every point of the front, folded away; a column without a value is left out."""
    heads = ["bits", "loss", "confirm", "predicted", "linears"]
    lines = []
    for row in front:
        counts = count_formats((row.get("configuration") or {}).values())
        lines.append([*_losses(row), show_loss(number(row.get("predicted"))), counts or "–"])
    kept = [i for i in range(len(heads)) if any(line[i] != "–" for line in lines)]
    rows = [[line[i] for i in kept] for line in lines]
    body = table([heads[i] for i in kept], rows, text_columns=[k for k, i in enumerate(kept) if i == len(heads) - 1])
    return f"<details><summary>All {len(front)} points of the front</summary>{body}</details>"


def _losses(row: Mapping[str, Any]) -> list[str]:
    shown = (number(row.get("loss")), number(row.get("loss_confirm")))
    return [show_bits(number(row.get("bits_per_weight"))), *map(show_loss, shown)]


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    text_columns: Sequence[int] = (0,),
    last_strong: bool = False,
    groups: Sequence[tuple[str, int]] = (),
) -> str:
    """A table that scrolls sideways, right-aligned except `text_columns`; `groups`: (heading, columns) above."""
    kind = [' class="text"' if i in text_columns else "" for i in range(len(heads))]
    above = "".join(f'<th class="group" colspan="{columns}">{escape(text)}</th>' for text, columns in groups)
    above = f"<tr>{above}</tr>" if groups else ""
    head = "".join(f"<th{k}>{escape(text)}</th>" for k, text in zip(kind, heads, strict=True))
    lines = []
    for i, row in enumerate(rows):
        mark = ' class="strong"' if last_strong and i == len(rows) - 1 else ""
        cells = "".join(f"<td{k}>{escape(text)}</td>" for k, text in zip(kind, row, strict=True))
        lines.append(f"<tr{mark}>{cells}</tr>")
    body = f"<thead>{above}<tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def memory_table(data: MemoryData) -> str:
    """The breakdown behind the memory bars, with the total last."""
    total = data.total or 1
    rows: list[list[str]] = []
    for name, now, full, note in data.items:
        label = f"{name} ({note})" if note else name
        rows.append([label, show_bytes(now), _share(now / total), show_bytes(full) if full else "–"])
    rows.append(["total", show_bytes(data.total), "100 %", show_bytes(data.total_16)])
    heads = ["part", "bytes", "share", "at 16 bits"]
    if not data.compared:
        heads, rows = heads[:3], [row[:3] for row in rows]
    return table(heads, rows, last_strong=True)


def _change(ours: float | None, theirs: float | None) -> str:
    if ours is None or not theirs:
        return "–"
    percent = round(100 * (ours / theirs - 1))
    return f"{percent:+d} %".replace("-", "−") if percent else "0 %"


def _share(part: float) -> str:
    return f"{100 * part:.0f} %" if part == 0 or part >= 0.01 else "< 1 %"


def _settings(run: Run) -> str:
    """Everything needed to repeat the run, folded away."""
    model = {key: value for key, value in child(run.run, "model").items()}
    keys = ("settings", "calibration", "versions", "machine", "timings", "evaluations")
    groups = [("Model", model), *((key.capitalize(), child(run.run, key)) for key in keys)]
    if child(run.run, "pinned"):
        groups.append(("Pinned linears", child(run.run, "pinned")))
    if child(run.front, "fit"):
        groups.append(("Fit", child(run.front, "fit")))
    parts = []
    for heading, values in groups:
        lines = "".join(
            f'<tr><td class="text">{escape(key)}</td><td class="value">{escape(_plain(value))}</td></tr>'
            for key, value in values.items()
        )
        if lines:
            parts.append(f"<h3>{escape(heading)}</h3><table><tbody>{lines}</tbody></table>")
    return f"<section><details><summary>Settings, versions, machine</summary>{''.join(parts)}</details></section>"


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
