"""What llama.cpp makes of each family of models, as data: its name there, its fixed choices, names, changed tensors.

llama.cpp builds a model from its architecture's name and a few keys; everything else is fixed in its code. So a family
is listed with what is `fixed` there: a model whose config says otherwise would be computed as another model, silently,
and is refused. The table serves both directions: an export makes keys and tensors of a config and weights, and a file
that is read gives them back. tests/test_export_gguf_families.py and tests/test_gguf_families.py do both with each; all
ran in llama.cpp beside transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from amq.errors import AmqError
from amq.model.experts import COUNTS
from amq.model.gguf import keys, orders, reading
from amq.model.gguf.file_keys import FileKeys, Read
from amq.model.gguf.keys import Keys
from amq.model.gguf.orders import Config, Numbers
from amq.model.gguf.rope_keys import rope_keys, rope_of
from amq.model.shape import ModelShape, head_dim, kv_heads, need, said, size


@dataclass(frozen=True)
class Change:
    """A tensor that llama.cpp has in another form.

    name: a regular expression, searched for in its name. numbers: how they differ; None for not at all.
    rename: (what, by what) in the name before it is looked up, "" for none. place: what stands for `name` in the file,
    where gguf's table of names lacks it.
    rows: int64 [rows] of their number, which row of the checkpoint's comes next. blocks: the same for input features,
    in blocks of 32, so that packed weights can move. split: a change per part, which are tensors of their own.
    """

    name: str
    numbers: Numbers | None = None
    rename: tuple[str, str] = ("", "")
    place: str = ""
    rows: Callable[[Config, int], Tensor] | None = None
    blocks: Callable[[Config], Tensor] | None = None
    split: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    arch: llama.cpp's name, which `arch_of` may say better.
    activation: the one in its code. fixed: {key of config.json: values that its code computes; None where unsaid}.
    keys: those below the architecture's name that it needs besides the common ones. read: the way back, which puts
    into a config what those keys and the shapes of tensors say.
    unused: whether a tensor of that name in a file of that config is one that llama.cpp reads and never multiplies by.
    check: raises AmqError for what `fixed` cannot say. windows: whether it knows sliding windows; else the context ends
    with them. ropes: kinds of rotary scaling that were compared. turned: whether positions turn anything.
    mixture: whether its models have experts; None for either. told_by: a key that tells its files from others of the
    same architecture.
    epsilon, head_dim, partial: how its configs name the norm's ε, and whether they always say a head's width and how
    much of it turns.
    """

    arch: str
    activation: str = "silu"
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    keys: Callable[[Config], Keys] = lambda config: {}
    read: Callable[[FileKeys, Read], None] = lambda keys, read: None
    unused: Callable[[Config, str], bool] = lambda config, name: False
    check: Callable[[Config], None] = lambda config: None
    changes: tuple[Change, ...] = ()
    arch_of: Callable[[Config], str] | None = None
    windows: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")
    turned: bool = True
    mixture: bool | None = False
    told_by: str = ""
    epsilon: str = "rms_norm_eps"
    head_dim: bool = True
    partial: bool = False


def find_family(config: Config) -> Family:
    """Of a model that llama.cpp computes as transformers does; raises AmqError for any other."""
    kind = config.get("model_type")
    dense = FAMILIES.get(f"{kind}{DENSE}") if not size(config, *COUNTS) else None
    family = dense or FAMILIES.get(str(kind))
    if family is None:
        raise AmqError(f"the gguf export knows the model types {', '.join(FAMILIES)}; this model is {kind!r}")
    if (rope := rope_of(config).kind) not in family.ropes:
        raise AmqError(f"llama.cpp has no rotary positions of type {rope!r} for {kind}, or they were not compared")
    check_family(config, family)
    return replace(family, arch=family.arch_of(config)) if family.arch_of else family


def check_family(config: Config, family: Family) -> None:
    """Raises AmqError for a model that llama.cpp computes otherwise than transformers."""
    kind = config.get("model_type")
    if (activation := said(config, *ACTIVATIONS) or family.activation) != family.activation:
        raise AmqError(
            f"llama.cpp computes {kind} with the activation {family.activation}; this model has {activation!r}"
        )
    for key, values in family.fixed.items():
        if (value := config.get(key)) not in values:
            expected = " or ".join(map(repr, values))
            raise AmqError(f"llama.cpp computes {kind} with {key} {expected}; this model has {value!r}")
    family.check(config)


