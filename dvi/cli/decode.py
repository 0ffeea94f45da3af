"""The verbs that decode: generate, and audit, which says whether drafts change a token.

Knows arguments and streams; both import what they need when they run.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dvi.cli.arguments import check_model
from dvi.cli.options import (
    PROMPTS_HELP,
    AdapterOption,
    DeviceOption,
    DraftTokensOption,
    DtypeOption,
    ModelArgument,
    ModeOption,
    SourceOption,
    SplitLayerOption,
)
from dvi.settings import (
    CompanionName,
    DrafterKind,
    DrafterSettings,
    DraftSettings,
    ModelSettings,
    PolicyName,
    RuleName,
    SamplingSettings,
    VerifySettings,
)
from dvi.terminal import FOUND_WRONG, finish, make_console, quieten_transformers, say

if TYPE_CHECKING:
    from dvi.decode.prompts import Prompt
    from dvi.decode.speculator import SelfSpeculator
    from dvi.decode.verification import VerifyRule

_SAMPLING, _DRAFT, _DRAFTER, _VERIFY = SamplingSettings(), DraftSettings(), DrafterSettings(), VerifySettings()


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
    source: SourceOption = _DRAFT.source,
    num_draft_tokens: DraftTokensOption = _DRAFT.num_draft_tokens,
    policy: PolicyName = _DRAFT.policy,
    companion: Annotated[
        CompanionName, typer.Option(help="Second opinion of the companion policy.")
    ] = _DRAFT.companion,
    companion_model: Annotated[
        str | None, typer.Option(help="Of companion model: a small model with the same tokenizer.")
    ] = None,
    split_layer: SplitLayerOption = None,
    drafter: Annotated[
        DrafterKind, typer.Option(help="Kind, without an adapter.")
    ] = _DRAFTER.kind,
    verify_rule: Annotated[
        RuleName, typer.Option(help="All but strict are lossy, and the result says so.")
    ] = _VERIFY.rule,
    margin_theta: Annotated[
        float | None, typer.Option(help="Of the margin rule: the least share of the highest logit that passes.")
    ] = None,
    mode: ModeOption = ModelSettings.mode,
    dtype: DtypeOption = ModelSettings.dtype,
    device: DeviceOption = ModelSettings.device,
    batch_size: Annotated[int, typer.Option(help="Prompts that decode together.")] = 8,
) -> None:
    """Decode prompts. One is streamed as it grows, several are printed as they finish."""
    check_model(model)
    quieten_transformers()
    from dvi.decode.speculator import SelfSpeculator
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
    speculator = SelfSpeculator.from_pretrained(
        model, adapter=adapter, split_layer=split_layer, drafter=drafter, mode=mode, dtype=dtype, device=device,
        source=source, policy=policy, num_draft_tokens=num_draft_tokens, companion=companion,
        companion_model=companion_model, rule=_rule(verify_rule, margin_theta),
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


def audit(
    ctx: typer.Context,
    model: ModelArgument,
    adapter: AdapterOption = None,
    prompts: Annotated[Path | None, typer.Option(help=f"{PROMPTS_HELP} Default: a few built-in ones.")] = None,
    limit: Annotated[int, typer.Option(help="Prompts to audit, 0 takes all.")] = 0,
    max_new_tokens: int = 64,
    source: SourceOption = _DRAFT.source,
    num_draft_tokens: DraftTokensOption = _DRAFT.num_draft_tokens,
    split_layer: SplitLayerOption = None,
    drafter: DrafterKind = _DRAFTER.kind,
    mode: ModeOption = ModelSettings.mode,
    dtype: DtypeOption = ModelSettings.dtype,
    device: DeviceOption = ModelSettings.device,
    against_hf: Annotated[
        bool, typer.Option("--against-hf", help="Also compare with the model's own generate.")
    ] = False,
) -> None:
    """Audit that drafts change no token. A difference from greedy decoding without them is explained, or it fails."""
    import dataclasses

    check_model(model)
    quieten_transformers()
    from dvi.decode.speculator import SelfSpeculator
    from dvi.inspect.audit import PROMPTS, divergence_table
    from dvi.inspect.audit import audit as audit_prompts
    from dvi.traffic import read_prompts

    if prompts is None:
        messages = [[{"role": "user", "content": text}] for text in PROMPTS][: limit or None]
    else:
        messages = read_prompts([prompts], limit=limit)
    speculator = SelfSpeculator.from_pretrained(
        model, adapter=adapter, split_layer=split_layer, drafter=drafter, mode=mode, dtype=dtype, device=device,
        source=source, num_draft_tokens=num_draft_tokens,
    )
    room = speculator.max_positions - max_new_tokens - 1
    ids = [speculator.encode(p, max_tokens=max(room, 1)) for p in _as_prompts(speculator, messages, None)]
    report = audit_prompts(speculator, ids, max_new_tokens=max_new_tokens, against_huggingface=against_hf)
    console = make_console()
    console.print(
        f"{report.num_matches} of {report.num_prompts} prompts match plain decoding token for token "
        f"({report.num_tokens} tokens, {report.num_drafted} drafted, {report.num_accepted} accepted); "
        f"{report.mode} mode, {report.dtype}, kernel noise {report.noise:.1e}"
    )
    if report.divergences:
        console.print(divergence_table(report.divergences))
    finish(
        ctx.info_name, **dataclasses.asdict(report), num_explained=report.num_explained,
        num_unexplained=report.num_unexplained,
    )
    if report.num_unexplained:
        raise typer.Exit(FOUND_WRONG)


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
    warn_if_lossy(rule)
    return rule


def warn_if_lossy(rule: VerifyRule) -> None:
    """Says on stderr that a rule in force is lossy."""
    if not rule.is_lossless:
        say(f"warning: verify rule {rule.name} is lossy: the output is not the model's own")


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
