"""Where what was measured on this machine once is kept for the next time: JSON files in the user's cache.

Knows names of files and fingerprints, which say what a measurement depends on; knows nothing of what was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """Where measurements of a kind are kept if nobody says: dvi/KIND in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dvi" / kind


def measured_path(folder: Path, fingerprint: Mapping[str, object]) -> Path:
    key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"{key}.json"
