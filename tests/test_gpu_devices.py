"""Two GPUs of different kinds in one machine, and what an embedding on a GPU holds; with stand-ins for the GPUs."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.packed import random_packed
from torch import nn

from amq.errors import AmqError
from amq.formats import FORMATS
from amq.kernels import backends, cuda, modules
from amq.kernels import gpu_layout as layout
from amq.kernels import launch_table as tuning
from amq.kernels import triton as launcher
from amq.kernels.embedding import StoredEmbedding
from amq.kernels.modules import Execution, StoredLinear
from amq.packing import PreparedWeight, dequantize
from amq.search.records import MachineEntry
from amq.util.machine import gpu_facts
from amq.util.records import parse_record, to_json

NAMES, CAPABILITIES = ("GeForce RTX 4090", "GeForce GTX 1080"), ((8, 9), (6, 1))


@dataclass
class Gpus:
    """torch.cuda for two GPUs, of which the second is too old. checks: at which of them the CUDA library was asked."""

    current: int = 0
    checks: tuple[int, ...] = ()

    @contextmanager
    def device(self, device: torch.device | int):
        before, self.current = self.current, device if isinstance(device, int) else device.index or 0
        yield
        self.current = before

    def unsupported_reason(self) -> None:
        self.checks += (self.current,)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    found = Gpus()
    functions = {
        "is_available": lambda: True,
        "current_device": lambda: found.current,
        "device": found.device,
        "get_device_name": NAMES.__getitem__,
        "get_device_capability": CAPABILITIES.__getitem__,
    }
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    library = SimpleNamespace(has_bits=lambda bits: True, unsupported_reason=found.unsupported_reason)
    monkeypatch.setattr(cuda, "library", lambda: library)
    monkeypatch.setattr(launcher, "_kernels", lambda: SimpleNamespace(interpreted=False))
    caches = (cuda._too_old, cuda._not_loadable, tuning._gpu_name, modules._choose, tuning._entries)
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def test_each_gpu_is_asked_for_itself(gpus: Gpus, caplog: pytest.LogCaptureFixture) -> None:
    """The first runs the kernels, before and after the second, which is too old, has said so by name."""
    reason = "GeForce GTX 1080 (cuda:1) has compute capability 6.1, and the kernels want 8.0 or newer"
    for device, chosen in (("cuda:0", "cuda"), ("cuda:1", "triton"), ("cuda:0", "cuda")):
        assert backends.choose_backend(FORMATS, device) == chosen
    assert caplog.messages == [f"backend cuda is passed over: int2: {reason}"] and gpus.checks == (0,)
    execution = Execution("fp32", None, tuple(FORMATS))
    assert [execution.backend_on(torch.device("cuda", index)) for index in (0, 1, 0)] == ["cuda", "triton", "cuda"]


def test_a_weight_is_prepared_for_the_gpu_that_it_is_on(gpus: Gpus) -> None:
    packed = random_packed(FORMATS["int3"], 24, 640, 64)
    elsewhere = SimpleNamespace(format=packed.format, qweight=SimpleNamespace(device=torch.device("cuda", 1)))
    with pytest.raises(AmqError, match=r"cuda cannot run int3: GeForce GTX 1080 \(cuda:1\) has compute capability 6.1"):
        backends.prepare(elsewhere, "cuda")
    assert gpus.current == 0 and backends.prepare(packed, "cuda").backend == "cuda"


def test_launch_parameters_are_those_of_the_current_gpu(gpus: Gpus, cache: Path) -> None:
    key = tuning.DENSE_KEY
    for name, warps in zip(NAMES, (8, 2), strict=True):
        tuning.save(name, {key: {"parameters": warps}}, {})
    assert tuning.look_up(key) == 8
    with gpus.device(1):
        assert tuning.look_up(key) == 2 and tuning.current_gpu() == NAMES[1]
    assert tuning.look_up(key) == 8


@pytest.mark.parametrize("group_size", (32, 128))
@pytest.mark.parametrize("name", FORMATS)
def test_rows_of_the_gpu_layout(name: str, group_size: int) -> None:
    """In plain torch, for every width: to the bit those of the packed weight; an id that is no row is an error."""
    packed = random_packed(FORMATS[name], 21, 1100, group_size)
    weight = PreparedWeight.of(packed, "cuda", layout.prepare(packed))
    ids = torch.tensor([20, 0, 7, 8, 8])
    assert torch.equal(layout.rows(weight, ids), dequantize(packed)[ids])
    with pytest.raises(IndexError):
        layout.rows(weight, torch.tensor([24]))


def tied(backend: str) -> tuple[StoredLinear, StoredEmbedding]:
    """A head in int8 of an odd number of bytes, which `reference` has its scales after, and its embedding."""
    head = StoredLinear(FORMATS["int8"], (41, 577), 64, Execution("fp32", backend, ("int8",)), name="lm_head")
    head.store(random_packed(FORMATS["int8"], 41, 577, 64))
    embedding = StoredEmbedding(nn.Embedding(41, 577, dtype=torch.float16), head)
    return head, embedding


@pytest.mark.parametrize("backend", ("cuda", "triton", "reference"))
def test_an_embedding_reads_what_the_head_multiplies_with(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU nothing is copied there but the prepared head, which gives the bits of the packed rows."""
    head, embedding = tied(backend)
    monkeypatch.setattr(modules, "check_activations", lambda *_: None)
    monkeypatch.setattr(modules, "prepare", lambda packed, name: PreparedWeight.of(packed, name, made(packed, name)))

    def made(packed, name: str) -> torch.Tensor:
        return backends.BACKENDS[name].prepare(packed)

    ids = torch.tensor([[3, 40], [0, 3]])
    expected = embedding(ids)  # on a CPU, from the packed weight
    monkeypatch.setattr(StoredEmbedding, "shares", lambda *_: True)
    monkeypatch.setattr(StoredEmbedding, "packed_on", lambda *_: pytest.fail("a second copy"))
    assert torch.equal(embedding(ids), expected)
    assert head._weight.backend == backend and embedding._copy is None
    held = {t.data_ptr(): t.nbytes for m in (head, embedding) for t in (*m.buffers(), *m.parameters()) if t.numel()}
    assert list(held.values()) == [head._weight.nbytes]


def test_what_the_head_has_elsewhere_is_not_shared() -> None:
    """A head on another device keeps its weight there, and the embedding its own."""
    head, _ = tied("reference")
    assert head.lends_rows(torch.device("cpu")) and head.lends_rows(torch.device("cuda", 1))
    head.prepared(torch.device("cpu"))
    assert head.lends_rows(torch.device("cpu")) and not head.lends_rows(torch.device("cuda", 1))


def test_a_run_names_its_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    properties = SimpleNamespace(name="GeForce RTX 4090", major=8, minor=9, total_memory=24 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n")
    facts = {"name": "GeForce RTX 4090", "capability": "8.9", "memory_bytes": 24 << 30, "driver": "570.86.15"}
    assert gpu_facts("cuda:1", version) == facts and gpu_facts("cuda", tmp_path / "none") == {**facts, "driver": ""}
    assert gpu_facts("cpu") is None and MachineEntry.of("cpu", 2).gpu is None
    entry = MachineEntry.of("cuda", 2)
    assert entry.gpu.name == "GeForce RTX 4090" and parse_record(to_json(entry), MachineEntry, "run.json") == entry
