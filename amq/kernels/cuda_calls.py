"""kernels/cuda/calls.h in Python: the same structs, field by field, with tensors in the place of addresses.

A `Call` is one struct with the function that takes it and what it holds the addresses of. It is made once and run as
often as wanted: everything that changes from pass to pass lies in the tensors.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_float, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

import torch
from torch import Tensor

from amq.errors import AmqError

KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""`Kind` of calls.h."""
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "clamped_swiglu": 2, "relu2": 3}
"""`ActivationKind`, by the names of amq.runtime.decoder_spec."""
STORE, ADD, ACTIVATE = 0, 1, 2
"""`Epilogue`."""
PACKED_ROWS, PREPARED = 3, 4
"""`EmbedCall.kind` beyond KINDS."""
MOST_ROWS, MOST_WEIGHTS = 8, 4
"""Of one LinearCall."""

Fields = list[tuple[str, Any]]


def _integers(names: str) -> Fields:
    return [(name, c_int32) for name in names.split()]


def _longs(names: str) -> Fields:
    return [(name, c_int64) for name in names.split()]


def _floats(names: str) -> Fields:
    return [(name, c_float) for name in names.split()]


def _addresses(names: str) -> Fields:
    return [(name, c_void_p) for name in names.split()]


class LinearWeight(Structure):
    _fields_ = [*_addresses("data bias"), *_integers("bits all_rows first_row rows")]


class ExpertWeight(Structure):
    _fields_ = [*_addresses("data bias"), *_longs("bits")]


class ExpertRows(Structure):
    _fields_ = [*_integers("expert count"), ("entries", c_int32 * MOST_ROWS)]


class _Called(Structure):
    """A struct that FUNCTION of the library takes."""

    FUNCTION: ClassVar[str]


class LinearCall(_Called):
    FUNCTION = "amq_cuda_linear_call"
    _fields_ = [
        ("weights", LinearWeight * MOST_WEIGHTS),
        *_integers("n_weights rows in_features group_size dtype int8 x_kind y_kind"),
        *(*_addresses("x"), *_longs("x_stride"), *_addresses("norm"), *_floats("epsilon scale")),
        *(*_integers("epilogue activation"), *_floats("limit"), *_integers("n_experts")),
        *(*_addresses("y"), *_longs("y_stride"), *_addresses("partials experts groups n_groups")),
        *_integers("most_groups x_share rotated reserved"),
    ]


class NormCall(_Called):
    FUNCTION = "amq_cuda_norm"
    _fields_ = [
        *_integers("rows features parts y_kind"),
        *(*_addresses("x"), *_longs("x_stride"), *_addresses("weight"), *_floats("epsilon factor")),
        *(*_addresses("y"), *_longs("y_stride")),
    ]


class RotateCall(_Called):
    FUNCTION = "amq_cuda_rotate"
    _fields_ = [
        *(*_integers("rows features kind reserved"), *_addresses("x"), *_longs("x_stride"), *_addresses("y")),
        *_longs("y_stride"),
    ]


class EmbedCall(_Called):
    FUNCTION = "amq_cuda_embed"
    _fields_ = [
        *(*_integers("rows columns"), *_addresses("tokens"), *_integers("kind bits group_size table_rows")),
        *(*_addresses("data scales zero_points"), *_longs("row_bytes"), *_floats("scale"), *_integers("reserved")),
        *(*_addresses("y"), *_longs("y_stride")),
    ]


class DenseCall(_Called):
    FUNCTION = "amq_cuda_dense"
    _fields_ = [
        *(*_integers("rows in_features out_features element x_kind y_kind"), *_addresses("weight bias x")),
        *(*_longs("x_stride"), *_addresses("y"), *_longs("y_stride"), *_floats("scale"), *_integers("reserved")),
    ]


class ActivateCall(_Called):
    FUNCTION = "amq_cuda_activate"
    _fields_ = [
        *(*_integers("rows features activation y_kind"), *_addresses("gate up"), *_longs("gate_stride up_stride")),
        *(*_floats("limit"), *_integers("reserved"), *_addresses("y"), *_longs("y_stride")),
    ]


