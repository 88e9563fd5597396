"""What the commands do: open the model, agree on terms, and let the two loops run."""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
from pathlib import Path

import torch

import amq
from amq.errors import AmqError
from amq.model.inventory import find_blocks
from amq.model.open import LoadedModel, load_model, model_fingerprint
from amq.model.text import load_corpus
from amq.split.client import Client, Reach
from amq.split.data import windows_of
from amq.split.link import Throttle
from amq.split.model import Part, check_cut, default_cut, take_part
from amq.split.party import Party
from amq.split.records import PACKAGES, SplitRun
from amq.split.server import Door, Server
from amq.split.settings import LOOPBACK, PartySettings, ServeSettings, TrainSettings
from amq.split.state import States
from amq.split.terms import AQ_SGD_BACKWARD, Terms
from amq.split.wire import secret
from amq.util.files import check_place
from amq.util.limits import fit_threads
from amq.util.machine import cpu_name, installed_versions
from amq.util.progress import Progress
from amq.util.settings import parse_time

LEAST_DEADLINE, MOST_DEADLINE = 1.0, 24 * 3600.0


def open_for(settings: PartySettings, host: str) -> tuple[LoadedModel, int]:
    """The model, and the cut that the settings mean for it. host: at which the parties meet."""
    threads = fit_threads()
    if host in LOOPBACK and "OMP_NUM_THREADS" not in os.environ:  # both parties are on this machine
        torch.set_num_threads(max(1, threads // 2))
    loaded = load_model(settings.model, settings.dtype, settings.device, settings.trust_remote_code)
    blocks = len(find_blocks(loaded.model)[1])
    cut = default_cut(blocks) if settings.cut is None else settings.cut
    check_cut(cut, blocks)
    return loaded, cut


def key_of(settings: PartySettings) -> bytes:
    """The key of --key's file; empty without one."""
    if settings.key is None:
        return b""
    try:
        text = Path(settings.key).read_bytes()
    except OSError as error:
        raise AmqError(f"--key {settings.key} cannot be read: {error.strerror or error}") from None
    return secret(text, settings.key)


def deadline_of(settings: PartySettings) -> float:
    """Seconds. Raises AmqError where no sign of life could come in time."""
    seconds = parse_time(settings.deadline)
    if not LEAST_DEADLINE <= seconds <= MOST_DEADLINE:
        raise AmqError(f"--deadline {settings.deadline}: expected {LEAST_DEADLINE:g} s to {MOST_DEADLINE / 3600:g} h")
    return seconds


def run_serve(settings: ServeSettings, progress: Progress) -> None:
    """`amq split serve`: until the run is finished."""
    output, key, deadline = Path(settings.output), key_of(settings), deadline_of(settings)
    check_place(output, "--output")
    states = States(output)
    states.hold()
    states.check_new(settings.resume)
    with listen(settings.host, settings.port) as listener:
        _serve(settings, output, listener, key, deadline, progress)
    progress.say(f"finished: the adapter is with the client, this party's states are in {output}")


def _serve(
    settings: ServeSettings, output: Path, listener: socket.socket, key: bytes, deadline: float, progress: Progress
) -> None:
    loaded, cut = open_for(settings, settings.host)
    model = loaded.model
    host, port = listener.getsockname()[:2]
    own = {
        "version": amq.__version__, "dtype": str(model.dtype).removeprefix("torch."), "model": model_fingerprint(model),
        "cut": cut, "lora": settings.lora, "lora_alpha": settings.lora_alpha,
    }  # fmt: skip
    own |= {name: value for name, value in (("policy", settings.policy), ("seed", settings.seed)) if value is not None}

    def make_part(terms: Terms) -> Part:
        return take_part(model, cut, terms.lora, terms.lora_alpha, terms.seed, client=False)

    channels = model.config.get_text_config().hidden_size
    server = Server(own, channels, make_part, output, progress)
    door = Door(listener, key, deadline)
    at = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    progress.say(f"{settings.model} behind block {cut - 1}, at {at}" + (", with a key" if key else ""))
    try:
        server.serve(door, key, parse_time(settings.reconnect))
    finally:
        door.close()


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise AmqError(f"cannot listen at --host {host} --port {port}: {why}") from None


def address(text: str) -> tuple[str, int]:
    """`host:port`, IPv6 in brackets."""
    match = re.fullmatch(r"(?:\[(.+)\]|([^:\[\]]+)):([0-9]{1,5})", text)
    if not match or not 0 < int(match[3]) < 65536:
        raise AmqError(f"--server {text!r} is not HOST:PORT, such as 127.0.0.1:7000 or [::1]:7000")
    return match[1] or match[2], int(match[3])


def run_train(settings: TrainSettings, progress: Progress) -> Path:
    """`amq split train`; returns the folder of the adapter."""
    output, key = Path(settings.output), key_of(settings)
    host, port = address(settings.server)
    if host not in LOOPBACK and not key:
        raise AmqError(
            f"--server {settings.server} is another machine, which needs --key FILE: a secret that both have"
        )
    reach = Reach(host, port, key, deadline_of(settings), parse_time(settings.reconnect), Throttle.parse(settings.link))
    check_place(output, "--output")
    states = States(output)
    states.hold()
    states.check_new(settings.resume)
    loaded, cut = open_for(settings, host)
    corpus = load_corpus(settings.text, loaded.tokenizer, loaded.embedding_rows)
    windows, _ = windows_of(corpus, settings.window_length, settings.samples)
    digest = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    fingerprint = model_fingerprint(loaded.model)
    terms = terms_of(settings, loaded, cut, fingerprint, len(windows), corpus.unscored, digest)
    states.check(terms)
    part = take_part(loaded.model, cut, terms.lora, terms.lora_alpha, terms.seed, client=True)
    run = record_of(settings, loaded, part, terms)
    client = Client(Party(part, terms, client=True), windows, output, run, progress)
    return client.train(reach)


def terms_of(
    settings: TrainSettings, loaded: LoadedModel, cut: int, fingerprint: str, samples: int, unscored: int, text: str
) -> Terms:
    """What the training side asks the server for."""
    backward = settings.backward_bits
    if backward is None and settings.policy == "aq-sgd":
        backward = AQ_SGD_BACKWARD
    named = {name: getattr(settings, name) for name in Terms.__dataclass_fields__ if hasattr(settings, name)}
    named |= {
        "version": amq.__version__, "dtype": str(loaded.model.dtype).removeprefix("torch."), "model": fingerprint,
        "cut": cut, "samples": samples, "unscored": unscored, "text": text, "backward_bits": backward,
    }  # fmt: skip
    try:
        return Terms(**named)
    except ValueError as error:
        raise AmqError(f"these settings do not go together: {error}") from None


def record_of(settings: TrainSettings, loaded: LoadedModel, part: Part, terms: Terms) -> SplitRun:
    config = loaded.config.get_text_config()
    return SplitRun(
        model=settings.model, architecture=type(loaded.model).__name__, blocks=part.runner.n_blocks,
        parameters=sum(p.numel() for n, p in loaded.model.named_parameters() if "lora_" not in n),
        trainable=sum(map(math.prod, part.shapes.values())), hidden_size=config.hidden_size, link=settings.link,
        text=settings.text, terms=terms.json(),
        machine={"cpu": cpu_name(), "threads": torch.get_num_threads(), "device": settings.device},
        versions={"amq": amq.__version__, **installed_versions(PACKAGES)},
    )  # fmt: skip
