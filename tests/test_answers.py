"""Greedy answers: what the full-precision model answers, how far another form agrees, and what amq.eval makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES, TEMPLATES, byte_tokenizer, tiny_llama
from torch import nn

from amq.errors import AmqError
from amq.eval import evaluate
from amq.eval.__main__ import main
from amq.eval.result import Evaluation, table
from amq.model import answers as module
from amq.model.answers import (
    DRAWN,
    HELD_OUT,
    ROWS,
    SEARCHED,
    Answer,
    Answers,
    Writer,
    agreement,
    find_beginnings,
    open_answers,
    thoughts_end,
    until_difference,
    write_round,
)
from amq.model.experts import unfuse
from amq.model.open import LoadedModel, model_fingerprint
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("cache", "one_thread")

LIMIT = 12
CHAT = (
    "{% for m in messages %}<start>{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)
EOS = 257


def loaded_model(family: str = "llama", chat: str = "", seed: int = 0, **options: Any) -> LoadedModel:
    tokenizer = byte_tokenizer(TEMPLATES["llama"])
    tokenizer.chat_template = chat or None
    model = ARCHITECTURES[family].build(seed, vocab_size=len(tokenizer), **options)
    return LoadedModel(model, tokenizer, "tiny")


def opened(loaded: LoadedModel, count: int = ROWS, half: int = HELD_OUT, **options: Any) -> Answers:
    return open_answers(loaded, count, options.pop("limit", LIMIT), 3, model_fingerprint(loaded.model), half, **options)


def by_hand(model: nn.Module, prompt: tuple[int, ...], limit: int, ends: tuple[int, ...]) -> tuple[int, ...]:
    """Greedy, one text at a time, without a cache."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit:
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
        if tokens[-1] in ends:
            break
    return tuple(tokens[len(prompt) :])


def shaken(model: nn.Module, by: float) -> nn.Module:
    """The model with noise on its matrices, as rounding puts it there."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter += by * parameter.std() * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_answers_are_greedy_and_agreement_is_what_writing_gives(family: str) -> None:
    """In float64, in which passes over one token and over many do not round into another order."""
    loaded = loaded_model(family, CHAT)
    model = loaded.model.double()
    unfuse(model)
    found = opened(loaded, 6)
    for item in found.items:
        assert item.tokens == by_hand(model, item.prompt, LIMIT, found.ends)
    assert agreement(model, found) == [len(item.tokens) for item in found.items]
    shaken(model, 0.05)
    own = Writer(model).write(found.prompts, LIMIT, found.ends)
    assert own == [by_hand(model, item.prompt, LIMIT, found.ends) for item in found.items]
    agreed = [until_difference(item.tokens, tokens) for item, tokens in zip(found.items, own, strict=True)]
    assert agreement(model, found) == agreed
    assert any(n < len(item.tokens) for n, item in zip(agreed, found.items, strict=True)) and any(agreed)


def test_as_transformers_generates() -> None:
    loaded = loaded_model(chat=CHAT)
    found = opened(loaded, 4)
    for item in found.items:
        prompt = torch.tensor([item.prompt])
        whole = loaded.model.generate(prompt, do_sample=False, max_new_tokens=LIMIT, eos_token_id=list(found.ends))
        assert tuple(whole[0, len(item.prompt) :].tolist()) == item.tokens


def test_of_equal_logits_the_lowest_id_is_taken() -> None:
    """Every other row of the head is its neighbour's, so that all logits are ties: no odd id is ever written."""
    loaded = loaded_model(chat=CHAT, tie_word_embeddings=False)
    head = loaded.model.lm_head.weight
    head[1::2] = head[: len(head) - 1 : 2]
    found = opened(loaded)
    assert all(token % 2 == 0 for item in found.items for token in item.tokens)
    assert agreement(loaded.model, found) == [len(item.tokens) for item in found.items]
    changed = [Answer(i.prompt, (*i.tokens[:3], i.tokens[3] + 1, *i.tokens[4:]), i.begun, False) for i in found.items]
    twins = Answers(tuple(changed), found.beginnings, found.kind, LIMIT, "")
    assert agreement(loaded.model, twins) == [3] * ROWS


def test_an_answer_ends_with_the_token_that_ends_it() -> None:
    """The head speaks for one token alone: first another one than the end, then the end."""
    loaded = loaded_model(chat=CHAT)
    answers = opened(loaded)
    writer = Writer(loaded.model)
    first = {item.tokens[0] for item in answers.items}
    written = writer.write(answers.prompts, LIMIT, sorted(first))
    assert written == [item.tokens[:1] for item in answers.items]
    assert not any(item.ended for item in answers.items)
    ended = Answers(
        tuple(Answer(i.prompt, (*i.tokens[:2], EOS), i.begun, True) for i in answers.items),
        answers.beginnings, "chat", LIMIT, "",
    )  # fmt: skip
    assert agreement(loaded.model, ended) == [2] * ROWS  # the model goes on, so that it differs where they end


def test_a_form_that_overflows_agrees_with_nothing() -> None:
    loaded = loaded_model(chat=CHAT)
    answers = opened(loaded)
    loaded.model.model.norm.weight.fill_(torch.nan)
    assert agreement(loaded.model, answers) == [0] * ROWS


def test_prompts_are_beginnings_and_a_little_that_is_drawn() -> None:
    loaded = loaded_model(chat=CHAT)
    openings = find_beginnings(loaded).openings["chat"]
    asked = {}
    for half in (SEARCHED, HELD_OUT):
        items = opened(loaded, 2 * ROWS, half).items
        assert all(len(item.prompt) == item.begun + DRAWN for item in items)
        begun = [item.prompt[1 : item.begun] for item in items]  # behind <bos>
        assert all(some in openings for some in begun)
        asked[half] = set(begun)
        assert len({item.prompt for item in items}) == len(items)
    assert not asked[SEARCHED] & asked[HELD_OUT]
    assert asked[SEARCHED] | asked[HELD_OUT] == set(openings)  # each question once before any is asked again
    plain = opened(loaded_model())
    assert plain.kind == "plain" and all(item.prompt[0] == 256 for item in plain.items)