class FinishCall(_Called):
    FUNCTION = "amq_cuda_finish"
    _fields_ = [
        *(*_integers("rows features"), *_addresses("stream"), *_longs("stream_stride"), *_addresses("y")),
        *(*_longs("y_stride"), *_addresses("post_norm"), *_floats("epsilon scale after"), *_integers("reserved")),
    ]


class PerLayerCall(_Called):
    FUNCTION = "amq_cuda_per_layer"
    _fields_ = [
        *(*_integers("rows columns width reserved"), *_addresses("sum token norm")),
        *_floats("epsilon table_scale projection_scale sum_scale"),
    ]


class SoftcapCall(_Called):
    FUNCTION = "amq_cuda_softcap"
    _fields_ = [*_longs("count"), *_addresses("x"), *_floats("cap"), *_integers("reserved")]


class AttentionCall(_Called):
    FUNCTION = "amq_cuda_attention"
    _fields_ = [
        *_integers("rows n_heads n_kv_heads head_dim q_stride gated keys_are_values own_keys stored"),
        *(*_integers("rotary window cache_kind"), *_floats("scale softcap epsilon"), *_integers("out_kind")),
        *(*_addresses("qkv"), *_longs("qkv_stride"), *_addresses("q_norm k_norm v_norm")),
        *(("cos", c_void_p * 2), ("sin", c_void_p * 2), *_addresses("sinks position_scale")),
        *(*_addresses("positions slots long_text tables"), *_longs("table_stride"), *_addresses("cache")),
        *(*_longs("page_bytes cache_offset"), *_addresses("out"), *_longs("out_stride")),
        *(*_addresses("partials counters"), *_integers("splits reserved")),
    ]


class Segments(Structure):
    _fields_ = [*_integers("n longest"), *_addresses("first count state begins")]


class HeadPlaces(Structure):
    _fields_ = _longs("first stride")


class DeltaCall(_Called):
    FUNCTION = "amq_cuda_delta"
    _fields_ = [
        ("segments", Segments),
        *_integers("n_key_heads n_value_heads key_dim value_dim kernel out_kind"),
        *(*_addresses("in_"), *_longs("in_stride"), *((name, HeadPlaces) for name in "qkvzba")),
        *(*_addresses("convolution rate dt_bias norm"), *_floats("epsilon"), *_integers("reserved")),
        *(*_addresses("mixed"), *_longs("mixed_stride"), *_addresses("states"), *_longs("state_floats state_offset")),
        *(*_addresses("out"), *_longs("out_stride")),
    ]


class ShortConvCall(_Called):
    FUNCTION = "amq_cuda_short_conv"
    _fields_ = [
        *(("segments", Segments), *_integers("channels kernel out_kind reserved"), *_addresses("in_")),
        *(*_longs("in_stride"), *_addresses("convolution bias states"), *_longs("state_floats state_offset")),
        *(*_addresses("out"), *_longs("out_stride")),
    ]


class ChooseCall(_Called):
    FUNCTION = "amq_cuda_choose"
    _fields_ = [
        *_integers("rows experts top_k sigmoid normalized groups top_groups score_stride"),
        *(*_floats("epsilon scale"), *_addresses("scores correction expert_scale positions choice weights")),
        *_addresses("groups_out n_groups"),
    ]


class CombineCall(_Called):
    FUNCTION = "amq_cuda_combine"
    _fields_ = [
        *(*_integers("rows features top_k reserved"), *_addresses("outputs weights shared shared_gate")),
        *(*_longs("gate_stride"), *_addresses("routed_post_norm shared_post_norm"), *_floats("epsilon")),
        *(*_integers("reserved2"), *_addresses("y")),
    ]


class SampleCall(_Called):
    FUNCTION = "amq_cuda_sample"
    _fields_ = [
        *(*_integers("rows vocabulary"), *_addresses("logits tokens positions temperature top_p min_p top_k seed")),
        *(*_addresses("drawn out step"), *_integers("steps reserved"), *_addresses("scratch")),
    ]


CALLS: tuple[type[_Called], ...] = (
    LinearCall, NormCall, EmbedCall, DenseCall, ActivateCall, FinishCall, PerLayerCall, SoftcapCall,
    AttentionCall, DeltaCall, ShortConvCall, ChooseCall, CombineCall, SampleCall,
)  # fmt: skip
"""In the order of AMQ_CALLS."""
STORE_KEYS = "amq_cuda_store"
"""The other function that takes an AttentionCall."""


