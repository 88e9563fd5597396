"""onnxruntime's MatMulNBits at accuracy level 4 (int8 activations): one session over R nodes, so one thread pool.

Every node has initializers of its own, which the session prepacks. Zero points are given, as our formats have them
(measured 2026-11: with them it is no slower than without).
"""

from __future__ import annotations

import numpy as np

from .base import GROUP_SIZE, Peer, Product, Runner, missing_module, random_scales


class OnnxRuntime(Peer):
    def __init__(self, rival: str, bits: int) -> None:
        self.name, self.rival, self.bits = f"onnxruntime-int{bits}", rival, bits

    def unsupported_reason(self) -> str | None:
        return missing_module("onnxruntime", "onnx")

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        groups = in_features // GROUP_SIZE
        zero_points = -(-groups * self.bits // 8)
        return out_features * (in_features * self.bits // 8 + 4 * groups + zero_points)

    def build(self, problem: Product, x: np.ndarray) -> Runner:
        return _Session(problem, x, self.bits)


class _Session(Runner):
    def __init__(self, problem: Product, x: np.ndarray, bits: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = problem.threads, 1
        constants = {}
        for index in range(problem.count):
            weight = _weight(problem, bits, index)
            if index == 0:
                self.reference = _dequantize(*weight, bits)
            for kind, values in zip(_CONSTANTS, weight, strict=True):
                constants[f"{kind}{index}"] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
        options.add_external_initializers(list(constants), list(constants.values()))
        self._session = onnxruntime.InferenceSession(
            _model(problem, bits, constants), options, providers=["CPUExecutionProvider"]
        )
        self._binding = self._session.io_binding()
        self._binding.bind_cpu_input("x", x)
        for index in range(problem.count):
            self._binding.bind_output(f"y{index}")

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def first(self) -> np.ndarray:
        return self._binding.get_outputs()[0].numpy()


_CONSTANTS = ("weight", "scale", "zero")


def _weight(problem: Product, bits: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random codes uint8 [N, groups, bytes], scales float32 [N, groups], zero points uint8 [N, bytes]."""
    n, groups, random = problem.out_features, problem.in_features // GROUP_SIZE, problem.random(index)
    codes = np.frombuffer(random.bytes(n * problem.in_features * bits // 8), np.uint8).reshape(n, groups, -1)
    zeros = np.frombuffer(random.bytes(n * -(-groups * bits // 8)), np.uint8).reshape(n, -1)
    return codes, random_scales(random, n, groups), zeros


def _model(problem: Product, bits: int, constants: dict) -> bytes:
    """The graph; its constants are named only, the session gets their values directly (protobuf copies too often)."""
    from onnx import TensorProto, helper

    n, k = problem.out_features, problem.in_features
    initializers, nodes, outputs = [], [], []
    for name, value in constants.items():
        kind = TensorProto.UINT8 if "uint8" in value.data_type() else TensorProto.FLOAT
        tensor = TensorProto(name=name, data_type=kind, dims=value.shape(), data_location=TensorProto.EXTERNAL)
        tensor.external_data.add(key="location", value="in memory")
        initializers.append(tensor)
    for index in range(problem.count):
        inputs = ["x", *(f"{kind}{index}" for kind in _CONSTANTS)]
        attributes = dict(K=k, N=n, bits=bits, block_size=GROUP_SIZE, accuracy_level=4)
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{index}"], domain="com.microsoft", **attributes))
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, [problem.tokens, n]))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [problem.tokens, k])
    graph = helper.make_graph(nodes, "linears", [x], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _dequantize(packed: np.ndarray, scales: np.ndarray, zeros: np.ndarray, bits: int) -> np.ndarray:
    n, groups, _ = packed.shape
    zero_points = _unpack(zeros, bits)[:, :groups, None]
    return ((_unpack(packed, bits) - zero_points) * scales[:, :, None]).reshape(n, -1)


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """[..., bytes] → float32 [..., codes], first code in the lowest bits."""
    codes = (packed[..., None] >> (bits * np.arange(8 // bits, dtype=np.uint8))) & np.uint8(2**bits - 1)
    return codes.reshape(*packed.shape[:-1], -1).astype(np.float32)
