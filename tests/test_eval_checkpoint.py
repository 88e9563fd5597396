"""`amq.eval` on folders that amq quantized: as they run in the runtime, dequantized, beside each other and a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer
from helpers.tiny_models import tiny_llama as make_tiny_llama
from torch import nn

from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import open_checkpoint, write_checkpoint
from amq.errors import AmqError
from amq.eval import evaluate
from amq.eval.__main__ import main
from amq.formats import get_format
from amq.model.inventory import get_linear, take_inventory
from amq.packing import PackedWeight, dequantize
from amq.quantize.quantizers import rtn
from amq.util.settings import run_command

pytestmark = pytest.mark.usefixtures("cache", "one_thread")

GROUP = 32
LENGTH = 150
TEXT = "".join(f"Window {i} says {i * i}; " for i in range(100))
OPTIONS: dict[str, Any] = {"window_length": LENGTH, "max_tokens": 450}
MIXED = ("int2", "int3", "int8")


def packed_weights(model: nn.Module, formats: tuple[str, ...]) -> dict[str, PackedWeight]:
    """Every linear, the formats in turn, rounded to nearest."""
    packed = {}
    for index, spec in enumerate(take_inventory(model).linears):
        fmt = get_format(formats[index % len(formats)])
        packed[spec.name] = rtn.quantize([get_linear(model, spec.name).weight], [fmt], GROUP)[0][fmt.name]
    return packed


def write(folder: Path, model: nn.Module, formats: tuple[str, ...], tokenizer: Any = None) -> Path:
    packed = packed_weights(model, formats)
    linears = take_inventory(model).linears
    record = QuantizationRecord(
        {name: weight.format.name for name, weight in packed.items()},
        {s.name: (s.out_features, s.in_features) for s in linears},
        GROUP,
        "rtn",
        tuple(tuple(f"model.layers.{i}.self_attn.{x}_proj" for x in "qkv") for i in range(len(model.model.layers))),
    )
    taken = {f"{s.name}.weight" for s in linears}
    others = {name: tensor for name, tensor in model.named_parameters() if name not in taken}
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    write_checkpoint(folder, config, record, packed, others, (tokenizer or byte_tokenizer()).save_pretrained)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in three formats."""
    return write(tmp_path_factory.mktemp("checkpoints") / "mixed", make_tiny_llama(), MIXED)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def direct(model: nn.Module, formats: tuple[str, ...] = ()) -> float:
    """Mean loss by transformers on `model`, its weights replaced by what the formats make of them."""
    for name, weight in packed_weights(model, formats).items() if formats else ():
        get_linear(model, name).weight.copy_(dequantize(weight))
    tokens = torch.tensor(byte_tokenizer()(TEXT)["input_ids"])[: 3 * LENGTH].view(3, LENGTH)
    return sum(float(model(input_ids=w[None], labels=w[None]).loss) for w in tokens) / 3


def test_the_runtime_and_the_dequantized_model(checkpoint: Path, text: str) -> None:
    result = evaluate(str(checkpoint), text=text, dequantized=True, **OPTIONS)
    expected = direct(make_tiny_llama(), MIXED)
    assert [r.name for r in result.rows] == ["mixed", "mixed dequantized"]
    for row in result.rows:
        assert row.negative_log_likelihood == pytest.approx(expected, rel=1e-5), row.name
    assert result.settings.backend == "cpu" and result.settings.activations == "fp32"
    assert result.settings.bank is None
    model = make_tiny_llama()
    linears = take_inventory(model).linears
    stored = sum(w.nbytes for w in packed_weights(model, MIXED).values())
    rest = sum(p.numel() for p in model.parameters()) - sum(s.numel for s in linears)
    assert result.rows[0].bits_per_weight == round(8 * stored / sum(s.numel for s in linears), 4)
    assert {r.weight_bytes for r in result.rows} == {stored + 2 * rest}


def test_a_packed_head_counts_in_bytes_and_in_bits(tmp_path: Path, text: str) -> None:
    """The same linears with the head in 16 bits and in 8; the embedding is tied to it."""
    folders = [tiny_checkpoint(make_tiny_llama(), tmp_path / f"head{head}", head=head) for head in ("", "int8")]
    kept, packed, dense = evaluate([str(f) for f in folders], text=text, dequantized=True, **OPTIONS).rows[1:]
    assert packed.negative_log_likelihood == pytest.approx(dense.negative_log_likelihood, rel=1e-5)
    assert packed.negative_log_likelihood == pytest.approx(kept.negative_log_likelihood, rel=1e-2)
    assert packed.negative_log_likelihood != kept.negative_log_likelihood
    linears = sum(rows * columns for rows, columns in open_checkpoint(folders[0]).record.shapes.values())
    head = open_checkpoint(folders[1]).packed("lm_head")
    assert kept.weight_bytes - packed.weight_bytes == 2 * 256 * 64 - head.nbytes > 0
    together = kept.bits_per_weight * linears + 8 * head.nbytes
    assert packed.bits_per_weight == pytest.approx(together / (linears + 256 * 64), abs=1e-3)


