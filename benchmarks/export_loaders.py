"""Loads an export in the library it is for, and saves logits: run by export_matrix.py in that library's environment.

    python benchmarks/export_loaders.py LOADER FOLDER TOKENS.json OUT.npy

Nothing of amq is imported. The last line printed is the JSON {"version", "kernels"}.
"""

from __future__ import annotations

import json
import sys
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
}

if __name__ == "__main__":
    loader, folder, tokens_file, output = sys.argv[1:]
    with open(tokens_file) as file:
        tokens = json.load(file)
    logits, facts = LOADERS[loader](folder, tokens)
    np.save(output, logits)
    print(json.dumps(facts))
