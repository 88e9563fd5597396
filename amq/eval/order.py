"""`python -m amq.eval order MODEL`: does the proxy rank configurations as the deployed quantizer does?

AMQ's claim (order equivalence) is what makes a search on a cheap bank worth anything. Random configurations spread over
the budget are evaluated twice, assembled from the proxy's bank and quantized as they would be deployed, both by their
divergence from the full-precision model; Spearman's and Kendall's coefficients compare the two orders. Configurations
of very different size rank themselves, so the coefficient among those of about equal size is reported too: there
a search has to choose.

Deployed quantizers work with full-precision inputs here (as AWQ does), not with those of the blocks quantized before:
a group of linears then depends on its own formats only, is quantized once per combination that occurs, and 50
configurations cost about as much as five.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from amq.bank import BankRecipe
from amq.calibration import CalibrationStream, InputGroup
from amq.configuration import Configuration
from amq.data import WindowSampler, load_corpus
from amq.errors import AmqError
from amq.evaluator import Evaluator
from amq.files import check_new_folder, write_json
from amq.formats import get_format, parse_formats
from amq.linears import Inventory, check_weights, get_linear, inventory
from amq.models import LoadedModel, load_model, model_fingerprint
from amq.packing import PackedWeight
from amq.progress import Progress, terminal_progress
from amq.quantize.fold import Fold, find_fold
from amq.quantize.methods import METHODS, Method, head_dim, quantize_group
from amq.settings import add_flags, flag, run_command

BANDS = 5
"""Configurations are compared with those of about their size in this many bands."""


@dataclass(frozen=True)
class OrderSettings:
    """Every field is a flag of the same name; `model` is the positional argument."""

    model: str
    output: str = flag("runs/order", "folder for order.json and order.png", metavar="DIR")
    samples: int = flag(50, "configurations", metavar="N")
    formats: str = flag("int2,int3,int4", "formats that they mix", metavar="LIST")
    group_size: int = flag(128, "input features per scale", metavar="G")
    proxy: str = flag("hqq", "banks that rank them: hqq, rtn, clip, gptq; several with commas", metavar="LIST")
    deployed: str = flag("awq,gptq", "quantizers that they are deployed with", metavar="LIST")
    calibration: str = flag("pydoc", "text of calibration and loss, on different windows", metavar="TEXT")
    bank_windows: int = flag(24, "calibration windows", metavar="N")
    windows: int = flag(2, "windows that the loss is measured on", metavar="N")
    window_length: int = flag(512, "tokens per window", metavar="N")
    seed: int = flag(0, "of configurations and windows", metavar="N")
