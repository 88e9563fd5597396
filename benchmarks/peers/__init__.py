"""Peers of our GEMV: every library and format that `bench_gemv.py` compares with; each is optional.

Peers of a whole model are in amq/bench/peers. Here are besides, for `engine_large.py` and `equal_bytes.py`, what they
make GGUF files with.
"""

from __future__ import annotations

from .auto_round import AutoRound
from .base import Peer
from .ggml import Ggml
from .onnxruntime_nbits import OnnxRuntime
from .torch_linear import TorchDense, TorchInt4

PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        OnnxRuntime("int2", 2),
        AutoRound("int2", 2),
        Ggml("int2", "q2_K"),
        AutoRound("int3", 3),
        Ggml("int3", "q3_K"),
        OnnxRuntime("int4", 4),
        AutoRound("int4", 4),
        TorchInt4(),
        Ggml("int4", "q4_0"),
        Ggml("int4", "q4_K"),
        OnnxRuntime("int8", 8),
        Ggml("int8", "q8_0"),
        TorchDense("bfloat16"),
        TorchDense("float32"),
    )
}
"""By name; `rival` says which of our formats each is compared with."""
