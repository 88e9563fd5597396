"""What commands write: wherever --output points, whole or not at all, tried before the work and opened after it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.checkpoints import tiny_checkpoint
from helpers.tiny_models import ARCHITECTURES, byte_tokenizer, random_tokens, tiny_llama
from safetensors.torch import load_file, save_file

from amq.checkpoint.store import open_checkpoint
from amq.errors import AmqError
from amq.export import export
from amq.integrations.opening import open_checkpoint_once, open_export_once
from amq.model.companions import copy_model_files
from amq.quantize import quantize
from amq.quantize import run as quantize_run
from amq.quantize.log import LOG, QuantizationLog
from amq.quantize.resume import Identity, WorkFolder
from amq.quantize.settings import QuantizeSettings
from amq.util.folders import PARTIAL, check_new_folder, work_folder, write_folder
from amq.util.progress import Progress

pytestmark = pytest.mark.usefixtures("one_thread", "cache")
SMALL = {"uniform": "int4", "group_size": 32, "method": "rtn", "windows": 2, "window_length": 48, "perplexity": "none"}
FILES = {"config.json", "a", "below"}


@pytest.fixture(autouse=True)
def short_text(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(chr(97 + (i * i + i // 7) % 26) for i in range(4000))
    monkeypatch.setattr("amq.model.text.BUILTIN", {"pydoc": lambda: text, "docstrings": lambda: text})


def run(source: Path, output: Path | str, **settings: object) -> Path:
    quantize(str(source), str(output), **{**SMALL, **settings})
    return Path(output)


def write(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "a").touch(mode=0o600)
    (folder / "below").mkdir()
    (folder / "below" / "b").touch()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def edit_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


# Places


@pytest.mark.parametrize("place", ["new", "far/below/new", "empty/", "link", "dangling", ".", "n" * 250, "模型 ümläut"])
def test_a_folder_is_written_wherever_it_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = {str(path) for path in tmp_path.rglob("*")}
    output = place if place == "." else f"{tmp_path}/{place}"
    check_new_folder(output)
    assert {str(path) for path in tmp_path.rglob("*")} == before  # the trial leaves nothing
    write_folder(output, write)
    assert names(Path(output)) == FILES and (tmp_path / "link").is_symlink() and (tmp_path / "dangling").is_symlink()
    (tmp_path / "plain").touch()
    assert (Path(output) / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("file", "is a file: expected a folder"),
        ("file/below", "cannot be written: Not a directory"),
        ("full", "is not empty"),
        ("loop", "a link that leads nowhere"),
        ("n" * 256, "cannot be written: File name too long"),
        ("a\0b", "NUL"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, message: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full" / "something").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.setattr(quantize_run, "open_model", lambda *_: pytest.fail("the model was loaded"))
    before = names(tmp_path)
    for refused in (check_new_folder, lambda output: run(tmp_path, output)):
        with pytest.raises(AmqError, match=message):
            refused(f"{tmp_path}/{place}")
    assert names(tmp_path) == before


def test_a_disk_that_refuses_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **options: object) -> str:
        raise OSError(errno.EROFS, "Read-only file system", options["dir"])

    monkeypatch.setattr("amq.util.temporary.tempfile.mkdtemp", read_only)
    with pytest.raises(AmqError, match=f"new cannot be written: Read-only file system .{tmp_path}"):
        check_new_folder(tmp_path / "far" / "new")
    assert names(tmp_path) == set()


def busy(monkeypatch: pytest.MonkeyPatch, mount: Path) -> None:
    """`mount` behaves as a mount point does: it is neither renamed, renamed onto nor removed, nor renamed across."""
    rename, rmdir = os.rename, os.rmdir

    def checked(source: str, target: str) -> None:
        if mount in (Path(source), Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy", str(mount))
        if (mount in Path(source).parents) != (mount in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        rename(source, target)

    def kept(path: str, **options: object) -> None:
        if Path(path) == mount:
            raise OSError(errno.EBUSY, "Device or resource busy", str(mount))
        rmdir(path, **options)

    monkeypatch.setattr(os, "rename", checked)
    monkeypatch.setattr(os, "rmdir", kept)


def test_a_mount_point_is_filled_and_holds_the_work_too(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    (mount / "lost+found").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == mount)
    busy(monkeypatch, mount)
    make = quantize_run.BlockQuantizer.make

    def failing(self: object, block: int) -> object:
        if block == 1:
            raise KeyboardInterrupt
        return make(self, block)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(quantize_run.BlockQuantizer, "make", failing)
        run(tiny_folder, mount)
    assert names(tmp_path) == {"mount"} and names(mount) == {"lost+found", PARTIAL}
    with pytest.raises(AmqError, match="holds an interrupted run: add --resume"):
        run(tiny_folder, mount)
    run(tiny_folder, mount, resume=True)
    open_checkpoint(mount)
    assert names(tmp_path) == {"mount"} and {n for n in names(mount) if n.startswith(".")} == set()


def test_finished_blocks_beside_other_files_are_named(tmp_path: Path) -> None:
    (tmp_path / PARTIAL).mkdir()
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(AmqError, match=f"remove all but {PARTIAL}, .* add --resume"):
        check_new_folder(tmp_path)


def test_the_config_comes_last_into_a_folder_that_is_filled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, moved = os.rename, []
    monkeypatch.setattr(os, "rename", lambda a, b: (moved.append(Path(b)), rename(a, b)))
    (tmp_path / "out").mkdir()
    write_folder(tmp_path / "out", write)
    mine = [path.name for path in moved if path.parent == tmp_path / "out" and not path.name.startswith(".")]
    assert set(mine) == FILES and mine[-1] == "config.json"


def test_a_folder_that_cannot_be_filled_is_left_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.rename

    def failing(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "out" / "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(AmqError, match="the disk is full"):
        write_folder(tmp_path / "out", write)
    assert names(tmp_path / "out") == set()


@pytest.mark.parametrize("exists", [False, True])
def test_what_another_process_made_meanwhile_is_left_alone(tmp_path: Path, exists: bool) -> None:
    output = tmp_path / "out"
    if exists:
        output.mkdir()

    def late(folder: Path) -> None:
        write(folder)
        output.mkdir(exist_ok=True)
        (output / "theirs").touch()

    with pytest.raises(AmqError, match="is not empty"):
        write_folder(output, late)
    assert names(output) == {"theirs"} and names(tmp_path) == {"out"}


def test_a_folder_that_appears_at_the_last_moment_is_an_error_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, output = os.rename, tmp_path / "out"

    def late(source: Path, target: Path) -> None:
        if Path(target) == output:
            (output / "theirs").mkdir(parents=True)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    with pytest.raises(AmqError, match="was made by another process meanwhile"):
        write_folder(output, write)
    assert names(output) == {"theirs"} and names(tmp_path) == {"out"}


def test_what_a_killed_process_left_is_no_content_and_goes(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    child = os.fork()
    if not child:
        write_folder(output, lambda folder: os._exit(9))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(names(output)) == 1
    write_folder(output, write)
    assert names(output) == FILES


# Runs


def test_an_interrupted_run_is_named_before_the_model_is_loaded(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(WorkFolder, "remove", lambda self: None)
        patch.setattr(quantize_run.CheckpointOutput, "write", interrupted)
        run(tiny_folder, output)
    monkeypatch.setattr(quantize_run, "open_model", lambda *_: pytest.fail("the model was loaded"))
    for settings, message in (
        ({}, "holds an interrupted run: add --resume"),
        ({"resume": True, "seed": 1, "method": "hqq"}, "was made with another method, seed"),
    ):
        with pytest.raises(AmqError, match=message):
            run(tiny_folder, output, **settings)
    assert work_folder(output).is_dir()


def test_two_processes_do_not_write_one_output(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("new", "exists"):
        output = tmp_path / name
        if name == "exists":
            output.mkdir()
        with WorkFolder(output, Identity.of(QuantizeSettings("m", "out", uniform="int4")), resume=False):
            with pytest.raises(AmqError, match="another process is writing --output"):
                run(tiny_folder, output)
            with pytest.raises(AmqError, match="another process is writing --output"):
                run(tiny_folder, output, resume=True)
        run(tiny_folder, output)
    assert names(tmp_path) == {"new", "exists"}


def test_bad_input_leaves_no_work_folder(tiny_folder: Path, tmp_path: Path) -> None:
    for settings in ({"window_length": 100_000}, {"head": "int9"}, {"uniform": "int9"}, {"group_size": 7}):
        with pytest.raises(AmqError):
            run(tiny_folder, tmp_path / "out", **settings)
    assert names(tmp_path) == set()


class Said(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines += text.splitlines()


def test_a_plan_comes_first(tiny_folder: Path, tmp_path: Path) -> None:
    said = Said()
    run(tiny_folder, tmp_path / "out", perplexity="docstrings", perplexity_tokens=96, progress=said)
    assert "14 linears in 2 blocks by rtn (14 int4): 5.0000 bits per weight" in said.lines[0]
    assert "GiB free; disk: " in said.lines[1]
    assert "perplexities before and after, on 96 tokens, take about" in said.lines[2]
    assert "--perplexity none leaves them out" in said.lines[2]
    assert "1 blocks more at" in said.lines[-1]


def test_a_disk_without_room_for_the_checkpoint_is_found_first(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_run.BlockQuantizer, "make", lambda *_: pytest.fail("a block was quantized"))
    monkeypatch.setattr("amq.quantize.plan.shutil.disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    with pytest.raises(AmqError, match="not enough disk space for --output .*out: [0-9]+ MiB needed .* 1 MiB free at"):
        run(tiny_folder, tmp_path / "out")
    assert names(tmp_path) == set()


def test_equal_runs_give_equal_bytes(tiny_folder: Path, tmp_path: Path) -> None:
    first, second = (run(tiny_folder, tmp_path / name / "out") for name in "ab")
    assert names(first) == names(second)
    for name in names(first) - {"quantization.json"}:  # which says how long it took
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


# Contents


def test_what_a_checkpoint_cannot_hold_is_found_before_the_first_block(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_run.BlockQuantizer, "make", lambda *_: pytest.fail("a block was quantized"))
    with monkeypatch.context() as patch:
        patch.setattr("amq.quantize.output.copy_model_files", lambda source, folder: None)
        with pytest.raises(AmqError, match="nothing was quantized: transformers cannot read the tokenizer in .*out"):
            run(make_folder(tiny_llama()), tmp_path / "out")
    with monkeypatch.context() as patch:
        others = quantize_run.CheckpointOutput._others
        patch.setattr(quantize_run.CheckpointOutput, "_others", lambda self: dict(list(others(self).items())[1:]))
        with pytest.raises(AmqError, match=r"nothing was quantized: .*lacks .*model\.embed_tokens\.weight"):
            run(make_folder(tiny_llama()), tmp_path / "out")
    assert names(tmp_path) == set()


def test_a_trial_that_has_no_room_says_where(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("amq.quantize.output.write_hollow", full)
    with pytest.raises(AmqError, match="could not be tried out in .*No space left on device; set TMPDIR"):
        run(tiny_folder, tmp_path / "out")
    assert names(tmp_path) == set()


def test_infinity_in_a_config_is_written_as_transformers_writes_it(make_folder: Callable, tmp_path: Path) -> None:
    from transformers import AutoConfig

    source = make_folder(tiny_llama())
    limits = {"time_step_limit": [0.0, float("inf")], "nested": {"low": float("-inf")}}
    edit_json(source / "config.json", **limits)
    folder = run(source, tmp_path / "out", zero_points="symmetric")

    def refuse(constant: str) -> None:
        raise AssertionError(f"config.json holds {constant}")

    json.loads((folder / "config.json").read_text(), parse_constant=refuse)
    config = AutoConfig.from_pretrained(folder)
    assert {name: getattr(config, name) for name in limits} == limits
    export(folder, "mlx", tmp_path / "mlx")
    json.loads((tmp_path / "mlx" / "config.json").read_text(), parse_constant=refuse)


def test_generation_settings_that_transformers_refuses_to_write_are_kept(make_folder: Callable, tmp_path: Path) -> None:
    source = make_folder(tiny_llama())
    given = {"do_sample": False, "temperature": 0.7, "top_k": 20, "my_flag": 3, "eos_token_id": 1}
    (source / "generation_config.json").write_text(json.dumps(given))
    folder = run(source, tmp_path / "out")
    assert (folder / "generation_config.json").read_text() == json.dumps(given)
    (source / "generation_config.json").unlink()
    edit_json(source / "config.json", temperature=0.7, eos_token_id=2)
    folder = run(source, tmp_path / "derived")
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2


def test_tokenizer_files_are_the_sources_own(make_folder: Callable, tmp_path: Path) -> None:
    """Byte for byte; in checkpoints and exports."""
    source = make_folder(tiny_llama(intermediate_size=128))
    edit_json(source / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "added_tokens.json").write_text("{}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    copied = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "added_tokens.json"]
    copied += ["additional_chat_templates/tools.jinja", "generation_config.json"]
    folder = run(source, tmp_path / "out", zero_points="symmetric")
    export(folder, "gptq", tmp_path / "gptq")
    for name in copied:
        for made in (folder, tmp_path / "gptq"):
            assert (made / name).read_bytes() == (source / name).read_bytes(), name


def test_what_transformers_5_calls_a_tokenizer_gets_the_name_that_4_knows(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "out").mkdir()
    source, tokenizer = tmp_path / "source", byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(source)
    copy_model_files(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<tool>"] and "extra_special_tokens" not in config
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("a<tool>b").input_ids == tokenizer("a<tool>b").input_ids
    assert again.all_special_tokens == tokenizer.all_special_tokens


def test_the_config_says_what_the_weights_are(make_folder: Callable, tmp_path: Path) -> None:
    """A config that claims tied embeddings beside a head of its own in the file; every reader computes the same."""
    from transformers import AutoModelForCausalLM

    from amq.runtime import load

    source = make_folder(tiny_llama(tie_word_embeddings=False))
    edit_json(source / "config.json", tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    folder = run(source, tmp_path / "out", uniform="int8")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in open_checkpoint(folder).other_names) != tied
    tokens = random_tokens(1, 8)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits
        assert torch.nn.functional.cosine_similarity(model(tokens).logits, expected, dim=-1).min() > 0.99
    load(folder, threads=1, activations="fp32")


def test_composite_configs_say_it_in_both_places() -> None:
    from amq.quantize.output import config_as_found

    config = {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": True, "a": 1}, "vision_config": {}}
    found = config_as_found(config, tied=False)
    assert found == {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False, "a": 1},
                     "vision_config": {}}  # fmt: skip
    assert config_as_found({"text_config": {"a": 1}}, tied=True)["text_config"] == {"a": 1}


# Opening


@pytest.mark.parametrize(
    ("family", "head"),
    [("llama", ""), ("llama", "int8"), ("qwen3", "int8"), ("gemma2", ""), ("opt", ""), ("phi3", "int8")],
)
def test_whole_checkpoints_open(tmp_path: Path, family: str, head: str) -> None:
    open_checkpoint_once(tiny_checkpoint(ARCHITECTURES[family].build(), tmp_path / "out", head=head))


def damage(folder: Path, change: Callable[[dict], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks .*model\.norm\.weight"),
        (lambda t: t.pop("model.layers.1.mlp.up_proj.scale"), r"lacks .*up_proj\.scale"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), r"norm\.weight: .* floats \[64\], .* F32 \[3\]"),
        (lambda t: t.update({"model.nothing": torch.ones(3)}), r"does not use: model\.nothing"),
        (lambda t: t.update({"model.layers.0.mlp.up_proj.scale": torch.ones(3, 2).half()}), "up_proj"),
    ],
)
def test_a_checkpoint_that_does_not_fit_its_config_does_not_open(
    tmp_path: Path, change: Callable, message: str
) -> None:
    folder = tiny_checkpoint(tiny_llama(), tmp_path / "out")
    damage(folder, change)
    with pytest.raises(AmqError, match=message):
        open_checkpoint_once(folder)


def test_a_config_that_does_not_fit_its_weights_does_not_open(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tiny_llama(), tmp_path / "out")
    for entries, message in (
        ({"num_hidden_layers": 1}, "not in this"),
        ({"num_hidden_layers": 3}, r"lacks .*layers\.2"),
        ({"vocab_size": 300}, r"floats \[300, 64\], the checkpoint has F32 \[256, 64\]"),
        ({"model_type": "nothing"}, "cannot build a model"),
    ):
        before = (folder / "config.json").read_text()
        edit_json(folder / "config.json", **entries)
        with pytest.raises(AmqError, match=message):
            open_checkpoint_once(folder)
        (folder / "config.json").write_text(before)


@pytest.mark.parametrize("to", ["gptq", "mlx", "auto-round"])
def test_exports_are_opened_before_they_get_their_name(
    make_folder: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    import importlib

    folder = run(make_folder(tiny_llama(intermediate_size=128)), tmp_path / "out", zero_points="symmetric")
    export(folder, to, tmp_path / "whole")
    open_export_once(tmp_path / "whole")
    module = importlib.import_module(f"amq.export.{to.replace('-', '_')}")
    write_all = module.write

    def write_less(checkpoint: object, path: Path) -> dict:
        facts = write_all(checkpoint, path)
        damage(path, lambda tensors: tensors.pop("model.norm.weight"))
        return facts

    monkeypatch.setattr(module, "write", write_less)
    with pytest.raises(AmqError, match=r"lacks model\.norm\.weight"):
        export(folder, to, tmp_path / "less")
    assert names(tmp_path) == {"out", "whole"}


CUSTOM = """from transformers import LlamaConfig, LlamaForCausalLM


