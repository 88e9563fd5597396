"""Every stage feeds windows that begin as the tokenizer begins a text, and counts no prediction made at that position.

A Llama's, a Gemma's (whose configuration says that it adds nothing) and a Qwen's tokenizer around one tiny model, all
with a byte per token. What a stage counts is computed again here, in plain torch and the way of llama.cpp and lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import VOCABULARY, byte_tokenizer, family_tokenizer, tiny_llama
from torch import Tensor, nn

import amq
from amq.configuration import Configuration
from amq.errors import AmqError
from amq.eval.order import run_order
from amq.eval.order_settings import OrderSettings
from amq.formats import FORMATS
from amq.model.blocks import BlockRunner
from amq.model.inventory import get_linear, take_inventory
from amq.model.losses import jensen_shannon
from amq.model.open import load_model
from amq.model.perplexity import negative_log_likelihood
from amq.model.text import Corpus, WindowSampler, fixed_windows, load_corpus
from amq.packing import dequantize
from amq.quantize.quantizers import rtn

pytestmark = pytest.mark.usefixtures("cache", "one_thread")
ROWS = VOCABULARY + 3
BOS, EOS = VOCABULARY, VOCABULARY + 1
PREFIX = {"llama": ["<bos>"], "gemma": ["<bos>"], "qwen": []}
LENGTH = 24
TEXT = "".join(f"Window {i} says {i * i}; " for i in range(120))
QUICK: dict[str, Any] = {
    "group_size": 32, "window_length": LENGTH, "windows": 2, "confirm_windows": 2, "bank_windows": 3, "cost_passes": 2,
    "points": 2, "proxy": "rtn", "head": "16bit",
}  # fmt: skip


def make_model() -> nn.Module:
    """With rows for the special tokens, which are as random as any."""
    return tiny_llama(vocab_size=ROWS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The model with each kind of tokenizer, as `load_model` loads it; read-only."""
    found = {}
    for kind in PREFIX:
        found[kind] = tmp_path_factory.mktemp(kind)
        make_model().save_pretrained(found[kind])
        family_tokenizer(kind, found[kind])
    return found


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


