"""Checkpoints on disk: what is written is read back bit for bit, and what was damaged is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from amq.checkpoint import store as module
from amq.checkpoint.record import QuantizationRecord
from amq.checkpoint.store import is_checkpoint, open_checkpoint
from amq.errors import AmqError
from amq.packing import PARTS
from amq.util.tensors import tensor_hash

DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers.tiny_models import tiny_llama

    return tiny_checkpoint(tiny_llama(), tmp_path_factory.mktemp("checkpoint") / "one")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    """Sets keys of quantization_config; None removes one."""
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(values)
    config["quantization_config"] = {k: v for k, v in config["quantization_config"].items() if v is not None}
    (path / "config.json").write_text(json.dumps(config))


def test_shards_hold_what_one_file_holds(folder: Path, tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    sharded = tiny_checkpoint(tiny_llama, tmp_path / "sharded", shard_size=20_000)
    assert len(list(sharded.glob("*.safetensors"))) > 3
    one, many = open_checkpoint(folder), open_checkpoint(sharded)
    assert one.record == many.record and sorted(one.other_names) == sorted(many.other_names)
    assert one.configuration.formats == one.record.formats
    for name in one.record.formats:
        for part in PARTS:
            assert torch.equal(getattr(one.packed(name), part), getattr(many.packed(name), part)), name
    for name in one.other_names:
        assert torch.equal(one.tensor(name), many.tensor(name))
        assert torch.equal(one.tensor(name), tiny_llama.state_dict()[name])
    assert is_checkpoint(sharded) and not is_checkpoint(tmp_path)


def test_hashes_cover_dtype_shape_and_every_byte() -> None:
    tensor = torch.arange(12, dtype=torch.float16).view(3, 4)
    seen = {tensor_hash(t) for t in (tensor, tensor.view(4, 3), tensor.view(torch.bfloat16), tensor.view(torch.int16))}
    for i in range(tensor.nbytes):
        changed = tensor.clone()
        changed.view(torch.uint8).view(-1)[i] += 1
        seen.add(tensor_hash(changed))
    assert len(seen) == 4 + tensor.nbytes
    written = b"float16 [3, 4]\n" + tensor.numpy().tobytes()  # docs/format.md
    assert tensor_hash(tensor) == hashlib.blake2b(written, digest_size=16).hexdigest()


def test_a_changed_byte_anywhere_is_named(folder: Path, tmp_path: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    damaged = tmp_path / "model.safetensors"
    for name, entry in header.items():
        if name != "__metadata__":
            at = start + sum(entry["data_offsets"]) // 2
            damaged.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
            with pytest.raises(AmqError, match=f"tensor {name} is not what was written"):
                module.verify_file(damaged)


def test_truncated_missing_and_foreign_files(copy: Path) -> None:
    path = copy / "model.safetensors"
    data = path.read_bytes()
    for keep in (0, 7, 1000, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(AmqError, match="model.safetensors cannot be read.*damaged or cut short"):
            open_checkpoint(copy)
    path.write_bytes(data)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(AmqError, match="has no hashes"):
        open_checkpoint(copy)
    del tensors[f"{DOWN}.scale"]
    save_file(tensors, path, metadata=module.hashes_metadata(tensors))
    with pytest.raises(AmqError, match=f"lacks 1 tensors, such as {DOWN}.scale"):
        open_checkpoint(copy)
    path.unlink()
    with pytest.raises(AmqError, match="has no .*safetensors"):
        open_checkpoint(copy)


def test_a_missing_shard_is_named(tiny_llama: torch.nn.Module, tmp_path: Path) -> None:
    sharded = tiny_checkpoint(tiny_llama, tmp_path / "sharded", shard_size=50_000)
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(AmqError, match=f"{gone.name} is missing"):
        open_checkpoint(sharded)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"version": 5}, "checkpoint version 5 is not known to this amq"),
        ({"version": None}, "checkpoint version None"),
        ({"quant_method": "gptq"}, "expected quantization_config.quant_method 'amq', found 'gptq'"),
        ({"group_size": 48}, "group size 48 is not supported"),
        ({"formats": None}, "is damaged"),
        ({"shapes": {DOWN: ["a", 3]}}, "is damaged"),
        ({"formats": [1]}, "is damaged"),
        ({"records": {}}, "format int2 was written as None"),
        ({"shared_inputs": [["model.nowhere"]]}, "shared_inputs names 'model.nowhere'"),
        ({"head": "lm_head"}, "head names 'lm_head', which has no format"),
        ({"embedding": {"model.embed_tokens": "lm_head"}}, "embedding names 'lm_head', which has no format"),
        ({"embedding": 3}, "is damaged"),
    ],
)
def test_a_damaged_record_is_refused(copy: Path, values: dict[str, Any], message: str) -> None:
    change(copy, **values)
    with pytest.raises(AmqError, match=message):
        open_checkpoint(copy)


def test_shapes_are_checked(copy: Path) -> None:
    shapes = json.loads((copy / "config.json").read_text())["quantization_config"]["shapes"]
    change(copy, shapes={**shapes, DOWN: [63, 96]})
    with pytest.raises(AmqError, match=rf"{DOWN}.qweight must be U8 \[63, .*got U8 \[64, "):
        open_checkpoint(copy, verify=False).packed(DOWN)
    change(copy, shapes={**shapes, DOWN: [64, 160]})
    with pytest.raises(AmqError, match=rf"{DOWN}.qweight must be U8 .* of \[64, 160\]"):
        open_checkpoint(copy, verify=False).packed(DOWN)


def test_unknown_keys_are_ignored(copy: Path) -> None:
    change(copy, colour="red")
    assert isinstance(open_checkpoint(copy).record, QuantizationRecord)


def test_a_packed_head_and_its_embedding(tmp_path: Path, folder: Path) -> None:
    """One packed tensor for a tied pair, and a version that older readers refuse; untied, the old version."""
    from helpers.tiny_models import tiny_llama

    for tied in (True, False):
        path = tiny_checkpoint(tiny_llama(tie_word_embeddings=tied), tmp_path / str(tied), head="int8")
        record = open_checkpoint(path).record
        assert record.head == "lm_head" and record.embedding == ({"model.embed_tokens": "lm_head"} if tied else {})
        assert record.formats["lm_head"] == "int8" and open_checkpoint(path).packed("lm_head").out_features == 256
        assert "lm_head" not in record.block_shapes and record.configuration.formats["lm_head"] == "int8"
        assert ("model.embed_tokens.weight" in open_checkpoint(path).other_names) != tied
        assert "lm_head.weight" not in open_checkpoint(path).other_names
        assert json.loads((path / "config.json").read_text())["quantization_config"]["version"] == 1 + tied
    stored = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert stored["version"] == 1 and not stored.keys() & {"head", "embedding"}


def test_a_full_disk_leaves_nothing_behind(
    tiny_llama: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(AmqError, match="the disk is full"):
        tiny_checkpoint(tiny_llama, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_left_alone(copy: Path, tiny_llama: torch.nn.Module) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}
    with pytest.raises(AmqError, match="is not empty"):
        tiny_checkpoint(tiny_llama, copy)
    assert before == {p.name: p.stat().st_mtime_ns for p in copy.iterdir()}


def test_tensors_are_mapped_not_copied(folder: Path) -> None:
    """Two readers of one file see one mapping each; a copy would lie outside every mapping of the file."""
    weight = open_checkpoint(folder, verify=False).packed(DOWN).qweight
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if "model.safetensors" in line]
    assert any(int(a, 16) <= weight.data_ptr() < int(b, 16) for a, b in spans)


def test_remote_code_names_the_models_class(folder: Path) -> None:
    auto = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto == {"AutoModelForCausalLM": "modeling_amq.AmqLlamaForCausalLM"}
    code = (folder / "modeling_amq.py").read_text()
    assert "import amq" in code and "class AmqLlamaForCausalLM(LlamaForCausalLM)" in code
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_a_checkpoint_can_be_read_by_those_who_may_read_other_new_files(tmp_path):
    from amq.util.folders import write_folder

    def write(folder: Path) -> None:
        (folder / "file").touch(mode=0o600)

    write_folder(tmp_path / "out", write)
    (tmp_path / "plain").touch()
    assert (tmp_path / "out" / "file").stat().st_mode == (tmp_path / "plain").stat().st_mode
