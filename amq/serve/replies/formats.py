"""How models spell the calls of tools: one record per family, recognised by what the chat template spells.

The parser (parser.py) reads by `markers` and `bare` alone and finds out itself which of the spellings stands behind a
marker; grammars (grammars.py) and conversations (describe.py) are written by the other fields. A new family whose calls
are one of these spellings behind another marker is one more record in FORMATS.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from amq.model.conversations import THINKING

if TYPE_CHECKING:
    from amq.runtime.tokenizer import Tokenizer


@dataclass(frozen=True)
class Marker:
    """What stands before a call, and behind it ("": nothing).

    strict: the marker also stands before other things, so only what is a call from its first key on is one.
    """

    opens: str
    closes: str = ""
    strict: bool = False


BARE = Marker("", strict=True)
"""Of a call that begins without a marker."""


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models spells calls.

    spelled: texts that its chat templates have, all of them; quotes are compared without the backslash before them.
    bare: an answer that begins with a JSON object of a name and arguments is a call.
    opens, call, between, closes: how calls are written: `call` is what stands before a name, between the name and the
    arguments, and behind these. Of models, a space in `opens` may be missing.
    xml: arguments are written <parameter=name>, not as JSON.
    several: whether an answer may hold more than one call.
    short_ids: ids are nine letters and digits; its templates refuse others.
    described: the template knows no tools (or in a way that is not known here): a system message of ours describes
    them, and results are users' messages (describe.py). `{tools}` stands for their JSON, one a line, `{list}` for
    the list of them. "": the template does all that.
    """

    name: str
    spelled: tuple[str, ...]
    markers: tuple[Marker, ...]
    call: tuple[str, str, str]
    opens: str = ""
    between: str = "\n"
    closes: str = ""
    bare: bool = False
    xml: bool = False
    several: bool = True
    short_ids: bool = False
    described: str = ""

    def shown(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of the special tokens that the parser must see as text."""
        return _special(tokenizer, self.spellings)

    @property
    def spellings(self) -> tuple[str, ...]:
        """Texts that may be special tokens of the tokenizer."""
        ends = [text for marker in self.markers for text in (marker.opens, marker.closes) if text]
        return (*ends, ARGUMENTS, CALL_ID) if ARGUMENTS in self.call[1] else tuple(ends)

    def new_id(self) -> str:
        """Of a call; no other has it."""
        if self.short_ids:
            return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
        return f"call_{secrets.token_hex(12)}"


ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
"""Of Mistral: between a call's name, its id and its arguments."""
TAGS = Marker("<tool_call>", "</tool_call>")
LOOSE = (
    Marker("<tools>", "</tools>", strict=True),
    Marker("```json", "```", strict=True),
)
"""Where small models (Qwen2.5-Coder) put their calls instead."""
JSON_CALL = ('{"name": "', '", "arguments": ', "}")
HERMES_CALL = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")

DESCRIBED = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
"""In the words of Hermes 2 Pro and Qwen, which other models have read too."""

DESCRIBED_SMOLLM = """You are an expert in composing functions. You are given a question and a set of possible \
functions.
Based on the question, you will need to make one or more function/tool calls to achieve the purpose.
If none of the functions can be used, point it out and refuse to answer.
If the given question lacks the parameters required by the function, also point it out.

You have access to the following tools:
<tools>{list}</tools>

The output MUST strictly adhere to the following format, and NO other text MUST be included.
The example format is as follows. Please make sure the parameter type is correct. If no function call is needed, \
please make the tool calls an empty list '[]'.
<tool_call>[
{"name": "func_name1", "arguments": {"argument1": "value1", "argument2": "value2"}},
... (more tool calls as required)
]</tool_call>"""
"""What SmolLM2 was trained on, as its card says; its chat template does not."""

GENERIC = ToolFormat("generic", (), (TAGS, *LOOSE), HERMES_CALL, bare=True, described=DESCRIBED)
"""Of a template that no record is recognised in."""

FORMATS = (
    ToolFormat(
        "qwen3-coder",
        ("<tool_call>", "<function=", "<parameter="),
        (TAGS, Marker("<function=")),
        ("<tool_call>\n<function=", ">\n", "</function>\n</tool_call>"),
        xml=True,
    ),
    ToolFormat(
        "mistral-args",
        ("[TOOL_CALLS]", "[ARGS]"),
        (Marker("[TOOL_CALLS]"),),
        ("[TOOL_CALLS]", "[ARGS]", ""),
        between="",
        short_ids=True,
    ),
    ToolFormat(
        "mistral",
        ("[TOOL_CALLS]",),
        (Marker("[TOOL_CALLS]"),),
        JSON_CALL,
        opens="[TOOL_CALLS] [",
        between=", ",
        closes="]",
        short_ids=True,
    ),
    ToolFormat("hermes", ("<tool_call>", '"name"', "tools"), (TAGS, *LOOSE), HERMES_CALL, bare=True),
    ToolFormat(
        "llama3",
        ("<|start_header_id|>", '"parameters": ', "tools"),
        (Marker("<|python_tag|>"),),
        ('{"name": "', '", "parameters": ', "}"),
        between="; ",
        bare=True,
        several=False,
    ),
    ToolFormat(
        "smollm2",
        ("named SmolLM,", "<|im_start|>"),
        (TAGS, *LOOSE),
        JSON_CALL,
        opens="<tool_call>[",
        between=", ",
        closes="]</tool_call>",
        bare=True,
        described=DESCRIBED_SMOLLM,
    ),
    GENERIC,
)
"""The first that the template spells is taken. The last fits every template."""


def format_of(template: str | None) -> ToolFormat | None:
    """The format of the model with this chat template; None where it has no template."""
    if template is None:
        return None
    plain = template.replace('\\"', '"')
    return next(known for known in FORMATS if all(text in plain for text in known.spelled))


def thinks_open(prompt: str) -> bool:
    """Whether a prompt ends inside the model's thoughts: some templates begin these themselves."""
    return prompt.rstrip().endswith(tuple(opens for opens, _ in THINKING))


def thinking_shown(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the special tokens around thoughts, where they are special."""
    return _special(tokenizer, (text for pair in THINKING for text in pair))


def _special(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[int, ...]:
    found = (tokenizer.special_named(text) for text in texts)
    return tuple(sorted({token for token in found if token is not None}))
