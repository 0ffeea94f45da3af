"""The `dvi` command: init, model, generate, train, warmup, serve, tune, route, top, verify, export, inspect, bench ...

Knows arguments, streams and exit codes; every verb imports what it needs when it runs, so that `--help` is instant.
What is for people goes to stderr (generated text, which is the product, to stdout); the last line of stdout is one JSON
object, which a terminal shows only with --json. Exit codes: 0, 1 when `verify` or `doctor` found something wrong, 2 for
a user's error, 3 when another rank of the job was lost, 128 + signal.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dvi import __version__, terminal
from dvi.cli.arguments import check_model, load_arguments
from dvi.cli.bench import app as bench_app
from dvi.cli.model import app as model_app
from dvi.config import load_config, to_yaml
from dvi.progress import shown_on
from dvi.settings import (
    DrafterSettings,
    DraftSettings,
    RouteSettings,
    SamplingSettings,
    ServeConfig,
    ServeSettings,
    TrainConfig,
    VerifySettings,
    WarmupConfig,
)
from dvi.signals import SIGNAL_BASE, handled
from dvi.software import extra_of, install_extra
from dvi.terminal import finish, make_console, quieten_transformers, say

if TYPE_CHECKING:
    from dvi.decode.speculator import Prompt, SelfSpeculator
    from dvi.decode.verification import VerifyRule
    from dvi.serving.loop import EngineLoop

USER_ERROR = 2
PEER_LOST = 3
FOUND_WRONG = 1
SIGINT = 2
DEBUG, JSON = "--debug", "--json"
PROMPTS_HELP = "JSONL rows with prompt, messages, text ..., or a .txt of one prompt a line; also .gz."
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

_SAMPLING, _DRAFT, _DRAFTER, _VERIFY = SamplingSettings(), DraftSettings(), DrafterSettings(), VerifySettings()
_SERVE = ServeSettings()


class _Group(TyperGroup):
    """Turns a user's error into one line and an exit code; knows the two options that may stand anywhere.

    --debug turns the error into a traceback, --json shows the last line on a terminal too.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)  # what follows is text, whatever it looks like
        ctx.meta[DEBUG], terminal.is_json_asked = DEBUG in args[:end], JSON in args[:end]
        return super().parse_args(ctx, [arg for arg in args[:end] if arg not in (DEBUG, JSON)] + args[end:])

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


app.add_typer(bench_app, name="bench")
app.add_typer(model_app, name="model")

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
    Literal["auto", "float32", "bfloat16", "float16", "float64"],
    typer.Option(help="auto: the adapter's; else bfloat16 on GPUs, and on CPUs what decodes faster, measured once."),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
ModeOption = Annotated[
    Literal["fast", "exact"], typer.Option(help="exact: token ids equal plain decoding's, in float32 and float64.")
]
SplitLayerOption = Annotated[
    int | None, typer.Option(help="Layers below it draft; default the adapter's, or one in sixteen.")
]
DraftTokensOption = Annotated[int, typer.Option(help="The most tokens drafted in a round.")]


