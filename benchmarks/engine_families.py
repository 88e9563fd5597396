"""What the native engine does with each family of models that it knows: `python benchmarks/engine_families.py DIR`.

Exactness, on every tiny model of the tests' table: the largest difference of its logits from transformers' in float32
on the same checkpoint, as a share of the largest logit, and whether 64 tokens that are chosen greedily are the same.
Speed, on a random model of the family's usual shape with fewer layers and a vocabulary of 32,768, beyond the last-level
cache: bytes that a token moves (weights, keys and values, state) per second over the read bandwidth that is measured
between the cases, and tokens/s of four sequences over those of one.

--smoke takes tiny shapes and one tiny model per family: it checks the benchmark and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from decode_bytes import beside_weights, spec_of
from provenance import provenance, write_results
from random_models import Formats, Shape, layers_that_read, small_tokenizer, write_random
from torch import nn

from amq.bench.result import OURS
from amq.bench.run import bench
from amq.bench.settings import BenchSettings
from amq.errors import AmqError
from amq.model.experts import unfuse
from amq.model.open import resolve
from amq.runtime.engine import Segment
from amq.runtime.families import FAMILIES
from amq.runtime.native_engine import NativeEngine, open_native
from amq.util.progress import terminal_progress
from amq.util.settings import parse_size, run_command

TESTS = Path(__file__).resolve().parents[1] / "tests"
SCHEMA = "amq/engine_families/1"
VOCABULARY = 32768
TEXT, PROMPT, NEW = 100, 70, 64
"""Tokens whose logits are compared; of a prompt, and greedily chosen after it. More than a page of the cache."""


def _shape(config: str, layers: int, period: int = 1, patterns: dict[str, tuple[Any, ...]] | None = None,
           source: str = "transformers' default", **options: Any) -> Shape:  # fmt: skip
    return Shape(source, config, layers, {**options, "vocab_size": VOCABULARY}, patterns or {}, period)


SPEED: dict[str, Shape] = {
    "llama": _shape("LlamaConfig", 32, source="Llama-3.1-8B", hidden_size=4096, intermediate_size=14336,
                    num_key_value_heads=8),
    "mistral": _shape("MistralConfig", 32),
    "ministral": _shape("MinistralConfig", 36, source="Ministral-8B", hidden_size=4096, intermediate_size=12288,
                        num_attention_heads=32, num_key_value_heads=8, head_dim=128),
    "ministral3": _shape("Ministral3Config", 34),
    "qwen2": _shape("Qwen2Config", 28, source="Qwen2.5-7B", hidden_size=3584, intermediate_size=18944,
                    num_attention_heads=28, num_key_value_heads=4),
    "qwen3": _shape("Qwen3Config", 36, source="Qwen3-8B", hidden_size=4096, intermediate_size=12288,
                    num_key_value_heads=8),
    "qwen2_moe": _shape("Qwen2MoeConfig", 24),
    "qwen3_moe": _shape("Qwen3MoeConfig", 48, source="Qwen3-30B-A3B", head_dim=128, norm_topk_prob=True),
    "qwen3_next": _shape("Qwen3NextConfig", 48, 4, source="Qwen3-Next-80B-A3B, 128 experts", num_experts=128),
    "qwen3_5_text": _shape("Qwen3_5TextConfig", 32, 4),
    "qwen3_5_moe_text": _shape("Qwen3_5MoeTextConfig", 40, 4, source="transformers' default, 128 experts",
                               num_experts=128),
    "mixtral": _shape("MixtralConfig", 32),
    "olmoe": _shape("OlmoeConfig", 16),
    "olmo2": _shape("Olmo2Config", 32),
    "olmo3": _shape("Olmo3Config", 32, 4),
    "arcee": _shape("ArceeConfig", 32),
    "gemma": _shape("GemmaConfig", 28),
    "gemma2": _shape("Gemma2Config", 26, 2),
    "gemma3_text": _shape("Gemma3TextConfig", 34, 6, source="Gemma-3-4B", hidden_size=2560, intermediate_size=10240),
    "gemma4_text": _shape("Gemma4TextConfig", 36, 12, num_kv_shared_layers=6,
                          vocab_size_per_layer_input=VOCABULARY),
    "gpt_oss": _shape("GptOssConfig", 24, 2, source="gpt-oss-20b", num_local_experts=32),
    "glm4_moe": _shape("Glm4MoeConfig", 46, source="GLM-4.5-Air, 64 experts", head_dim=128, n_routed_experts=64),
    "phi3": _shape("Phi3Config", 32),
    "smollm3": _shape("SmolLM3Config", 36, 4),
    "granite": _shape("GraniteConfig", 32),
    "granitemoehybrid": _shape("GraniteMoeHybridConfig", 32, patterns={"layer_types": ("attention",)},
                               source="attention and experts of Granite 4.0", hidden_size=1536, intermediate_size=512,
                               num_attention_heads=12, num_key_value_heads=4, num_local_experts=64,
                               num_experts_per_tok=8),
    "lfm2": _shape("Lfm2Config", 32, 3, {"layer_types": ("conv", "conv", "full_attention")}),
    "lfm2_moe": _shape("Lfm2MoeConfig", 32, 3, {"layer_types": ("conv", "conv", "full_attention")}),
}  # fmt: skip
"""By `model_type`."""


@dataclass(frozen=True)
class Exact:
    """One tiny model. difference: see above. same: of the tokens chosen greedily, how many until the first other one.
    margin: there, how far the likeliest was ahead of the next, as a share of the largest logit."""

    case: str
    difference: float
    same: int
    margin: float | None = None


def cases() -> dict[str, dict[str, Callable[[], nn.Module]]]:
    """{model_type: {case: makes a tiny model}} of the tests' tables."""
    sys.path.insert(0, str(TESTS))
    helpers = importlib.import_module("helpers")
    found: dict[str, dict[str, Callable[[], nn.Module]]] = {}
    for module in pkgutil.iter_modules(helpers.__path__):
        if module.name.startswith("engine_cases"):
            for name, make in importlib.import_module(f"helpers.{module.name}").CASES.items():
                config = make().config
                found.setdefault(config.get_text_config().model_type, {})[name] = make
    return found


