"""llama.cpp's ggml through its C API, from the libraries that llama-cpp-python builds: one graph of R products.

    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" pip install --no-deps --no-binary llama-cpp-python llama-cpp-python

Weights lie where llama.cpp puts them: in the first of the CPU backend's extra buffer types (AMX, repacked) that
can take the product, else in plain memory; measured 2026-11 on an AMX machine, no other choice was faster for one row.
Blocks are random bytes with their fp16 scales overwritten.
"""

from __future__ import annotations

import ctypes
import itertools
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p

import numpy as np

from amq.bench.peers.llama_cpp import ggml_libraries

from .base import Peer, Product, Runner

GGML_TYPE = {"q4_0": 2, "q8_0": 8, "q2_K": 10, "q3_K": 11, "q4_K": 12}  # enum ggml_type
BLOCK = {"q4_0": (32, 18), "q8_0": (32, 34), "q2_K": (256, 84), "q3_K": (256, 110), "q4_K": (256, 144)}
"""Weights and bytes of a block (ggml-common.h)."""
SCALES = {"q4_0": (0,), "q8_0": (0,), "q2_K": (80, 82), "q3_K": (108,), "q4_K": (0, 2)}
"""Where in a block its fp16 numbers are."""


@CFUNCTYPE(None, c_int, c_char_p, c_void_p)
def _silence(level: int, text: bytes, data: int) -> None:
    """Instead of a line on stderr for every repacked tensor."""


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


SIGNATURES = {  # function: (result, arguments)
    "ggml_log_set": (None, [c_void_p, c_void_p]),
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p, c_void_p, c_void_p]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_get_device": (c_void_p, [c_void_p]),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_buft_get_alloc_size": (c_size_t, [c_void_p, c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p, c_void_p]),
    "ggml_backend_dev_supports_op": (c_bool, [c_void_p, c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_graph_compute": (c_int, [c_void_p, c_void_p]),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_free": (None, [c_void_p]),
    **{f"dequantize_row_{name}": (None, [c_void_p, c_void_p, c_int64]) for name in GGML_TYPE},
}


class Ggml(Peer):
    def __init__(self, rival: str, kind: str) -> None:
        self.name, self.rival, self.kind = f"ggml-{kind}", rival, kind

    def unsupported_reason(self) -> str | None:
        return None if ggml_libraries() else "no libggml*.so: llama-cpp-python is not installed"

    def matrix_bytes(self, out_features: int, in_features: int) -> int:
        weights, size = BLOCK[self.kind]
        return out_features * in_features // weights * size

    def build(self, problem: Product, x: np.ndarray) -> Runner:
        return _Graph(problem, x, self.kind)


def _load() -> dict:
    libraries = [ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL) for path in ggml_libraries()]
    functions = {}
    for name, (result, arguments) in SIGNATURES.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        functions[name.removeprefix("ggml_")] = function
    return functions