@app.command()
def init(
    place: Annotated[Path, typer.Argument(metavar="[FILE|FOLDER]", help="A new .yaml file, or its folder.")] = Path(),
    verb: Annotated[Literal["serve", "train"], typer.Option("--for", help="The verb that it is for.")] = "serve",
    model: Annotated[str | None, typer.Option(help="Its model: a folder, a hub name or a .gguf file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented file of settings to start from."""
    from dvi.cli.starter import write_starter

    path = write_starter(place, verb=verb, model=model, overwrite=force)
    say(f"wrote {path}: dvi {verb} {path}")
    finish("init", file=str(path), verb=verb)


@app.command()
def generate(
    model: ModelArgument,
    prompts: Annotated[list[str] | None, typer.Argument(help="One text or more.", metavar="PROMPT")] = None,
    prompts_file: Annotated[Path | None, typer.Option(help=PROMPTS_HELP)] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Through the chat template (the default with one), or as it is.")
    ] = None,
    adapter: AdapterOption = None,
    max_new_tokens: int = _SAMPLING.max_new_tokens,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = _SAMPLING.temperature,
    top_p: float = _SAMPLING.top_p,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = _SAMPLING.top_k,
    min_p: float = _SAMPLING.min_p,
    seed: int = _SAMPLING.seed,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given again.")] = None,
    num_draft_tokens: DraftTokensOption = _DRAFT.num_draft_tokens,
    policy: Literal["auto", "fixed", "confidence", "goodput", "companion"] = _DRAFT.policy,
    companion: Annotated[
        Literal["self", "exit", "older", "ema", "model"], typer.Option(help="Second opinion of the companion policy.")
    ] = _DRAFT.companion,
    companion_model: Annotated[
        str | None, typer.Option(help="Of companion model: a small model with the same tokenizer.")
    ] = None,
    split_layer: SplitLayerOption = None,
    drafter: Annotated[
        Literal["anchored", "lora_head", "recurrent"], typer.Option(help="Kind, without an adapter.")
    ] = _DRAFTER.kind,
    verify_rule: Annotated[
        Literal["strict", "margin", "typical"], typer.Option(help="All but strict are lossy, and the result says so.")
    ] = _VERIFY.rule,
    margin_theta: Annotated[
        float | None, typer.Option(help="Of the margin rule: the least share of the highest logit that passes.")
    ] = None,
    mode: ModeOption = "fast",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    batch_size: Annotated[int, typer.Option(help="Prompts that decode together.")] = 8,
) -> None:
    """Decode prompts. One is streamed as it grows, several are printed as they finish."""
    check_model(model)
    quieten_transformers()
    from dvi.records import RoundStats, SamplingParams

    params = SamplingParams(
        temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed, max_new_tokens=max_new_tokens,
        stop_strings=tuple(stop or ()),
    )
    messages = [[{"role": "user", "content": text}] for text in prompts or ()]
    if prompts_file is not None:
        from dvi.traffic import read_prompts

        messages += read_prompts([prompts_file])
    if not messages:
        raise ValueError("there must be a prompt, got none; give a text or --prompts-file")
    speculator = _load(
        model, adapter=adapter, split_layer=split_layer, drafter=drafter, mode=mode, dtype=dtype, device=device,
        policy=policy, num_draft_tokens=num_draft_tokens, companion=companion, companion_model=companion_model,
        rule=_rule(verify_rule, margin_theta),
    )
    waiting = _as_prompts(speculator, messages, chat)
    stats, start_s = RoundStats(), time.perf_counter()
    if len(waiting) == 1:
        results = [_print_stream(speculator.stream(waiting[0], params))]
    else:
        results = []
        for result in speculator.generate(waiting, params, batch_size=batch_size, keep_transitions=False):
            print(f"[{result.index}] {result.text}", flush=True)
            results.append(result)
    seconds = time.perf_counter() - start_s
    for result in results:
        stats.add(result.stats)
    say(
        f"{stats.new_tokens} tokens in {seconds:.1f} s, {stats.new_tokens / seconds:.1f} a second; "
        f"{stats.num_accepted} of {stats.num_drafted} drafts accepted, {stats.mean_accepted_tokens:.2f} tokens a round"
    )
    finish(
        "generate", prompts=len(results), prompt_tokens=stats.prompt_tokens, new_tokens=stats.new_tokens,
        rounds=stats.num_rounds, drafted=stats.num_drafted, accepted=stats.num_accepted,
        accepted_per_depth=stats.accepted_per_depth, acceptance=stats.acceptance_rate,
        mean_accepted_tokens=stats.mean_accepted_tokens,
        seconds=round(seconds, 3), tokens_per_s=round(stats.new_tokens / seconds, 1),
        finish_reasons=[r.finish_reason for r in sorted(results, key=lambda r: r.index)],
        drafter_version=speculator.drafter.version, level=results[0].level, verify_rule=speculator.rule.name,
        waived=stats.num_waived,
    )


@app.command()
def train(
    source: SourceArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS|KEY=VALUE", help="Files of prompts, and settings such as train.lr=1e-4."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Serve a stream of prompts with a drafter that learns from them."""
    settings = load_arguments(
        source, arguments or (), schema=TrainConfig, verb="train", options={"output.resume": resume or None}
    )
    if print_config:
        print(to_yaml(settings), end="")  # and no JSON after it: what is printed is a configuration file
        return
    quieten_transformers()
    from trainers.jobs.train import run_training

    summary = run_training(settings, console=make_console())
    _finish_job("train", summary)
    if summary["signal"] is not None:
        raise typer.Exit(SIGNAL_BASE + summary["signal"])


@app.command()
def warmup(
    source: SourceArgument,
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPTS|KEY=VALUE", help="Files of prompts, and settings such as warmup.source=texts."),
    ] = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
) -> None:
    """Train a drafter on a corpus before it serves."""
    settings = load_arguments(
        source, arguments or (), schema=WarmupConfig, verb="warmup", options={"output.resume": resume or None}
    )
    if print_config:
        print(to_yaml(settings), end="")
        return
    quieten_transformers()
    from trainers.jobs.warmup import run_warmup

    summary = run_warmup(settings, console=make_console())
    _finish_job("warmup", summary)
    if summary["signal"] is not None:
        raise typer.Exit(SIGNAL_BASE + summary["signal"])


def _finish_job(command: str, summary: dict[str, Any]) -> None:
    """The last line of a job, which of several ranks rank 0 alone prints."""
    if os.environ.get("RANK", "0") == "0":
        finish(command, **summary)


@app.command()
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
    print_config: Annotated[bool, typer.Option("--print-config", help="Print all settings and stop.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Show the figures here as they change.")] = False,
) -> None:
    """Answer OpenAI's API with a drafter that learns meanwhile."""
    settings = load_arguments(
        source, arguments or (), schema=ServeConfig, verb="serve",
        options={"drafter.adapter": adapter and str(adapter), "serve.host": host, "serve.port": port},
    )
    if print_config:
        print(to_yaml(settings), end="")
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
            from dvi.decode.speculator import build_speculator

            speculator, learner = build_speculator(launch.config), None
        loop = build_loop(settings, speculator, learner)
        if settings.serve.has_bound:
            from dvi.planning.controller import build_controller

            loop.planner = build_controller(settings, loop)
        server, url, num_ranks = Server(settings, loop, access), launch.url, launch.peers.num_ranks

        def announce() -> None:
            ranks = "" if num_ranks == 1 else f" on {num_ranks} ranks"
            say(f"serving {settings.model.path}{ranks} at {url}, figures at {url}/dashboard")
            _warn_if_lossy(speculator.rule)
            if live:
                _show_in_background(loop, until=lambda: server.should_exit)

        loop.engine.costs()  # takes seconds, on some ranks more than on others, and the door opens when all have them
        launch.announce(server, announce)
        run_server(server, loop, launch.listener)
    _finish_job("serve", {"url": url, "drafter_version": speculator.drafter.version})


@app.command()
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


@app.command()
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


@app.command()
def top(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a server, such as http://127.0.0.1:8000.")],
) -> None:
    """Show a server's figures as they change. Until it is gone; its key comes from DVI_API_KEY."""
    from dvi.serving.access import API_KEY_VARIABLE
    from dvi.serving.metrics.terminal_view import fetch_from, show

    show(fetch_from(url, os.environ.get(API_KEY_VARIABLE)), console=make_console(), until=lambda: False)


@app.command()
def verify(
    model: ModelArgument,
    adapter: AdapterOption = None,
    prompts: Annotated[Path | None, typer.Option(help=f"{PROMPTS_HELP} Default: a few built-in ones.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts to audit, 0 takes all.")] = 0,
    max_new_tokens: int = 64,
    num_draft_tokens: DraftTokensOption = _DRAFT.num_draft_tokens,
    split_layer: SplitLayerOption = None,
    drafter: Literal["anchored", "lora_head", "recurrent"] = _DRAFTER.kind,
    mode: ModeOption = "fast",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    against_hf: Annotated[
        bool, typer.Option("--against-hf", help="Also compare with the model's own generate.")
    ] = False,
) -> None:
    """Audit that drafts change no token. A difference from greedy decoding without them is explained, or it fails."""
    import dataclasses

    check_model(model)
    quieten_transformers()
    from dvi.inspect.audit import PROMPTS, audit, divergence_table
    from dvi.traffic import read_prompts

    if prompts is None:
        messages = [[{"role": "user", "content": text}] for text in PROMPTS][: limit or None]
    else:
        messages = read_prompts([prompts], limit=limit)
    speculator = _load(
        model, adapter=adapter, split_layer=split_layer, drafter=drafter, mode=mode, dtype=dtype, device=device,
        num_draft_tokens=num_draft_tokens,
    )
    room = speculator.max_positions - max_new_tokens - 1
    ids = [speculator.encode(p, max_tokens=max(room, 1)) for p in _as_prompts(speculator, messages, None)]
    report = audit(speculator, ids, max_new_tokens=max_new_tokens, against_huggingface=against_hf)
    console = make_console()
    console.print(
        f"{report.num_matches} of {report.num_prompts} prompts match plain decoding token for token "
        f"({report.num_tokens} tokens, {report.num_drafted} drafted, {report.num_accepted} accepted); "
        f"kernel noise {report.noise:.1e}"
    )
    if report.divergences:
        console.print(divergence_table(report.divergences))
    finish(
        "verify", **dataclasses.asdict(report), num_explained=report.num_explained,
        num_unexplained=report.num_unexplained,
    )
    if report.num_unexplained:
        raise typer.Exit(FOUND_WRONG)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new folder; with --server a name for it there.")],
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run, or of a server: its drafter, or its newest checkpoint's.")
    ] = None,
    server: Annotated[
        str | None, typer.Option(help="Of a running server; its key comes from DVI_ADMIN_KEY.", metavar="URL")
    ] = None,
    adapter: AdapterOption = None,
    model: Annotated[str | None, typer.Option(help="The base model; default: the one it was trained on.")] = None,
    standalone: Annotated[
        bool, typer.Option("--standalone", help="As a draft model that transformers loads by itself; lora_head only.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an export that is there, or with --server an adapter of that name.")
    ] = False,
) -> None:
    """Write a drafter as an adapter, or as a model of its own."""
    num_sources = sum(source is not None for source in (run, server, adapter))
    if num_sources != 1:
        raise ValueError(f"one of --run, --server and --adapter must be given, got {num_sources or 'none'}")
    if server is not None:
        if standalone or model is not None:
            raise ValueError("--standalone and --model go with --run and --adapter; a server saves an adapter as it is")
        from dvi.serving.client import ask_to_save

        saved = ask_to_save(server, str(folder), overwrite=force)
        say(f"{server} saved version {saved['version']} in its folder {saved['folder']}")
        finish("export", **saved)
        return
    if folder.exists() and not (force or (folder.is_dir() and not any(folder.iterdir()))):
        raise FileExistsError(f"{folder} is there already; --force replaces an export, another name keeps both")
    quieten_transformers()
    if run is not None:
        from trainers.jobs.train import load_run

        speculator, metrics, config = load_run(run, model=model)
    else:
        from dvi.decode.speculator import SelfSpeculator
        from dvi.model.adapter_store import read_manifest

        manifest = read_manifest(adapter)
        metrics, config = manifest.metrics, manifest.config
        speculator = SelfSpeculator.from_pretrained(
            model or manifest.base_model, revision=manifest.base_revision, dtype=manifest.dtype, adapter=adapter
        )
    if standalone:
        from dvi.model.adapter_store import export_standalone

        export_standalone(
            folder, speculator.drafter, speculator.split, tokenizer=speculator.tokenizer, overwrite=force
        )
    else:
        speculator.save_drafter(folder, metrics=metrics, config=config)
    say(f"wrote {folder}: {speculator.drafter.config.kind}, version {speculator.drafter.version}")
    finish(
        "export", folder=str(folder), standalone=standalone, kind=speculator.drafter.config.kind,
        drafter_version=speculator.drafter.version, base_model=speculator.model.config.name_or_path,
    )