def compare(case: str, model: nn.Module, folder: Path, threads: int | None, new: int) -> Exact:
    """The engine and transformers on one checkpoint, both exact in float32."""
    from helpers.checkpoints import tiny_checkpoint

    from amq.integrations.transformers import AmqConfig

    tiny_checkpoint(model, folder, head="int8", embeddings="int8")
    how = AmqConfig(activations="fp32", backend="reference")
    theirs = type(model).from_pretrained(folder, dtype=torch.float32, quantization_config=how).eval()
    engine = open_native(folder, "fp32", context=PROMPT + NEW, threads=threads)
    tokens = torch.randint(engine.vocab_size, (TEXT,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.inference_mode():
        expected = theirs(torch.tensor([tokens]), use_cache=False).logits[0].float()
        scale = float(expected.abs().max())
        difference = float((engine.all_logits(tokens) - expected).abs().max()) / scale
        return Exact(case, difference, *_same(engine, theirs, tokens[:PROMPT], new, scale))


def _same(engine: NativeEngine, model: Any, tokens: list[int], new: int, scale: float) -> tuple[int, float | None]:
    """(tokens until the two part, margin there); transformers reads the whole text for every token, without a cache."""
    slot = engine.open(tokens, new)
    assert slot is not None
    fed, text = tokens, list(tokens)
    for count in range(new):
        ours = int(engine.forward([Segment(slot, fed)])[0].argmax())
        best = model(torch.tensor([text]), use_cache=False).logits[0, -1].float().topk(2)
        if ours != int(best.indices[0]):
            return count, float(best.values[0] - best.values[1]) / scale
        fed = [ours]
        text.append(ours)
    engine.close(slot)
    return new, None


def measure_speed(folder: Path, model: nn.Module, formats: Formats, args: argparse.Namespace) -> dict[str, Any]:
    """Decode of one sequence and of four; model: without weights."""
    tokenizer = small_tokenizer(args.folder / "tokenizer") if args.smoke else resolve(args.tokenizer)
    write_random(folder, model, formats, tokenizer)
    spec = spec_of(folder)  # raises Unsupported before another engine is measured in its place
    settings = BenchSettings(
        model=str(folder), prompt="0", generate=str(args.generate), batch="1,4", startup=False,
        repetitions=args.repetitions, threads=args.threads,
    )  # fmt: skip
    result = bench(settings, terminal_progress(), provenance=provenance())
    one, four = result.rows
    facts, bandwidth = result.engines[OURS], result.read_bandwidth["memory"].bytes_per_second
    moved = facts.weight_bytes + beside_weights(spec, args.generate // 2)
    return {
        "weight_bytes": facts.weight_bytes, "bytes_per_token": moved, "read_bandwidth": bandwidth,
        "tokens_per_second": one.tokens_per_second,
        "share_of_bandwidth": moved * one.tokens_per_second / bandwidth,
        "four_users": four.tokens_per_second / one.tokens_per_second, "others": [one.others, four.others],
        "banner": facts.description, "warnings": list(result.warnings),
    }  # fmt: skip


def without_weights(model: nn.Module) -> nn.Module:
    """A model of the same config, for --smoke."""
    with torch.device("meta"):
        made = type(model)(model.config)
    unfuse(made)
    return made.eval()


def measure_family(name: str, made: dict[str, Callable[[], nn.Module]], args: argparse.Namespace) -> dict[str, Any]:
    """What the table says of one family; what cannot be had of it is under `left_out`, with the reason."""
    row: dict[str, Any] = {"family": name, "exact": [], "speed": None, "left_out": {}}
    chosen = list(made.items())[: 1 if args.smoke else None] if "exact" in args.parts else []
    for case, make in chosen:
        with tempfile.TemporaryDirectory(dir=args.folder) as work:
            found = compare(case, make(), Path(work) / case, args.threads, 4 if args.smoke else NEW)
        row["exact"].append(asdict(found))
    if "speed" not in args.parts:
        return row
    folder = args.folder / name
    try:
        row["speed"] = _speed(name, made, folder, args)
    except AmqError as error:
        row["left_out"]["speed"] = str(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return row


def _speed(
    name: str, made: dict[str, Callable[[], nn.Module]], folder: Path, args: argparse.Namespace
) -> dict[str, Any]:
    if args.smoke and made:
        return measure_speed(folder, without_weights(next(iter(made.values()))()), Formats(group_size=32), args)
    if name not in SPEED or args.smoke:
        raise AmqError("there is no shape for it")
    shape, formats = SPEED[name], Formats()
    layers = layers_that_read(shape, formats, parse_size(args.least), parse_size(args.most))
    where = {"source": shape.source, "layers": layers, "of_layers": shape.layers}
    return where | measure_speed(folder, shape.model(layers), formats, args)


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown."""
    yield (
        "| family | tiny models | logits differ by at most | greedy texts the same | speed measured on "
        "| MB per token | tokens/s | read bandwidth, GB/s | share of it | four users ÷ one |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        exact, speed = row["exact"], row["speed"]
        worst = f"{max(case['difference'] for case in exact):.1e}" if exact else ""
        same = f"{sum(case['margin'] is None for case in exact)} of {len(exact)}" if exact else ""
        cells = [row["family"], str(len(exact)), worst, same]
        if speed:
            where = (
                f"{speed['source']}, {speed['layers']} of {speed['of_layers']} layers" if "source" in speed else "tiny"
            )
            cells += [
                where,
                f"{speed['bytes_per_token'] / 1e6:.0f}", f"{speed['tokens_per_second']:.1f}",
                f"{speed['read_bandwidth'] / 1e9:.0f}", f"{speed['share_of_bandwidth']:.0%}",
                f"{speed['four_users']:.2f}",
            ]  # fmt: skip
        else:
            cells += [row["left_out"].get("speed", ""), "", "", "", "", ""]
        yield f"| {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="for models, which are removed again")
    parser.add_argument("--only", default="", metavar="LIST", help="families, by model_type (default: all)")
    parser.add_argument("--parts", default="exact,speed", metavar="LIST", help="default exact,speed")
    parser.add_argument("--least", default="400MB", metavar="SIZE", help="that a token reads (default 400MB)")
    parser.add_argument("--most", default="2.5GiB", metavar="SIZE", help="of a model (default 2.5GiB)")
    parser.add_argument("--generate", type=int, default=64, metavar="N")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    parser.add_argument("--threads", type=int, default=None, metavar="N")
    parser.add_argument("--tokenizer", default="smollm2", metavar="MODEL", help="whose tokenizer to copy")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: checks the benchmark, measures nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    args.parts, made, rows = args.parts.split(","), cases(), []
    for name in args.only.split(",") if args.only else list(FAMILIES):
        print(f"{name} …", file=sys.stderr, flush=True)
        rows.append(measure_family(name, made.get(name, {}), args))
        if args.json:  # after every family: a run of all of them takes long
            write_results(args.json, {"schema": SCHEMA, "rows": rows})
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(lambda _: main()))
