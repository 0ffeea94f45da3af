"""The verbs that look: inspect at a model, an adapter or settings, and doctor at this machine.

Knows arguments and tables; both import what they need when they run.
"""

from __future__ import annotations

from typing import Annotated

import typer

from dvi.cli.options import SplitLayerOption
from dvi.config import load_config
from dvi.settings import Dtype, ModelSettings
from dvi.terminal import FOUND_WRONG, finish, make_console, quieten_transformers


def inspect(
    path: Annotated[
        str,
        typer.Argument(
            metavar="ADAPTER|MODEL|YAML", help="An adapter, a model, or a file of settings of train or serve."
        ),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Such as data.batch_size=8.")
    ] = None,
    split_layer: SplitLayerOption = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="auto is the YAML file's, or the one the model is stored in."),
    ] = ModelSettings.dtype,
    positions: Annotated[
        int | None, typer.Option(min=1, help="Cached positions of each row, to plan memory for.")
    ] = None,
    check: Annotated[
        bool | None,
        typer.Option(
            "--check/--no-check", help="Load the weights and check the split; default for small models in a folder."
        ),
    ] = None,
) -> None:
    """Show what an adapter or a model is. How a model would be split, and what memory it would take."""
    quieten_transformers()
    from dvi.inspect import machine

    console = make_console()
    if machine.is_adapter(path):
        facts = machine.describe_adapter(path)
    else:
        overrides = [*(overrides or ()), *([f"model.split_layer={split_layer}"] if split_layer is not None else ())]
        if path.endswith((".yaml", ".yml")):
            settings = machine.load_settings(path, overrides)
            model, dtype = settings.model.path, None if dtype == "auto" else dtype
        else:
            model, settings = path, load_config(None, overrides)
        from trainers.learning.memory import learner_memory

        facts = machine.describe_model(
            model, settings, dtype=dtype, positions=positions, check=check, learner_memory=learner_memory
        )
    # A run's settings are long, and in config.yaml beside it; the JSON line has them. Memory has a table of its own.
    shown = {name: facts[name] for name in facts if name not in ("config", "demand", "memory", "devices")}
    console.print(machine.facts_table(shown, title=path))
    if "memory" in facts:
        console.print(machine.memory_table(facts))
    finish("inspect", source=path, **facts)


def doctor() -> None:
    """Check this machine. Versions, devices, precisions, exact mode, and what is missing."""
    quieten_transformers()
    from dvi.inspect.machine import describe_machine, facts_table

    facts = describe_machine()
    make_console().print(facts_table(facts, title="this machine"))
    finish("doctor", **facts)
    if facts["problems"]:
        raise typer.Exit(FOUND_WRONG)