@app.command()
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
        Literal["auto", "float32", "bfloat16", "float16", "float64"],
        typer.Option(help="auto is the YAML file's, or the one the model is stored in."),
    ] = "auto",
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


@app.command()
def doctor() -> None:
    """Check this machine. Versions, devices, precisions, exact mode, and what is missing."""
    quieten_transformers()
    from dvi.inspect.machine import describe_machine, facts_table

    facts = describe_machine()
    make_console().print(facts_table(facts, title="this machine"))
    finish("doctor", **facts)
    if facts["problems"]:
        raise typer.Exit(FOUND_WRONG)


def _load(model: str, **options: Any) -> SelfSpeculator:
    """The speculator, with the libraries' own progress bars and notes turned off."""
    from dvi.decode.speculator import SelfSpeculator

    return SelfSpeculator.from_pretrained(model, **options)


def _rule(name: str, margin_theta: float | None) -> VerifyRule:
    """The rule as the options have it; one that is lossy is announced."""
    import dataclasses

    from dvi.decode.verification import make_rule

    settings = dataclasses.replace(_VERIFY, rule=name)
    if margin_theta is not None:
        if name != "margin":
            raise ValueError(f"--margin-theta goes with --verify-rule margin, got {name}; leave it out")
        settings = dataclasses.replace(settings, margin_theta=margin_theta)
    rule = make_rule(settings)
    _warn_if_lossy(rule)
    return rule


