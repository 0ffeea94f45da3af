"""The verbs of servers: serve, tune before one starts, route before several, top beside one that runs.

Knows arguments; every verb imports what it needs when it runs, and serve nothing of training where that is off.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dvi.cli.arguments import load_arguments
from dvi.cli.decode import warn_if_lossy
from dvi.cli.options import PROMPTS_HELP, AdapterOption, PrintConfigOption, SourceArgument
from dvi.explained_yaml import explained_yaml
from dvi.settings import RouteSettings, ServeConfig, ServeSettings
from dvi.terminal import finish, finish_job, make_console, quieten_transformers, say

if TYPE_CHECKING:
    from dvi.serving.loop import EngineLoop

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_SERVE = ServeSettings()


def serve(
    source: SourceArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE|YAML", help="Settings such as train.budget=0.1; files, such as a plan."),
    ] = None,
    adapter: AdapterOption = None,
    host: Annotated[str | None, typer.Option(help=f"Default {_SERVE.host}; others need an API key.")] = None,
    port: Annotated[
        int | None, typer.Option(help=f"Default {_SERVE.port}; 0 takes a free one.", min=0, max=65535)
    ] = None,
    print_config: PrintConfigOption = False,
    live: Annotated[bool, typer.Option("--live", help="Show the figures here as they change.")] = False,
) -> None:
    """Answer OpenAI's API with a drafter that learns meanwhile."""
    settings = load_arguments(
        source, arguments or (), schema=ServeConfig, verb="serve",
        options={"drafter.adapter": adapter and str(adapter), "serve.host": host, "serve.port": port},
    )
    if print_config:
        print(explained_yaml(settings), end="")
        return
    import logging

    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    from dvi.serving.access import load_access

    access = load_access(settings.serve.keys_file)
    access.check_host(settings.serve.host)
    quieten_transformers()
    from dvi.serving.launch import ServerLaunch
    from dvi.serving.server import Server, build_loop, leave_a_core, run_server

    leave_a_core(settings)
    with ServerLaunch(settings) as launch:
        if settings.train.enabled:
            from trainers.jobs.serve import build_serving

            speculator, learner = build_serving(launch.config, launch.peers)
        else:
            from dvi.decode.construction import build_speculator

            speculator, learner = build_speculator(launch.config), None
        loop = build_loop(settings, speculator, learner)
        if settings.serve.has_bound:
            from dvi.planning.controller import build_controller

            loop.planner = build_controller(settings, loop)
        server, url, num_ranks = Server(settings, loop, access), launch.url, launch.peers.num_ranks

        def announce() -> None:
            ranks = "" if num_ranks == 1 else f" on {num_ranks} ranks"
            say(f"serving {settings.model.path}{ranks} at {url}, figures at {url}/dashboard")
            warn_if_lossy(speculator.rule)
            if live:
                _show_in_background(loop, until=lambda: server.should_exit)

        loop.engine.costs()  # takes seconds, on some ranks more than on others, and the door opens when all have them
        launch.announce(server, announce)
        run_server(server, loop, launch.listener)
    finish_job("serve", {"url": url, "drafter_version": speculator.drafter.version})