class _Graph(Runner):
    def __init__(self, problem: Product, x: np.ndarray, kind: str) -> None:
        self._problem, self._kind, self._c = problem, kind, _load()
        self._c["log_set"](ctypes.cast(_silence, c_void_p), None)
        self._backend = self._c["backend_cpu_init"]()
        self._c["backend_cpu_set_n_threads"](self._backend, problem.threads)
        buffer = self._choose_buffer()
        weights, _ = self._weights(buffer, problem.count)
        random = problem.random()
        for index, weight in enumerate(weights):
            blocks = self._blocks(random)
            if index == 0:
                self.reference = self._dequantize(blocks)
            self._c["backend_tensor_set"](weight, blocks.ctypes.data, 0, blocks.nbytes)
        self.matrix_bytes = self._c["backend_buft_get_alloc_size"](buffer, weights[0])
        self.detail = f"buffer type {self._c['backend_buft_name'](buffer).decode()}"
        self._graph, self._outputs = self._products(weights, x)

    def run(self) -> None:
        if self._c["backend_graph_compute"](self._backend, self._graph) != 0:
            raise RuntimeError("ggml_backend_graph_compute failed")

    def first(self) -> np.ndarray:
        y = np.empty((self._problem.tokens, self._problem.out_features), np.float32)
        self._c["backend_tensor_get"](self._outputs[0], y.ctypes.data, 0, y.nbytes)
        return y

    def _context(self, tensors: int, extra: int = 0) -> int:
        """A context for the metadata of that many tensors; their data goes into a buffer."""
        return self._c["init"](_InitParams(tensors * self._c["tensor_overhead"]() + extra + 1024, None, True))

    def _weights(self, buffer: int, count: int) -> tuple[list[int], tuple[int, int]]:
        n, k = self._problem.out_features, self._problem.in_features
        context = self._context(count)
        weights = [self._c["new_tensor_2d"](context, GGML_TYPE[self._kind], k, n) for _ in range(count)]
        storage = self._c["backend_alloc_ctx_tensors_from_buft"](context, buffer)
        if not storage:
            raise MemoryError(f"ggml: no buffer for {count} matrices {n}x{k} in {self._kind}")
        return weights, (context, storage)

    def _default_buffer(self) -> int:
        return self._c["backend_get_default_buffer_type"](self._backend)

    def _choose_buffer(self) -> int:
        """The first buffer type that supports this product, in llama.cpp's order."""
        name = b"ggml_backend_dev_get_extra_bufts"
        address = self._c["backend_reg_get_proc_address"](self._c["backend_cpu_reg"](), name)
        device = self._c["backend_get_device"](self._backend)
        extra = CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(device)
        count = next(index for index in itertools.count() if not extra[index])
        candidates = [*extra[:count], self._default_buffer()]
        return next(buffer for buffer in candidates if self._supports(device, buffer))

    def _supports(self, device: int, buffer: int) -> bool:
        weights, (context, storage) = self._weights(buffer, 1)
        other = self._context(2)
        x = self._c["new_tensor_2d"](other, 0, self._problem.in_features, self._problem.tokens)
        supported = self._c["backend_dev_supports_op"](device, self._c["mul_mat"](other, weights[0], x))
        self._c["free"](other)
        self._c["backend_buffer_free"](storage)
        self._c["free"](context)
        return supported

    def _products(self, weights: list[int], x: np.ndarray) -> tuple[int, list[int]]:
        nodes = len(weights) + 1
        context = self._context(nodes, self._c["graph_overhead_custom"](2 * nodes, False))
        tensor = self._c["new_tensor_2d"](context, 0, x.shape[1], x.shape[0])  # type 0 is float32
        outputs = [self._c["mul_mat"](context, weight, tensor) for weight in weights]
        graph = self._c["new_graph_custom"](context, 2 * nodes, False)
        for output in outputs:
            self._c["build_forward_expand"](graph, output)
        if not self._c["backend_alloc_ctx_tensors_from_buft"](context, self._default_buffer()):
            raise MemoryError("ggml: no buffer for the outputs")
        x = np.ascontiguousarray(x)
        self._c["backend_tensor_set"](tensor, x.ctypes.data, 0, x.nbytes)
        return graph, outputs

    def _blocks(self, random: np.random.Generator) -> np.ndarray:
        """uint8 [blocks, bytes per block]: one random linear."""
        weights, size = BLOCK[self._kind]
        count = self._problem.out_features * self._problem.in_features // weights
        blocks = np.frombuffer(random.bytes(count * size), np.uint8).reshape(count, size).copy()
        for offset in SCALES[self._kind]:
            scale = (random.random(count, dtype=np.float32) + np.float32(0.5)) * np.float32(0.001)
            blocks[:, offset : offset + 2] = scale.astype(np.float16)[:, None].view(np.uint8)
        return blocks

    def _dequantize(self, blocks: np.ndarray) -> np.ndarray:
        weight = np.empty((self._problem.out_features, self._problem.in_features), np.float32)
        self._c[f"dequantize_row_{self._kind}"](blocks.ctypes.data, weight.ctypes.data, weight.size)
        return weight
