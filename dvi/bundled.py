"""Files that travel with the package: the folder configs/, at the top of a checkout, and inside `dvi` in a wheel.

Knows where they lie, and reads none.
"""

from __future__ import annotations

from pathlib import Path

CONFIGS = "configs"  # pyproject.toml puts it into the wheel as dvi.configs


def bundled(path: str | Path) -> Path:
    """Where a bundled file lies on this machine. path: as in the repository, such as configs/demo/prompts.jsonl."""
    package = Path(__file__).parent
    return (package if (package / CONFIGS).is_dir() else package.parent) / path


def here_or_bundled(path: str | Path) -> Path:
    """The path itself; the bundled file where it names one that is not in the current folder.

    What the documentation says of configs/demo/prompts.jsonl then works in any folder.
    """
    path = Path(path)
    is_bundled = path.parts[:1] == (CONFIGS,) and not path.exists() and bundled(path).is_file()
    return bundled(path) if is_bundled else path
