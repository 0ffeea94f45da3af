"""The `dvi` command: its verbs in the order of the help, what may stand before any of them, and how it ends.

Knows streams and exit codes; a verb is in the module of its kind, and imports what it needs when it runs, so that
`--help` is instant. What is for people goes to stderr (generated text, which is the product, to stdout); the last line
of stdout is one JSON object, which a terminal shows only with --json. Exit codes: 0, 1 when `audit` or `doctor` found
something wrong, 2 for a user's error, 3 when another rank of the job was lost, 128 + signal.
"""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dvi import __version__, terminal
from dvi.cli import bench, decode, model, serve, tools, train
from dvi.progress import shown_on
from dvi.signals import SIGNAL_BASE, handled
from dvi.software import extra_of, install_extra
from dvi.terminal import PEER_LOST, USER_ERROR, make_console, say

SIGINT = 2
DEBUG, JSON = "--debug", "--json"
RENAMED = {"verify": "audit"}  # verbs by the names they had


class _Group(TyperGroup):
    """Turns a user's error into one line and an exit code; knows old names of verbs, and two options for anywhere.

    --debug turns the error into a traceback, --json shows the last line on a terminal too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)  # what follows is text, whatever it looks like
        ctx.meta[DEBUG], terminal.is_json_asked = DEBUG in args[:end], JSON in args[:end]
        return super().parse_args(ctx, [arg for arg in args[:end] if arg not in (DEBUG, JSON)] + args[end:])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        name = RENAMED.get(cmd_name, cmd_name)
        if name != cmd_name:
            say(f"dvi {cmd_name} is now called dvi {name}; the old name goes on working")
        return super().get_command(ctx, name)

    def invoke(self, ctx: Any) -> Any:
        is_first = os.environ.get("RANK", "0") == "0"
        try:
            with shown_on(make_console()) if is_first else nullcontext():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(SIGNAL_BASE + SIGINT) from None
        except (ValueError, OSError) as error:
            if ctx.meta[DEBUG]:
                raise
            # By name: the class is of a module that imports torch.
            exit_code = PEER_LOST if type(error).__name__ == "PeerLostError" else USER_ERROR
            lines = (line.strip() for line in str(error).splitlines())
            say(f"error: {'; '.join(line for line in lines if line)}")
            raise typer.Exit(exit_code) from None
        except ModuleNotFoundError as error:
            extra = extra_of(error.name)
            if extra is None or ctx.meta[DEBUG]:
                raise
            say(f"error: this needs {error.name}, which is not installed: {install_extra(extra)}")
            raise typer.Exit(USER_ERROR) from None


app = typer.Typer(
    cls=_Group, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},  # of every verb: they inherit it
    epilog="Anywhere: --json ends with a line of JSON on a terminal too; --debug shows an error's traceback.",
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"dvi {__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Draft, Verify, & Improve: self-speculative decoding whose drafter learns while it serves."""


for _verb in (  # in the order of the help
    train.init, decode.generate, train.train, train.warmup, serve.serve, serve.tune, serve.route, serve.top,
    decode.audit, train.export, tools.inspect, tools.doctor,
):  # fmt: skip
    app.command()(_verb)
app.add_typer(bench.app, name="bench")
app.add_typer(model.app, name="model")


def main() -> None:
    """`dvi`: signals are handled, and nothing is collected that ends with the process anyway."""
    with handled():
        try:
            app(prog_name="dvi")
        finally:
            gc.freeze()  # or for seconds the interpreter looks for cycles among all objects of torch and transformers


if __name__ == "__main__":
    main()