class OddConfig(LlamaConfig):
    model_type = "odd"


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


def test_a_model_with_code_of_its_own_keeps_it(tmp_path: Path) -> None:
    """Its checkpoint loads with the code of the folder; without leave to run that, nothing is quantized."""
    from transformers import AutoModelForCausalLM

    from amq.model.inventory import take_inventory
    from amq.model.open import LoadedModel
    from amq.quantize.output import CheckpointOutput

    source = tmp_path / "source"
    tiny_llama().save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "modeling_odd.py").write_text(CUSTOM)
    auto_map = {"AutoConfig": "modeling_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    edit_json(source / "config.json", auto_map=auto_map, model_type="odd", architectures=["OddForCausalLM"])
    loaded = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, dtype=torch.float32)
    stored = open_checkpoint(tiny_checkpoint(tiny_llama(), tmp_path / "plain"))
    made = LoadedModel(loaded, byte_tokenizer(), "odd"), take_inventory(loaded), stored.record, stored.configuration
    log = QuantizationLog.read(run(source_of_plain(tmp_path), tmp_path / "log") / LOG)
    with pytest.raises(AmqError, match="nothing was quantized: .*contains custom code"):
        CheckpointOutput(tmp_path / "out", source, *made, torch.float16).try_out(log)
    output = CheckpointOutput(tmp_path / "out", source, *made, torch.float16, trust_remote_code=True)
    output.try_out(log)
    output.write({name: stored.packed(name) for name in stored.record.formats}, log)
    assert not (tmp_path / "out" / "modeling_amq.py").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__name__ == "OddForCausalLM"


def source_of_plain(folder: Path) -> Path:
    """A plain tiny model in a folder below `folder`."""
    tiny_llama().save_pretrained(folder / "tiny")
    byte_tokenizer().save_pretrained(folder / "tiny")
    return folder / "tiny"
