"""Every export in the library it is for, against the dequantized model in plain torch: largest difference of logits.

    python benchmarks/export_matrix.py --work /tmp/exports --python gptqmodel=/tmp/venv/bin/python --json FILE

Each row of `ROWS` quantizes SmolLM2 by rounding to nearest (quickly, and badly: the numbers must agree, not be good),
exports it, and loads it with benchmarks/export_loaders.py under the Python given for the loader. Libraries compute in
fp16; the row `plain torch, fp16` of each checkpoint says what that alone does to the logits.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from provenance import write_results

import amq
from amq.checkpoint.store import open_checkpoint
from amq.configuration import Configuration
from amq.export import export
from amq.model.inventory import take_inventory
from amq.model.open import load_model
from amq.packing import dequantize
from amq.util.files import write_json

GROUP_SIZE = 64
SHARED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Source:
    """A checkpoint: its formats, drawn per linear, or per group of `SHARED` where `tied`; and its zero points."""

    formats: tuple[str, ...]
    zero_points: str
    tied: bool = False


SOURCES = {
    "int4": Source(("int4",), "integer"),
    "int4 symmetric": Source(("int4",), "symmetric"),
    "mixed": Source(("int2", "int3", "int4"), "integer"),
    "mixed symmetric": Source(("int2", "int3", "int4"), "symmetric"),
    "mixed tied symmetric": Source(("int2", "int3", "int4"), "symmetric", tied=True),
    "mixed to int8": Source(("int4", "int5", "int6", "int8"), "integer"),
    "int4 fractional": Source(("int4",), "fractional"),
    "all fractional": Source(("int2", "int3", "int4", "int5", "int6", "int8"), "fractional"),
}

ROWS = [
    ("gptq", "int4", "gptqmodel"),
    ("gptq", "int4 symmetric", "gptqmodel"),
    ("gptq", "mixed", "gptqmodel"),
    ("gptq", "mixed symmetric", "gptqmodel"),
    ("gptq", "int4", "transformers-gptq"),
    ("gptq", "int4 symmetric", "transformers-gptq"),
    ("gptq", "mixed symmetric", "transformers-gptq"),
    ("auto-round", "int4 symmetric", "auto-round"),
    ("auto-round", "mixed tied symmetric", "auto-round"),
    ("auto-round", "mixed", "auto-round"),
    ("auto-round", "mixed to int8", "auto-round"),
    ("auto-round", "int4 symmetric", "auto-round-own-choice"),
    ("auto-round", "mixed tied symmetric", "auto-round-own-choice"),
    ("mlx", "int4 fractional", "mlx-lm"),
    ("mlx", "all fractional", "mlx-lm"),
    ("gguf", "int4 fractional", "llama.cpp"),
    ("gguf", "int4 fractional", "llama.cpp-float32"),
    ("gguf", "all fractional", "llama.cpp"),
    ("gguf", "all fractional", "llama.cpp-float32"),
    ("gguf", "mixed symmetric", "llama.cpp"),
    ("gguf", "mixed symmetric", "llama.cpp-float32"),
]
"""(export, checkpoint of SOURCES, loader of export_loaders.LOADERS)."""

VENV = "python3 -m venv --system-site-packages VENV  # over torch, transformers 5.23, accelerate"
INSTALL = {
    "gptqmodel": "VENV/bin/pip install --no-deps gptqmodel pypcre tokenicer logbar device-smi defuser torchao",
    "transformers-gptq": "as gptqmodel, and VENV/bin/pip install --no-deps optimum",
    "auto-round": "VENV/bin/pip install --no-deps auto-round py-cpuinfo",
    "auto-round-own-choice": "as auto-round, and VENV/bin/pip install --no-deps auto-round-lib",
    "mlx-lm": "VENV/bin/pip install --no-deps mlx mlx-cpu mlx-lm",
    "llama.cpp": "VENV/bin/pip install --no-deps llama-cpp-python diskcache  # compiles llama.cpp, 10 minutes",
    "llama.cpp-float32": "as llama.cpp",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="checkpoints and exports are kept here, and reused")
    parser.add_argument("--python", action="append", default=[], metavar="LOADER=PYTHON")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="text; its first 64 tokens are used")
    parser.add_argument("--loaders", default="", help="only these, of " + ", ".join(INSTALL))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    pythons = dict(entry.split("=", 1) for entry in args.python)
    loaded = load_model("smollm2")
    tokens = loaded.tokenizer(args.text.read_text(encoding="utf-8")[:2000]).input_ids[:64]
    write_json(args.work / "tokens.json", tokens)
    references: dict[str, np.ndarray] = {}
    results = []
    for to, source, loader in ROWS:
        if args.loaders and loader not in args.loaders.split(","):
            continue
        if source not in references:
            make_checkpoint(loaded.model, SOURCES[source], folder_of(args.work, source))
            references[source], half = plain_logits(loaded.model, folder_of(args.work, source), tokens)
            results.append(compare("none", source, "plain torch, fp16", references[source], half))
        results.append(run_row(args.work, to, source, loader, references[source], pythons.get(loader)))
        if args.json:
            write_results(args.json, {"rows": results})
    print(table(results))
    return 0


def folder_of(work: Path, source: str) -> Path:
    return work / source.replace(" ", "-")


def make_checkpoint(model: torch.nn.Module, source: Source, folder: Path) -> None:
    """SmolLM2 rounded to `source`, unless it is there from an earlier run."""
    if folder.exists():
        return
    draw, names = random.Random(0), {}
    for spec in take_inventory(model).linears:
        role = spec.role.rpartition(".")[2]
        group = next((roles for roles in SHARED if source.tied and role in roles), (role,))
        names[spec.name] = f"{spec.block}{group[0]}"
    chosen = {key: draw.choice(source.formats) for key in names.values()}
    configuration = folder.with_suffix(".json")
    Configuration({name: chosen[key] for name, key in names.items()}, GROUP_SIZE).save(configuration)
    amq.quantize(
        "smollm2", str(folder), configuration=str(configuration), method="rtn", zero_points=source.zero_points,
        perplexity="none",
    )  # fmt: skip


def plain_logits(model: torch.nn.Module, folder: Path, tokens: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the checkpoint's weights, folded norms included, in plain torch: in float32, and in fp16."""
    checkpoint = open_checkpoint(folder)
    state = {f"{name}.weight": dequantize(checkpoint.packed(name)) for name in checkpoint.record.formats}
    state |= {name: checkpoint.tensor(name) for name in checkpoint.other_names}
    with torch.no_grad():
        model.float().load_state_dict(state, strict=False)
        exact = model(torch.tensor([tokens])).logits[0].numpy()
        half = model.half()(torch.tensor([tokens])).logits[0].float().numpy()
        model.float()
    return exact, half


