"""One budget for weights and cache: the joint knapsack, its costs from gradients, and a whole search with it."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.analytic import AnalyticLosses, space
from helpers.fake_bank import FakeBank
from helpers.mixtures import MIXTURES
from helpers.runs import make_run
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer, random_tokens
from torch import Tensor, nn

import amq
from amq.configuration import expand, linear_bytes
from amq.errors import AmqError
from amq.formats import get_format
from amq.model.blocks import TOKENS
from amq.model.experts import unfuse
from amq.model.inventory import Inventory, take_inventory
from amq.model.shape import LayerCache, ModelShape, kept_as
from amq.proxy.caches import CODED, PLAIN, attention_of, cached
from amq.proxy.fisher import CACHE, Scores
from amq.search.run_folder import RunFolder
from amq.search.select import select_from_run
from amq.search.settings import SearchSettings, SelectSettings
from amq.search.share import KINDS, SHARED, Share, Shares, Sharing, prompt_length, share_memory
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = TOKENS + 22


class NoBank:
    def formats_of(self, name: str) -> list[Any]:
        return []


@contextmanager
def moved(layer: int, by: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Iterator[None]:
    """Attention of a layer reads what `by` makes of its keys and values."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as INTERFACE

    attend = INTERFACE["sdpa"]

    def other(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module.layer_idx == layer:
            key, value = by(key, value)
        return attend(module, query, key, value, *args, **kwargs)

    INTERFACE["sdpa"] = other
    try:
        yield
    finally:
        del INTERFACE["sdpa"]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_costs_are_squares_of_what_rounding_does_to_the_likelihood(name: str) -> None:
    """As differences of the likelihood of the very labels say; one run is the whole window, so that sums can be
    compared. Qwen 2 has biases of keys."""
    model = ARCHITECTURES[name].build(num_hidden_layers=2)
    model.set_attn_implementation("sdpa")
    window = random_tokens(1, LENGTH, seed=5)
    scores = Scores(model, take_inventory(model).only(set()), NoBank(), (), 0, 1 << 20, (1 << 20,))
    (one,) = scores.passes(window, 3, 0, (CACHE,))
    found = scores.table(one, CACHE)
    assert found.keys() == {"layers.0", "layers.1"} and all(tuple(row) == CODED for row in found.values())
    with torch.no_grad():
        own = model(window).logits[0].log_softmax(-1)
    generator = torch.Generator().manual_seed(3 * 1_000_003)
    labels = torch.cat([torch.multinomial(part.exp(), 1, generator=generator) for part in own.split(TOKENS)])

    def likelihood(layer: int, kind: str, step: float) -> float:
        def by(key: Tensor, value: Tensor) -> list[Tensor]:
            kept = cached(kind, key, value, has_biases=name == "qwen2")
            return [x + step * (rounded - x) for x, rounded in zip((key, value), kept, strict=True)]

        with torch.no_grad(), moved(layer, by):
            return float(model(window).logits[0].double().log_softmax(-1).gather(1, labels).sum())

    for layer, kind in itertools.product((0, 1), CODED):
        slope = (likelihood(layer, kind, 0.5) - likelihood(layer, kind, -0.5)) / 1.0
        cost = found[f"layers.{layer}"][kind]
        assert cost > 0 and cost**0.5 == pytest.approx(abs(slope) / (8 * LENGTH) ** 0.5, rel=0.05, abs=2e-5), (
            layer,
            kind,
        )


@pytest.mark.parametrize("name", ["llama", "opt", "gemma2", "qwen3", "mixtral"])
def test_every_layer_is_watched(name: str) -> None:
    """By one of transformers' functions, or by the plain one of a model that has no other; and put back."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as INTERFACE

    model = (ARCHITECTURES | MIXTURES)[name].build()
    if name != "gemma2":
        model.set_attn_implementation("sdpa")
    unfuse(model)
    before, own = dict(INTERFACE), dict(INTERFACE._local_mapping)
    scores = Scores(model, take_inventory(model), FakeBank(model, []), (), 0, 1 << 20, (1,))
    (one,) = scores.passes(random_tokens(1, 70), 0, 0, (CACHE,))
    assert dict(INTERFACE) == before and INTERFACE._local_mapping == own
    assert list(scores.table(one, CACHE)) == list(reversed(ModelShape.of(model.config).keeping))


def test_attention_of_ones_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"].build()
    model.set_attn_implementation("eager")
    monkeypatch.delattr(sys.modules[type(model).__module__], PLAIN)
    with pytest.raises(AmqError, match=r"--cache auto .* LlamaForCausalLM has its own \(eager\): give one kind"):
        attention_of(model)


CACHES_OF = (
    LayerCache(512, heads=2),
    LayerCache(512, window=96, heads=2),
    LayerCache(constant=300),
    LayerCache(512, heads=2),
)
LAYERS = ("layers.0", "layers.1", "layers.3")
CONTEXT = 1024


def sharing(memory: int, seed: int = 0, formats: str = "int2,int4", context: int = CONTEXT) -> Sharing:
    of = space(formats, blocks=1)
    random = np.random.default_rng(seed)
    costs = {
        name: dict(zip(KINDS, sorted(random.lognormal(-5, 1.5, 3), reverse=True), strict=False)) for name in LAYERS
    }
    inventory = Inventory("", 1, of.weights, (), False)
    return Sharing(memory, context, inventory, of, CACHES_OF, LAYERS, AnalyticLosses(of, seed).table, costs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_the_joint_choice_is_the_best_of_all(seed: int, share: float) -> None:
    """Beside every choice of formats and kinds there is: never more than the memory, and next to none is cheaper."""
    of = sharing(0, seed)
    names = [[f.name for f in choices] for choices in of.space.choices]
    sizes = [
        [linear_bytes(s, get_format(f), 64) for f in row] for (s,), row in zip(of.space.variables, names, strict=True)
    ]
    found: list[tuple[int, float]] = []
    of_caches = []
    for kinds in itertools.product(KINDS, repeat=3):
        size = sum(cache.bytes(CONTEXT) for cache in kept_as(CACHES_OF, kinds))
        of_caches.append((size, sum(of.cache_table[n].get(k, 0.0) for n, k in zip(LAYERS, kinds, strict=True))))
    for point in itertools.product(*(range(len(row)) for row in names)):
        size = sum(row[i] for row, i in zip(sizes, point, strict=True))
        cost = sum(of.table[s.name][row[i]] for (s,), row, i in zip(of.space.variables, names, point, strict=True))
        found += [(size + more, cost + dearer) for more, dearer in of_caches]
    low, high = min(size for size, _ in found), max(size for size, _ in found)
    of = replace(of, memory=round(low + share * (high - low)))
    best = min(cost for size, cost in found if size <= of.memory)
    joint = of.shares()[0]
    assert joint.name == SHARED and joint.bits <= of.space.bits_range[1] + 1e-9
    used = joint.cache_bytes + sum(linear_bytes(s, get_format(joint.formats[s.name]), 64) for s in of.space.weights)
    assert used <= of.memory and best - 1e-12 <= joint.cost <= 1.05 * best
    for one in of.shares()[1:]:
        assert set(one.kinds.values()) == {one.name} and one.cost >= joint.cost - 1e-12


def test_what_was_measured_decides() -> None:
    of = sharing(2_000_000)
    measured = dict.fromkeys(KINDS, 0.5) | {"int8": 0.1}
    shares = share_memory(
        of, lambda formats, kinds: measured[kinds[0]] if len(set(kinds)) == 1 else 0.3, 900, Progress()
    )
    assert shares.chosen == "int8" and shares.best.loss == 0.1 and shares.length == 900
    predicted = share_memory(of, None, 0, Progress())
    assert predicted.best.cost == min(share.cost for share in predicted.shares) and predicted.length == 0
    assert all(share.loss is None for share in predicted.shares)


def test_kinds_keep_the_order_of_layers() -> None:
    """Which ranges in the file do not: an engine takes them by place."""
    kinds = {"layers.0": "int4", "layers.1": "int8", "layers.2": "int4"}
    share = Share(SHARED, kinds, 1, 3.0, {}, 0.1).shown
    assert list(share.kinds) == ["layers.0,2", "layers.1"]
    shares = Shares(memory=1, context=1, shares=(share,), chosen=SHARED)
    assert list(shares.kinds_of(tuple(kinds)).items()) == list(kinds.items())


def test_a_prompt_is_as_long_as_text_and_context_allow() -> None:
    assert prompt_length(100_000, 1 << 20, 1) == 4096 and prompt_length(1500, 1 << 20, 1) == 1500
    assert prompt_length(8192, 2000, 1) == 1001 and prompt_length(512, 1 << 20, 0) == 0


def test_too_little_memory_names_all_that_has_to_fit() -> None:
    with pytest.raises(AmqError, match=r"--memory 0\.000 GiB is below the smallest configuration, .*linears: codes"):
        sharing(1000).shares()
    with pytest.raises(AmqError, match=r"the cost table lacks layers\.3 in a cache of int4: search again with --cache"):
        replace(sharing(2_000_000), cache_table={name: dict.fromkeys(KINDS, 0.0) for name in LAYERS[:2]})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target_bits": 3.0, "cache": "auto"}, "--cache auto is what the tokens of --context are kept as"),
        ({"min_speed": 3.0, "context": 99, "cache": "auto"}, "--cache auto shares --memory between weights and cache"),
        (
            {"memory": "1MiB", "min_speed": 3.0, "context": 99, "cache": "auto"},
            "and knows no times: give --memory without",
        ),
        ({"memory": "1MiB", "context": 99, "cache": "auto", "solver": "paper"}, "--solver additive --cost fisher"),
        ({"memory": "1MiB", "context": 99, "cache": "auto", "cost": "weight"}, "--solver additive --cost fisher"),
    ],
    ids=str,
)
def test_unusable_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(AmqError, match=message):
        SearchSettings.make(model="m", output="o", **given)


def test_a_run_without_costs_of_caches_cannot_be_shared_anew(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(AmqError, match=r"knows no costs of caches, since its search was not with --cache auto"):
        select_from_run(run.path, memory="64KiB", context=32, cache="auto")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    ARCHITECTURES["llama"].build(max_position_embeddings=2048).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


QUICK = {
    "group_size": 64, "window_length": 32, "windows": 2, "confirm_windows": 2, "bank_windows": 4, "cost_passes": 2,
    "points": 2, "refine": 0, "calibration": "pydoc",
}  # fmt: skip
ASKED = {"memory": "320KiB", "context": 700, "cache": "auto"}


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMQ_CACHE", str(tmp_path_factory.getbasetemp() / "amq-cache"))
        amq.search(str(folder), output, **QUICK, **ASKED)
    return output


def test_a_search_shares_its_memory(run: Path) -> None:
    opened = RunFolder.open(run)
    shares, configuration = opened.shares, opened.configuration
    assert shares is not None and configuration is not None and opened.cost is not None
    assert configuration.cache == expand(shares.best.kinds) and set(configuration.cache) == set(
        opened.run.kv_cache.layers
    )
    assert configuration.details.memory is not None and configuration.details.memory.total <= 320 * 1024
    (cache,) = (item for item in configuration.details.memory.items if item.name == "KV cache")
    assert cache.bytes == shares.best.cache_bytes and configuration.details.bits_per_weight <= shares.best.bits + 1e-6
    assert (shares.length, shares.scored) == (700, 256) and shares.final is not None and shares.final > 0
    assert len(shares.shares) > 1 and all(share.loss is not None and share.loss > 0 for share in shares.shares)
    assert shares.best.loss == min(share.loss for share in shares.shares)
    assert opened.cost.cache is not None and opened.cost.cache.keys() == set(opened.run.kv_cache.layers)
    page = (run / "report.html").read_text()
    assert "What the context costs" in page and f"{shares.chosen} (chosen)" in page


def test_select_shares_another_memory_by_the_tables(run: Path) -> None:
    same = select_from_run(run, **ASKED)
    assert same.cache == RunFolder.open(run).configuration.cache
    other = select_from_run(run, memory="400KiB", context=1400, cache="auto")
    assert other.cache and other.details.memory.total <= 400 * 1024
    with pytest.raises(AmqError, match="is below the smallest configuration"):
        select_from_run(run, memory="64KiB", context=1400, cache="auto")
    with pytest.raises(AmqError, match="--cache auto is what the tokens of --context"):
        SelectSettings.make(run=str(run), target_bits=3.0, cache="auto")


def test_an_interrupted_run_keeps_its_share(
    run: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was chosen first is the budget of all that was evaluated since."""
    monkeypatch.setenv("AMQ_CACHE", str(run.parents[1] / "amq-cache"))
    part = tmp_path / "part"
    part.mkdir()
    for name in ("run.json", "cost.json", "context.json"):
        (part / name).write_bytes((run / name).read_bytes())
    shares = Shares.read(part / "context.json")
    other = next(share.name for share in shares.shares if share.name != shares.chosen)
    replace(shares, chosen=other).write(part / "context.json")
    result = amq.search(str(folder), part, resume=True, **QUICK, **ASKED)
    assert result.configuration.cache == expand(next(s.kinds for s in shares.shares if s.name == other))


def test_without_the_engine_costs_decide(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []

    class Told(Progress):
        def say(self, text: str) -> None:
            said.append(text)

    amq.search(str(folder), tmp_path / "run", progress=Told(), **QUICK, **ASKED, backend="reference")
    shares = RunFolder.open(tmp_path / "run").shares
    assert shares is not None and shares.final is None and all(share.loss is None for share in shares.shares)
    assert any("compared by their costs alone: the reference has no such caches" in text for text in said)
    assert "predicted by the cost tables" in (tmp_path / "run" / "report.html").read_text()