def tune(
    source: SourceArgument,
    max_token_latency_ms: Annotated[
        float, typer.Option(help="From a request's first token to its last, by the tokens after the first.")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings of dvi serve, as drafter.adapter=DIR.")
    ] = None,
    max_first_token_ms: Annotated[float | None, typer.Option(help="From a request's admission to it.")] = None,
    traffic: Annotated[
        Path | None, typer.Option(help="JSONL rows with prompt_tokens and new_tokens; default: the prompts' own.")
    ] = None,
    prompts: Annotated[
        Path, typer.Option(help=f"{PROMPTS_HELP} They are decoded to measure acceptance and lengths.")
    ] = Path("configs/demo/prompts.jsonl"),
    acceptance: Annotated[
        Path | None,
        typer.Option(help="JSON of acceptance by split layer, or dvi bench sweep's report: plans those layers too."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of plan.yaml and the frontier.")] = Path("runs/tune"),
    num_draft_tokens: Annotated[str | None, typer.Option(help="Values to choose from, such as 0,2,4.")] = None,
    max_rows: Annotated[str | None, typer.Option(help="Values to choose from.")] = None,
    prefill_tokens_per_step: Annotated[str | None, typer.Option(help="Values to choose from.")] = None,
    rounds_per_prefill: Annotated[str | None, typer.Option(help="Values to choose from.")] = None,
    seconds: Annotated[float, typer.Option(help="For measuring each split layer's passes.", min=0)] = 8.0,
    remeasure: Annotated[
        bool, typer.Option("--remeasure", help="Measure this machine even if it is known from an earlier time.")
    ] = False,
) -> None:
    """Find a server's fastest settings within a latency. For 99 requests of 100, as most tokens per second."""
    for option, value in (("token-latency", max_token_latency_ms), ("first-token", max_first_token_ms)):
        if value is not None and not value > 0:
            raise ValueError(f"--max-{option}-ms must be > 0, got {value}; try 50")
    settings = load_arguments(source, arguments or (), schema=ServeConfig, verb="serve")
    quieten_transformers()
    import math
    import shlex

    from dvi.planning.plans import LatencyBound
    from dvi.planning.tune import Sources, read_choices
    from dvi.planning.tune import tune as tune_server
    from dvi.serving.server import leave_a_core

    given = {
        "num_draft_tokens": num_draft_tokens, "max_rows": max_rows,
        "prefill_tokens_per_step": prefill_tokens_per_step, "rounds_per_prefill": rounds_per_prefill,
    }  # fmt: skip
    leave_a_core(settings)  # as a server does, for whom this is measured
    facts = tune_server(
        settings,
        LatencyBound(max_token_latency_ms / 1e3, math.inf if max_first_token_ms is None else max_first_token_ms / 1e3),
        Sources(prompts, traffic=traffic, acceptance=acceptance, seconds=seconds, remeasure=remeasure),
        choices={name: read_choices(name, text) for name, text in given.items() if text is not None},
        folder=output, command=shlex.join(["dvi", "serve", source, *(arguments or ())]), console=make_console(),
    )
    finish("tune", **facts)


def route(
    replicas: Annotated[list[str], typer.Argument(metavar="URL", help="Of a server, such as http://127.0.0.1:8001.")],
    host: str = RouteSettings.host,
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = RouteSettings.port,
    keys_file: Annotated[Path | None, typer.Option(help="API keys, the same file as the replicas'.")] = None,
    drain_s: Annotated[float, typer.Option(min=0, help="For running requests to end.")] = RouteSettings.drain_s,
    learn_together: Annotated[
        bool, typer.Option("--learn-together", help="The servers are ranks of one job and learn one drafter.")
    ] = False,
    handed: Annotated[int | None, typer.Option("--socket", hidden=True, help="Of a dvi serve that starts it.")] = None,
) -> None:
    """Give several servers one address. The least loaded comes first, and conversations stay together."""
    import logging

    keys = None if keys_file is None else str(keys_file)
    settings = RouteSettings(
        tuple(replicas), host=host, port=port, keys_file=keys, drain_s=drain_s, learn_together=learn_together
    )
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    import socket

    from dvi.serving.front_door import run_front_door

    run_front_door(settings, listener=None if handed is None else socket.socket(fileno=handed))
    finish("route", replicas=list(settings.replicas))


def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server, such as http://127.0.0.1:8000.")],
) -> None:
    """Show a server's figures as they change. Until it is gone; its key comes from DVI_API_KEY."""
    from dvi.serving.access import API_KEY_VARIABLE
    from dvi.serving.metrics.terminal_view import fetch_from, show

    show(fetch_from(url, os.environ.get(API_KEY_VARIABLE)), console=make_console(), until=lambda: False)


def _show_in_background(loop: EngineLoop, *, until: Callable[[], bool]) -> None:
    """The live figures, beside a server that needs the main thread for its signals."""
    import threading

    from dvi.serving.metrics.dashboard import status
    from dvi.serving.metrics.terminal_view import show

    arguments = {"console": make_console(), "until": until}
    threading.Thread(target=show, args=(lambda: status(loop),), kwargs=arguments, name="live", daemon=True).start()
