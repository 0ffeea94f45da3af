"""Which versions of what is installed run here: ours, and those of the libraries beside it.

Imports nothing heavy. Our own version stands here alone, so that it is right in a checkout that was never installed,
and beside another distribution called dvi.
"""

from __future__ import annotations

from collections.abc import Iterable

VERSION = "0.1.0"
DISTRIBUTION = "draft-verify-improve"  # the name on package indexes, where dvi is somebody else's
# Modules that only an extra brings, by extra.
EXTRAS = {"serve": ("fastapi", "uvicorn", "prometheus_client", "httpx2"), "deepspeed": ("deepspeed",)}


def version_of(package: str) -> str | None:
    """The installed version, None where there is none. `dvi` is this package, whatever it was installed as."""
    if package == "dvi":
        return VERSION
    from importlib import metadata  # here: it takes longer than all else that `dvi --help` imports

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions_of(packages: Iterable[str]) -> dict[str, str | None]:
    """`version_of` each, by name."""
    return {package: version_of(package) for package in packages}


def requirements() -> list[str] | None:
    """What the installed distribution asks for, as Requires-Dist has it; None in a checkout that is only importable."""
    from importlib import metadata

    try:
        return metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None


def install_extra(name: str) -> str:
    """The command that installs one of the project's extras."""
    return f"pip install '{DISTRIBUTION}[{name}]'"


def extra_of(module: str | None) -> str | None:
    """The extra that brings a module; None for a module that none brings."""
    return next((extra for extra, modules in EXTRAS.items() if module and module.partition(".")[0] in modules), None)
