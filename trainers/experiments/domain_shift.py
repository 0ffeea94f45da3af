"""Drift between domains: how soon a drafter follows when the traffic changes, and what it forgets meanwhile.

Serves streams of real prompts with a learner beside, and follows the acceptance on held-out prompts of each domain.
One file per cell, that is per stream and variant: an interrupted run goes on with the cells that are missing, and
several processes may share a folder. What the cells say is computed in `domain_shift_report`.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dvi.config import write_provenance
from dvi.decode.construction import build_speculator
from dvi.decode.precision import dtype_of_run, settle_dtype, weights_of_run
from dvi.decode.speculator import SelfSpeculator
from dvi.hardware import describe_machine
from dvi.records import SamplingParams
from dvi.settings import MACHINE_KEYS, LearningSettings, TrainConfig
from dvi.traffic import Messages, read_prompts
from trainers.experiments.cell_folder import CellFolder, with_one_mode
from trainers.experiments.domain_shift_report import write_report
from trainers.experiments.streams import MIXED, Stream, domain_files, parse_stream, paths_of, read_phases
from trainers.jobs.evaluation import SpeedProbe
from trainers.jobs.progress import RunDisplay
from trainers.learning.online import OnlineTrainer
from trainers.learning.recordings import RecordedText, decode_answers, record, replay_rounds

DEFAULT_STREAMS = ("math,medical,math", "math,code,math", "mixed")
PHASE_REQUESTS = 300  # where data.limit does not say
REQUESTS_PER_CHECK = 25  # between two looks at the held-out prompts
REQUESTS_PER_WINDOW = 50  # of a speed
# Of each row. With SpeedProbe's 16, a moment in which the machine was busy would look like a slow window.
WINDOW_PLAIN_TOKENS = 64
# What a variant changes, by section and key.
VARIANTS: dict[str, dict[str, dict[str, object]]] = {
    "full": {},
    "no_reservoir": {"train": {"reservoir_fraction": 0.0}},
    "no_wakeup": {"train": {"drift_wakeup": False}},
    # As one would serve: the others draft a fixed number and learn as much as they like, so that they can be compared.
    "full_auto": {"draft": {"policy": "auto"}, "train": {"budget": LearningSettings().budget}},
}


@dataclass(frozen=True)
class Cell:
    """One run: a stream, served in one variant."""

    stream: Stream
    variant: str

    @property
    def name(self) -> str:
        return f"{self.stream.name}-{self.variant}"


def run_drift(
    config: TrainConfig, *, streams: list[str], variants: list[str], folder: Path, data: Path | None, console: Console
) -> dict[str, object]:
    """Runs the cells that are missing in the folder, and reports them: report.json's content.

    config    data.limit requests a phase, eval.limit held-out ones a domain; the traffic is not from data.prompts.
    streams   domains by commas, such as "math,medical,math", or "mixed".
    variants  names of VARIANTS.
    data      folder of DOMAIN.jsonl files beside the bundled ones, over which they win.
    Leaves cells/*.json, report.json, report.md and drift-STREAM.png. Cells that another process works on are waited
    for. Raises ValueError for unknown names, settings that do not fit, too few rows, and cells of other settings.
    """
    _check_settings(config, variants)
    config = settle_dtype(config, earlier=dtype_of_run(folder), earlier_weights=weights_of_run(folder))
    config = with_one_mode(config)
    files = domain_files(data)
    parsed = [parse_stream(text, phase_requests=config.data.limit or PHASE_REQUESTS, domains=files) for text in streams]
    wanted = [Cell(stream, variant) for stream in parsed for variant in variants]
    # What a domain converges to comes first, and once for all streams of a length.
    references = [Cell(stream.alone(domain), "full") for stream in parsed for domain in stream.domains]
    cells = list(dict.fromkeys([*references, *wanted]))
    store, settings = CellFolder(folder / "cells"), {cell: _settings(config, cell, files) for cell in cells}
    for cell in cells:  # what does not fit must not show in an hour
        read_phases(cell.stream, files, shuffle_seed=config.data.shuffle_seed)
        store.read(cell.name, settings[cell])
    write_provenance(folder, config)
    held_out = HeldOut(config, files)
    for is_waiting in (False, True):  # at first only for what nobody works on
        for number, cell in enumerate(cells, start=1):
            with store.claim(cell.name, wait=is_waiting) as is_ours:
                if is_ours and store.read(cell.name, settings[cell]) is None:
                    console.print(f"cell {number} of {len(cells)}: {cell.name}, {cell.stream.num_requests} requests")
                    store.write(cell.name, settings[cell], run_cell(config, cell, files, held_out, console))
    results = {cell: store.read(cell.name, settings[cell]) for cell in cells}
    return write_report(
        [[results[Cell(stream, variant)] for variant in variants] for stream in parsed],
        converged={
            stream.name: {domain: results[Cell(stream.alone(domain), "full")] for domain in stream.domains}
            for stream in parsed
        },
        folder=folder, console=console,
    )  # fmt: skip


class HeldOut:
    """Held-out prompts by domain with the answers and states of the frozen model, made when first asked for."""

    def __init__(self, config: TrainConfig, files: dict[str, Path]) -> None:
        self._config, self._files = config, files
        self._texts: dict[str, list[RecordedText]] = {}

    def domains(self, stream: Stream) -> list[str]:
        """What is followed in a stream: its domains, and for MIXED each of them all."""
        return sorted(self._files) if stream.domains == [MIXED] else stream.domains

    def texts(self, domain: str, speculator: SelfSpeculator) -> list[RecordedText]:
        """eval.limit rows. Raises ValueError when no answer is long enough for a round."""
        if domain not in self._texts:
            rows = read_prompts([self._files[domain]], split="eval", limit=self._config.eval.limit)
            answers = decode_answers(
                speculator, encode(speculator, rows, self._config)[0],
                max_new_tokens=self._config.eval.max_new_tokens, batch_size=self._config.data.batch_size,
                doing=f"decoding held-out answers, {domain}",
            )
            num_draft_tokens = self._config.draft.num_draft_tokens
            # Where a text has no whole round, nobody can say what would be accepted in it.
            texts = [(ids, length) for ids, length in answers if len(ids) - length > num_draft_tokens]
            if not texts:
                raise ValueError(
                    f"a held-out answer of domain {domain} must be longer than draft.num_draft_tokens = "
                    f"{num_draft_tokens}, got none; raise eval.max_new_tokens or eval.limit"
                )
            self._texts[domain] = [record(speculator.split, ids, prompt_len=length) for ids, length in texts]
        return self._texts[domain]


def encode(
    speculator: SelfSpeculator, rows: list[Messages], config: TrainConfig
) -> tuple[list[list[int]], int]:
    """Token ids of the prompts, with room for an answer, and how many lost their beginning for it."""
    longest = max(config.sampling.max_new_tokens, config.eval.max_new_tokens)
    encoded = [speculator.encode_request(row, max_new_tokens=longest) for row in rows]
    return [token_ids for token_ids, _ in encoded], sum(is_cut for _, is_cut in encoded)


def run_cell(
    config: TrainConfig, cell: Cell, files: dict[str, Path], held_out: HeldOut, console: Console
) -> dict[str, object]:
    """Serves one stream from the initial drafter on, and returns what was seen: see `_Run`."""
    config = varied(config, cell.variant)
    speculator = build_speculator(config)
    rows = read_phases(cell.stream, files, shuffle_seed=config.data.shuffle_seed)
    encoded = [encode(speculator, phase, config) for phase in rows]
    texts = {domain: held_out.texts(domain, speculator) for domain in held_out.domains(cell.stream)}
    with RunDisplay(num_requests=cell.stream.num_requests, num_done=0) as display:
        run = _Run(speculator, config, texts, display)
        for phase, (prompts, _) in enumerate(encoded):
            run.serve(phase, prompts)
    return {
        "stream": cell.stream.name, "variant": cell.variant,
        "phases": [dataclasses.asdict(phase) for phase in cell.stream.phases],
        "num_draft_tokens": config.draft.num_draft_tokens, "requests_per_check": REQUESTS_PER_CHECK,
        "requests_per_window": REQUESTS_PER_WINDOW, "cut_prompts": sum(num_cut for _, num_cut in encoded),
        "traffic": run.traffic, "checks": run.checks, "windows": run.windows,
        "serving_s": round(run.serving_s, 2), "train_s": round(run.trainer.train_s, 2),
        "machine": describe_machine(speculator.split.device),
    }  # fmt: skip


class _Run:
    """The learner beside serving, through the phases.

    traffic    of each request, in the order they ended: phase, rounds, drafted, accepted, new_tokens.
    checks     at the start, every REQUESTS_PER_CHECK requests of a phase and at its end: requests so far, rounds and
               accepted tokens of each held-out text by domain, and the learner's steps, drifts and is_settled.
    windows    of every REQUESTS_PER_WINDOW requests of a phase: phase, requests so far, speed as a ratio to plain.
    """

    def __init__(
        self, speculator: SelfSpeculator, config: TrainConfig, texts: dict[str, list[RecordedText]], display: RunDisplay
    ) -> None:
        self._speculator, self._texts, self._display = speculator, texts, display
        self._num_draft_tokens, self._batch_size = config.draft.num_draft_tokens, config.data.batch_size
        self._params = SamplingParams(**dataclasses.asdict(config.sampling))
        self.trainer = OnlineTrainer(speculator, config.train)
        self.traffic: list[dict[str, int]] = []
        self.checks: list[dict[str, object]] = []
        self.windows: list[dict[str, float]] = []
        self.serving_s = 0.0
        self._check()

    def serve(self, phase: int, prompts: list[list[int]]) -> None:
        """Serves a phase to its last request; the next begins with an empty batch."""
        probe = SpeedProbe(
            self._speculator, self._params, batch_size=self._batch_size, requests_per_probe=REQUESTS_PER_WINDOW,
            probe_tokens=WINDOW_PLAIN_TOKENS,
        )
        resumed_s = time.perf_counter()
        results = self._speculator.generate(
            prompts, self._params, batch_size=self._batch_size, learner=self.trainer, keep_transitions=False
        )
        for count, result in enumerate(results, start=1):
            paused_s = time.perf_counter()
            self.serving_s += paused_s - resumed_s
            self.trainer.replay.end(result.request_id)
            stats = result.stats
            self.traffic.append({
                "phase": phase, "rounds": stats.num_rounds, "drafted": stats.num_drafted,
                "accepted": stats.num_accepted, "new_tokens": stats.new_tokens,
            })
            ratio = probe.observe(prompts[result.index], result)
            if ratio is not None:
                self.windows.append({"phase": phase, "requests": len(self.traffic), "speed_ratio": ratio})
            self._display.finish_request(
                stats, self.trainer.last_report, speed_up=probe.speed_up, drafter_version=result.drafter_version
            )
            if count % REQUESTS_PER_CHECK == 0 or count == len(prompts):
                check_s = time.perf_counter()
                self._check()
                probe.leave_out(time.perf_counter() - check_s)
            resumed_s = time.perf_counter()

    def _check(self) -> None:
        """Looks at every domain with the drafter as it serves now."""
        counts = {"rounds": {}, "accepted": {}}
        for domain, texts in self._texts.items():
            stats = [
                replay_rounds(self._speculator.drafter, [text], num_draft_tokens=self._num_draft_tokens)
                for text in texts
            ]
            counts["rounds"][domain] = [one.num_rounds for one in stats]
            counts["accepted"][domain] = [one.num_accepted for one in stats]
        trend = self.trainer.trend
        self.checks.append({
            "requests": len(self.traffic), "steps": self.trainer.num_steps, "drifts": trend.num_drifts,
            "is_settled": trend.is_settled, **counts,
        })
        # The time of a check is nobody's to learn in.
        self.trainer.restart_clock()


def varied(config: TrainConfig, variant: str) -> TrainConfig:
    """The settings as the variant changes them."""
    return dataclasses.replace(config, **{
        section: dataclasses.replace(getattr(config, section), **values)
        for section, values in VARIANTS[variant].items()
    })


def _check_settings(config: TrainConfig, variants: list[str]) -> None:
    """Raises ValueError for what a drift run cannot do."""
    unknown = [variant for variant in variants if variant not in VARIANTS]
    if unknown:
        raise ValueError(f"a variant must be one of {', '.join(VARIANTS)}, got {unknown[0]!r}")
    if config.data.prompts or config.data.dataset is not None:
        raise ValueError(
            "data.prompts and data.dataset must not be given: the streams are read by domain; leave them out, and name "
            "a folder of DOMAIN.jsonl files as data"
        )
    params = SamplingParams(**dataclasses.asdict(config.sampling))
    if not params.is_greedy or params.has_penalties:
        raise ValueError("sampling must be greedy and without penalties, for held-out acceptance is replayed exactly")
    if not config.train.enabled:
        raise ValueError("train.enabled must be true: a drafter that does not learn does not drift")
    if not config.draft.num_draft_tokens or not config.eval.limit:
        raise ValueError(
            f"draft.num_draft_tokens and eval.limit must be at least 1, got {config.draft.num_draft_tokens} and "
            f"{config.eval.limit}; try 4 and 16"
        )


def _settings(config: TrainConfig, cell: Cell, files: dict[str, Path]) -> dict[str, object]:
    """What a cell's figures depend on, by section; not where it runs or writes."""
    settings = dataclasses.asdict(varied(config, cell.variant))
    del settings["output"]
    settings["model"] = {key: value for key, value in settings["model"].items() if key not in MACHINE_KEYS}
    return settings | {
        "phases": [dataclasses.asdict(phase) for phase in cell.stream.phases],
        "files": [str(path) for domain in cell.stream.domains for path in paths_of(domain, files)],
    }
