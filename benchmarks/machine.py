"""The machine and the versions that a result was measured with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "numba", "numpy", "safetensors", "transformers", "peft")


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = Path("/sys/devices/system/cpu/cpu0/cache")
    kinds = {"Data": "d", "Instruction": "i"}
    caches = [f"L{_line(i / 'level')}{kinds.get(_line(i / 'type'), '')} {_line(i / 'size')}" for i in sorted(cpu.glob("index*"))]
    names = re.findall(r"^model name\s*: (.*)$", _text(Path("/proc/cpuinfo")), re.M)
    memory = re.search(r"^MemTotal:\s+(\d+) kB", _text(Path("/proc/meminfo")), re.M)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "caches": ", ".join(caches),
        "memory_gb": round(int(memory[1]) / 1e6, 1) if memory else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in PACKAGES},
        "commit": git.stdout.strip() or "unknown",
        "date": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
    }


def _text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _line(path: Path) -> str:
    return _text(path).strip() or "?"