class Call:
    """A struct of `kind`, filled with `fields`; what they leave out is zero or null.

    fields: numbers; tensors, of which the call keeps a reference and takes the address; None; a Structure, or a dict or
        sequence of any of these for a struct or array in it.
    function: of the library; "" is that of `kind`. label: what the call is for, in errors.
    """

    def __init__(self, kind: type[_Called], fields: Mapping[str, Any], label: str = "", function: str = "") -> None:
        self.label, self.function = label or kind.__name__, function or kind.FUNCTION
        self.keep: list[Tensor] = []
        self.struct = kind()
        self._fill(self.struct, fields)

    def _fill(self, struct: Structure, fields: Mapping[str, Any]) -> None:
        known = dict(struct._fields_)  # type: ignore[arg-type]
        for name, value in fields.items():
            if name not in known:
                raise TypeError(f"{type(struct).__name__} has no field {name}")
            if isinstance(value, Mapping):
                self._fill(getattr(struct, name), value)
            elif isinstance(value, (list, tuple)):
                array = getattr(struct, name)
                for index, item in enumerate(value):
                    if isinstance(item, Mapping):
                        self._fill(array[index], item)
                    else:
                        array[index] = self._value(item)
            else:
                setattr(struct, name, self._value(value))

    def _value(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        self.keep.append(value)
        return value.data_ptr()


def device_structs(structs: Sequence[Structure], device: torch.device) -> Tensor:
    """Structs one after another in the memory of `device`, uint8."""
    if not structs:
        return torch.empty(0, dtype=torch.uint8, device=device)
    array = (type(structs[0]) * len(structs))(*structs)
    return torch.frombuffer(bytearray(array), dtype=torch.uint8).to(device)


class Refused(AmqError):
    """The kernels do not compute what a call asks for."""


class CallLibrary:
    """The functions of calls.h in a library that ctypes has loaded."""

    def __init__(self, library: ctypes.CDLL, path: str) -> None:
        self._library, self._path = library, path
        library.amq_cuda_struct_bytes.restype = c_int64
        for index, kind in enumerate(CALLS):
            if (found := library.amq_cuda_struct_bytes(index)) != ctypes.sizeof(kind):
                raise AmqError(
                    f"{path} has a {kind.__name__} of {found} bytes, expected {ctypes.sizeof(kind)}: it was built from "
                    "other sources; build it again with `pip install -e .`"
                )
        self._functions: dict[str, Any] = {}

    def run(self, call: Call, stream: int) -> None:
        """Launches; raises Refused where the library does, AmqError where CUDA fails."""
        status = self._function(call.function)(ctypes.byref(call.struct), c_void_p(stream))
        if status:
            raise self._error(call, status)

    def size(self, function: str, call: Call) -> int:
        """What a function such as amq_cuda_linear_scratch says of a call; raises Refused where it refuses."""
        asked = getattr(self._library, function)
        asked.restype, asked.argtypes = c_int64, [c_void_p]
        size = int(asked(ctypes.byref(call.struct)))
        if size < 0:
            raise self._error(call, size)
        return size

    def _function(self, name: str) -> Any:
        if name not in self._functions:
            function = getattr(self._library, name)
            function.restype, function.argtypes = ctypes.c_int, [c_void_p, c_void_p]
            self._functions[name] = function
        return self._functions[name]

    def _error(self, call: Call, status: int) -> AmqError:
        if status < 0:
            reason = REFUSALS.get(status, "unknown status")
            return Refused(f"{call.label}: the kernels refuse the call ({status}: {reason})")
        self._library.amq_cuda_error.restype = ctypes.c_char_p
        return AmqError(f"{call.label}: CUDA error {status}: {self._library.amq_cuda_error(status).decode()}")


REFUSALS = {
    -1: "the number of rows of x is outside what one launch takes",
    -2: "the number of weights is outside what one launch takes",
    -3: "codes of a width that the library does not hold",
    -4: "a group size other than 32, 64 and 128",
    -5: "a dtype that it is not made for",
    -6: "a count out of range, or an address that is null or not a multiple of 16",
}
"""`Status` of calls.h."""
