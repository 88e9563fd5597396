"""What a reply is made of. Joined, the parts of one kind are the whole: pieces may end anywhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """What the model thought before it answered."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """The model calls the tool `name`. index: 0 for the first call of the reply."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of the arguments of call `index`, as JSON text. Joined they are one object, unless the model broke off."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments
