"""The settings of `amq split serve|train|eval|report`: what each party, and whoever reads a run, may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from amq.errors import AmqError
from amq.model.settings import MODEL, ModelSettings
from amq.util.settings import CHOOSE, MEASURE, REQUIRED, RUN, Settings, flag, parse_time

TRAIN, BITS, LINK = "how to train", "what goes over the wire", "the connection"
ACTIONS = ("serve", "train", "eval", "report")
POLICIES = ("none", "fixed", "aq-sgd", "amaq", "waterfill", "step")
CODERS = ("none", "range")
LABELS = ("server", "client")
LEAST_BITS = {"fixed": 1.0, "aq-sgd": 1.0, "waterfill": 1.0, "amaq": 2.0}
"""What a channel has at least, by policy; `step` has fractions of a bit."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class SplitSettings(Settings):
    """Of `amq split` itself: which of the four."""

    VERB: ClassVar[str] = "split"
    ABOUT: ClassVar[str] = "fine-tunes a model's LoRA over two machines, with few bits on the wire (AMAQ)"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq split serve smollm2 --cut 10 --port 7000",
        "amq split train smollm2 --cut 10 --server 127.0.0.1:7000 --policy waterfill --output runs/split",
    )

    action: str = flag(
        "train",
        "serve: holds the later blocks; train: holds the text and the first blocks; eval: perplexities of a run; "
        "report: its page; each has a --help of its own",
        choices=ACTIONS,
        positional=True,
    )


