"""Where the tests' files lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]  # of the repository
STORIES = ROOT / "tests/stories260k"  # a Llama of 260,000 parameters, trained on stories