def test_answers_are_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model(chat=CHAT)
    first = opened(loaded, 3)
    monkeypatch.setattr(module, "write_round", None)  # it is there
    assert opened(loaded, 3) == first and opened(loaded, 5).items[:3] == first.items
    monkeypatch.setattr(module, "write_round", write_round)
    more = opened(loaded, ROWS + 1)
    assert more.items[:3] == first.items and more.sha256 != first.sha256
    assert opened(loaded_model(chat=CHAT, seed=1), 3).items != first.items
    assert opened(loaded, 3, limit=LIMIT + 1).items != first.items
    for path in cache.rglob("round-000.safetensors"):
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(AmqError, match=r"round-000.safetensors is damaged .*delete it and run the same command again"):
        opened(loaded, 3)


def test_what_cannot_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = loaded_model(chat=CHAT)
    monkeypatch.setattr("amq.model.own_text.CACHE_NAMES", ())
    with pytest.raises(AmqError, match="answers: LlamaForCausalLM writes without a cache"):
        opened(loaded)
    monkeypatch.undo()
    monkeypatch.setattr("amq.model.answers.in_memory", lambda model: False)
    with pytest.raises(AmqError, match="answers: the model is not in memory as a whole.*--load memory"):
        opened(loaded)
    broken = loaded_model(chat=CHAT)
    broken.model.model.norm.weight.fill_(torch.inf)
    monkeypatch.undo()
    with pytest.raises(AmqError, match="answers: the model's logits are not finite"):
        opened(broken)


@pytest.mark.parametrize(
    ("prompt", "answer", "ends"),
    [
        ("<assistant>", "It is 4.", None),
        ("<assistant>", "<think>Two and two", False),
        ("<assistant>", "<think>Two and two</think>It is 4.", True),
        ("<assistant><think>\n", "Two and two", False),
        ("<assistant><think>\n", "Two and two</think>It is 4.", True),
        ("<assistant><think>\n\n</think>\n\n", "It is 4.", None),
        ("<assistant>", "[THINK]Two[/THINK]It is 4.", True),
        ("<assistant>", "<think>Two</think>But <think>four", False),
    ],
)
def test_thoughts(prompt: str, answer: str, ends: bool | None) -> None:
    assert thoughts_end(prompt, answer) is ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("chat")
    loaded = loaded_model(chat=CHAT)
    loaded.model.save_pretrained(path)
    loaded.tokenizer.save_pretrained(path)
    return str(path)


OPTIONS: dict[str, Any] = {"answers": 6, "answer_tokens": LIMIT}


def test_rows(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "table.json"
    flags = "--proxy rtn --group-size 32 --calibration docstrings --bank-windows 1"
    main([folder, "--uniform", "int8,int2", "--answers", "6", "--answer-tokens", str(LIMIT), *flags.split(),
          "--json", str(path)])  # fmt: skip
    result = Evaluation.read(path)
    assert table(result) in capsys.readouterr().out
    full, int2, int8 = result.answers
    assert [row.model for row in result.answers] == ["full", "int2", "int8"]
    assert full.until_difference == full.tokens == LIMIT and full.equal == 1 and full.stderr == 0
    assert int2.until_difference < int8.until_difference <= LIMIT and int2.equal < 1
    assert full.answers == 6 and full.ended == 0 and full.thoughts == 0 and full.closed is None
    assert result.settings.answers is not None and result.settings.answers["kind"] == "chat"
    assert all(row.perplexity is None for row in result.rows) and result.settings.text == ""
    assert "greedy answers to 6 prompts (chat), of at most 12 tokens" in table(result)
    assert "thoughts" not in table(result)


def test_thoughts_in_the_table(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The full model's first answer thinks and ends, all others think on."""
    texts = iter(["", "<think>a</think>", "a</think>", *["", "<think>a", "<think>a"] * 5])
    decode = "transformers.PreTrainedTokenizerFast.decode"
    monkeypatch.setattr(decode, lambda self, tokens, **options: next(texts))
    monkeypatch.setattr("amq.eval.answers.thoughts_end", lambda p, a: None if "a" not in a else "</think>" in a)
    result = evaluate(folder, **OPTIONS)
    (row,) = result.answers
    assert row.thoughts == 6 and row.closed == pytest.approx(1 / 6)
    assert "thoughts closed" in table(result) and "16.7%" in table(result)


def test_a_checkpoint_beside_its_model(folder: str, tiny_folder: Path, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tiny_llama(), tmp_path / "mixed")
    full, mixed = evaluate([str(tiny_folder), str(checkpoint)], **OPTIONS).answers
    assert (full.model, full.equal, mixed.model) == ("full", 1, "mixed") and mixed.until_difference < LIMIT
    with pytest.raises(AmqError, match="--answers compares with the full-precision model's.*name that model first"):
        evaluate([str(checkpoint), folder], **OPTIONS)
    with pytest.raises(AmqError, match="gives the questions of --answers other tokens than the first model"):
        evaluate([folder, str(checkpoint)], **OPTIONS)


def test_errors(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [folder, "--answer-tokens", "5"]) == 2
    assert "--answer-tokens needs --answers" in capsys.readouterr().err
    with pytest.raises(AmqError, match="--answers: the model is not in memory as a whole|answers: the model is not"):
        evaluate(folder, load="disk", **OPTIONS)
