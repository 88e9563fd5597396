"""The files of a model folder beside its weights and config.json: tokenizer, chat template, generation settings, code.

They are copied, byte for byte, from the folder that a model was loaded from. No stage of amq changes a tokenizer, and
what transformers writes anew is what its own version reads: since version 5 it calls every fast tokenizer
`TokenizersBackend`, a name that transformers 4 and the tools built on it do not know, and refuses to write generation
settings that it loads with a warning. Only what transformers 5 itself wrote is put into the older words, which both
versions read as the same tokenizer.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from amq.util.files import read_json, write_json

PATTERNS = (
    "tokenizer*", "configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt",
    "*.model", "*.tiktoken", "tekken.json", "*.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip
OURS = "modeling_amq.py"
"""Made for each checkpoint anew (`amq.checkpoint.store`), and of no use in an export."""
TOKENIZER_CONFIG = "tokenizer_config.json"
NEW_CLASS, OLD_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"
"""transformers 5's name of a fast tokenizer without a class of its own, and the one that both versions know."""
NEW_TOKENS, OLD_TOKENS = "extra_special_tokens", "additional_special_tokens"
"""Likewise of special tokens without a role; transformers 4 has the new key, too, for something else (a mapping)."""


def copy_model_files(source: Path, folder: Path) -> None:
    """Copies them from the model folder `source` to `folder`, where transformers 4 reads them as well."""
    found = {path for pattern in PATTERNS for path in source.glob(pattern) if path.is_file() and path.name != OURS}
    for path in sorted(found):
        target = folder / path.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)
    if (folder / TOKENIZER_CONFIG).is_file():
        config = read_json(folder / TOKENIZER_CONFIG, floats=True)
        if isinstance(config, dict) and (known := _old_words(config)) != config:
            write_json(folder / TOKENIZER_CONFIG, known)


def _old_words(config: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json without what only transformers 5 understands."""
    config = dict(config)
    if config.get("tokenizer_class") == NEW_CLASS:
        config["tokenizer_class"] = OLD_CLASS
    if isinstance(config.get(NEW_TOKENS), list):
        config[OLD_TOKENS] = [*config.get(OLD_TOKENS, ()), *config.pop(NEW_TOKENS)]
    return config
