"""What the numbers were measured on."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import sterna

PACKAGES = ("torch", "numba", "safetensors", "transformers", "tokenizers", "peft")


def machine() -> dict[str, str]:
    """The processor, its memory, the accelerator, and the versions of what computes."""
    found = {"cpu": _cpu(), "cores": str(os.cpu_count() or 1), "threads": str(torch.get_num_threads())}
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.get_device_name()
    found |= {"system": f"{platform.system()} {platform.machine()}", "sterna": sterna.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
