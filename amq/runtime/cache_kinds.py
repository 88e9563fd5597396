"""Which kind of `amq.model.shape.CACHES` each layer of a model keeps its keys and values as, in engines of our own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import Checkpoint
from amq.errors import AmqError
from amq.model.shape import ModelShape
from amq.runtime.decoder_spec import DecoderSpec
from amq.runtime.settings import AUTO_CACHE


def choose_kinds(
    given: str | Sequence[str],
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    engine: str,
    known: Collection[str],
    default: str,
) -> tuple[str, ...]:
    """A kind for each attention of `spec` with keys and values of its own, in their order.

    given: AUTO_CACHE, which is what the checkpoint says, or `default` where it says nothing; or a kind for all, or one
        for each. engine: its name in errors. known: the kinds that it has.
    Raises AmqError for a kind that the engine does not have, and for another number of them.
    """
    own = spec.own_caches
    advice = checkpoint.record.cache if given == AUTO_CACHE else {}
    if advice:
        given = _advised(checkpoint)
    elif given == AUTO_CACHE:
        given = default
    kinds = (given,) * own if isinstance(given, str) else tuple(given)
    if strange := next((kind for kind in ([given] if isinstance(given, str) else kinds) if kind not in known), None):
        hint = f", which {checkpoint.folder} asks for: give one of these as --cache" if advice else ""
        raise AmqError(f"the {engine} engine keeps keys and values as {', '.join(known)}, not as {strange}{hint}")
    if len(kinds) != own:
        raise AmqError(
            f"{checkpoint.folder} has {own} layers that keep keys and values of their own, got {len(kinds)} kinds of "
            "cache: give one for each, or one for all"
        )
    return kinds


def _advised(checkpoint: Checkpoint) -> tuple[str, ...]:
    try:
        return ModelShape.of(checkpoint.config).cache_kinds(checkpoint.record.cache)
    except AmqError as error:
        raise AmqError(
            f"{checkpoint.folder}/config.json: quantization_config.cache: {error}; it was edited: correct it, or give "
            "a kind for all layers as --cache"
        ) from None


def kinds_text(kinds: Sequence[str]) -> str:
    """For a banner."""
    return "+".join(sorted(set(kinds)))


def advice_text(record: QuantizationRecord) -> str:
    return kinds_text(tuple(record.cache.values()))
