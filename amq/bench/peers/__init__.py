"""Other engines that `amq bench --peers` measures in turn with ours, each in processes of its own; each is optional.

`strongest` finds the fastest way in which each runs a model here, `gguf` the file that it runs. Nothing here imports a
peer's package: what needs one does it inside the peer's process.
"""

from __future__ import annotations

from amq.bench.peers.base import Peer
from amq.util.lazy import Registry

PEERS: Registry[Peer] = Registry(
    "peer",
    {
        "llama.cpp": "amq.bench.peers.llama_cpp:PEER",
        "ik_llama.cpp": "amq.bench.peers.ik_llama:PEER",
        "xllamacpp": "amq.bench.peers.xllamacpp:PEER",
    },
)