def test_biases_untied_heads_and_a_longer_path(tmp_path: Path, text: str) -> None:
    """Qwen2's q, k and v have biases; two folders of one name are told apart by their paths."""
    model = ARCHITECTURES["qwen2"].build(tie_word_embeddings=False)
    folders = [str(write(tmp_path / name / "same", model, (name,))) for name in ("int2", "int4")]
    result = evaluate(folders, text=text, dequantized=True, **OPTIONS)
    assert [r.name for r in result.rows] == [name for f in folders for name in (f, f"{f} dequantized")]
    for row, fmt in zip(result.rows, ("int2", "int2", "int4", "int4"), strict=True):
        expected = direct(ARCHITECTURES["qwen2"].build(tie_word_embeddings=False), (fmt,))
        assert row.negative_log_likelihood == pytest.approx(expected, rel=1e-5), row.name


def test_backends_and_activations(checkpoint: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    def loss(**flags: str) -> tuple[str, float]:
        (row,) = evaluate(str(checkpoint), text=text, **OPTIONS, **flags).rows
        return row.name, row.negative_log_likelihood

    expected = direct(make_tiny_llama(), MIXED)
    assert loss(backend="reference") == ("mixed dequantized", pytest.approx(expected, rel=1e-5))
    name, int8 = loss(activations="int8")
    assert name == "mixed" and int8 == pytest.approx(expected, rel=1e-2) and abs(int8 / expected - 1) > 1e-6
    with pytest.raises(AmqError, match="--activations int8 does not go with backend reference"):
        loss(backend="reference", activations="int8")


def test_one_table_for_checkpoints_and_a_model(
    checkpoint: Path, tiny_folder: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write(tmp_path / "small", make_tiny_llama(), ("int4",))
    path = tmp_path / "table.json"
    flags = ["--text", text, "--window-length", str(LENGTH), "--max-tokens", "450", "--json", str(path)]
    assert run_command(main, [str(checkpoint), str(other), str(tiny_folder), *flags]) == 0
    data = json.loads(path.read_text())
    expected = {
        "mixed": direct(make_tiny_llama(), MIXED),
        "small": direct(make_tiny_llama(), ("int4",)),
        "full": direct(make_tiny_llama()),
    }
    found = {row["name"]: row["negative_log_likelihood"] for row in data["rows"]}
    assert found == pytest.approx(expected, rel=1e-5) and list(found) == list(expected)
    assert data["settings"]["model"] == f"{checkpoint}, {other}, {tiny_folder}"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(expected)
    assert lines[3].split()[1] == "5.000"


def test_what_makes_no_sense(checkpoint: Path, tiny_folder: Path, text: str) -> None:
    def refused(message: str, *models: object, **options: Any) -> None:
        with pytest.raises(AmqError, match=message):
            evaluate([str(m) for m in models], **{"text": text, **OPTIONS, **options})

    refused("mixed is quantized already: --configuration and --uniform want a plain model", checkpoint, uniform="int4")
    refused("mixed is quantized already", tiny_folder, checkpoint, configurations=["x.json"])
    refused("want one model, got 2", tiny_folder, tiny_folder.parent, uniform="int4")
    refused("--dequantized wants a folder that amq quantized", tiny_folder, dequantized=True)
    refused("is given twice", checkpoint, checkpoint)
    refused("no model is given")
    refused("nothing to measure: give a text or tasks", checkpoint, text="")


def test_other_tokens_do_not_compare(checkpoint: Path, tmp_path: Path, text: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["Window"])
    other = write(tmp_path / "other", make_tiny_llama(vocab_size=257), ("int4",), tokenizer)
    with pytest.raises(AmqError, match="other splits the text .* into other tokens than the model before it"):
        evaluate([str(checkpoint), str(other)], text=text, **OPTIONS)


@pytest.mark.parametrize("change", ["shape", "byte"])
def test_damaged_checkpoints_are_refused_first(
    checkpoint: Path, tmp_path: Path, text: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = write(tmp_path / "damaged", make_tiny_llama(), MIXED)
    if change == "byte":
        file = damaged / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        config = json.loads((damaged / "config.json").read_text())
        del config["quantization_config"]["shapes"]["model.layers.0.mlp.up_proj"]
        (damaged / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("amq.eval.checkpoints.load_model", lambda *a, **k: pytest.fail("something was loaded"))
    with pytest.raises(AmqError, match=r"hash differs|damaged/config.json: linear .*up_proj"):
        evaluate([str(checkpoint), str(damaged)], text=text, **OPTIONS)


def test_memory_is_counted_as_packed(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Packed weights are not cast to float32: they need no more memory than in the file."""
    asked: list[int] = []
    monkeypatch.setattr("amq.model.open.check_memory", lambda needed, what, device="cpu": asked.append(needed))
    evaluate(str(checkpoint), text=text, **OPTIONS)
    model = make_tiny_llama()
    packed = packed_weights(model, MIXED).values()
    scales = sum(w.scale.numel() + w.zero_point.numel() for w in packed)
    rest = sum(p.numel() for p in model.parameters()) - sum(s.numel for s in take_inventory(model).linears)
    assert asked == [sum(w.qweight.numel() for w in packed) + 4 * (scales + rest)]
