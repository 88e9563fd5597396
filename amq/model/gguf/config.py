"""The config of a GGUF file for transformers, made key by key: what the file says is translated or refused.

transformers' own reader takes the keys that it knows and leaves the rest, so that a model can come out with another
attention scale, window or rotary scaling, silently. Here a family's `read` (`amq.model.gguf.families`) makes a config
of the keys and of the shapes of tensors, and then the keys are made anew of that config, as an export makes them: where
the file says otherwise, it contradicts itself or has what no config can say, and is refused by the key. So is a key
that neither took part in this nor is neutral. Sizes are bounded before a model is built of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from amq.errors import AmqError
from amq.model.gguf.families import READ_ONLY, Family, check_family, family_of_file, keys_of, readable
from amq.model.gguf.file import GgufFile, Strings
from amq.model.gguf.file_keys import FileKeys, Read, shown
from amq.model.gguf.rope import Rope, read_rope, rope_parameters
from amq.model.shape import FULL

EPSILON_KEYS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "expert_count": (0,), "expert_used_count": (0,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,),
    "attention.causal": (True,), "pooling_type": (0,), "attention.sliding_window": (0,), "tensor_data_layout": (),
    "logit_scale": (0,), "rope.scaling.finetuned": (), "expert_group_count": (0, 1), "expert_group_used_count": (0, 1),
    "expert_shared_count": (), "expert_weights_scale": (0, 1), "residual_scale": (0,), "embedding_scale": (0,),
    "nextn_predict_layers": (0,),
}  # fmt: skip
"""Keys that change nothing: at these values, or at any where none is named."""
TURNS = "rope.scaling.finetuned"
"""Of granitehybrid: whether positions turn anything."""
TOKEN_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
STACK = re.compile(r"blk\.\d+\.(ffn_(gate|up|gate_up|down)_exps|ffn_gate_inp)\.weight")
"""Tensors whose first dimension is the number of experts."""


@dataclass(frozen=True)
class Translation:
    """values: of the config for transformers. rope: what the file says of rotary positions, None where nothing turns.

    layers: of the decoder; blocks beyond predict further tokens.
    """

    model_type: str
    family: Family
    values: Mapping[str, Any]
    rope: Rope | None
    layers: int


def family_of(file: GgufFile) -> tuple[str, Family] | None:
    """(model_type, family) of a file that is translated here; None of another architecture."""
    mixture = any(STACK.fullmatch(tensor.name) for tensor in file.tensors)
    found = family_of_file(file.architecture, mixture, FileKeys(file).has)
    if found is None and file.architecture in readable():
        raise AmqError(f"{file.path} has {'' if mixture else 'no '}tensors of experts, unlike a {file.architecture}")
    return found


def translate(file: GgufFile, factors: Mapping[str, np.ndarray]) -> Translation:
    """The config of a file with a `family_of`; factors: see `Rope`. Raises AmqError naming what has no equal."""
    keys, shapes = FileKeys(file), {tensor.name: tensor.shape for tensor in file.tensors}
    found = family_of(file)
    assert found is not None
    model_type, family = found
    _check_experts(keys, shapes)
    read = _sizes(keys, family, shapes)
    values, head_dim = read.values, read.values["head_dim"]
    rope = read_rope(_rope_taker(keys), head_dim, values["max_position_embeddings"], factors)
    try:
        values["rope_parameters"] = rope_parameters(rope)
    except AmqError as error:
        raise AmqError(f"{file.path}: {error}") from None
    if family.partial:
        for part in (values, values["rope_parameters"]):
            part["partial_rotary_factor"] = rope.dims / head_dim
    family.read(keys, read)
    if not family.head_dim and head_dim * values["num_attention_heads"] == values["hidden_size"]:
        values.pop("head_dim", None)
    for key, name in (("attention.head_count_kv", "num_key_value_heads"), ("feed_forward_length", "intermediate_size")):
        if name not in values:
            raise AmqError(f"{file.path}: {file.architecture}.{key} differs from block to block, not supported")
    _check_rope(keys, family, values)
    agreed = set() if model_type in READ_ONLY else _check_keys(keys, model_type, family, read)
    _refuse_untaken(keys, agreed, head_dim)
    return Translation(model_type, family, values, rope if "rope_parameters" in values else None, read.layers)


def _check_experts(keys: FileKeys, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises AmqError where keys say other numbers of experts than the tensors have."""
    count, used = keys.take("expert_count", 0, int), keys.take("expert_used_count", 0, int)
    stacks = {name: shape for name, shape in shapes.items() if STACK.fullmatch(name)}
    for name, shape in stacks.items():
        if shape[0] != count:
            raise keys.error("expert_count", f"{shape[0]}, the experts in the tensor {name} {list(shape)}", count)
    if count and not stacks:
        raise keys.error("expert_count", "0: the file has no tensors of experts", count)
    if count and not 1 <= used <= count:
        raise keys.error("expert_used_count", f"1 to {count}, the experts in the tensors", used)
    width = keys.take("expert_feed_forward_length", 0, int)
    for name, shape in stacks.items():
        if width and name.endswith("down_exps.weight") and shape[-1] != width:
            raise keys.error("expert_feed_forward_length", f"{shape[-1]}, as the tensor {name} {list(shape)}", width)
    keys.taken.clear()


