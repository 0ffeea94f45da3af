"""What a plain step and a speculative round cost on a real model, and where the time goes: all in one process.

Every repetition decodes one prompt with every arm, the order turning, and times the passes of a round and the machine's
copying beside them. Figures are medians over repetitions, ratios medians of the ratios within one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from torch import nn

from dvi.bench.arms import ArmOptions, MakeLearner, OurArm
from dvi.bench.records import Arm, ArmAnswer, written
from dvi.bench.rivals import rival_plans
from dvi.bench.round_parts import seconds_by_part
from dvi.bench.scripted import ScriptedArm, ScriptedDrafter, ScriptedLength, settled_script
from dvi.bench.step_report import report_tables
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.costs import CostTable
from dvi.draft.measure_costs import PROFILE_CONTEXT, draft_step, filled_cache, rest_of_round
from dvi.hardware import describe_machine, peak_bytes, seconds_of
from dvi.model.drafter import Drafter, choose_draft_tokens
from dvi.model.exact import exact_passes
from dvi.model.pretrained import read_weights
from dvi.model.split import SplitModel
from dvi.progress import doing
from dvi.settings import StepSettings
from dvi.traffic import Messages

WIDTHS = (1, 2, 5, 9, 16, 17)  # positions of a verifying pass: kernels change after 8 and 16
PASS_REPEATS = 3  # of each pass, in a repetition
COPIED_BYTES = 2**28  # more than caches hold


def bench_step(settings: StepSettings, *, make_learner: MakeLearner, console: Console) -> dict[str, Any]:
    """Measures, prints the tables and returns the figures. make_learner: of one that stores and owes no step.

    Raises ValueError for settings that do not fit the model.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    imported_bytes, start_s = peak_bytes(torch.device("cpu")), time.perf_counter()
    speculator = SelfSpeculator.from_pretrained(
        settings.model, adapter=settings.adapter, split_layer=settings.split_layer, dtype=settings.dtype,
        device=settings.device, num_draft_tokens=settings.num_draft_tokens, mode="fast",
    )
    load_s = time.perf_counter() - start_s
    split = speculator.split
    report = {
        "settings": written(settings), "machine": describe_machine(split.device), "model": repr(speculator),
        "dtype": str(split.dtype).removeprefix("torch."), "path": split.path, "context": PROFILE_CONTEXT,
        "load_s": load_s, "imported_bytes": imported_bytes, "weight_bytes": split.num_weight_bytes,
    }  # fmt: skip
    report |= StepBench(speculator, settings, make_learner).figures()
    for table in report_tables(report):
        console.print(table.for_terminal())
    return report


def trim(drafter: nn.Module, token_ids: list[int], num_tokens: int) -> None:
    """Trims an untrained drafter's vocabulary as a learner would, these being the tokens that it has seen."""
    head = drafter.draft_head
    if 0 < num_tokens < head.vocab_size:
        counts_V = torch.bincount(torch.tensor(token_ids), minlength=head.vocab_size)
        head.trim(choose_draft_tokens(counts_V, num_tokens).to(head.lora_B.device))
        drafter.publish(drafter, drafter.version)


@dataclass
class Sample:
    """One repetition, in seconds: a token by arm, a pass or a copy by name, a round's parts by arm."""

    token_s: dict[str, float]
    pass_s: dict[str, float]
    parts_s: dict[str, dict[str, float]]