@pytest.fixture
def first_tokens(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first token of every window that is run through blocks during the test."""
    seen: list[int] = []
    hidden = BlockRunner.hidden

    def spy(self: BlockRunner, tokens: Tensor, *arguments: Any) -> Tensor:
        seen.extend(tokens[:, 0].tolist())
        return hidden(self, tokens, *arguments)

    monkeypatch.setattr(BlockRunner, "hidden", spy)
    return seen


def tokens_of(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def check_begins(kind: str, first_tokens: list[int]) -> None:
    assert first_tokens
    if PREFIX[kind]:
        assert set(first_tokens) == {BOS}
    else:
        assert set(first_tokens) < set(tokens_of(TEXT))


# --- counting -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def llama_cpp(model: nn.Module, tokens: list[int], n_ctx: int, add_bos: bool, first: int) -> tuple[float, int]:
    """llama.cpp's `perplexity` (tools/perplexity): chunks of n_ctx tokens, whose first gives way to BOS where the model
    has one; the predictions of a chunk's positions first … n_ctx − 2 count, and `first` is n_ctx/2 there.

    Returns the sum of negative log-likelihoods and how many there are.
    """
    total, count = 0.0, 0
    for start in range(0, len(tokens) // n_ctx * n_ctx, n_ctx):
        chunk = tokens[start : start + n_ctx]
        batch = [BOS, *chunk[1:]] if add_bos else chunk
        logits = model(input_ids=torch.tensor([batch])).logits[0].double()
        for position in range(first, n_ctx - 1):
            total -= float(logits[position].log_softmax(-1)[chunk[position + 1]])
            count += 1
    return total, count


@torch.no_grad()
def lm_eval(model: nn.Module, document: list[int], prefix_token: int, max_length: int) -> list[float]:
    """lm-eval's `loglikelihood_rolling`: each token of a document counts once; the first window's context is the prefix
    token, a later one's the token before it. Returns the log-likelihood of each token of the document.
    """
    found: list[float] = []
    for start in range(0, len(document), max_length):
        continuation = document[start : start + max_length]
        context = document[start - 1] if start else prefix_token
        logits = model(input_ids=torch.tensor([[context, *continuation[:-1]]])).logits[0].double()
        found += logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("kind", PREFIX)
def test_perplexity_counts_as_llama_cpp_does(kind: str, folders: dict[str, Path], text: str) -> None:
    """On the same windows; over all of a window as over the second half that llama.cpp counts."""
    model = make_model()
    corpus = load_corpus(text, family_tokenizer(kind, folders[kind]), ROWS)
    windows = fixed_windows(corpus, LENGTH, 200)
    assert corpus.unscored == len(PREFIX[kind])
    for first in (corpus.unscored, LENGTH // 2):
        total, count = llama_cpp(model, windows.flatten().tolist(), LENGTH, bool(corpus.prefix), first)
        assert count == len(windows) * (LENGTH - 1 - first)
        assert negative_log_likelihood(model, windows, first) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("kind", PREFIX)
def test_perplexity_counts_as_lm_eval_does_but_for_the_first_token(
    kind: str, folders: dict[str, Path], text: str
) -> None:
    """A window's text as a document: lm-eval predicts its first token from BOS alone, which does not count here.

    Where there is no BOS, a window's first token of text is what the others are predicted from.
    """
    model = make_model()
    corpus = load_corpus(text, family_tokenizer(kind, folders[kind]), ROWS)
    windows = fixed_windows(corpus, LENGTH, 200)
    found: list[float] = []
    for window in windows.tolist():
        prefix, *document = window
        tokens = lm_eval(model, document, prefix, LENGTH - 1)
        found += tokens[corpus.unscored :]
    expected = -sum(found) / len(found)
    assert negative_log_likelihood(model, windows, corpus.unscored) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_lm_eval_itself_counts_so(kind: str, folders: dict[str, Path], text: str) -> None:
    pytest.importorskip("lm_eval.models.huggingface", reason="its own figures are compared with")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = make_model(), family_tokenizer(kind, folders[kind])
    corpus = load_corpus(text, tokenizer, ROWS)
    windows = fixed_windows(corpus, LENGTH, 200)
    runner = HFLM(pretrained=model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, add_bos_token=False)
    documents = [tokenizer.decode(window[1:]) for window in windows]
    requests = [Instance("loglikelihood_rolling", {}, (document,), i) for i, document in enumerate(documents)]
    total = sum(runner.loglikelihood_rolling(requests, disable_tqdm=True))
    first = sum(lm_eval(model, [int(window[1])], BOS, LENGTH)[0] for window in windows)
    expected = -(total - first) / (len(windows) * (LENGTH - 2))
    assert negative_log_likelihood(model, windows, corpus.unscored) == pytest.approx(expected, rel=1e-5)


def test_the_same_tokens_count_with_bos_as_without(text: str) -> None:
    """Of windows with as much text: so the two figures compare. And the model does see the token."""
    model = make_model()
    bare = Corpus(torch.tensor(tokens_of(TEXT)), "text", "")
    begun = fixed_windows(Corpus(bare.tokens, "text", "", (BOS,), ("<bos>",)), LENGTH + 1, 200)
    plain = fixed_windows(bare, LENGTH, 200)
    assert begun[:, 1:].equal(plain)
    blind = make_model()
    blind.model.embed_tokens.weight[BOS] = 0  # a norm makes nothing of it: attention gets zeros
    figures = [negative_log_likelihood(m, begun, 1) for m in (model, blind)]
    assert abs(figures[0] - figures[1]) > 1e-4 and figures[0] != negative_log_likelihood(model, plain)


# --- stages ---------------------------------------------------------------------------------------------------------


def scored_logits(model: nn.Module, windows: Tensor, unscored: int) -> Tensor:
    """[tokens, vocabulary] of the positions that count, from whole forwards."""
    with torch.no_grad():
        return model(input_ids=windows).logits[:, unscored:].flatten(0, 1)


def rounded(fmt: Callable[[str], str]) -> nn.Module:
    """The model with each linear rounded to nearest in the format that `fmt` gives its name."""
    model = make_model()
    for spec in take_inventory(model).linears:
        linear = get_linear(model, spec.name)
        packed = rtn.quantize([linear.weight], [FORMATS[fmt(spec.name)]], 32)[0][fmt(spec.name)]
        linear.weight.data = dequantize(packed)
    return model


@pytest.fixture
def cost_windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, int]]:
    """What the search's cost table is made from: windows, and their leading positions that have no loss."""
    from amq.search import run as module

    seen: list[tuple[Tensor, int]] = []
    passes = module.gradient_passes

    def spy(*arguments: Any) -> Any:
        seen.append((arguments[3], arguments[7]))
        return passes(*arguments)

    monkeypatch.setattr(module, "gradient_passes", spy)
    return seen


@pytest.mark.parametrize("kind", PREFIX)
def test_search(
    kind: str, folders: dict[str, Path], text: str, tmp_path: Path, first_tokens: list[int],
    cost_windows: list[tuple[Tensor, int]],
) -> None:  # fmt: skip
    """Losses of both sets of windows, computed again; and the cost table counts what they count."""
    run = tmp_path / "run"
    result = amq.search(
        str(folders[kind]), run, calibration=text, backend="reference", **QUICK
    )  # whose windows are seen
    check_begins(kind, first_tokens)
    (windows, unscored), = cost_windows  # fmt: skip
    assert unscored == len(PREFIX[kind]) and bool((windows[:, 0] == BOS).all()) == bool(unscored)
    state = json.loads((run / "run.json").read_text())
    assert state["schema"] == "amq/run/3" and state["calibration"]["window_prefix"] == PREFIX[kind]
    assert result.configuration.details.provenance.window_prefix == tuple(PREFIX[kind])
    corpus = load_corpus(text, family_tokenizer(kind, folders[kind]), ROWS)
    sampler = WindowSampler(corpus, LENGTH, 0)
    sampler.take(QUICK["bank_windows"])
    sets = {"search": sampler.take(2), "confirm": sampler.take(2)}
    records = [json.loads(line) for line in (run / "archive.jsonl").read_text().splitlines()]
    full = make_model()
    for record in records[0], next(r for r in records if r["windows"] == "confirm"):
        windows, model = sets[record["windows"]], rounded(record["configuration"].__getitem__)
        p, q = (scored_logits(m, windows, corpus.unscored).log_softmax(-1) for m in (full, model))
        assert len(p) == 2 * (LENGTH - len(PREFIX[kind]))
        assert record["loss"] == pytest.approx(float(jensen_shannon(p, q).mean()), rel=1e-4)


def test_runs_with_and_without_are_not_mixed(folders: dict[str, Path], text: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shared = tmp_path / "model"
    make_model().save_pretrained(shared)
    family_tokenizer("qwen", shared)
    amq.search(str(shared), run, calibration=text, **QUICK)
    family_tokenizer("llama", shared)  # the weights, and so the fingerprint, stay
    with pytest.raises(AmqError, match="gives other windows of tokens than when"):
        amq.search(str(shared), run, resume=True, calibration=text, **QUICK)
    state = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(state | {"schema": "amq/run/1"}))
    with pytest.raises(AmqError, match="a run of schema 'amq/run/1', this amq writes 'amq/run/3'"):
        amq.search(str(shared), run, resume=True, calibration=text, **QUICK)


@pytest.mark.parametrize("kind", PREFIX)
@pytest.mark.parametrize("method", ["gptq", "bank"])
def test_quantize(
    kind: str, method: str, folders: dict[str, Path], text: str, tmp_path: Path, first_tokens: list[int]
) -> None:
    output = tmp_path / "out"
    amq.quantize(
        str(folders[kind]), str(output), uniform="int3", group_size=32, method=method, calibration=text, windows=3,
        window_length=LENGTH, perplexity=text, perplexity_tokens=200,
    )  # fmt: skip
    check_begins(kind, first_tokens)
    log = json.loads((output / "quantization.json").read_text())
    assert log["window_prefix"] == log["perplexity"]["window_prefix"] == PREFIX[kind]
    slot = LENGTH - len(PREFIX[kind])
    assert log["perplexity"]["tokens"] == 200 // slot * slot
    expected = amq.evaluate(str(folders[kind]), text=text, window_length=LENGTH, max_tokens=200).rows[0].perplexity
    assert log["perplexity"]["rows"]["full"] == expected
    assert ("that begin with `<bos>`" in (output / "README.md").read_text()) == bool(PREFIX[kind])


def test_an_interrupted_quantization_is_not_finished_with_other_windows(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from amq.quantize.blocks import BlockQuantizer

    model, output = tmp_path / "model", tmp_path / "out"
    make_model().save_pretrained(model)
    family_tokenizer("qwen", model)
    settings: dict[str, Any] = {"uniform": "int3", "group_size": 32, "windows": 3, "window_length": LENGTH}
    settings |= {"calibration": text, "perplexity": "none"}
    with monkeypatch.context() as patch:
        patch.setattr(BlockQuantizer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            amq.quantize(str(model), str(output), **settings)
    family_tokenizer("llama", model)
    with pytest.raises(AmqError, match="was made with another calibration windows"):
        amq.quantize(str(model), str(output), resume=True, **settings)
    family_tokenizer("qwen", model)
    amq.quantize(str(model), str(output), resume=True, **settings)


@pytest.mark.parametrize("kind", PREFIX)
def test_evaluate(kind: str, folders: dict[str, Path], text: str, first_tokens: list[int]) -> None:
    result = amq.evaluate(
        str(folders[kind]), uniform="int4", text=text, calibration=text, window_length=LENGTH, max_tokens=200,
        group_size=32, bank_windows=2, proxy="rtn",
    )  # fmt: skip
    check_begins(kind, first_tokens)
    slot = LENGTH - len(PREFIX[kind])
    settings = result.settings
    assert settings.window_prefix == tuple(PREFIX[kind]) and settings.tokens == 200 // slot * slot
    assert (settings.window_length, settings.stride) == (LENGTH, slot)
    from amq.eval import table

    shown = table(result).splitlines()[0]
    assert ("<bos> and 23 of text" in shown) == bool(PREFIX[kind]) == ("window = stride" not in shown)
    tokens = torch.tensor(tokens_of(TEXT))[: 200 // slot * slot].view(-1, slot)
    for row, model in zip(result.rows, (make_model(), rounded(lambda name: "int4")), strict=True):
        begun = torch.cat([torch.full((len(tokens), len(PREFIX[kind])), BOS), tokens], 1)
        labels = begun.clone()
        labels[:, : len(PREFIX[kind]) + 1] = -100  # transformers' loss skips these
        expected = float(model(input_ids=begun, labels=labels).loss)
        assert row.negative_log_likelihood == pytest.approx(expected, rel=1e-5), row.name


def test_order(folders: dict[str, Path], text: str, tmp_path: Path, first_tokens: list[int]) -> None:
    settings = OrderSettings.make(
        model=str(folders["gemma"]), output=str(tmp_path / "order"), spread=4, within=4, budgets="4", width=0.5,
        formats="int2,int4", group_size=32, banks="rtn", methods="rtn", calibration=text, bank_windows=1,
        deploy_windows=1, windows=2, window_length=LENGTH, backend="reference",
    )  # fmt: skip
    table = run_order(settings)
    check_begins("gemma", first_tokens)
    assert [row.spearman for row in table.rows] == [pytest.approx(1)] * 2


@pytest.mark.parametrize("kind", PREFIX)
def test_bench(kind: str, text: str, tmp_path: Path) -> None:
    """The engine's own perplexity, over windows that it cuts itself: those of every other stage."""
    from amq.bench.own import OwnEngine

    folder = tiny_checkpoint(make_model(), tmp_path / "checkpoint")
    tokenizer = family_tokenizer(kind, folder)
    engine = OwnEngine(str(folder), 0, {"context": LENGTH + 1, "activations": "fp32", "max_sequences": 2, "threads": 1})
    found, prefix = engine.windows(text, LENGTH, 100)
    corpus = load_corpus(text, tokenizer, ROWS)
    windows = fixed_windows(corpus, LENGTH, 100)
    assert (found, list(prefix)) == (windows.tolist(), PREFIX[kind])
    mean = negative_log_likelihood(load_model(str(folder)).model, windows, corpus.unscored)
    total = engine.log_likelihood(found, len(prefix))
    assert -total / (len(windows) * (LENGTH - 1 - len(prefix))) == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("stage", ["search", "quantize", "evaluate", "order", "bank"])
def test_every_stage_names_a_token_that_has_no_row(stage: str, tmp_path: Path) -> None:
    """A tokenizer that was extended, and a model that was not."""
    model, path = tmp_path / "model", tmp_path / "text.txt"
    tiny_llama().save_pretrained(model)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(model)
    path.write_text(TEXT + "<tool>" + TEXT)
    text, output = str(path), str(tmp_path / "out")
    configuration = tmp_path / "configuration.json"
    Configuration({s.name: "int3" for s in take_inventory(tiny_llama()).linears}, 32).save(configuration)
    run = {
        "search": lambda: amq.search(str(model), output, calibration=text, **QUICK),
        "quantize": lambda: amq.quantize(str(model), output, uniform="int3", group_size=32, calibration=text),
        "evaluate": lambda: amq.evaluate(str(model), text=text),
        "order": lambda: run_order(
            OrderSettings.make(model=str(model), output=output, calibration=text, group_size=32)
        ),
        "bank": lambda: amq.evaluate(str(model), [configuration], text="pydoc", calibration=text),
    }[stage]
    with pytest.raises(AmqError, match="holds the token '<tool>' with id 256, but the model's embedding has 256 rows"):
        run()
    assert not Path(output).exists()


@pytest.mark.parametrize("head", ["", "int8"])
def test_rows_of_an_embedding_that_is_packed_with_the_head(head: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(make_model(), tmp_path / "checkpoint", head=head)
    assert load_model(str(folder)).embedding_rows == ROWS
