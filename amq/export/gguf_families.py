"""What llama.cpp makes of each family of models, as data: its name there, its fixed choices, names, changed tensors.

llama.cpp builds a model from its architecture's name and a few keys; everything else is fixed in its code. So a family
is listed with what is `fixed` there: a model whose config says otherwise would be computed as another model, silently,
and is refused. tests/test_export_gguf_families.py exports each; all of them ran in llama.cpp beside transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from amq.errors import AmqError
from amq.export import gguf_keys as keys
from amq.export.gguf_keys import Config, Keys
from amq.export.gguf_rope import rope_of
from amq.model.experts import COUNTS
from amq.model.shape import said, size


@dataclass(frozen=True)
class Change:
    """A tensor that llama.cpp has in another form.

    name: a regular expression, searched for in its name. make: of what the checkpoint has; None keeps the tensor.
    rename: (what, by what) in the name before it is looked up, "" for none.
    rows: int64 [rows] of their number, which row of the checkpoint's comes next. blocks: the same for input features,
    in blocks of 32, so that packed weights can move. split: renames of parts of equal size, which follow one another.
    """

    name: str
    make: Callable[[Tensor, Config], Tensor] | None = None
    rename: tuple[str, str] = ("", "")
    rows: Callable[[Config, int], Tensor] | None = None
    blocks: Callable[[Config], Tensor] | None = None
    split: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Family:
    """Models of one `model_type`.

    arch: llama.cpp's name, which `arch_of` may say better.
    activation: the one in its code. fixed: {key of config.json: values that its code computes; None where unsaid}.
    keys: those below the architecture's name that it needs besides the common ones.
    check: raises AmqError for what `fixed` cannot say. windows: whether it knows sliding windows; else the context ends
    with them. ropes: kinds of rotary scaling that were compared.
    """

    arch: str
    activation: str = "silu"
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    keys: Callable[[Config], Keys] = lambda config: {}
    check: Callable[[Config], None] = lambda config: None
    changes: tuple[Change, ...] = ()
    arch_of: Callable[[Config], str] | None = None
    windows: bool = False
    ropes: tuple[str, ...] = ("default", "linear", "yarn")


def find_family(config: Config) -> Family:
    """Of a model that llama.cpp computes as transformers does; raises AmqError for any other."""
    kind = config.get("model_type")
    dense = FAMILIES.get(f"{kind}{DENSE}") if not size(config, *COUNTS) else None
    family = dense or FAMILIES.get(str(kind))
    if family is None:
        reason = f": {REFUSED[str(kind)]}" if str(kind) in REFUSED else ""
        raise AmqError(f"the gguf export knows the model types {', '.join(FAMILIES)}; this model is {kind!r}{reason}")
    if (rope := rope_of(config).kind) not in family.ropes:
        raise AmqError(f"the gguf export cannot write rotary positions of type {rope!r} for {kind}")
    if (activation := said(config, *ACTIVATIONS) or family.activation) != family.activation:
        raise AmqError(
            f"llama.cpp computes {kind} with the activation {family.activation}; this model has {activation!r}"
        )
    for key, values in family.fixed.items():
        if (value := config.get(key)) not in values:
            expected = " or ".join(map(repr, values))
            raise AmqError(f"llama.cpp computes {kind} with {key} {expected}; this model has {value!r}")
    family.check(config)
    return replace(family, arch=family.arch_of(config)) if family.arch_of else family


ACTIVATIONS = ("hidden_act", "hidden_activation", "mlp_hidden_act")
MOE_NAMES = Change(r"\.block_sparse_moe\.", rename=("block_sparse_moe", "mlp"))
ROUTER = Change(r"\.mlp\.router\.weight|\.block_sparse_moe\.router\.weight", rename=("router", "gate"))
SCORES = Change(r"e_score_correction_bias$", rename=("e_score_correction_bias", "e_score_correction.bias"))
SINKS = Change(r"\.sinks$", rename=("sinks", "sinks.weight"))
SHORT_CONV = Change(r"\.conv\.conv\.weight$", keys.flat_kernel)
EXPERT_BIAS = Change(r"\.expert_bias$", rename=("expert_bias", "expert_bias.bias"))
SHARED_GATE = Change(r"\.shared_expert_gate\.weight$", keys.vector)
GEMMA_NORMS = Change(r"norm\.weight$", keys.plus_one)
TURNED = (Change(r"\.q_proj\.", rows=keys.query_rows), Change(r"\.k_proj\.", rows=keys.key_rows))
"""llama.cpp's rotary positions turn neighbouring rows where transformers turns rows half a head apart."""
DELTA = (
    Change(r"(?<!linear_attn\.)norm\.weight$", keys.plus_one),
    Change(r"\.A_log$", keys.minus_exp, rows=keys.value_rows),
    Change(r"\.dt_bias$", rename=("dt_bias", "dt_proj.bias"), rows=keys.value_rows),
    Change(r"\.conv1d\.weight$", keys.flat_kernel, rows=keys.query_key_value_rows),
    Change(r"\.in_proj_qkv\.", rows=keys.query_key_value_rows),
    Change(r"\.in_proj_[zab]\.", rows=keys.value_rows),
    Change(r"\.linear_attn\.out_proj\.", blocks=keys.value_blocks),
    SHARED_GATE,
)
MAMBA = (
    Change(r"\.A_log$", keys.column_of_minus_exp),
    Change(r"\.D$", keys.column),
    Change(r"\.dt_bias$", rename=("dt_bias", "dt_proj.bias")),
    Change(r"\.conv1d\.weight$", keys.flat_kernel),
    Change(r"\.(mamba|mixer)\.norm\.weight$", keys.grouped_norm),
)
SHARED_MLP = r"shared_mlp.input_linear"
FUSED = Change(SHARED_MLP, split=tuple((SHARED_MLP, f"mlp.shared_expert.{role}_proj") for role in ("gate", "up")))
FUSED_ALONE = Change(SHARED_MLP, split=tuple((SHARED_MLP, f"mlp.{role}_proj") for role in ("gate", "up")))
DOWN_ALONE = Change(r"shared_mlp\.output_linear", rename=("shared_mlp.output_linear", "mlp.down_proj"))
DENSE = ", dense"
"""Behind the model_type of a family without experts, where that differs in more than keys."""
EXPERTS_OF_MIXER = r"\.mixer\.(experts|gate|shared_experts)\."
MIXER = Change(EXPERTS_OF_MIXER, rename=(".mixer.", ".mlp."))
BACKBONE = Change(rf"^model\.layers\.(?!.*{EXPERTS_OF_MIXER})", rename=("model.layers", "backbone.layers"))
LLAMA = Family("llama", ropes=("default", "linear", "llama3", "yarn"), keys=keys.mixtral, changes=TURNED)
ONE_GROUP = {"n_group": (1, None), "topk_group": (1, None)}
GELU = "gelu_pytorch_tanh"
PLAIN_ROPE = ("default", "linear")

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "qwen2_moe": Family("qwen2moe", fixed={"norm_topk_prob": (False,)}, keys=keys.qwen2_moe, check=keys.all_sparse,
                        changes=(SHARED_GATE,)),
    "qwen3_moe": Family("qwen3moe", fixed={"norm_topk_prob": (True,)}, keys=keys.experts, check=keys.all_sparse),
    "olmoe": Family("olmoe", fixed={"norm_topk_prob": (False,), "clip_qkv": (None,)},
                    keys=keys.mixtral, check=keys.all_heads),
    "gpt_oss": Family("gpt-oss", keys=keys.gpt_oss, check=keys.alternates, windows=True, changes=(SINKS,)),
    "gemma2": Family("gemma2", activation=GELU, keys=keys.gemma2, check=keys.gemma2_check, changes=(GEMMA_NORMS,),
                     windows=True, ropes=PLAIN_ROPE),
    "gemma3_text": Family("gemma3", activation=GELU, keys=keys.gemma3, check=keys.gemma3_check, changes=(GEMMA_NORMS,),
                          fixed={"final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)},
                          windows=True, ropes=PLAIN_ROPE),
    "phi3": Family("phi3", ropes=("default", "longrope")),
    "smollm3": Family("smollm3", check=keys.no_rope, changes=TURNED),
    "olmo2": Family("olmo2"),
    "granite": Family("granite", keys=keys.granite, changes=TURNED),
    "granitemoe": Family("granitemoe", keys=keys.granite_moe, changes=(*TURNED, ROUTER, MOE_NAMES)),
    "glm4_moe": Family("glm4moe", keys=keys.shared, fixed=ONE_GROUP, changes=(SCORES,)),
    "qwen3_5_text": Family("qwen35", keys=keys.delta, check=keys.delta_check, changes=DELTA, ropes=PLAIN_ROPE),
    "qwen3_5_moe_text": Family("qwen35moe", keys=keys.delta_moe, check=keys.delta_check, changes=DELTA,
                               ropes=PLAIN_ROPE),
    "deepseek_v3": Family("deepseek2", keys=keys.deepseek, changes=(SCORES,), ropes=PLAIN_ROPE,
                          fixed={**ONE_GROUP, "rope_interleave": (True, None)}),
    f"granitemoehybrid{DENSE}": Family("granitehybrid", keys=keys.granite_hybrid, check=keys.granite_check,
                                       changes=(*TURNED, FUSED_ALONE, DOWN_ALONE, *MAMBA)),
    "granitemoehybrid": Family("granitehybrid", keys=keys.granite_hybrid, check=keys.granite_check,
                               changes=(*TURNED, ROUTER, MOE_NAMES, FUSED, *MAMBA)),
    "nemotron_h": Family("nemotron_h", activation="relu2", keys=keys.nemotron, check=keys.nemotron_check,
                         arch_of=keys.nemotron_arch,
                         changes=(BACKBONE, MIXER, SCORES, *MAMBA)),
    "ernie4_5": Family("ernie4_5"),
    "lfm2": Family("lfm2", keys=keys.lfm2, changes=(SHORT_CONV,)),
    "lfm2_moe": Family("lfm2moe", keys=keys.lfm2_moe, changes=(SHORT_CONV, EXPERT_BIAS),
                       fixed={"norm_topk_prob": (True,), "routed_scaling_factor": (1.0, None),
                              "tie_word_embeddings": (True,)}),
}  # fmt: skip
"""{model_type: family}."""

REFUSED: dict[str, str] = {
    "gemma3": "with its vision tower; the text model alone, gemma3_text, can be exported",
}
"""{model_type: why it is not in `FAMILIES`}."""