class StepBench:
    """One run, with everything loaded and each of our arms answered once."""

    def __init__(self, speculator: SelfSpeculator, settings: StepSettings, make_learner: MakeLearner) -> None:
        self._settings, self._speculator = settings, speculator
        self._device = speculator.split.device
        options = ArmOptions(
            max_new_tokens=settings.max_new_tokens, num_draft_tokens=settings.num_draft_tokens, tells_decode_s=True,
            ignore_eos=True,
        )
        self._params = options.sampling(seed=0)
        question = Messages([{"role": "user", "content": settings.prompt}])
        self._prompt_ids, _ = speculator.encode_request(question, max_new_tokens=settings.max_new_tokens)
        self._arms: dict[str, Arm] = {"plain": OurArm(speculator, PLAIN, options)}
        token_ids = self._answer("plain").token_ids
        if settings.adapter is None:
            trim(speculator.drafter, token_ids, settings.draft_vocab_size)
        self._script = settled_script(
            speculator, self._prompt_ids, token_ids, acceptance=settings.acceptance, options=options
        )
        self._arms["scripted"] = ScriptedArm(speculator, self._script, options)
        self._passes = passes_of(speculator.passes, speculator.drafter, settings.num_draft_tokens)
        self._passes["copy"] = copying(self._device)
        self._learner = make_learner(speculator)
        self._peak_bytes = peak_bytes(self._device)  # from here on others' weights are loaded
        self._na_reasons = {}
        try:
            exact = speculator.afresh(passes=exact_passes(speculator.split), mode="exact")
            self._arms["exact"] = OurArm(exact, PLAIN, options)
        except ValueError as refusal:
            self._na_reasons["exact"] = str(refusal)
        for dtype in settings.hf_dtypes:
            model = read_weights(settings.model, dtype=getattr(torch, dtype)).to(self._device)
            (plan,) = rival_plans(model, speculator.tokenizer, options, split_layer=1, names=["hf_generate"])
            self._arms[f"hf {dtype}"] = plan.build()

    def figures(self) -> dict[str, Any]:
        """All that is measured; `dvi.bench.step_report` says what is what."""
        num_samples = self._settings.repetitions
        with doing("measuring", total=num_samples + 1, noun="repetitions") as stage:
            samples = []
            for index in range(num_samples + 1):
                samples.append(self._sample(turn=(-1) ** index))
                stage.advance()
        mat = self._answer("scripted").stats.mean_accepted_tokens
        return summary(
            samples[1:], num_draft_tokens=self._settings.num_draft_tokens, mean_accepted_tokens=mat
        ) | {"peak_bytes": self._peak_bytes, "na_reasons": self._na_reasons, "copied_bytes": COPIED_BYTES}

    def _sample(self, *, turn: int) -> Sample:
        """turn: 1 or -1, the order of the arms."""
        token_s = {}
        for name in list(self._arms)[::turn]:
            answer = self._answer(name)
            # The first token of a rival belongs to its prompt, as it does not of ours.
            token_s[name] = answer.decode_s / (len(answer.token_ids) - (answer.stats is None))
        parts_s = {name: self._parts(name) for name in ("plain", "scripted")[::turn]}
        times: dict[str, list[float]] = {name: [] for name in self._passes}
        for _ in range(PASS_REPEATS):
            for name in list(times)[::turn]:
                times[name].append(seconds_of(self._passes[name], self._device))
        return Sample(
            {name: token_s[name] for name in self._arms},
            {name: statistics.median(found) for name, found in times.items()},
            {name: parts_s[name] for name in ("plain", "scripted")},
        )

    def _answer(self, name: str) -> ArmAnswer:
        (answer,) = self._arms[name].answer([self._prompt_ids], seed=0)
        return answer

    def _parts(self, name: str) -> dict[str, float]:
        """Of a round of plain or of scripted decoding, with a length rule that is asked and not followed."""
        length = {"plain": 0, "scripted": self._settings.num_draft_tokens}[name]
        drafter = ScriptedDrafter(self._speculator.drafter, self._script)
        any_costs = CostTable(draft_step_s={1: 1e-3}, verify_s={1: 1e-2})
        rule = self._speculator.new_policy("goodput", self._settings.num_draft_tokens, costs=lambda: any_costs)
        self._script.position = 0
        return seconds_by_part(
            self._speculator.afresh(drafter=drafter), ScriptedLength(self._script, length, rule=rule), self._learner,
            self._prompt_ids, self._params,
        )


def passes_of(split: SplitModel, drafter: Drafter, num_draft_tokens: int) -> dict[str, Callable[[], object]]:
    """One row's passes over nothing in particular: v(n) verifies n positions, v(1) is a plain step."""
    cache = filled_cache(split, 1)
    token_11 = torch.zeros(1, 1, dtype=torch.int64, device=split.device)
    return {
        **{f"v({width})": rest_of_round(split, cache, 1, width) for width in sorted({*WIDTHS, num_draft_tokens + 1})},
        "draft step": draft_step(split, drafter, cache, 1),
        "shallow step": lambda: split.shallow(token_11, cache, cache.place(offset=0, width=1)),
    }


def copying(device: torch.device) -> Callable[[], object]:
    """Reads COPIED_BYTES of memory and writes as many."""
    source = torch.ones(COPIED_BYTES, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def summary(samples: list[Sample], *, num_draft_tokens: int, mean_accepted_tokens: float) -> dict[str, Any]:
    """Medians over the repetitions:

    token_s, pass_s, parts_s   as in `Sample`.
    speed_ratios   of tokens/s, medians of the ratios within a repetition: plain over each rival, the others over plain.
    law            scripted decoding by the speed law, tokens a round over T draft steps and v(T + 1), as those passes
                   took in the same repetition: mean_accepted_tokens, predicted_token_s, and measured_over_predicted
                   of the speeds.
    """

    def median(of: Callable[[Sample], float]) -> float:
        return statistics.median(map(of, samples))

    def predicted_s(sample: Sample) -> float:
        round_s = num_draft_tokens * sample.pass_s["draft step"] + sample.pass_s[f"v({num_draft_tokens + 1})"]
        return round_s / mean_accepted_tokens

    first = samples[0]
    ratios = {}
    for name in first.token_s:
        if name.startswith("hf"):
            ratios[f"plain / {name}"] = median(lambda s, name=name: s.token_s[name] / s.token_s["plain"])
        elif name != "plain":
            ratios[f"{name} / plain"] = median(lambda s, name=name: s.token_s["plain"] / s.token_s[name])
    return {
        "token_s": {name: median(lambda s, name=name: s.token_s[name]) for name in first.token_s},
        "pass_s": {name: median(lambda s, name=name: s.pass_s[name]) for name in first.pass_s},
        "parts_s": {
            name: {part: median(lambda s, name=name, part=part: s.parts_s[name][part]) for part in parts}
            for name, parts in first.parts_s.items()
        },
        "speed_ratios": ratios,
        "law": {
            "mean_accepted_tokens": mean_accepted_tokens, "predicted_token_s": median(predicted_s),
            "measured_over_predicted": median(lambda s: predicted_s(s) / s.token_s["scripted"]),
        },
    }  # fmt: skip
