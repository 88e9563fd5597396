"""/tokenize and /detokenize: text and chats as token ids, and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request

from amq.serve.generation import chat_prompt
from amq.serve.messages import tools_of
from amq.serve.protocol import DetokenizeRequest, TokenizeRequest, bad, check_ids
from amq.serve.responses import Text, Tokens

if TYPE_CHECKING:
    from amq.serve.app import Service


async def tokenize(service: Service, request: Request, body: TokenizeRequest) -> Tokens:
    """Raises ApiError."""
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise bad(given[1] if given else "prompt", "expected one of prompt, content and messages")

    def make() -> list[int]:
        if body.messages is not None:
            return chat_prompt(service, body, body.messages, tools_of(body.tools or ())).tokens
        if body.content is not None:
            return service.encode(body.content, bool(body.add_special or body.add_special_tokens))
        return service.encode(body.prompt or "", body.add_special_tokens is not False)

    tokens = await service.make(request, make)
    return Tokens(tokens, len(tokens), service.runtime.engine.context)


async def detokenize(service: Service, request: Request, body: DetokenizeRequest) -> Text:
    """Raises ApiError."""
    check_ids("tokens", body.tokens, service.vocabulary)
    text = await service.make(request, lambda: service.runtime.tokenizer.decode(body.tokens))
    return Text(text, text)
