"""What llama.cpp says of a GGUF file, in a process of its own, which an error of llama.cpp may end.

As a script: reads {"file", "tokens", "vocabulary"} as JSON from stdin, prints {token: log-probability} of what follows.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MARK = "log-probabilities: "


def last_position(file: Path, tokens: list[int], vocabulary: int) -> dict[int, float]:
    """{token: log-probability} after `tokens`; in one thread, attention and its cache in 32 bits."""
    question = json.dumps({"file": str(file), "tokens": tokens, "vocabulary": vocabulary})
    done = subprocess.run([sys.executable, __file__], input=question, capture_output=True, text=True, timeout=120)
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    assert answers, (done.stdout + done.stderr)[-2000:]
    return {int(token): value for token, value in json.loads(answers[0].removeprefix(MARK)).items()}


def main() -> None:
    import xllamacpp

    question: dict[str, Any] = json.load(sys.stdin)
    settings = xllamacpp.CommonParams()
    settings.model.path = question["file"]
    settings.n_ctx, settings.n_parallel, settings.warmup, settings.fit_params = 256, 1, False, False
    settings.cpuparams.n_threads = 1
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    asked = {"prompt": question["tokens"], "n_predict": 1, "n_probs": question["vocabulary"], "temperature": 1.0}
    for seed in range(8):  # it says nothing where it chooses a token that ends the text
        said = server.handle_completions(asked | {"seed": seed, "cache_prompt": False})["choices"][0]["logprobs"]
        if said and said["content"]:
            print(MARK + json.dumps({top["id"]: top["logprob"] for top in said["content"][0]["top_logprobs"]}))
            return


if __name__ == "__main__":
    main()
