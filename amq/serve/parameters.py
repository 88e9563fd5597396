"""Every parameter that clients of OpenAI, vLLM, llama.cpp, SGLang and TGI are known to send, and what becomes of it.

The one table of them: `amq.serve.protocol` takes what is supported, drops what is ignored (and says so: header
X-Amq-Ignored), and refuses by name what would change the answer and cannot be had. /openapi.json lists it all. Names
that nobody knows are dropped too, and named like the ignored ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Handling = Literal["supported", "ignored", "refused"]


@dataclass(frozen=True)
class Parameter:
    """why: what it does, why it does nothing here, or why it cannot be had. nothing: values of a refused one that ask
    for nothing; null always does."""

    name: str
    handling: Handling
    why: str
    nothing: tuple[Any, ...] = ()


def _rows(handling: Handling, why: str, *names: str) -> list[Parameter]:
    return [Parameter(name, handling, why) for name in names]


def _refused(why: str, **nothing: tuple[Any, ...]) -> list[Parameter]:
    return [Parameter(name, "refused", why, values) for name, values in nothing.items()]


_SUPPORTED = {
    "model": "the name at /v1/models, or none; another one is 404",
    "messages": "the conversation; text only",
    "prompt": "a text, token ids, or a list of either; each gets n choices, numbered prompt · n + choice",
    "stream": "server-sent events",
    "stream_options": "include_usage: a last event with the usage; continuous_usage_stats: it is in every event",
    "n": "choices, up to --max-choices with all prompts",
    "max_tokens": "of the answer; above the server's own limit, null or -1: that limit",
    "max_completion_tokens": "as max_tokens, and goes before it",
    "temperature": "0 takes the likeliest token",
    "top_p": "draws from the likeliest that make up this probability; 0 takes the likeliest",
    "top_k": "draws from so many of the likeliest; 0 and -1: all",
    "min_p": "draws from what is at least so many times as likely as the likeliest",
    "repetition_penalty": "divides logits of tokens that came before, the prompt's too",
    "repeat_penalty": "llama.cpp's name of repetition_penalty",
    "presence_penalty": "taken once from logits of new tokens",
    "frequency_penalty": "taken from logits of new tokens as often as they came",
    "logit_bias": "token id → added to its logit, -100 to 100",
    "seed": "of the draws; choice k draws with seed + k; -1: another one every time",
    "stop": "up to 64 texts that end the answer and are not part of it",
    "stop_token_ids": "tokens that end the answer besides the model's own",
    "min_tokens": "no end before so many tokens",
    "ignore_eos": "goes on after an end token",
    "skip_special_tokens": "false: special tokens are part of the text, but for those that end it",
    "logprobs": "log probabilities: of chats true, of completions how many of the likeliest beside the chosen one",
    "top_logprobs": "of chats: how many of the likeliest beside the chosen one",
    "echo": "the answer begins with the prompt, its log probabilities included",
    "add_special_tokens": "false: a text prompt is taken without the tokens that the tokenizer puts around it",
    "tools": "functions that the model may call",
    "tool_choice": "none, auto, required, or one function",
    "parallel_tool_calls": "false: one call per answer at most",
    "response_format": "text, json_object or json_schema",
    "functions": "the older form of tools",
    "function_call": "the older form of tool_choice",
    "chat_template_kwargs": "names for the model's chat template",
    "enable_thinking": "as in chat_template_kwargs",
    "reasoning_effort": "as in chat_template_kwargs",
    "documents": "as in chat_template_kwargs",
    "add_generation_prompt": "false: the model goes on without the beginning of an answer",
    "continue_final_message": "the model goes on with the last message",
    "guided_json": "vLLM's: a JSON schema that the answer keeps to",
    "guided_regex": "vLLM's: a regular expression that the answer matches",
    "guided_grammar": "vLLM's: a grammar in Lark's form or llama.cpp's (GBNF)",
    "guided_choice": "vLLM's: one of these texts",
    "structured_outputs": "vLLM's: json, regex, choice or grammar",
    "json_schema": "llama.cpp's: a JSON schema that the answer keeps to",
    "regex": "SGLang's: a regular expression that the answer matches",
    "grammar": "llama.cpp's name of guided_grammar",
    "ebnf": "SGLang's name of guided_grammar",
}

_IGNORED = [
    *_rows("ignored", "of OpenAI's accounts, storage and billing", "user", "metadata", "store", "service_tier"),
    *_rows("ignored", "of OpenAI's accounts, storage and billing", "safety_identifier", "prompt_cache_key"),
    *_rows("ignored", "of OpenAI's accounts, storage and billing", "prompt_cache_retention"),
    *_rows("ignored", "only makes answers come sooner", "prediction", "cache_prompt", "id_slot", "slot_id"),
    *_rows("ignored", "only makes answers come sooner", "n_cache_reuse", "cache_salt", "kv_transfer_params", "n_keep"),
    *_rows("ignored", "only makes answers come sooner", "n_discard"),
    *_rows("ignored", "turns are fair between clients here", "priority"),
    *_rows("ignored", "answers tell their timings always", "timings_per_token", "return_progress"),
    *_rows("ignored", "a wish about style, which only OpenAI's models know", "verbosity"),
    *_rows("ignored", "text is joined as the tokenizer does", "spaces_between_special_tokens"),
    *_rows("ignored", "a choice among implementations", "guided_decoding_backend", "guided_whitespace_pattern"),
    *_rows("ignored", "a choice among implementations", "samplers", "backend", "mm_processor_kwargs"),
    *_rows("ignored", "has no part in one answer", "request_id", "rid", "session_id", "lora_path"),
    *_rows("ignored", "has no part in one answer", "return_hidden_states"),
    *_rows("ignored", "temperature says it", "do_sample"),
    *_rows("ignored", "thinking is told apart always; --reasoning none turns it off", "include_reasoning"),
    *_rows("ignored", "thinking is told apart always; --reasoning none turns it off", "separate_reasoning"),
    *_rows("ignored", "thinking is told apart always; --reasoning none turns it off", "reasoning_format"),
    *_rows("ignored", "thinking is told apart always; --reasoning none turns it off", "stream_reasoning"),
]  # fmt: skip

_REFUSED = [
    *_refused("the model writes forward only", suffix=("",)),
    *_refused("only text comes out", modalities=(["text"],), audio=()),
    *_refused("the server searches nothing", web_search_options=()),
    *_refused("every choice is handed out: ask for n", best_of=(1,)),
    *_refused("there is no beam search", use_beam_search=(False,), length_penalty=(1, 1.0), early_stopping=(False,)),
    *_refused("this filter of tokens is not made", typical_p=(1, 1.0), tfs_z=(1, 1.0), top_a=(0, 0.0)),
    *_refused("this filter of tokens is not made", mirostat=(0,), dynatemp_range=(0, 0.0), xtc_probability=(0, 0.0)),
    *_refused("this filter of tokens is not made", dry_multiplier=(0, 0.0), top_n_sigma=(-1, -1.0, 0, 0.0)),
    *_refused("this filter of tokens is not made", allowed_token_ids=([],), bad_words=([],), epsilon_cutoff=(0, 0.0)),
    *_refused("the stop text is not part of the answer", include_stop_str_in_output=(False,), no_stop_trim=(False,)),
    *_refused("echo with logprobs of /v1/completions has them", prompt_logprobs=(0,)),
    *_refused("logprobs have each token's text and bytes", return_tokens_as_token_ids=(False,)),
    *_refused("logprobs have each token's text and bytes", return_token_ids=(False,)),
    *_refused("the answer is text", detokenize=(True,)),
    *_refused("a prompt is taken whole or not at all", truncate_prompt_tokens=(), truncation=()),
    *_refused("the template is the model's", chat_template=()),
    *_refused("tags are not parsed: send response_format or tools", structural_tag=()),
]  # fmt: skip

PARAMETERS: dict[str, Parameter] = {
    parameter.name: parameter
    for parameter in [
        *(Parameter(name, "supported", why) for name, why in _SUPPORTED.items()),
        *_IGNORED,
        *_REFUSED,
    ]
}