@dataclass(frozen=True, kw_only=True)
class PartySettings(ModelSettings):
    """What both parties take. cut: None for a third of the blocks."""

    model: str = flag(REQUIRED, MODEL + "; the same at both parties", positional=True)
    cut: int | None = flag(
        None, "blocks that the training side holds, from the first on (default a third)", CHOOSE, least=1, metavar="N"
    )
    lora: int = flag(8, "rank of the adapters of every linear in the blocks", CHOOSE, least=1, most=1024, metavar="R")
    lora_alpha: float = flag(16.0, "their scale is alpha / rank", CHOOSE, above=0, metavar="A")
    key: str | None = flag(
        None, "a file with a secret that both parties have: every frame is authenticated", LINK, metavar="FILE"
    )
    deadline: str | float = flag("30s", "how long the other party may be silent", LINK, parse=parse_time, metavar="T")
    reconnect: str | float = flag(
        "10min", "how long to wait for a party that is gone", LINK, parse=parse_time, metavar="T"
    )
    resume: bool = flag(False, "go on from the last state in --output")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(PartySettings):
    VERB: ClassVar[str] = "split serve"
    ABOUT: ClassVar[str] = "holds the later blocks of a model that another machine trains, and trains their LoRA"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq split serve smollm2 --cut 10 --lora 8 --port 7000",
        "amq split serve smollm2 --host 0.0.0.0 --key secret.txt --policy waterfill --resume",
    )

    host: str = flag("127.0.0.1", "address to listen on; any but this machine's own needs --key", LINK)
    port: int = flag(7000, "port to listen on; 0 for any that is free", LINK, least=0, most=65535, metavar="N")
    policy: str | None = flag(
        None, "refuse a client with another policy (default: take the client's)", BITS, choices=POLICIES
    )
    seed: int | None = flag(None, "refuse a client with another seed", TRAIN, least=0, metavar="N")
    output: str = flag("runs/split-server", "folder of this party's states", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.host not in LOOPBACK and self.key is None:
            raise AmqError(
                f"--host {self.host} lets other machines in, which needs --key FILE: a file with a secret that both "
                "parties have"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings(PartySettings):
    VERB: ClassVar[str] = "split train"
    ABOUT: ClassVar[str] = "trains a model's LoRA: the first blocks and the text here, the later blocks at a server"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq split train smollm2 --cut 10 --server 127.0.0.1:7000 --steps 150 --policy waterfill --target-bits 3",
        "amq split train smollm2 --server 10.0.0.2:7000 --key secret.txt --text notes.txt --policy amaq --resume",
    )

    server: str = flag(REQUIRED, "the server's address and port", LINK, metavar="HOST:PORT")
    link: str = flag("", "pretend a slower network, such as 20mbit,30ms, both ways", LINK, metavar="RATE,LATENCY")
    text: str = flag("docstrings", "a text file, wikitext2, c4, pydoc or docstrings", TRAIN, metavar="TEXT")
    samples: int = flag(
        0, "windows of the text to train on, in every epoch anew (default: all but the held-out)", TRAIN, least=0,
        metavar="N",
    )  # fmt: skip
    window_length: int = flag(128, "tokens per window, BOS included", TRAIN, least=4, metavar="N")
    batch: int = flag(4, "windows per step", TRAIN, least=1, metavar="N")
    micro_batches: int = flag(2, "parts of a step; two are on their way at a time", TRAIN, least=1, most=65535,
                              metavar="N")  # fmt: skip
    steps: int = flag(150, "steps in all", TRAIN, least=1, most=10**9, metavar="N")
    learning_rate: float = flag(2e-4, "of AdamW, falling linearly to 0", TRAIN, above=0, metavar="X")
    clip: float = flag(1.0, "largest norm of each party's gradient", TRAIN, above=0, metavar="X")
    labels: str = flag("server", "who computes the loss: client is the U-shape, where no token leaves", TRAIN,
                       choices=LABELS)  # fmt: skip
    seed: int = flag(0, "of the adapters' start and the order of samples", TRAIN, least=0, most=2**31 - 1, metavar="N")
    policy: str = flag("waterfill", "how many bits each channel gets: " + ", ".join(POLICIES), BITS, choices=POLICIES)
    coder: str = flag("none", "entropy coder behind it: none or range", BITS, choices=CODERS)
    start_bits: float = flag(6.0, "mean bits per value at the first step, of amaq, waterfill and step", BITS,
                             above=0, most=8, metavar="B")  # fmt: skip
    target_bits: float = flag(3.0, "mean bits per value to reach", BITS, above=0, most=8, metavar="B")
    backward_bits: float | None = flag(
        None, "the same of gradients (default: as forward; 8 with aq-sgd)", BITS, above=0, most=8, metavar="B"
    )
    beta: float = flag(1.0, "of amaq: weight of the loss of bits", BITS, least=0, metavar="X")
    range_tokens: int = flag(0, "tokens that share a channel's range (default: a whole micro-batch)", BITS, least=0,
                             metavar="N")  # fmt: skip
    half: bool = flag(False, "with --policy none: send float16 instead of float32", BITS)
    save_every: int = flag(10, "steps between states on disk", least=1, metavar="N")
    output: str = flag("runs/split", "folder of the run", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % self.micro_batches:
            raise AmqError(
                f"--batch {self.batch} windows do not divide into --micro-batches {self.micro_batches}: give a multiple"
            )
        if self.half and self.policy != "none":
            raise AmqError(f"--half is of --policy none; --policy {self.policy} quantizes")
        if self.coder != "none" and self.policy == "none":
            raise AmqError("--coder codes quantized values: --policy none has none")
        if self.backward_bits is not None and self.policy in ("none", "amaq"):
            raise AmqError(
                f"--backward-bits is of policies whose gradients have a mean of their own: --policy {self.policy} "
                + ("quantizes nothing" if self.policy == "none" else "sends them with the widths of the hidden states")
            )
        least = LEAST_BITS.get(self.policy, 0.0)
        for name in ("start_bits", "target_bits", "backward_bits"):
            if (bits := getattr(self, name)) is not None and bits < least:
                flag_name = "--" + name.replace("_", "-")
                raise AmqError(
                    f"--policy {self.policy} gives every channel at least {least:g} bits: {flag_name} must be "
                    f"{least:g} or more, got {bits:g}"
                )


@dataclass(frozen=True, kw_only=True)
class SplitEvalSettings(Settings):
    VERB: ClassVar[str] = "split eval"
    ABOUT: ClassVar[str] = "perplexities of a split run: before, after, and with the cut quantized"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq split eval runs/split",
        "amq split eval runs/split --text held-out.txt --max-tokens 8192",
    )

    run: str = flag(REQUIRED, "folder of a finished run", positional=True)
    text: str | None = flag(None, "a text (default: what the run held out of its own)", MEASURE, metavar="TEXT")
    max_tokens: int = flag(8192, "tokens of the text to use", MEASURE, least=1, metavar="N")
    model: str | None = flag(None, "where the model is, if not where the run had it", metavar="MODEL")
    device: str = flag("cpu", "where the model runs, in torch's words", RUN, metavar="DEVICE")


@dataclass(frozen=True, kw_only=True)
class SplitReportSettings(Settings):
    VERB: ClassVar[str] = "split report"
    ABOUT: ClassVar[str] = "writes the page and the charts of one or several split runs"
    EXAMPLES: ClassVar[tuple[str, ...]] = (
        "amq split report runs/split",
        "amq split report runs/none runs/fixed runs/waterfill --output runs/compared",
    )

    runs: tuple[str, ...] = flag(REQUIRED, "folders of runs", positional=True)
    output: str | None = flag(None, "folder for the page (default: the first run's)", metavar="FOLDER")
