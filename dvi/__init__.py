"""DVI: Draft, Verify, & Improve - self-speculative decoding whose drafter learns while it serves."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dvi.records import SamplingParams
    from dvi.speculator import SelfSpeculator

__version__ = "0.1.0"
__all__ = ["SamplingParams", "SelfSpeculator", "__version__"]

_HOMES = {"SamplingParams": "dvi.records", "SelfSpeculator": "dvi.speculator"}


def __getattr__(name: str) -> object:
    # Lazily: `dvi --help` and `import dvi.config` must not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'dvi' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
