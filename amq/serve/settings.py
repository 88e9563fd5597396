"""The server's settings: one dataclass is the command line and what `create_app` takes."""

from __future__ import annotations

from dataclasses import dataclass

from amq.errors import AmqError
from amq.kernels.backends import ACTIVATIONS, BACKENDS
from amq.util.settings import TRUST_REMOTE_CODE, flag, parse_size


@dataclass
class ServeSettings:
    """Where the server listens, whom it admits, what it takes on. Raises AmqError for values that do not fit."""

    host: str = flag("127.0.0.1", "address to listen on; 0.0.0.0 lets other machines in", metavar="ADDRESS")
    port: int = flag(8000, "port to listen on; 0 takes a free one", metavar="PORT")
    api_key: list[str] = flag([], "clients must send this key; may be repeated (or set AMQ_API_KEY)", metavar="KEY")
    cors: list[str] = flag([], "web pages of this origin may call the server; may be repeated", metavar="ORIGIN")
    model_name: str | None = flag(None, "what clients call the model (default: the folder's name)", metavar="NAME")
    queue: int = flag(64, "requests that may wait; more are answered with 429", metavar="N")
    max_sequences: int = flag(8, "requests that run at the same time", metavar="N")
    context: int | None = flag(None, "positions of one request's KV cache (default: the engine's choice)", metavar="N")
    max_prompt_tokens: int | None = flag(None, "longest prompt (default: what fits the context)", metavar="N")
    max_new_tokens: int = flag(1024, "most tokens that one answer may have, and have unless it says less", metavar="N")
    timeout: float = flag(600.0, "seconds that a request may take, waiting included", metavar="SECONDS")
    write_timeout: float = flag(30.0, "seconds that a client may leave what was sent unread", metavar="SECONDS")
    drain: float = flag(30.0, "seconds that running requests have to finish after SIGTERM", metavar="SECONDS")
    max_body: str = flag("1MiB", "largest request body", metavar="SIZE")
    threads: int | None = flag(None, "CPU threads (default: torch's choice)", metavar="N")
    activations: str | None = flag(None, "int8 or fp32 (exact); default: int8 on backend cpu", choices=ACTIVATIONS)
    backend: str | None = flag(None, "what multiplies the quantized linears (default: the fastest)", choices=BACKENDS)
    device: str = flag("cpu", "where the model runs", metavar="DEVICE")
    dtype: str = flag("auto", "of what is not quantized (auto: float32 on a CPU)", metavar="DTYPE")
    trust_remote_code: bool = flag(False, TRUST_REMOTE_CODE)

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_new_tokens", "context", "max_prompt_tokens", "threads"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise AmqError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
        for name in ("timeout", "write_timeout", "drain", "queue"):
            if not getattr(self, name) >= 0:  # NaN too
                raise AmqError(f"--{name.replace('_', '-')} must be 0 or more, got {getattr(self, name)}")
        if not 0 <= self.port < 2**16:
            raise AmqError(f"--port must be from 0 to {2**16 - 1}, got {self.port}")
        if not all(self.api_key):
            raise AmqError("--api-key is empty: give some text, or leave it out to let everyone in")
        self.max_body_bytes = parse_size(self.max_body)
