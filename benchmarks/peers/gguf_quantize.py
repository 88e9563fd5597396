"""One quantization of a GGUF file with an importance matrix, by the quantizer of llama.cpp or of ik_llama.cpp:

    python -m peers.gguf_quantize llama.cpp SOURCE OUTPUT Q3_K_M IMATRIX [THREADS]        # from the folder benchmarks/

In a process of its own, whose time and memory are then those of this quantization.
"""

from __future__ import annotations

import sys
from pathlib import Path

from amq.bench.peers import ik_llama, llama_cpp
from amq.errors import AmqError

from . import imatrix


def by_llama_cpp(source: str, output: str, kind: str, matrix: Path, threads: int) -> None:
    llama_cpp.quantize_file(source, output, kind, threads, imatrix.read(matrix))


def by_ik_llama(source: str, output: str, kind: str, matrix: Path, threads: int) -> None:
    ik_llama.quantize_file(source, output, kind, threads, matrix)


QUANTIZERS = {llama_cpp.NAME: by_llama_cpp, ik_llama.NAME: by_ik_llama}

if __name__ == "__main__":
    name, source, output, kind, matrix, *threads = sys.argv[1:]
    try:
        QUANTIZERS[name](source, output, kind, Path(matrix), int(threads[0]) if threads else 1)
    except AmqError as error:
        sys.exit(str(error))