def run_row(work: Path, to: str, source: str, loader: str, reference: np.ndarray, python: str | None) -> dict:
    output = work / f"{source.replace(' ', '-')}.{to}"
    if not output.exists():
        export(folder_of(work, source), to, output)
    if python is None:
        return {"export": to, "checkpoint": source, "loader": loader, "missing": f"{VENV}; {INSTALL[loader]}"}
    saved = work / "logits.npy"
    script = Path(__file__).with_name("export_loaders.py")
    command = [python, str(script), loader, str(output), str(work / "tokens.json"), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=work, timeout=1800)
    if done.returncode:
        reason = (done.stderr.strip() or "no output").splitlines()[-1]
        return {"export": to, "checkpoint": source, "loader": loader, "failed": reason}
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    return compare(to, source, loader, reference, np.load(saved)) | facts


def compare(to: str, source: str, loader: str, reference: np.ndarray, logits: np.ndarray) -> dict:
    difference = float(np.abs(logits - reference).max())
    return {
        "export": to, "checkpoint": source, "loader": loader, "max_difference": difference,
        "relative": difference / float(np.abs(reference).max()),
        "top1_agreement": float((logits.argmax(-1) == reference.argmax(-1)).mean()),
    }  # fmt: skip


def table(results: list[dict]) -> str:
    lines = [
        "| export | checkpoint | loader | max difference | of the largest logit | top-1 |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        start = f"| {r['export']} | {r['checkpoint']} | {r['loader']} {r.get('version', '')} |"
        if "max_difference" in r:
            lines.append(f"{start} {r['max_difference']:.4f} | {r['relative']:.2%} | {r['top1_agreement']:.0%} |")
        else:
            lines.append(f"{start} {r.get('missing') or 'fails: ' + r['failed']} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
