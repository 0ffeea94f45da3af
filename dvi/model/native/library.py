"""Compiles kernels.cpp for this machine, once, and loads it; says why where that cannot be done.

Knows compilers, files and the C interface; knows nothing of models. Everything works without it, slower.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from pathlib import Path

import torch  # noqa: F401  (brings the OpenMP runtime whose symbols the kernels need)

from dvi.measured import cache_folder
from dvi.progress import doing
from dvi.whole_files import write_whole

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
# No libgomp is linked: its symbols come from the OpenMP runtime that torch has loaded, since two runtimes would each
# keep threads that spin. Sums keep the order in which they are written, so no -ffast-math.
FLAGS = ("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-w")
SWITCH = "DVI_NATIVE"  # environment: off = never compile, load or use; else what -march is to be, "native" if unset
TIMEOUT_S = 180

log = logging.getLogger(__name__)


class Product(Structure):
    """struct Product of kernels.cpp."""

    _fields_ = [
        ("kind", c_int32), ("n", c_int32), ("k", c_int32), ("padding", c_int32),
        ("weight", c_void_p), ("bias", c_void_p),
    ]


class Layer(Structure):
    """struct Layer of kernels.cpp."""

    _fields_ = [
        ("qkv", Product), ("o", Product), ("gate_up", Product), ("down", Product),
        ("input_gain", c_void_p), ("post_gain", c_void_p), ("q_gain", c_void_p), ("k_gain", c_void_p),
        ("input_eps", c_float), ("post_eps", c_float), ("qk_eps", c_float), ("window", c_int32),
    ]


class Pass(Structure):
    """struct Pass of kernels.cpp."""

    _fields_ = [
        ("rows", c_int32), ("width", c_int32), ("heads", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
        ("capacity", c_int32), ("threads", c_int32), ("scale", c_float),
        ("cache_rows", c_void_p), ("positions", c_void_p), ("slots", c_void_p), ("ancestors", c_void_p),
        ("lengths", c_void_p), ("cos", c_void_p), ("sin", c_void_p),
        ("inputs", c_void_p), ("mixed", c_void_p), ("sums", c_void_p), ("scores", c_void_p),
    ]


class Drafter(Structure):
    """struct Drafter of kernels.cpp."""

    _fields_ = [
        ("from_hidden", Product), ("to_hidden", Product), ("head", Product),
        ("gain", c_void_p), ("eps", c_float), ("rows", c_int32), ("threads", c_int32),
        ("inputs", c_void_p), ("inner", c_void_p), ("normed", c_void_p),
    ]


def load() -> ctypes.CDLL | None:
    """The kernels, compiled now if they never were on this machine; None, with the reason in the log, without them."""
    wanted = os.environ.get(SWITCH, "native")
    return None if wanted == "off" else _load(wanted)[0]


def why_none() -> str | None:
    """Why there are no kernels here; None where there are."""
    wanted = os.environ.get(SWITCH, "native")
    return f"{SWITCH}=off" if wanted == "off" else _load(wanted)[1]


def kernels_version() -> str | None:
    """What tells these kernels from other ones; None where there are none. For whatever depends on their speed."""
    return None if load() is None else hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]


@functools.cache
def _load(march: str) -> tuple[ctypes.CDLL | None, str | None]:
    try:
        return _bound(ctypes.CDLL(str(compiled(march)))), None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        log.warning("layers run without compiled kernels, at a half to a third of the speed: %s", error)
        return None, str(error)


def compiled(march: str = "native") -> Path:
    """The compiled library for this machine, from the user's cache or made now.

    march: what the compiler's -march is to be. Raises RuntimeError with the reason when it cannot be compiled.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError(f"the kernels are for x86-64, this machine is {platform.machine()}")
    if compiler is None or shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler ({compiler or ', '.join(COMPILERS)}) is installed, such as g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=TIMEOUT_S).stdout
    described = "\n".join([SOURCE.read_text(), *FLAGS, march, compiler, version, _cpu_flags()])
    path = cache_folder("native") / f"kernels-{hashlib.sha256(described.encode()).hexdigest()[:16]}.so"
    if not path.exists():
        with doing("compiling kernels for this machine"), tempfile.TemporaryDirectory() as folder:
            write_whole(path, _compile(compiler, march, Path(folder)))
    return path


def _compile(compiler: str, march: str, folder: Path) -> bytes:
    # In two steps: only a link without -fopenmp leaves the runtime's symbols to be found when it is loaded.
    parts, whole = str(folder / "kernels.o"), folder / "kernels.so"
    for command in (
        [compiler, *FLAGS, f"-march={march}", "-c", str(SOURCE), "-o", parts],
        [compiler, "-shared", parts, "-o", str(whole)],
    ):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{compiler} did not end within {TIMEOUT_S} s") from None
        if done.returncode != 0:
            raise RuntimeError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
    return whole.read_bytes()


def _cpu_flags() -> str:
    """What this CPU can do: a cache may be shared by machines that differ."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line for line in lines if line.startswith("flags")), platform.processor())


def _bound(library: ctypes.CDLL) -> ctypes.CDLL:
    library.dvi_layers.argtypes = [c_void_p, c_int32, POINTER(Pass), POINTER(c_void_p), POINTER(c_void_p), c_void_p]
    library.dvi_product.argtypes = [POINTER(Product), c_void_p, c_int32, c_void_p, c_void_p, c_int32]
    library.dvi_norm.argtypes = [c_void_p, c_void_p, c_float, c_int32, c_int32, c_int32, c_void_p]
    library.dvi_draft.argtypes = [POINTER(Drafter), c_void_p, c_void_p, c_void_p]
    for function in (library.dvi_layers, library.dvi_product, library.dvi_norm, library.dvi_draft):
        function.restype = None
    return library

