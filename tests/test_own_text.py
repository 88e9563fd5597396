"""The text that a model writes itself: what is drawn, how windows begin, what is kept, and who finds it again."""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import ARCHITECTURES, TEMPLATES, byte_tokenizer, tiny_llama
from safetensors.torch import save_file

from amq.errors import AmqError
from amq.model import own_text
from amq.model.experts import unfuse
from amq.model.inventory import take_inventory
from amq.model.open import LoadedModel, model_fingerprint
from amq.model.own_text import QUESTIONS, ROWS, WORDS, Beginnings, open_sampler, own_corpus, write_round
from amq.model.text import load_text
from amq.quantize.bank import BankRecipe
from amq.quantize.run import run_quantize
from amq.quantize.settings import QuantizeSettings
from amq.search import search
from amq.util.progress import Progress, terminal_progress

LENGTH, ROOMY = 24, 200
"""Tokens of windows: too few for a question, and enough for some."""
CHAT = (
    "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
BOS, EOS, START = 256, 257, 258

pytestmark = pytest.mark.usefixtures("cache", "one_thread")


def loaded_model(template: str = "", chat: str = "", family: str = "llama", **options: Any) -> LoadedModel:
    tokenizer = byte_tokenizer(template)
    tokenizer.chat_template = chat or None
    rows = {"vocab_size": len(tokenizer)} if template else {}
    return LoadedModel(ARCHITECTURES[family].build(**{**rows, **options}), tokenizer, "tiny")


def written(
    loaded: LoadedModel, count: int = ROWS, length: int = LENGTH, seed: int = 0, **options: Any
) -> torch.Tensor:
    """int64 [count, length]"""
    corpus = own_corpus(loaded, length, seed, count, model_fingerprint(loaded.model), **options)
    assert corpus.name == "self" and corpus.in_order and len(corpus.sha256) == 64
    text = corpus.tokens.view(count, length - corpus.unscored)
    return torch.cat([torch.tensor([corpus.prefix], dtype=torch.int64).expand(count, -1), text], dim=1)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_tokens_are_drawn_from_the_model_at_temperature_one(family: str) -> None:
    """The same numbers, drawn from what the model says of the whole text so far, without a cache: in float64, in which
    the two do not fall on two sides of a drawn number."""
    loaded = loaded_model(family=family)
    model = loaded.model.double()
    unfuse(model)  # as a loaded model's; transformers' own experts know no float64
    beginnings = Beginnings.of(loaded)
    calls: list[str] = []
    tokens = write_round(model, beginnings, LENGTH, 3, 1, lambda note="": calls.append(note))
    assert tokens.shape == (ROWS, LENGTH) and len(calls) == LENGTH
    generator = torch.Generator().manual_seed(3 * 1_000_003 + 1)
    for position in range(1, LENGTH):
        logits = model(input_ids=tokens[:, :position], use_cache=False).logits[:, -1].float()
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        given = torch.tensor([starts_with_word(row[: position + 1]) for row in tokens.tolist()])
        assert bool((given | (drawn == tokens[:, position])).all()), position
    assert all(starts_with_word(row[:1]) for row in tokens.tolist())


def starts_with_word(tokens: list[int]) -> bool:
    return any(beginning[: len(tokens)] == tokens for beginning in byte_tokenizer()(list(WORDS))["input_ids"])


def test_windows_begin_behind_the_start_token_and_never_hold_it_again() -> None:
    windows = written(loaded_model(TEMPLATES["llama"]), 2 * ROWS)
    assert bool((windows[:, 0] == BOS).all()) and not bool((windows[:, 1:] == BOS).any())
    assert len(set(windows[:, 1].tolist())) > 8  # drawn, not given


def test_every_other_window_holds_conversations() -> None:
    loaded = loaded_model(TEMPLATES["llama"], "<bos>" + CHAT)
    windows = written(loaded, length=ROOMY)
    chat = [loaded.tokenizer.decode(row[2:]) for row in windows[1::2]]
    assert bool((windows[:, 0] == BOS).all()) and bool((windows[1::2, 1] == START).all())
    assert not bool((windows[:, 1:] == BOS).any())  # the template's own is taken off
    assert len({text.partition(">")[0] for text in chat}) > 4
    assert all(text.startswith("user:") and text[5:].partition(">")[0] in QUESTIONS for text in chat)


def test_a_conversation_that_ends_is_followed_by_another_and_plain_text_goes_on() -> None:
    openings = {"plain": ((1,),), "chat": ((7, 8),)}
    beginnings = Beginnings((), (), openings, ends=(5,), never=())
    drawn = [-1, 0, 5, 0, 0, 5, 3]
    found = {}
    for kind in openings:
        row = own_text._Row(beginnings, kind, np.random.default_rng(0))
        found[kind] = [row.next(token) for token in drawn]
    assert found == {"plain": [1, 0, 5, 0, 0, 5, 3], "chat": [7, 8, 5, 7, 8, 5, 7]}
    behind = Beginnings((9,), ("<s>",), openings, ends=(5,), never=(9,))
    assert own_text._Row(behind, "plain", np.random.default_rng(0))._given == deque([9])


def test_what_ends_a_text_and_what_is_never_drawn() -> None:
    loaded = loaded_model(TEMPLATES["llama"], vocab_size=270, eos_token_id=[EOS, 65])
    loaded.model.config.image_token_id = 66
    beginnings = Beginnings.of(loaded)
    assert beginnings.ends == (65, EOS)
    assert beginnings.never == (66, BOS, *range(259, 270))
    windows = written(loaded, 2 * ROWS)
    assert not set(windows[:, 1:].flatten().tolist()) & set(beginnings.never)


def test_more_windows_are_more_rounds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not written again, and stays as it is; another seed, length or model is another text."""
    loaded = loaded_model()
    rounds: list[int] = []

    def counted(model: Any, beginnings: Any, length: int, seed: int, number: int, step: Any) -> torch.Tensor:
        rounds.append(number)
        return write_round(model, beginnings, length, seed, number, step)

    monkeypatch.setattr(own_text, "write_round", counted)
    first = written(loaded, 3)
    more = written(loaded, ROWS + 2)
    assert rounds == [0, 1] and more[:3].equal(first)
    assert not more[ROWS:].equal(more[:2])
    assert written(loaded, ROWS).equal(more[:ROWS]) and rounds == [0, 1]
    assert not written(loaded, 3, seed=1).equal(first) and rounds == [0, 1, 0]
    written(loaded, 3, length=LENGTH + 1), written(loaded_model(seed=1), 3)
    assert rounds == [0, 1, 0, 0, 0] and len(list((cache / "own_text").iterdir())) == 4


def test_kinds_can_be_chosen() -> None:
    loaded = loaded_model(TEMPLATES["llama"], CHAT)
    chat = written(loaded, kinds=("chat",))
    assert bool((chat[:, 1] == START).all())
    assert not bool((written(loaded, kinds=("plain",))[:, 1] == START).all())
    with pytest.raises(AmqError, match="tiny has no chat template, so that it writes no conversations"):
        written(loaded_model(), kinds=("chat",))


def test_a_damaged_round_is_named(cache: Path) -> None:
    loaded = loaded_model()
    written(loaded)
    (path,) = (cache / "own_text").glob("*/round-000.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(AmqError, match=r"round-000.safetensors is damaged .* delete it and run the same command again"):
        written(loaded)
    path.unlink()
    assert len(written(loaded)) == ROWS
    save_file({"other": torch.zeros(1)}, path, {"amq_hashes": '{"other": "00"}'})
    with pytest.raises(AmqError, match="round-000.safetensors"):
        written(loaded)


def test_models_that_cannot_write() -> None:
    loaded = loaded_model()
    with pytest.raises(AmqError, match="a window length of 1 is too small: expected at least 2"):
        written(loaded, length=1)
    elsewhere = LoadedModel(tiny_llama().to("meta"), loaded.tokenizer, "far")
    with pytest.raises(AmqError, match="--calibration self: far is not in memory as a whole"):
        own_corpus(elsewhere, LENGTH, 0, 1, "fingerprint")
    loaded.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(AmqError, match="--calibration self: the model's logits are not finite"):
        own_corpus(loaded, LENGTH, 0, 1, "fingerprint")


def test_a_model_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model()
    monkeypatch.setattr(own_text, "CACHE_NAMES", ("state",))
    with pytest.raises(AmqError, match="--calibration self: LlamaForCausalLM writes without a cache"):
        written(loaded)


def test_a_template_that_fails() -> None:
    with pytest.raises(AmqError, match="--calibration self: the model's chat template does not take this conversation"):
        Beginnings.of(loaded_model(chat="{{ raise_exception('no') }}"))


def test_the_text_needs_a_model() -> None:
    with pytest.raises(AmqError, match="the text 'self' is what a model writes itself, for --calibration alone: give"):
        load_text("self")


def test_a_bank_by_name_is_of_the_windows_that_a_search_took() -> None:
    loaded = loaded_model()
    fingerprint = model_fingerprint(loaded.model)
    sampler = open_sampler(loaded, "self", LENGTH, 0, ROWS + 5, fingerprint)
    searched = sampler.take(4)
    assert not sampler.take(4).equal(searched)
    assert open_sampler(loaded, "self", LENGTH, 0, 4, fingerprint).take(4).equal(searched)
    inventory = take_inventory(loaded.model)
    recipe = BankRecipe("gptq", 32, "self", 4, LENGTH, 0)
    first = recipe.open(loaded, inventory, {"int3"}, Progress(), fingerprint).folder
    assert recipe.open(loaded, inventory, {"int3"}, Progress(), fingerprint).folder == first
    other = BankRecipe("gptq", 32, "pydoc", 4, LENGTH, 0)
    assert other.open(loaded, inventory, {"int3"}, Progress(), fingerprint).folder != first


def test_windows_of_a_mixture_take_turns(tmp_path: Path) -> None:
    """And stay the same when more are asked for, so that a bank by name is of the windows that a search took."""
    loaded = loaded_model(TEMPLATES["llama"])
    fingerprint = model_fingerprint(loaded.model)
    other = tmp_path / "a+b.txt"
    other.write_text("".join(map(chr, range(32, 122))) * 30)

    def windows(source: str, count: int) -> torch.Tensor:
        return open_sampler(loaded, source, LENGTH, 0, count, fingerprint).take(count)

    mixture = windows("pydoc+self", 7)
    assert mixture[::2].equal(windows("pydoc", 4)) and mixture[1::2].equal(windows("self", 3))
    assert windows("pydoc+self", 30)[:7].equal(mixture)
    corpus = open_sampler(loaded, "pydoc+self", LENGTH, 0, 7, fingerprint).corpus
    assert corpus.name == "pydoc+self" and corpus.prefix == (BOS,) and corpus.in_order
    assert len(windows(str(other), 2)) == 2  # a path with a + is a path
    with pytest.raises(AmqError, match="no text 'nowhere'"):
        windows("pydoc+nowhere", 2)


def test_auto_is_a_mixture_where_the_model_writes(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = loaded_model()
    fingerprint = model_fingerprint(loaded.model)
    assert open_sampler(loaded, "auto", LENGTH, 0, 2, fingerprint).corpus.name == "pydoc+self"
    elsewhere = LoadedModel(tiny_llama().to("meta"), loaded.tokenizer, "far")
    assert open_sampler(elsewhere, "auto", LENGTH, 0, 2, fingerprint, terminal_progress()).corpus.name == "pydoc"
    assert "calibration: pydoc alone, because far is read from disk" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["self", "auto"])
def test_a_search_and_its_quantization_share_the_text(
    given: str, tiny_folder: Path, cache: Path, tmp_path: Path
) -> None:
    small = {"window_length": LENGTH, "calibration": given}
    result = search(
        str(tiny_folder), output=str(tmp_path / "run"), group_size=32, bank_windows=3, windows=2, confirm_windows=1,
        cost_passes=2, points=2, head="16bit", **small,
    )  # fmt: skip
    provenance = result.configuration.details.provenance
    assert provenance is not None and provenance.calibration == {"auto": "pydoc+self"}.get(given, given)
    banks = sorted((cache / "banks").iterdir())
    settings = QuantizeSettings.make(
        model=str(tiny_folder), output=str(tmp_path / "out"), method="bank", windows=2, perplexity="none",
        configuration=str(tmp_path / "run" / "configuration.json"), **small,
    )  # fmt: skip
    log = run_quantize(settings).log
    assert sorted((cache / "banks").iterdir()) == banks and len(log.calibration_sha256) == 64
    assert len(list((cache / "own_text").iterdir())) == 1
