"""A pass of a decoder as a list of calls of kernels/cuda/calls.h, made of a `DecoderSpec` once for each number of rows.

Two kinds of passes: *decode*, up to 8 rows of as many sequences, whose calls only read device memory and can be
captured in a CUDA graph; and *prompt*, up to MAX_ROWS rows of any sequences, which runs linears 8 rows at a time or
through `many` and stores all keys and values before it attends.

A plain layer takes five calls for up to OWN_NORM_ROWS rows: qkv with the norm in front, attention, o onto the stream,
gate and up with norm and activation, down onto the stream; two more for the norms beyond that, where every block of a
linear would read all rows again. What the fused forms cannot do is done by a call of its own: a projection that is
partly unquantized, a norm behind an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from amq.kernels import cuda_calls as calls
from amq.kernels.cuda_calls import KINDS, MOST_ROWS, MOST_WEIGHTS, CallLibrary
from amq.packing import PreparedWeight
from amq.runtime.cuda_buffers import Buffers, Inputs, KeyCache
from amq.runtime.cuda_parts import PassCalls
from amq.runtime.cuda_weights import CudaWeights, ExpertTables, expert_tables, gate_and_up, in_whole_tiles
from amq.runtime.decoder_spec import (
    RELU2,
    Array,
    Attention,
    DeltaNet,
    Linear,
    Mixture,
    Mlp,
    PerLayerInput,
    Projection,
    ShortConv,
    Step,
    Table,
)

OWN_NORM_ROWS = 2
"""Rows up to which a linear norms its input itself."""
SPLITS = 32
"""Spans that attention is cut into at most: with 8 KV heads 256 blocks for a row, two for each of 128
multiprocessors. A row's bits depend on it: it is the same in every pass. Passes of more than 8 rows are not cut."""

Many = Callable[[Tensor, Sequence[PreparedWeight], Tensor], None]
"""(x [rows, K] of 16 bits, weights, y float32 [rows, ΣN], rows of it strided) → y = x · Wᵀ, for more than 8 rows."""


