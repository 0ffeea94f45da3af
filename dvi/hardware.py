"""What a measurement is made on: the machine, to be written beside it, and the device, whose work ends when it ends."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers


def wait_for(device: torch.device) -> None:
    """Returns when a CUDA device has done all that it was asked; other devices have by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of one call, and of the device's work in it."""
    start_s = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start_s


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has held so far: on a GPU of the device's, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


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
