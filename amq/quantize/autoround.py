"""`--method autoround`: Intel's auto-round package rounds, by sign gradient descent on each block's output error.

auto-round tunes all blocks in one call and keeps what it chose on the modules: a scale, a whole zero point, and a
weight that equals (code − zero_point)·scale. The codes are read off that weight, never rounded anew. It works on a
copy, because it converts and patches the model that it is given; memory is twice the model.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from amq.errors import AmqError
from amq.formats import BitFormat, get_format
from amq.model.experts import expert_of
from amq.model.inventory import Inventory, LinearSpec, get_linear
from amq.model.open import LoadedModel
from amq.packing import PackedWeight
from amq.quantize.blocks import BlockResult, install, relative_error
from amq.quantize.quantizers.grid import check_scales, decode, packed, to_groups

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH = 8
"""Windows per tuning step, auto-round's own choice."""
ALIGNMENT = 32
"""auto-round leaves a linear alone, without a word, where this does not divide both of its sizes."""
INSTALL = (
    "pip install 'auto-round>=0.16'; into an environment that has torch and transformers: "
    "pip install --no-deps 'auto-round>=0.16' && pip install py-cpuinfo accelerate datasets pydantic"
)


class AutoRoundSource:
    """A `BlockSource`. The first `make` tunes that block and all after it; the others hand out what it found.

    formats: {linear: format name}. windows: int64 [windows, length]. iterations: tuning steps per block. zero_points:
    `symmetric`, or whole ones for anything else. A run that is interrupted inside auto-round starts it again; blocks
    that a former run saved stay as that run left them, and those after them are tuned behind them.
    Raises AmqError, before anything runs, for a missing package, a format or a linear that auto-round lacks.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        inventory: Inventory,
        formats: Mapping[str, str],
        group_size: int,
        windows: Tensor,
        zero_points: str,
        iterations: int,
        seed: int,
    ) -> None:
        if importlib.util.find_spec("auto_round") is None:
            raise AmqError(f"--method autoround needs the package auto-round: {INSTALL}")
        if iterations < 1:
            raise AmqError(f"--autoround-iterations {iterations} is too small: expected at least 1")
        self._model, self._tokenizer, self._inventory = loaded.model, loaded.tokenizer, inventory
        self._formats = {name: get_format(fmt) for name, fmt in formats.items()}
        self._group_size, self._windows, self._iterations, self._seed = group_size, windows, iterations, seed
        self._symmetric = zero_points == "symmetric"
        whole = "autoround makes whole zero points: --zero-points fractional was taken as integer"
        self._notes = [whole] if zero_points == "fractional" else []
        self._tuned: dict[str, PackedWeight] = {}
        if experts := sum(expert_of(loaded.model, spec.name) is not None for spec in inventory.linears):
            raise AmqError(
                f"--method autoround does not take experts, of which this model has {experts} linears: auto-round "
                "would have to route tokens to them as the model does; use --method gptq or awq+gptq"
            )
        for spec in inventory.linears:
            _check(spec, self._formats[spec.name])
            check_scales(spec.name, get_linear(self._model, spec.name).weight, self._formats[spec.name], group_size)

    def make(self, block: int) -> BlockResult:
        linears = self._inventory.in_block(block)
        if any(spec.name not in self._tuned for spec in linears):
            self._tune(block)
        result = BlockResult(notes=list(self._notes))
        for spec in linears:
            weight = get_linear(self._model, spec.name).weight.detach().float().cpu()
            result.packed[spec.name] = self._tuned.pop(spec.name)
            result.errors[spec.name] = relative_error(weight, result.packed[spec.name], None)
        return result

    def finish(self, result: BlockResult) -> None:
        install(self._model, result)

    def _tune(self, first: int) -> None:
        """Runs auto-round for the linears of block `first` and all after it; others keep their weights."""
        specs = [s for s in self._inventory.linears if s.block >= first]
        device = self._model.device
        model = copy.deepcopy(self._model.cpu())  # not on the device, where auto-round puts one block at a time
        try:
            self._run(model, specs, str(device))
        finally:
            nn.Module.to(self._model, device)
        for spec in specs:
            module = get_linear(model, spec.name)
            self._tuned[spec.name] = read_off(module, spec.name, self._formats[spec.name], self._group_size)

    def _run(self, model: PreTrainedModel, specs: list[LinearSpec], device: str) -> None:
        os.environ.setdefault("AR_ALLOW_W8_ASYM", "1")  # else it refuses what only other tools' kernels cannot run
        import auto_round

        logging.getLogger("autoround").setLevel(logging.WARNING)  # its bar shows the blocks
        model.name_or_path = model.config.name_or_path = ""  # a name is all that it could download by
        settings: dict[str, Any] = {"group_size": self._group_size, "sym": self._symmetric, "data_type": "int"}
        tuner = auto_round.AutoRound(
            model,
            self._tokenizer,
            scheme={**settings, "bits": 16, "act_bits": 16},  # of everything that is not listed: left alone
            layer_config={s.name: {**settings, "bits": self._formats[s.name].bits} for s in specs},
            alg_configs=auto_round.SignRoundConfig(iters=self._iterations),
            dataset=list(self._windows.split(BATCH)),
            nsamples=len(self._windows),
            seqlen=self._windows.shape[1],
            batch_size=BATCH,
            seed=self._seed,
            device_map=device,
            amp=model.dtype != torch.float32,  # with it, float32 models are cut to bfloat16
            enable_torch_compile=False,
            low_cpu_mem_usage=False,  # else it writes the blocks to disk
            to_quant_block_names=[[f"{self._inventory.blocks_path}.{i}" for i in range(self._inventory.n_blocks)]],
        )
        tuner.quantize()
        torch.set_printoptions(profile="default")  # it changes how all tensors print


def read_off(module: nn.Linear, name: str, fmt: BitFormat, group_size: int) -> PackedWeight:
    """The weight that auto-round left on `module`, packed; its scale may be negative, its zero point is whole.

    Raises AmqError if the weight is not on the grid of the scale and zero point beside it.
    """
    weight, scale, zero = module.weight.detach().cpu(), getattr(module, "scale", None), getattr(module, "zp", None)
    if scale is None or zero is None:
        raise AmqError(f"auto-round left {name} unquantized: use --method gptq, which takes every linear")
    rows, in_features = weight.shape
    scale = scale.half().float().view(rows, -1)
    zero = torch.as_tensor(zero).float().expand_as(scale)  # one number for all groups if symmetric
    groups = to_groups(weight, group_size)
    codes = (groups / scale.unsqueeze(-1)).round_() + zero.unsqueeze(-1)
    restored = decode(codes, scale, zero)
    codes = codes.flatten(1)[:, :in_features]
    on_grid = (restored - groups).abs() <= torch.finfo(weight.dtype).eps * groups.abs()
    if not (on_grid.all() and codes.min() >= 0 and codes.max() <= fmt.max_code):
        raise AmqError(
            f"{name}: the weight that auto-round left is not ({fmt.name} code − zero point)·scale of those beside it: "
            "this version of auto-round keeps its results in another way; use --method gptq"
        )
    return packed(codes, scale, zero, fmt, group_size)


def _check(spec: LinearSpec, fmt: BitFormat) -> None:
    if fmt.levels != 1 << fmt.bits:
        raise AmqError(f"{spec.name}: auto-round has whole bits only, not {fmt.name} of {fmt.levels} levels")
    if spec.out_features % ALIGNMENT or spec.in_features % ALIGNMENT:
        raise AmqError(
            f"{spec.name} is {spec.out_features} x {spec.in_features}: auto-round takes linears with multiples of "
            f"{ALIGNMENT} only; use --method gptq or awq+gptq"
        )