class PassBuilder:
    """Makes the calls of passes over `buffers`, whose rows they read and write.

    dtype: of what is multiplied, float16 or bfloat16. int8: round x to 8 bits. many: multiplies more than 8 rows, or
    None: 8 rows at a time.
    """

    def __init__(
        self,
        library: CallLibrary,
        weights: CudaWeights,
        buffers: Buffers,
        inputs: Inputs,
        cache: KeyCache,
        states: Tensor | None,
        int8: bool,
        many: Many | None,
    ) -> None:
        self._library, self._weights, self._spec = library, weights, weights.spec
        self._b, self._inputs, self._cache, self._states = buffers, inputs, cache, states
        self._int8, self._many = int8, many
        self._group_size = weights.checkpoint.record.group_size
        self._dtype = KINDS[buffers.dtype]
        self._rows, self._decode = 0, True
        self._pass = PassCalls(library)
        self._experts: dict[int, ExpertTables] = {}

    def build(self, rows: int, decode: bool) -> PassCalls:
        """The calls that make the stream of rows 0 … rows − 1 of `inputs` what the head reads."""
        self._rows, self._decode, self._pass = rows, decode, PassCalls(self._library)
        self._embed(self._spec.embedding, self._b.stream, self._spec.embedding_scale)
        if self._spec.per_layer is not None:
            self._per_layer_embedding()
        for index, step in enumerate(self._spec.steps):
            self._step(index, step)
        self._pass.share_scratch(self._b.device)
        return self._pass

    def build_head(self, x: Tensor, logits: Tensor) -> PassCalls:
        """logits float32 [rows, vocabulary] ← those after the stream's rows x."""
        spec, rows = self._spec, len(x)
        self._rows, self._decode, self._pass = rows, True, PassCalls(self._library)
        head = Linear(spec.head.name, spec.head.rows, spec.head.columns)
        final = Step(Mlp(Projection((head,)), Projection((head,))), norm=spec.final_norm)
        self._project(final, Projection((head,)), logits, spec.logit_scale, x)
        if spec.logit_softcap:
            fields = {"count": logits.numel(), "x": logits, "cap": spec.logit_softcap}
            self._pass.add(calls.SoftcapCall, fields, "softcap of the logits")
        self._pass.share_scratch(self._b.device)
        return self._pass

    # -- inputs

    def _embed(self, table: Table, y: Tensor, scale: float) -> None:
        w, name = self._weights, table.name
        fields = {
            "rows": self._rows, "columns": table.columns, "tokens": self._inputs.tokens, "group_size": self._group_size,
            "table_rows": table.rows, "scale": scale, "y": y, "y_stride": y.stride(0),
        }  # fmt: skip
        if name in w.rows:
            packed = w.rows[name]
            fields |= {
                "kind": calls.PACKED_ROWS, "bits": packed.format.bits, "data": packed.qweight, "scales": packed.scale,
                "zero_points": packed.zero_point, "row_bytes": packed.qweight.stride(0),
            }  # fmt: skip
        elif name in w.prepared:
            prepared = w.prepared[name]
            fields |= {"kind": calls.PREPARED, "bits": prepared.format.bits, "data": prepared.data}
        else:
            fields |= {"kind": KINDS[w.elements[name].dtype], "data": w.elements[name]}
        self._pass.add(calls.EmbedCall, fields, f"rows of {name}")

    def _per_layer_embedding(self) -> None:
        p = self._spec.per_layer
        assert p is not None
        b, columns = self._b, p.table.columns
        self._embed(p.table, b.token, 1.0)
        self._project(Step(Mlp(p.projection, p.projection)), p.projection, b.per_layer)
        fields = {
            "rows": self._rows, "columns": columns, "width": p.width, "sum": b.per_layer, "token": b.token,
            "norm": self._array(p.norm), "epsilon": self._spec.epsilon, "table_scale": p.table_scale,
            "projection_scale": p.projection_scale, "sum_scale": p.sum_scale,
        }  # fmt: skip
        self._pass.add(calls.PerLayerCall, fields, "per-layer embeddings")

    # -- projections

    def _step(self, index: int, step: Step) -> None:
        operators: dict[type, Callable[..., None]] = {
            Attention: self._attention, DeltaNet: self._delta_net, ShortConv: self._short_conv, Mlp: self._mlp,
            Mixture: self._mixture, PerLayerInput: self._per_layer_input,
        }  # fmt: skip
        operators[type(step.op)](index, step, step.op)

    def _array(self, array: Array | None) -> Tensor | None:
        return None if array is None else self._weights.elements[array.key]

    def _is_packed(self, projection: Projection) -> bool:
        return all(linear.name in self._weights.prepared for linear in projection.linears)

    def _norm(
        self, x: Tensor, weight: Array | None, y: Tensor, features: int, parts: int = 1, label: str = "norm"
    ) -> None:
        fields = {
            "rows": self._rows, "features": features, "parts": parts, "x": x, "x_stride": x.stride(0), "factor": 1.0,
            "weight": self._array(weight), "epsilon": self._spec.epsilon, "y": y, "y_stride": y.stride(0),
            "y_kind": KINDS[y.dtype],
        }  # fmt: skip
        self._pass.add(calls.NormCall, fields, label)

    def _weight(self, linear: Linear, first: int = 0, rows: int = 0) -> dict[str, Any]:
        """A LinearWeight: `rows` rows of a linear, 0: all."""
        weight = self._weights.prepared[linear.name]
        bias = self._weights.elements[f"{linear.name}.bias"][first:] if linear.bias else None
        return {
            "data": weight.data, "bias": bias, "bits": weight.format.bits, "all_rows": weight.out_features,
            "first_row": first, "rows": rows or weight.out_features,
        }  # fmt: skip

    def _linear(
        self, linears: Sequence[Linear], x: Tensor, y: Tensor, parts: Sequence[dict[str, Any]] = (), **more: Any
    ) -> None:
        """A LinearCall for each 8 of the rows, of whole linears or of `parts` of them."""
        weights, label = parts or [self._weight(each) for each in linears], ", ".join(each.name for each in linears)
        more |= {"in_features": linears[0].in_features, "rotated": self._is_rotated(linears[0])}
        for begin in range(0, self._rows, MOST_ROWS):
            fields = {
                "weights": weights, "n_weights": len(weights), "rows": min(MOST_ROWS, self._rows - begin),
                "group_size": self._group_size, "dtype": self._dtype, "int8": self._int8, "x_kind": KINDS[x.dtype],
                "x": x[begin:], "x_stride": x.stride(0), "y": y[begin:], "y_stride": y.stride(0),
                "y_kind": KINDS[y.dtype], "epsilon": self._spec.epsilon, "scale": 1.0, "x_share": 1, **more,
            }  # fmt: skip
            self._pass.add(calls.LinearCall, fields, label)

    def _normed(self, step: Step, x: Tensor, own: bool) -> tuple[Tensor, dict[str, Any]]:
        """What a projection reads in the place of norm(x), and what it then has to do itself: nothing, or (`own`, few
        rows) the norm."""
        if own and self._rows <= OWN_NORM_ROWS:
            return x, {"norm": self._array(step.norm)}
        self._norm(x, step.norm, self._b.input, x.shape[1])
        return self._b.input, {}

    def _project(
        self, step: Step, projection: Projection, y: Tensor, scale: float = 1.0, stream: Tensor | None = None
    ) -> None:
        """y [rows, out_features] ← scale · projection · norm(stream), the linears side by side."""
        stream = self._b.stream if stream is None else stream
        packed = self._is_packed(projection)
        x, more = self._normed(step, stream, own=packed)
        if self._many is not None and self._rows > MOST_ROWS and packed:
            return self._multiply_many(projection, x, y, scale)
        column, group = 0, []
        for linear in projection.linears:
            if linear.name not in self._weights.prepared:
                self._dense(linear, x, y[:, column:], scale)
                column += linear.out_features
                continue
            group.append(linear)
            last = linear is projection.linears[-1]
            following = None if last else projection.linears[projection.linears.index(linear) + 1]
            if len(group) == MOST_WEIGHTS or following is None or following.name not in self._weights.prepared:
                self._linear(group, x, y[:, column:], scale=scale, epilogue=calls.STORE, **more)
                column += sum(each.out_features for each in group)
                group = []

    def _multiply_many(self, projection: Projection, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        rows, linears, many, elements = self._rows, projection.linears, self._many, self._weights.elements
        assert many is not None
        weights = [self._weights.prepared[linear.name] for linear in linears]
        x, y = x[:rows, : projection.in_features], y[:rows, : projection.out_features]
        if weights[0].rotation:
            x = self._rotate(x)
        parts = y.split([linear.out_features for linear in linears], -1)
        biases = [(part, elements[f"{each.name}.bias"]) for each, part in zip(linears, parts, strict=True) if each.bias]

        def run() -> None:
            many(x, weights, y)
            for part, bias in biases:
                part += bias
            if scale != 1:
                y.mul_(scale)

        self._pass.parts.append(run)

    def _is_rotated(self, linear: Linear) -> bool:
        return bool(self._weights.prepared[linear.name].rotation)

    def _rotate(self, x: Tensor) -> Tensor:
        """x rotated, in memory that all passes share."""
        y = self._b.rotated[: len(x), : x.shape[1]]
        fields = {
            "rows": len(x), "features": x.shape[1], "kind": KINDS[x.dtype], "x": x, "x_stride": x.stride(0), "y": y,
            "y_stride": y.stride(0),
        }  # fmt: skip
        self._pass.add(calls.RotateCall, fields, "rotation")
        return y

    def _dense(self, linear: Linear, x: Tensor, y: Tensor, scale: float = 1.0) -> None:
        weight = self._weights.elements[linear.name]
        bias = self._weights.elements[f"{linear.name}.bias"] if linear.bias else None
        fields = {
            "rows": self._rows, "in_features": linear.in_features, "out_features": linear.out_features,
            "element": KINDS[weight.dtype], "x_kind": KINDS[x.dtype], "y_kind": KINDS[y.dtype], "weight": weight,
            "bias": bias, "x": x, "x_stride": x.stride(0), "y": y, "y_stride": y.stride(0), "scale": scale,
        }  # fmt: skip
        self._pass.add(calls.DenseCall, fields, linear.name)

    def _finish(self, step: Step, y: Tensor) -> None:
        b = self._b
        fields = {
            "rows": self._rows, "features": self._spec.hidden, "stream": b.stream, "stream_stride": b.stream.stride(0),
            "y": y, "y_stride": y.stride(0), "post_norm": self._array(step.post_norm), "epsilon": self._spec.epsilon,
            "scale": step.scale, "after": self._after(step),
        }  # fmt: skip
        self._pass.add(calls.FinishCall, fields, "end of a step")

    def _after(self, step: Step) -> float:
        after = self._array(step.after)
        return 1.0 if after is None else float(after)

    def _last(self, step: Step, projection: Projection, x: Tensor) -> None:
        """The stream ← what the step makes of it and of projection · x."""
        linear, plain = projection.linears[0], step.post_norm is None and self._after(step) == 1
        packed = self._is_packed(projection)
        if plain and packed and (self._rows <= MOST_ROWS or self._many is None):
            self._linear([linear], x, self._b.stream, scale=step.scale, epilogue=calls.ADD)
            return
        self._output_of(projection, x, self._b.output)
        self._finish(step, self._b.output)

    def _output_of(self, projection: Projection, x: Tensor, y: Tensor) -> None:
        linear = projection.linears[0]
        if not self._is_packed(projection):
            self._dense(linear, x, y)
        elif self._many is not None and self._rows > MOST_ROWS:
            self._multiply_many(projection, x, y)
        else:
            self._linear([linear], x, y, epilogue=calls.STORE)

    # -- operators

    def _attention(self, index: int, step: Step, op: Attention) -> None:
        b, q_features = self._b, op.n_heads * (2 if op.gated else 1) * op.head_dim
        self._project(step, op.qkv, b.wide)
        if op.q_norm_all is not None:
            self._norm(b.wide, op.q_norm_all, b.wide, q_features)
            keys = b.wide[:, q_features:]
            self._norm(keys, op.k_norm_all, keys, op.n_kv_heads * op.head_dim)
        fields = self._cache.attention_fields(index, op) | {
            "rows": self._rows, "stored": not self._decode, "scale": op.scale, "softcap": op.softcap,
            "epsilon": self._spec.epsilon, "window": op.window, "qkv": b.wide, "qkv_stride": b.wide.stride(0),
            "q_norm": self._array(op.q_norm), "k_norm": self._array(op.k_norm), "v_norm": self._array(op.v_norm),
            "sinks": self._array(op.sinks), "out": b.wide_input, "out_stride": b.wide_input.stride(0),
            "out_kind": self._dtype, "splits": SPLITS,
            "partials": b.attention_partials, "counters": b.attention_counters, **self._inputs.attention_fields(),
            **self._angles(op),
        }  # fmt: skip
        if not self._decode and op.cache_of is None:
            self._pass.add(calls.AttentionCall, fields, f"keys and values of step {index}", calls.STORE_KEYS)
        self._pass.add(calls.AttentionCall, fields, f"attention of step {index}")
        self._last(step, op.o, b.wide_input)

    def _angles(self, op: Attention) -> dict[str, Any]:
        e = self._weights.elements
        fields: dict[str, Any] = {}
        if op.position_scale is not None:
            fields["position_scale"] = e["position_scale"]
        if op.rope is not None:
            fields["rotary"] = self._spec.ropes[op.rope].rotary
            for name in ("cos", "sin"):
                short = f"rope.{op.rope}.{name}"
                fields[name] = [e[short], e.get(f"rope.{op.rope}.long.{name}")]
        return fields

    def _segments(self) -> dict[str, Any]:
        return self._inputs.segment_fields(self._rows, self._decode)

    def _delta_net(self, index: int, step: Step, op: DeltaNet) -> None:
        b = self._b
        self._project(step, op.in_, b.wide)
        places = {name: {"first": at.first, "stride": at.stride} for name in "qkvzba" if (at := getattr(op, name))}
        fields = places | self._cache.state_fields(index, self._states) | {
            "segments": self._segments(), "n_key_heads": op.n_key_heads, "n_value_heads": op.n_value_heads,
            "key_dim": op.key_dim, "value_dim": op.value_dim, "kernel": op.kernel, "in_": b.wide,
            "in_stride": b.wide.stride(0), "convolution": self._array(op.convolution), "rate": self._array(op.rate),
            "dt_bias": self._array(op.dt_bias), "norm": self._array(op.norm), "epsilon": self._spec.epsilon,
            "mixed": b.mixed, "mixed_stride": b.mixed.stride(0), "out": b.wide_input,
            "out_stride": b.wide_input.stride(0), "out_kind": self._dtype,
        }  # fmt: skip
        self._pass.add(calls.DeltaCall, fields, f"delta net of step {index}")
        self._last(step, op.out, b.wide_input)

    def _short_conv(self, index: int, step: Step, op: ShortConv) -> None:
        b = self._b
        self._project(step, op.in_, b.wide)
        fields = self._cache.state_fields(index, self._states) | {
            "segments": self._segments(), "channels": op.out.in_features, "kernel": op.kernel, "in_": b.wide,
            "in_stride": b.wide.stride(0), "convolution": self._array(op.convolution), "bias": self._array(op.bias),
            "out": b.wide_input, "out_stride": b.wide_input.stride(0), "out_kind": self._dtype,
        }  # fmt: skip
        self._pass.add(calls.ShortConvCall, fields, f"short convolution of step {index}")
        self._last(step, op.out, b.wide_input)

    def _mlp(self, index: int, step: Step, op: Mlp) -> None:
        self._gate_and_up(step, op)
        self._last(step, op.down, self._b.wide_input)

    def _gate_and_up(self, step: Step, op: Mlp) -> None:
        """wide_input ← activation(gate, up)."""
        b, wide = self._b, op.down.in_features
        pair = self._pair(op)
        if pair is None or (self._many is not None and self._rows > MOST_ROWS):
            self._project(step, op.in_, b.wide)
            return self._activate(op.activation, op.limit, b.wide, b.wide[:, op.in_.out_features - wide :], wide)
        x, more = self._normed(step, b.stream, own=True)
        self._linear(
            op.in_.linears, x, b.wide_input, pair, epilogue=calls.ACTIVATE, limit=op.limit,
            activation=calls.ACTIVATIONS[op.activation], **more,
        )  # fmt: skip

    def _pair(self, op: Mlp) -> list[dict[str, Any]] | None:
        """Gate and up as the weights of one call; None where they are not all packed, or meet within a tile."""
        windows = gate_and_up(op)
        if not self._is_packed(op.in_) or not in_whole_tiles(windows):
            return None
        return [self._weight(*window) for window in windows]

    def _activate(self, activation: str, limit: float, gate: Tensor, up: Tensor, features: int) -> None:
        y = self._b.wide_input
        fields = {
            "rows": self._rows, "features": features, "activation": calls.ACTIVATIONS[activation], "gate": gate,
            "gate_stride": gate.stride(0), "up": None if activation == RELU2 else up, "up_stride": up.stride(0),
            "limit": limit, "y": y, "y_stride": y.stride(0), "y_kind": KINDS[y.dtype],
        }  # fmt: skip
        self._pass.add(calls.ActivateCall, fields, activation)

    def _per_layer_input(self, index: int, step: Step, op: PerLayerInput) -> None:
        b, width = self._b, op.out.in_features
        self._project(step, op.in_, b.wide)
        self._activate(op.activation, 0.0, b.wide, b.per_layer[:, op.index * width :], width)
        self._last(step, op.out, b.wide_input)

    # -- mixtures

    def _mixture(self, index: int, step: Step, op: Mixture) -> None:
        """Eight rows at a time, from the choice of their experts to what is added to the stream."""
        b, all_rows = self._b, self._rows
        whole = (b.stream, b.input, b.input32, b.wide_input, b.output, self._inputs.positions)
        for begin in range(0, all_rows, MOST_ROWS):
            self._rows = min(MOST_ROWS, all_rows - begin)
            b.stream, b.output, self._inputs.positions = whole[0][begin:], whole[4][begin:], whole[5][begin:]
            self._mixture_of_few(index, step, op)
        b.stream, b.input, b.input32, b.wide_input, b.output, self._inputs.positions = whole
        self._rows = all_rows

    def _mixture_of_few(self, index: int, step: Step, op: Mixture) -> None:
        b, hidden = self._b, self._spec.hidden
        self._norm(b.stream, step.norm, b.input32, hidden)
        self._choose(step, op, index)
        x = b.input
        self._norm(b.stream, op.routed_norm or step.norm, x, hidden)
        experts = self._experts_of(index, op)
        first, top_k = op.experts[0], op.router.top_k
        more = {"n_experts": len(op.experts), "groups": b.expert_groups, "n_groups": b.n_groups,
                "most_groups": min(len(op.experts), self._rows * top_k)}  # fmt: skip
        self._linear_of_experts(experts.gate_and_up, x, b.expert_input, more | {
            "in_features": hidden, "rotated": self._is_rotated(first.in_.linears[0]),
            "experts": experts.gate_and_up_table, "x_share": top_k, "epilogue": calls.ACTIVATE,
            "activation": calls.ACTIVATIONS[first.activation], "limit": first.limit,
        }, f"experts' gate and up of step {index}")  # fmt: skip
        self._linear_of_experts(experts.down, b.expert_input, b.expert_output, more | {
            "in_features": first.down.in_features, "rotated": self._is_rotated(first.down.linears[0]),
            "experts": experts.down_table, "x_share": 1, "epilogue": calls.STORE,
        }, f"experts' down of step {index}")  # fmt: skip
        if op.shared is not None:
            self._gate_and_up(step, op.shared)
            self._output_of(op.shared.down, b.wide_input, b.shared_output)
        fields = {
            "rows": self._rows, "features": hidden, "top_k": top_k, "outputs": b.expert_output,
            "weights": b.choice_weights, "shared": None if op.shared is None else b.shared_output,
            "shared_gate": None if op.shared_gate is None else b.shared_gate, "gate_stride": b.shared_gate.stride(0),
            "routed_post_norm": self._array(op.routed_post_norm), "shared_post_norm": self._array(op.shared_post_norm),
            "epsilon": self._spec.epsilon, "y": b.output,
        }  # fmt: skip
        self._pass.add(calls.CombineCall, fields, f"sum of experts of step {index}")
        self._finish(step, b.output)

    def _experts_of(self, index: int, op: Mixture) -> ExpertTables:
        if index not in self._experts:
            self._experts[index] = expert_tables(self._weights, op)
        return self._experts[index]

    def _linear_of_experts(
        self, weights: list[dict[str, Any]], x: Tensor, y: Tensor, fields: dict[str, Any], label: str
    ) -> None:
        common = {
            "weights": weights, "n_weights": len(weights), "group_size": self._group_size, "dtype": self._dtype,
            "int8": self._int8, "x_kind": KINDS[x.dtype], "x": x, "x_stride": x.stride(0), "y": y,
            "y_stride": y.stride(0), "y_kind": KINDS[y.dtype], "epsilon": self._spec.epsilon, "scale": 1.0,
        }  # fmt: skip
        self._pass.add(calls.LinearCall, common | fields | {"rows": self._rows}, label)

    def _choose(self, step: Step, op: Mixture, index: int) -> None:
        b, router = self._b, op.router
        if op.shared_gate is not None:
            self._dense_array(op.shared_gate, b.input32, b.shared_gate)
        x = b.input32
        if router.norm is not None:
            self._norm(b.stream, router.norm, b.input32, self._spec.hidden)
        self._dense(router.weight, x, b.scores)
        fields = {
            "rows": self._rows, "experts": router.weight.out_features, "top_k": router.top_k,
            "sigmoid": router.score == "sigmoid", "normalized": router.normalized, "groups": router.groups,
            "top_groups": router.top_groups, "score_stride": b.scores.stride(0), "epsilon": router.epsilon,
            "scale": router.scale, "scores": b.scores, "correction": self._array(router.correction),
            "expert_scale": self._array(router.expert_scale), "positions": self._inputs.positions, "choice": b.choice,
            "weights": b.choice_weights, "groups_out": b.expert_groups, "n_groups": b.n_groups,
        }  # fmt: skip
        self._pass.add(calls.ChooseCall, fields, f"router of step {index}")

    def _dense_array(self, weight: Array, x: Tensor, y: Tensor) -> None:
        """y [rows, 1] ← weight · x."""
        fields = {
            "rows": self._rows, "in_features": x.shape[1], "out_features": 1, "element": KINDS[torch.float32],
            "x_kind": KINDS[x.dtype], "y_kind": KINDS[y.dtype], "weight": self._array(weight), "x": x,
            "x_stride": x.stride(0), "y": y, "y_stride": y.stride(0), "scale": 1.0,
        }  # fmt: skip
        self._pass.add(calls.DenseCall, fields, "gate of the shared expert")
