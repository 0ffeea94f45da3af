"""Imports point down: which package knows which, held by reading every module's import statements."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

# From the bottom up: a package, and those that its modules may import beside their own.
KNOWS = {
    "dvi": "",
    "dvi.model": "dvi",
    "dvi.draft": "dvi dvi.model",
    "dvi.decode": "dvi dvi.model dvi.draft",
    "dvi.inspect": "dvi dvi.model dvi.draft dvi.decode",
    "dvi.serving": "dvi dvi.model dvi.draft dvi.decode",
    "dvi.planning": "dvi dvi.model dvi.draft dvi.decode dvi.serving",
    "dvi.bench": "dvi dvi.model dvi.draft dvi.decode dvi.inspect",
    "trainers.learning": "dvi dvi.model dvi.decode",
    "trainers.ranks": "dvi dvi.model dvi.decode trainers.learning",
    "trainers.jobs": "dvi dvi.model dvi.draft dvi.decode trainers.learning trainers.ranks",
    "trainers.experiments": "dvi dvi.model dvi.draft dvi.decode dvi.bench trainers.learning trainers.jobs",
    # The command line imports what a verb needs when the verb runs: serving must run with training absent.
    "dvi.cli": "dvi dvi.model dvi.draft dvi.decode dvi.inspect dvi.serving dvi.planning dvi.bench",
}
DOORS = {"dvi", "trainers"}  # packages whose __init__ passes names on, from anywhere
LIGHT = ("dvi.cli.main", "dvi.config", "dvi.serving.front_door")  # `--help` is instant; clients wait for a front door


def modules() -> dict[str, ast.Module]:
    paths = [path for folder in ("dvi", "trainers") for path in (ROOT / folder).rglob("*.py")]
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}
    trees = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in named.items()}
    return {name: tree for name, tree in trees.items() if name not in DOORS}


MODULES = modules()


def package_of(module: str) -> str:
    """The package of the table that a module is in; dvi.serving.metrics is a part of dvi.serving."""
    package = ".".join(module.split(".")[:2])
    return package if package in KNOWS else module.partition(".")[0]


def imported(tree: ast.AST) -> set[str]:
    """Modules of ours that an import statement below this node names."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            # `from dvi.inspect import machine` names a module, `from trainers import OnlineTrainer` a door.
            within = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= within & set(MODULES) or {node.module}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name in MODULES or name == "trainers"}


class WithoutFunctions(ast.NodeTransformer):
    """What is left of a module runs when it is imported."""

    def visit_FunctionDef(self, _node: ast.FunctionDef) -> None:
        return None


def test_every_import_points_down():
    """Catches serving that needs training, maths that needs models, and a module in no package of the table."""
    assert {package_of(name) for name in MODULES} == set(KNOWS)
    for name, tree in MODULES.items():
        package = package_of(name)
        tree = WithoutFunctions().visit(tree) if package == "dvi.cli" or name == "dvi.__main__" else tree
        for target in imported(tree):
            assert package_of(target) in {package, *KNOWS[package].split()}, f"{name} imports {target}"


def test_no_module_imports_itself_by_way_of_others():
    """Catches two files that only look like two."""
    arrows = {name: imported(tree) & set(MODULES) for name, tree in modules().items()}
    while arrows:
        leaves = {name for name, targets in arrows.items() if not targets & set(arrows) - {name}}
        assert leaves, f"a circle among {sorted(arrows)}"
        arrows = {name: targets for name, targets in arrows.items() if name not in leaves}


@pytest.mark.parametrize("module", LIGHT)
def test_what_must_answer_at_once_does_not_import_torch(module):
    code = f"import sys, {module}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"
