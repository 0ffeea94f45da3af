"""What a measurement is made on: the machine, to be written beside it, and the device, whose work ends when it ends."""

from __future__ import annotations

import os
import platform
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


def wait_for(device: torch.device) -> None:
    """Returns when a CUDA device has done all that it was asked; other devices have by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: torch.device | str = "cpu") -> dict[str, object]:
    """CPU, cores, threads, load, GPU, versions and date."""
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    is_cuda = torch.device(device).type == "cuda"
    return {
        "date": datetime.now(UTC).date().isoformat(), "cpu": cpu, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "load": round(os.getloadavg()[0], 2),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
    }