def _sizes(keys: FileKeys, family: Family, shapes: Mapping[str, tuple[int, ...]]) -> Read:
    """What all families have."""
    file, architecture = keys.file, keys.architecture
    tokens = file.keys.get("tokenizer.ggml.tokens")
    vocabulary = keys.size("vocab_size", tokens.length if isinstance(tokens, Strings) else None)
    blocks, heads = keys.size("block_count"), keys.size("attention.head_count")
    if blocks > len(file.tensors):
        raise AmqError(
            f"{file.path}: {architecture}.block_count is {blocks}, more than its {len(file.tensors)} tensors"
        )
    further = keys.take("nextn_predict_layers", 0, int)
    if not 0 <= further < blocks:
        raise keys.error("nextn_predict_layers", f"fewer than the {blocks} blocks", further)
    hidden = keys.size("embedding_length")
    head_dim = keys.size("attention.key_length", max(hidden // heads, 1))
    given = [key for key in EPSILON_KEYS if keys.has(key)] or [EPSILON_KEYS[0]]
    values: dict[str, Any] = {
        "max_position_embeddings": keys.size("context_length"),
        "num_hidden_layers": blocks - further,
        "hidden_size": hidden,
        "head_dim": head_dim,
        "num_attention_heads": heads,
        family.epsilon: keys.number(given[0]),
        "vocab_size": vocabulary,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if not keys.varies("attention.head_count_kv"):
        values["num_key_value_heads"] = keys.size("attention.head_count_kv", heads)
    if not keys.varies("feed_forward_length"):
        values["intermediate_size"] = keys.size("feed_forward_length", 1 if family.mixture else None)
    for name, key in TOKEN_IDS.items():  # a class's own default may not even be in the vocabulary
        value = file.keys.get(f"tokenizer.ggml.{key}_token_id")
        known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocabulary
        if known or name != "unk_token_id":
            values[name] = value if known else None
    own_name = file.keys.get("general.name")
    if isinstance(own_name, str):  # as transformers writes it: fingerprints stay
        values["_model_name_or_path"] = own_name
    return Read(values, shapes, blocks - further)


def _rope_taker(keys: FileKeys) -> Callable[..., Any]:
    def take(key: str, default: Any, kind: type = float) -> Any:
        return keys.number(key, default) if kind is float else keys.take(key, default, kind)

    return take


def _check_rope(keys: FileKeys, family: Family, values: Mapping[str, Any]) -> None:
    """Raises AmqError for scaled rotary positions that llama.cpp has not for this family; factors it takes for any."""
    rope = values.get("rope_parameters") or {}
    kind = rope.get(FULL, rope).get("rope_type", "default")
    if kind not in (*family.ropes, "longrope"):
        raise AmqError(
            f"{keys.file.path}: rotary positions of type {kind!r} of a {family.arch} have no equal in transformers, or "
            f"were not compared; expected {', '.join(family.ropes)}"
        )


def _check_keys(keys: FileKeys, model_type: str, family: Family, read: Read) -> set[str]:
    """The names of keys that agree with those of the config that was made; raises AmqError for one that does not."""
    file, config = keys.file, {"model_type": model_type, **_complete(keys, model_type, read)}
    try:
        check_family(config, family)
        made = keys_of(config, family)
    except AmqError as error:
        raise AmqError(f"{file.path}: {error}") from None
    if "rope_parameters" not in read.values:  # nothing turns: what keys say of positions has no effect
        made = {key: value for key, value in made.items() if not key.startswith("rope.") or key == TURNS}
    del made["context_length"]  # which an export of a model with a window, unknown to llama.cpp, cuts
    made["block_count"] += int(file.keys.get(f"{file.architecture}.nextn_predict_layers", 0))
    agreed = set()
    for key, value in made.items():
        name = f"{file.architecture}.{key}"
        if name not in file.keys:
            continue
        if not _agree(file.keys[name], value):
            raise keys.error(key, f"{value} by the other keys and the tensors of this {family.arch}", file.keys[name])
        agreed.add(name)
    return agreed


def _complete(keys: FileKeys, model_type: str, read: Read) -> dict[str, Any]:
    """The config with what its class adds; raises AmqError where that cannot take the values."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type, **read.values)
    except Exception as error:  # a config's own checks raise many types
        raise unbuildable(keys.file, error) from error
    found: dict[str, Any] = config.to_dict()
    return found


def unbuildable(file: GgufFile, error: Exception) -> AmqError:
    return AmqError(f"{file.path}: no model can be built of its keys ({type(error).__name__}: {error})")


def _agree(found: Any, made: Any) -> bool:
    """Whether two values of a key say the same. One value may stand for a list of equal ones; a period for the pattern
    that it makes has been read by then."""
    if isinstance(made, str) or isinstance(found, str):
        return bool(found == made)
    if isinstance(found, np.ndarray) and found.dtype == np.bool_ and not isinstance(made, list):
        return True
    given, expected = np.asarray(found, dtype=np.float64), np.asarray(made, dtype=np.float64)
    if given.ndim and expected.ndim and given.shape != expected.shape:
        return False
    return bool(np.allclose(given, expected, rtol=1e-6, atol=0))


def _refuse_untaken(keys: FileKeys, agreed: set[str], head_dim: int) -> None:
    """Raises AmqError for a key with an effect that no translation took."""
    for name, value in keys.untaken().items():
        key = name.partition(".")[2]
        if name in agreed or (key == "attention.scale" and abs(float(value) * math.sqrt(head_dim) - 1) < 1e-5):
            continue
        if key in NEUTRAL and (not NEUTRAL[key] or (np.ndim(value) == 0 and value in NEUTRAL[key])):
            continue
        if key == "attention.value_length":
            if value == head_dim:
                continue
            raise keys.error(key, f"attention.key_length, {head_dim}: another is not supported", value)
        raise AmqError(
            f"{keys.file.path}: nothing translates the key {name} ({shown(value)}), which may change what the model "
            "computes: use the original safetensors"
        )
