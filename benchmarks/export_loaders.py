"""Loads an export in the library it is for, and saves logits: run by export_matrix.py in that library's environment.

    python benchmarks/export_loaders.py LOADER FOLDER TOKENS.json OUT.npy

Nothing of amq is imported. The last line printed is the JSON {"version", "kernels"}.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from importlib.metadata import version

import numpy as np


def gptqmodel(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    import torch
    from gptqmodel import BACKEND, GPTQModel

    model = GPTQModel.load(folder, backend=BACKEND.GPTQ_TORCH, device="cpu", dtype=torch.float16).model
    return _logits(model, tokens), {"version": version("gptqmodel"), "kernels": _kernels(model)}


def transformers_gptq(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    from transformers import GPTQConfig

    with open(f"{folder}/quantize_config.json") as file:
        bits = json.load(file)["bits"]
    model = _transformers(folder, GPTQConfig(bits=bits, backend="gptq_torch"))
    return _logits(model, tokens), {"version": f"optimum {version('optimum')}", "kernels": _kernels(model)}


def auto_round(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    from transformers import AutoRoundConfig

    model = _transformers(folder, AutoRoundConfig(backend="torch"))
    return _logits(model, tokens), {"version": version("auto-round"), "kernels": _kernels(model)}


def auto_round_own_choice(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    model = _transformers(folder)
    return _logits(model, tokens), {"version": version("auto-round"), "kernels": _kernels(model)}


def mlx_lm(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    import mlx.core as mx
    from mlx_lm import load

    logits = load(folder)[0](mx.array([tokens]))[0]
    return np.array(logits.astype(mx.float32)), {"version": version("mlx-lm"), "kernels": f"mlx {version('mlx-cpu')}"}


def llama_cpp(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    """As people run it: activations in blocks of int8."""
    return _llama_cpp(f"{folder}/model.gguf", tokens), {"version": version("llama-cpp-python")}


def llama_cpp_float32(folder: str, tokens: list[int]) -> tuple[np.ndarray, dict]:
    """The file's own weights, dequantized into another GGUF: what the export did, without llama.cpp's int8."""
    import gguf

    reader = gguf.GGUFReader(f"{folder}/model.gguf")
    with tempfile.TemporaryDirectory() as temporary:
        writer = gguf.GGUFWriter(f"{temporary}/float32.gguf", reader.fields["general.architecture"].contents())
        for name, field in reader.fields.items():
            if not name.startswith(("GGUF.", "general.architecture")):
                element = field.types[-1] if len(field.types) > 1 else None
                writer.add_key_value(name, field.contents(), field.types[0], element)
        for tensor in reader.tensors:
            writer.add_tensor(tensor.name, gguf.dequantize(tensor.data, tensor.tensor_type))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return _llama_cpp(f"{temporary}/float32.gguf", tokens), {"version": version("llama-cpp-python")}


def _llama_cpp(path: str, tokens: list[int]) -> np.ndarray:
    import llama_cpp.llama_cpp as library
    from llama_cpp import Llama

    defaults = library.llama_model_default_params

    def parameters():  # without AMX buffers, with which 0.3.36 crashes in some sandboxes, on any file
        chosen = defaults()
        chosen.use_extra_bufts = False
        return chosen

    library.llama_model_default_params = parameters
    llama = Llama(path, n_ctx=len(tokens), logits_all=True, verbose=False)
    llama.eval(tokens)
    logits = llama.scores[: len(tokens)].copy()
    llama.close()
    return logits


def _transformers(folder: str, settings: object = None):
    import torch
    from transformers import AutoModelForCausalLM

    options = {"quantization_config": settings} if settings else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu", **options)


def _kernels(model) -> str:
    kinds = Counter(type(m).__module__ for m in model.modules() if hasattr(m, "qweight"))
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def _logits(model, tokens: list[int]) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


LOADERS = {
    "gptqmodel": gptqmodel,
    "transformers-gptq": transformers_gptq,
    "auto-round": auto_round,
    "auto-round-own-choice": auto_round_own_choice,
    "mlx-lm": mlx_lm,
    "llama.cpp": llama_cpp,
    "llama.cpp-float32": llama_cpp_float32,
}

if __name__ == "__main__":
    loader, folder, tokens_file, output = sys.argv[1:]
    with open(tokens_file) as file:
        tokens = json.load(file)
    logits, facts = LOADERS[loader](folder, tokens)
    np.save(output, logits)
    print(json.dumps(facts))
