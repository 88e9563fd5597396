"""What a model's text means: thoughts, content, calls of tools; and the grammars that make a text be such a thing.

Text in, parts out: nothing here knows HTTP, tokens of a prompt, or the engine.
"""

from amq.serve.replies.describe import describe_tools
from amq.serve.replies.formats import FORMATS, ToolFormat, format_of, thinking_shown, thinks_open
from amq.serve.replies.grammars import Thoughts, response_grammar, tools_grammar
from amq.serve.replies.parser import ReplyParser
from amq.serve.replies.parts import CallArguments, CallStart, Content, Part, Reasoning

__all__ = [
    "FORMATS",
    "CallArguments",
    "CallStart",
    "Content",
    "Part",
    "Reasoning",
    "ReplyParser",
    "Thoughts",
    "ToolFormat",
    "describe_tools",
    "format_of",
    "response_grammar",
    "thinking_shown",
    "thinks_open",
    "tools_grammar",
]
