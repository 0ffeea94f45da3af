"""The versions this project is tested with: what faces the network is among them."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.support.paths import ROOT

# The distributions behind every module that a server, its door and its learner import.
CLOSURE = """
import importlib.metadata, sys
import dvi.cli.main, dvi.serving.front_door, dvi.serving.server, trainers.jobs.serve
by_module = importlib.metadata.packages_distributions()
modules = {name.partition(".")[0] for name in sys.modules} - {"dvi", "trainers"}
print(*sorted({name for module in modules for name in by_module.get(module, ())}))
"""


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_all_that_a_server_imports_is_pinned():
    """Catches a server whose HTTP parser or framework is whatever the index had on the day of the installation."""
    run = subprocess.run([sys.executable, "-c", CLOSURE], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = [line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    pinned = {normal(line.partition("==")[0]) for line in lines if "==" in line}
    imported = {normal(name) for name in run.stdout.split()}
    assert {"fastapi", "starlette", "uvicorn", "h11", "jinja2", "prometheus-client", "torch"} <= imported
    # setuptools comes with the environment, and an editable installation has it hook into every start.
    assert not imported - pinned - {"setuptools"}, "pin them in constraints.txt"
