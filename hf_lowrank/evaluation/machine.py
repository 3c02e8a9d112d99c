"""What a measurement was made on."""

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
    """Versions, processor, threads and devices, as text."""
    found = {
        "hf_lowrank": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    found |= {name: _version(name) for name in PACKAGES}
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of torch's"
    found["CPU kernels"] = native.instruction_set_in_use() if native.library_path() is not None else "not built"
    found["kernels switch"] = os.environ.get(kernels.ENVIRONMENT_VARIABLE, "not set")
    found["GPU"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The processor's name; the architecture where the system does not tell it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
