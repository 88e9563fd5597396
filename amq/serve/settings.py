"""The server's settings: one dataclass is the command line and what `create_app` takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.errors import AmqError
from amq.model.settings import CHECKPOINT
from amq.runtime.settings import RuntimeSettings
from amq.util.settings import REQUIRED, flag, parse_size

LISTEN, TAKE = "where to listen, whom to admit", "what to take on"


@dataclass(frozen=True, kw_only=True)
class ServeSettings(RuntimeSettings):
    """Where the server listens, whom it admits, what it takes on."""

    VERB: ClassVar[str] = "serve"
    ABOUT: ClassVar[str] = "serves a model with OpenAI's API, a chat page and metrics"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq serve smollm2-4bit",
        "amq serve smollm2-4bit --host 0.0.0.0 --port 8080 --api-key secret --context 8192",
    )

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in", LISTEN, metavar="ADDRESS")
    port: int = flag(8000, "port to listen on; 0 takes a free one", LISTEN, least=0, most=2**16 - 1, metavar="PORT")
    api_key: list[str] = flag(
        [], "clients must send this key; may be repeated (or set AMQ_API_KEY)", LISTEN, metavar="KEY"
    )
    cors: list[str] = flag(
        [], "web pages of this origin may call the server; may be repeated", LISTEN, metavar="ORIGIN"
    )
    model_name: str | None = flag(
        None, "what clients call the model (default: the folder's name)", LISTEN, metavar="NAME"
    )
    queue: int = flag(64, "requests that may wait; more are answered with 429", TAKE, least=0, metavar="N")
    max_sequences: int = flag(8, "requests that run at the same time", TAKE, least=1, metavar="N")
    context: int | None = flag(
        None, "positions of one request's KV cache (default: the engine's choice)", TAKE, least=1, metavar="N"
    )
    max_prompt_tokens: int | None = flag(
        None, "longest prompt (default: what fits the context)", TAKE, least=1, metavar="N"
    )
    max_new_tokens: int = flag(
        1024, "most tokens that one answer may have, and have unless it says less", TAKE, least=1, metavar="N"
    )
    timeout: float = flag(600.0, "seconds that a request may take, waiting included", TAKE, least=0, metavar="SECONDS")
    write_timeout: float = flag(
        30.0, "seconds that a client may leave what was sent unread", TAKE, least=0, metavar="SECONDS"
    )
    drain: float = flag(
        30.0, "seconds that running requests have to finish after SIGTERM", TAKE, least=0, metavar="SECONDS"
    )
    max_body: str = flag("1MiB", "largest request body", TAKE, parse=parse_size, metavar="SIZE")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.api_key):
            raise AmqError("--api-key is empty: give some text, or leave it out to let everyone in")

    @property
    def max_body_bytes(self) -> int:
        return parse_size(self.max_body)


@dataclass(frozen=True)
class ServeCommand:
    """What the command takes besides; `create_app` gets a model that is loaded."""

    model: str = flag(REQUIRED, CHECKPOINT, positional=True)
