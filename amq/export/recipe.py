"""Recipes: a configuration in the words of other quantizers, for people who quantize with those tools themselves.

Only names and formats are used, never weights, so any checkpoint has a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.export.auto_round import LEFT_ALONE
from amq.export.common import outer_weights
from amq.export.gptq import bits, commonest, dynamic_rules
from amq.model.gguf.families import FAMILIES
from amq.util.files import write_json

SUPER_BLOCK = 256
"""Input features of one block of llama.cpp's k-quants: where they do not divide a row, the older types are left."""
TYPES = {
    "int2": ("q2_k", "q4_0", "Q2_K"),
    "int3": ("q3_k", "q4_0", "Q3_K_M"),
    "int4": ("q4_k", "q4_0", "Q4_K_M"),
    "int5": ("q5_k", "q5_0", "Q5_K_M"),
    "int6": ("q6_k", "q8_0", "Q6_K"),
    "int8": ("q8_0", "q8_0", "Q8_0"),
}
"""Format → llama.cpp's type, the type for rows that are not whole super-blocks, and the preset of the whole file."""

TYPES_FILE, LAYER_CONFIG, DYNAMIC = "llama-tensor-types.txt", "autoround-layer-config.json", "gptqmodel-dynamic.json"

LOADING = f"""
## How to use it

These files say which linear gets how many bits. Start each tool from the **original** model, not from this folder.

- `{TYPES_FILE}`: a type per tensor for llama.cpp. Convert the original with `convert_hf_to_gguf.py --outtype f16`,
  then run the command in `llama-quantize.sh`; below 4 bits give it an `--imatrix`.
- `{LAYER_CONFIG}`: for AutoRound, `json.load` it and pass it on: `AutoRound(model, tokenizer, **settings)`, then
  `quantize_and_save("out")`. It is symmetric; add `sym=False` for asymmetric groups.
- `{DYNAMIC}`: for GPTQModel, `QuantizeConfig(**json.load(open("{DYNAMIC}")))`, then `GPTQModel.load(model, config)`,
  `.quantize(texts)` and `.save("out")`. Its `dynamic` rules are regular expressions of module names.
"""


def write(checkpoint: Checkpoint, folder: Path) -> dict[str, Any]:
    """See `amq.export`. Refused: formats without a llama.cpp type, models that llama.cpp does not have."""
    record = checkpoint.record
    lines = tensor_types(checkpoint)
    formats = {name: record.formats[name] for name in record.block_shapes}
    base = commonest(formats)
    head = f"--output-tensor-type {llama_type(record, record.head)} " if record.head else ""
    head += "".join(f"--token-embedding-type {llama_type(record, name)} " for name in record.own_embeddings)
    (folder / TYPES_FILE).write_text("".join(f"{name}={type_}\n" for name, type_ in lines.items()), encoding="utf-8")
    (folder / "llama-quantize.sh").write_text(
        f"llama-quantize --tensor-type-file {TYPES_FILE} {head}model-f16.gguf model-mixed.gguf {TYPES[base][2]}\n",
        encoding="utf-8",
    )
    layers: dict[str, object] = {n: {"bits": bits(f), "group_size": record.group_size} for n, f in formats.items()}
    layers |= dict.fromkeys(record.kept, LEFT_ALONE)
    scheme = {"bits": bits(base), "group_size": record.group_size}
    write_json(folder / LAYER_CONFIG, {**scheme, "sym": True, "layer_config": layers})
    write_json(folder / DYNAMIC, {**scheme, "dynamic": dynamic_rules(record.configuration.formats, base)})
    narrow = sum(shape[1] % SUPER_BLOCK > 0 for shape in record.block_shapes.values())
    facts = {f"{fmt} in llama.cpp": TYPES[fmt][0] for fmt in sorted(set(formats.values()))}
    for name in outer_weights(checkpoint):
        facts[name] = f"{llama_type(record, name)} in llama.cpp; AutoRound and GPTQModel leave it in 16 bits"
    if narrow:
        facts["rows that are not a multiple of 256"] = (
            f"{narrow} linears take q4_0, q5_0 or q8_0 instead, which cost more bits than the configuration counts"
        )
    return facts


def tensor_types(checkpoint: Checkpoint) -> dict[str, str]:
    """{`blk.3.attn_q`: `q3_k`} for every linear: the lines of `llama-quantize --tensor-type-file`."""
    import gguf

    config, record = checkpoint.config, checkpoint.record
    kind = str(config.get("model_type"))
    known = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    arch = known.get(FAMILIES[kind].arch if kind in FAMILIES else kind)
    if arch is None:
        raise AmqError(f"llama.cpp has no architecture for model type {kind!r}: there is no recipe for this model")
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    types = {}
    for linear in (*record.block_shapes, *record.kept):
        name = names.get_name(linear)
        if name is None:
            raise AmqError(f"llama.cpp's {gguf.MODEL_ARCH_NAMES[arch]} has no tensor for {linear}: no recipe for it")
        types[name] = llama_type(record, linear)
    return types


def llama_type(record: QuantizationRecord, linear: str) -> str:
    """llama.cpp's type nearest to the format of `linear`; 16 bits for one that is kept."""
    if linear in record.kept:
        return "f16"
    fmt = record.formats[linear]
    if fmt not in TYPES:
        raise AmqError(f"llama.cpp has no type near {fmt}, which {linear} uses: expected {', '.join(TYPES)}")
    return TYPES[fmt][bool(record.shapes[linear][1] % SUPER_BLOCK)]
