"""Description of the machine and the software that a measurement was made on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import kernels
from ..kernels.cpu import native
from ..version import __version__

PACKAGES = ("torch", "transformers", "accelerate", "safetensors", "peft", "triton")


def machine() -> dict[str, str]:
    """Return versions, processor, threads and devices as text, by what they are."""
    facts = {
        "hf_lowrank": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in PACKAGES:
        facts[package] = _version(package)
    facts["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch's"
    facts["CPU kernels"] = "not built"
    if native.library_path() is not None:
        facts["CPU kernels"] = native.instruction_set_in_use()
    facts["kernels switch"] = os.environ.get(kernels.ENVIRONMENT_VARIABLE, "not set")
    facts["GPU"] = "none"
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell the name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            # All cores have the same name, so the first entry is enough.
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
