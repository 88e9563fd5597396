"""The server's settings: one dataclass is the command line and what `create_app` takes."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any, ClassVar

from amq.errors import AmqError
from amq.model.settings import CHECKPOINT
from amq.runtime.settings import RuntimeSettings
from amq.util.settings import REQUIRED, flag, parse_size

LISTEN, TAKE, ANSWER = "where to listen, whom to admit", "what to take on", "how to read and answer"


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
        [], "clients must send this key; may be repeated; others on the machine can see it: rather set AMQ_API_KEY "
        "(several: commas between them) or --api-key-file", LISTEN, metavar="KEY",
    )  # fmt: skip
    api_key_file: str | None = flag(
        None,
        "file of keys, one per line, # before comments; others must not be able to read it",
        LISTEN,
        metavar="FILE",
    )
    allow_host: list[str] = flag(
        [], "without a key: a name besides localhost and addresses by which clients call the server; may be repeated",
        LISTEN, metavar="NAME",
    )  # fmt: skip
    trust_proxy: list[str] = flag(
        [], "a proxy at this address says in X-Forwarded-For who its clients are; may be repeated", LISTEN,
        metavar="ADDRESS",
    )  # fmt: skip
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
    max_connections: int = flag(
        512, "open connections; above it a newcomer takes the place of one without a request", TAKE, least=1,
        metavar="N",
    )  # fmt: skip
    header_timeout: float = flag(
        10.0, "seconds that the head of a request may take to arrive", TAKE, above=0, metavar="SECONDS"
    )
    stall: float = flag(
        300.0, "seconds that one pass of the engine may take before it is taken for dead, and the server ends with "
        "status 70 for its supervisor", TAKE, above=0, metavar="SECONDS",
    )  # fmt: skip
    max_body: str = flag("1MiB", "largest request body", TAKE, parse=parse_size, metavar="SIZE")
    max_choices: int = flag(
        32, "most answers that one request may ask for (n times its prompts)", TAKE, least=1, metavar="N"
    )
    prompt_cache: str | None = flag(
        None, "keep beginnings of prompts on disk, within this size, for the next start too", TAKE, parse=parse_size,
        metavar="SIZE",
    )  # fmt: skip
    state_cache: str | None = flag(
        None, "memory for states from which conversations go on, of models with recurrent layers (default: by the KV "
        "cache)", TAKE, parse=parse_size, metavar="SIZE",
    )  # fmt: skip
    log_requests: bool = flag(False, "log a line for each request: who, how many tokens; never texts or keys", ANSWER)
    parse_special: bool = flag(False, "take special tokens that are spelled in clients' texts as such", ANSWER)
    reasoning: str = flag(
        "auto", "auto: thinking is a field of its own (reasoning_content); none: it stays in the text", ANSWER,
        choices=("auto", "none"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.api_key):
            raise AmqError("--api-key is empty: give some text, or leave it out to let everyone in")
        for proxy in self.trust_proxy:
            try:
                ipaddress.ip_network(proxy)
            except ValueError:
                raise AmqError(f"--trust-proxy must be an address or a network, got {proxy!r}") from None

    @property
    def loading(self) -> dict[str, Any]:
        """As RuntimeSettings.loading, sizes in bytes."""
        given = super().loading
        for name in ("prompt_cache", "state_cache"):
            if given.get(name) is not None:
                given[name] = parse_size(given[name])
        return given

    @property
    def max_body_bytes(self) -> int:
        return parse_size(self.max_body)


@dataclass(frozen=True)
class ServeCommand:
    """What the command takes besides; `create_app` gets a model that is loaded."""

    model: str = flag(REQUIRED, CHECKPOINT, positional=True)
