"""What machine this is, for the records of runs and measurements."""

from __future__ import annotations

import platform
import re
import resource
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

CPU_INFO = Path("/proc/cpuinfo")
NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")


def cpu_name() -> str:
    """The processor's name; Linux tells it in a file only. Where the name has no number, as a hypervisor's may, with
    the family and the model that tell generations apart."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    if "cpu family" in fields and not re.search(r"\d", name.partition("@")[0]):
        name += f" (family {fields['cpu family']}, model {fields['model']})"
    return name


def gpu_facts(device: str, driver: Path = NVIDIA_DRIVER) -> dict[str, Any] | None:
    """name, capability ("8.9"), memory_bytes and driver of the GPU `device` as torch names it, None for no GPU.

    driver: the file in which NVIDIA's driver says what it is; without it the driver is "".
    """
    import torch

    where = torch.device(device)
    if where.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(where)
    try:
        release = re.search(r"\b\d+\.\d+(\.\d+)?\b", driver.read_text(encoding="utf-8"))
    except OSError:
        release = None
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "memory_bytes": found.total_memory,
        "driver": release[0] if release else "",
    }


def peak_memory_bytes() -> int:
    """The most memory that this process has had resident. Right after a fork that is its parent's figure."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else 1024 * largest


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """{package: version} of those of `packages` that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