def family_of_file(arch: str, mixture: bool, has: Callable[[str], bool]) -> tuple[str, Family] | None:
    """(model_type, family) of a file of llama.cpp's architecture `arch`, with experts or without, which has a key or
    not; None where none is known."""
    for kind, family in (*FAMILIES.items(), *READ_ONLY.items()):
        known = arch in (family.arch, *ARCHS.get(kind, ())) and family.mixture in (None, mixture)
        if known and (not family.told_by or has(family.told_by)):
            return kind.removesuffix(DENSE), replace(family, arch=arch)
    return None


def readable() -> list[str]:
    """llama.cpp's names of the architectures whose files are read by this table."""
    found = [(family.arch, *ARCHS.get(kind, ())) for kind, family in (*FAMILIES.items(), *READ_ONLY.items())]
    return sorted({arch for archs in found for arch in archs})


EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_epsilon")


def keys_of(config: Config, family: Family) -> Keys:
    """{key below the architecture's name: value}: all that a file says of a config."""
    window = None if family.windows else ModelShape.of(config).window
    context = need(config, "max_position_embeddings")
    found: Keys = {
        "block_count": keys.n_layers(config),
        "context_length": min(context, window) if window else context,
        "embedding_length": need(config, "hidden_size"),
        "attention.head_count": need(config, "num_attention_heads"),
        "attention.head_count_kv": kv_heads(config),
        "attention.key_length": head_dim(config),
        "attention.value_length": head_dim(config),
        "attention.layer_norm_rms_epsilon": float(said(config, *EPSILONS)),
        "vocab_size": need(config, "vocab_size"),
    }
    if width := size(config, "intermediate_size"):
        found["feed_forward_length"] = width
    return {**found, **rope_keys(config), **family.keys(config)}


def _parts(what: str, *by: str) -> tuple[Change, ...]:
    """Of equal size, each under a name of its own."""
    return tuple(Change("", rename=(what, name), rows=orders.part_of(i, len(by))) for i, name in enumerate(by))


ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
MOE_NAMES = Change(r"\.block_sparse_moe\.", rename=("block_sparse_moe", "mlp"))
ROUTER = Change(r"\.mlp\.router\.weight|\.block_sparse_moe\.router\.weight", rename=("router", "gate"))
SCORES = Change(r"e_score_correction_bias$", rename=("e_score_correction_bias", "e_score_correction.bias"))
STATISTICS = Change(
    r"moe_statics\.e_score_correction_bias$",
    orders.VECTOR,
    rename=("gate.moe_statics.e_score_correction_bias", "moe_statics.e_score_correction.bias"),
)
SINKS = Change(r"\.sinks$", rename=("sinks", "sinks.weight"))
SHORT_CONV = Change(r"\.conv\.conv\.weight$", orders.FLAT_KERNEL)
EXPERT_BIAS = Change(r"\.expert_bias$", rename=("expert_bias", "expert_bias.bias"))
SHARED_GATE = Change(r"\.shared_expert_gate\.weight$", orders.VECTOR)
LARGER_NORMS = Change(r"norm\.weight$", orders.PLUS_ONE)
TURNED = (Change(r"\.q_proj\.", rows=orders.query_rows), Change(r"\.k_proj\.", rows=orders.key_rows))
"""llama.cpp's rotary positions turn neighbouring rows where transformers turns rows half a head apart."""
DELTA_NORMS = Change(r"(?<!linear_attn\.)norm\.weight$", orders.PLUS_ONE)
DT_BIAS = Change(r"\.dt_bias$", rename=("dt_bias", "dt_proj.bias"))
KERNEL = Change(r"\.conv1d\.weight$", orders.FLAT_KERNEL)
DELTA = (
    DELTA_NORMS,
    Change(r"\.A_log$", orders.MINUS_EXP, rows=orders.value_rows),
    replace(DT_BIAS, rows=orders.value_rows),
    replace(KERNEL, rows=orders.query_key_value_rows),
    Change(r"\.in_proj_qkv\.", rows=orders.query_key_value_rows),
    Change(r"\.in_proj_[zab]\.", rows=orders.value_rows),
    Change(r"\.linear_attn\.out_proj\.", blocks=orders.value_blocks),
    SHARED_GATE,
)
JOINT_DELTA = (
    DELTA_NORMS,
    Change(r"\.A_log$", orders.MINUS_EXP),
    DT_BIAS,
    KERNEL,
    Change(r"\.in_proj_qkvz\.", split=(
        Change("", rename=("in_proj_qkvz", "in_proj_qkv"), rows=orders.joint_query_key_value),
        Change("", rename=("in_proj_qkvz", "in_proj_z"), rows=orders.joint_gate),
    )),
    SHARED_GATE,
)  # fmt: skip
MAMBA = (
    Change(r"\.A_log$", orders.COLUMN_OF_MINUS_EXP),
    Change(r"\.D$", orders.COLUMN),
    DT_BIAS,
    KERNEL,
    Change(r"\.(mamba|mixer)\.norm\.weight$", orders.GROUPED_NORM),
)
GEMMA4 = (
    Change(r"\.layer_scalar$", rename=("layer_scalar", "layer_scalar.weight")),
    Change(r"\.router\.scale$", rename=("router.scale", "router.proj.scale")),
    Change(r"\.router\.per_expert_scale$", rename=("router.per_expert_scale", "experts.down_proj.scale")),
    Change(r".*\.layers\.(\d+)\.experts\.(gate|up)_proj\.", place=r"blk.\1.ffn_\2_exps."),
)
SHARED_MLP = r"shared_mlp.input_linear"
FUSED = Change(SHARED_MLP, split=_parts(SHARED_MLP, "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"))
FUSED_ALONE = Change(SHARED_MLP, split=_parts(SHARED_MLP, "mlp.gate_proj", "mlp.up_proj"))
DOWN_ALONE = Change(r"shared_mlp\.output_linear", rename=("shared_mlp.output_linear", "mlp.down_proj"))
DENSE = ", dense"
"""Behind the model_type of a family without experts, where that differs in more than keys."""
EXPERTS_OF_MIXER = r"\.mixer\.(experts|gate|shared_experts)\."
MIXER = Change(EXPERTS_OF_MIXER, rename=(".mixer.", ".mlp."))
BACKBONE = Change(rf"^model\.layers\.(?!.*{EXPERTS_OF_MIXER})", rename=("model.layers", "backbone.layers"))
LLAMA = Family("llama", ropes=("default", "linear", "llama3", "yarn"), keys=keys.mixtral, read=reading.llama,
               changes=TURNED)  # fmt: skip
