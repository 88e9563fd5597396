"""One quantization of a GGUF file with an importance matrix, by the quantizer of llama.cpp or of ik_llama.cpp:

    python -m peers.gguf_quantize llama.cpp SOURCE OUTPUT Q3_K_M IMATRIX [THREADS]        # from the folder benchmarks/

In a process of its own, whose time and memory are then those of this quantization. llama.cpp's is called through
llama-cpp-python, ik_llama.cpp's is the program `llama-quantize` of its wheel.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from amq.errors import AmqError

from . import ik_llama, imatrix, llama_cpp


def by_llama_cpp(source: str, output: str, kind: str, matrix: str, threads: int) -> None:
    """See the head of this file. Raises AmqError where llama.cpp refuses."""
    llama_cpp.quantize_file(source, output, kind, threads, imatrix.read(Path(matrix)))


def by_ik_llama(source: str, output: str, kind: str, matrix: str, threads: int) -> None:
    """Becomes the wheel's program, which says what is wrong itself."""
    found = find_spec("ik_llama_cpp")
    if found is None or found.origin is None:
        raise AmqError(str(ik_llama.unsupported_reason()))
    program = Path(found.origin).parent / "bin" / "llama-quantize"
    os.execv(program, [str(program), "--imatrix", matrix, source, output, kind, str(threads)])


QUANTIZERS = {llama_cpp.NAME: by_llama_cpp, ik_llama.NAME: by_ik_llama}

if __name__ == "__main__":
    name, source, output, kind, matrix, *threads = sys.argv[1:]
    try:
        QUANTIZERS[name](source, output, kind, matrix, int(threads[0]) if threads else 1)
    except AmqError as error:
        sys.exit(str(error))