def _warn_if_lossy(rule: VerifyRule) -> None:
    if not rule.is_lossless:
        say(f"warning: verify rule {rule.name} is lossy: the output is not the model's own")


def _show_in_background(loop: EngineLoop, *, until: Callable[[], bool]) -> None:
    """The live figures, beside a server that needs the main thread for its signals."""
    import threading

    from dvi.serving.metrics.dashboard import status
    from dvi.serving.metrics.terminal_view import show

    arguments = {"console": make_console(), "until": until}
    threading.Thread(target=show, args=(lambda: status(loop),), kwargs=arguments, name="live", daemon=True).start()


def _as_prompts(speculator: SelfSpeculator, messages: list[list[dict[str, str]]], chat: bool | None) -> list[Prompt]:
    """Chat messages, or their text where there is no template or it is not wanted."""
    from dvi.traffic import as_text

    if chat is None:
        chat = speculator.tokenizer.chat_template is not None
    return list(messages) if chat else [as_text(one) for one in messages]


def _print_stream(pieces: Any) -> Any:
    """Prints the pieces as they come; returns what the generator returns."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return end.value


def main() -> None:
    """`dvi`: signals are handled, and nothing is collected that ends with the process anyway."""
    with handled():
        try:
            app(prog_name="dvi")
        finally:
            gc.freeze()  # or for seconds the interpreter looks for cycles among all objects of torch and transformers


if __name__ == "__main__":
    main()
