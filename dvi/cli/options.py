"""Arguments and options that several verbs have, in one place so that they are one thing everywhere.

Knows names, choices and help texts; what their values mean is in `arguments`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dvi.settings import Dtype, Mode, SourceName

PROMPTS_HELP = "JSONL rows with prompt, messages, text ..., or a .txt of one prompt a line; also .gz."

ModelArgument = Annotated[
    str, typer.Argument(help="A model: a folder, a hub name or a .gguf file.", metavar="MODEL", show_default=False)
]
SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|YAML", help="A model (a folder, a hub name, a .gguf file), or a file of settings: see dvi init."
    ),
]
AdapterOption = Annotated[Path | None, typer.Option(help="Folder of a saved drafter.")]
DtypeOption = Annotated[
    Dtype,
    typer.Option(help="auto: the adapter's; else bfloat16 on GPUs, and on CPUs what decodes faster, measured once."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
ModeOption = Annotated[
    Mode, typer.Option(help="exact: token ids equal plain decoding's to the bit; auto: where that costs nothing.")
]
SplitLayerOption = Annotated[
    int | None, typer.Option(help="Layers below it draft; default the adapter's, or one in sixteen.")
]
SourceOption = Annotated[
    SourceName, typer.Option(help="What proposes drafts: the drafter, or lookups in the request's own text.")
]
DraftTokensOption = Annotated[int, typer.Option(help="The most tokens drafted in a round.")]
PrintConfigOption = Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")]