ONE_GROUP = {"n_group": (1, None), "topk_group": (1, None)}
GELU = "gelu_pytorch_tanh"
PLAIN_ROPE = ("default", "linear")
ARCHS = {"nemotron_h": ("nemotron_h_moe",), "mistral": ("mistral3",)}
"""{model_type: names besides `Family.arch` that its files have}."""

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "ministral3": Family("mistral3", ropes=("yarn",), keys=keys.ministral, read=reading.ministral,
                         check=keys.ministral_check, changes=TURNED, told_by="attention.temperature_scale"),
    "mistral": replace(LLAMA, read=reading.mistral),
    "mixtral": replace(LLAMA, mixture=True, read=reading.mixtral),
    "qwen2": Family("qwen2", head_dim=False),
    "qwen3": Family("qwen3", read=reading.attention_bias),
    "qwen2_moe": Family("qwen2moe", fixed={"norm_topk_prob": (False,)}, keys=keys.qwen2_moe, read=reading.qwen2_moe,
                        check=keys.all_sparse, changes=(SHARED_GATE,), mixture=True, head_dim=False),
    "qwen3_moe": Family("qwen3moe", fixed={"norm_topk_prob": (True,)}, keys=keys.experts, read=reading.qwen3_moe,
                        check=keys.all_sparse, mixture=True, head_dim=False),
    "qwen3_next": Family("qwen3next", fixed={"norm_topk_prob": (True,)}, keys=keys.joint_delta,
                         read=reading.joint_delta, check=keys.joint_delta_check, changes=JOINT_DELTA,
                         ropes=PLAIN_ROPE, mixture=True),
    "olmoe": Family("olmoe", fixed={"norm_topk_prob": (False,), "clip_qkv": (None,)}, keys=keys.mixtral,
                    read=reading.mixtral, check=keys.all_heads, mixture=True, head_dim=False),
    "gpt_oss": Family("gpt-oss", keys=keys.gpt_oss, read=reading.gpt_oss, check=keys.alternates, windows=True,
                      changes=(SINKS,), mixture=True),
    "gemma2": Family("gemma2", activation=GELU, keys=keys.gemma2, read=reading.gemma2, check=keys.gemma2_check,
                     changes=(LARGER_NORMS,), windows=True, ropes=PLAIN_ROPE),
    "gemma3_text": Family("gemma3", activation=GELU, keys=keys.gemma3, read=reading.gemma3, check=keys.gemma3_check,
                          changes=(LARGER_NORMS,), windows=True, ropes=PLAIN_ROPE,
                          fixed={"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)}),
    "gemma4_text": Family("gemma4", activation=GELU, keys=keys.gemma4, read=reading.gemma4, check=keys.gemma4_check,
                          unused=reading.gemma4_unused,
                          changes=GEMMA4, windows=True, ropes=("proportional",), mixture=None,
                          fixed={"attention_bias": (False, None),
                                 "use_bidirectional_attention": (None, "vision")}),
    "phi3": Family("phi3", ropes=("default", "longrope"), read=reading.phi3, head_dim=False, partial=True),
    "smollm3": Family("smollm3", check=keys.no_rope, read=reading.attention_bias, changes=TURNED, head_dim=False),
    "olmo2": Family("olmo2", head_dim=False),
    "granite": Family("granite", keys=keys.granite, read=reading.granite, changes=TURNED, head_dim=False),
    "granitemoe": Family("granitemoe", keys=keys.granite_moe, read=reading.granite_moe,
                         changes=(*TURNED, ROUTER, MOE_NAMES), mixture=True, head_dim=False),
    "glm4_moe": Family("glm4moe", keys=keys.shared, read=reading.glm4_moe, fixed=ONE_GROUP, changes=(SCORES,),
                       mixture=True),
    "qwen3_5_text": Family("qwen35", keys=keys.delta, read=reading.delta, check=keys.delta_check, changes=DELTA,
                           ropes=PLAIN_ROPE),
    "qwen3_5_moe_text": Family("qwen35moe", keys=keys.delta_moe, read=reading.delta_moe, check=keys.delta_check,
                               changes=DELTA, ropes=PLAIN_ROPE, mixture=True),
    "deepseek_v3": Family("deepseek2", keys=keys.deepseek, read=reading.deepseek, changes=(SCORES,), ropes=PLAIN_ROPE,
                          fixed={**ONE_GROUP, "rope_interleave": (True, None)}, mixture=True, head_dim=False),
    f"granitemoehybrid{DENSE}": Family("granitehybrid", keys=keys.granite_hybrid, read=reading.granite_hybrid,
                                       check=keys.granite_check, changes=(*TURNED, FUSED_ALONE, DOWN_ALONE, *MAMBA),
                                       head_dim=False),
    "granitemoehybrid": Family("granitehybrid", keys=keys.granite_hybrid, read=reading.granite_hybrid,
                               check=keys.granite_check, changes=(*TURNED, ROUTER, MOE_NAMES, FUSED, *MAMBA),
                               mixture=True, head_dim=False),
    "nemotron_h": Family("nemotron_h", activation="relu2", keys=keys.nemotron, read=reading.nemotron_h,
                         check=keys.nemotron_check, arch_of=keys.nemotron_arch, turned=False, mixture=None,
                         epsilon="layer_norm_epsilon", changes=(BACKBONE, MIXER, SCORES, *MAMBA)),
    "ernie4_5": Family("ernie4_5", read=reading.ernie),
    "ernie4_5_moe": Family("ernie4_5-moe", keys=keys.ernie_moe, read=reading.ernie_moe, check=keys.ernie_moe_check,
                           changes=(STATISTICS,), mixture=True),
    "lfm2": Family("lfm2", keys=keys.lfm2, read=reading.lfm2, changes=(SHORT_CONV,), epsilon="norm_eps",
                   head_dim=False),
    "lfm2_moe": Family("lfm2moe", keys=keys.lfm2_moe, read=reading.lfm2_moe, changes=(SHORT_CONV, EXPERT_BIAS),
                       fixed={"norm_topk_prob": (True,), "routed_scaling_factor": (1.0, None),
                              "tie_word_embeddings": (True,)},
                       epsilon="norm_eps", mixture=True, head_dim=False),
}  # fmt: skip
"""{model_type: family}."""

READ_ONLY: dict[str, Family] = {
    "stablelm": Family("stablelm", read=reading.stablelm, epsilon="layer_norm_eps", head_dim=False, partial=True),
    "starcoder2": Family("starcoder2", read=reading.starcoder2, epsilon="norm_epsilon", head_dim=False),
    "nemotron": Family("nemotron", changes=(LARGER_NORMS,), epsilon="norm_eps", partial=True),
}
"""{model_type: family} of files that are read; no export writes them."""
