"""Our arms of a benchmark: plain, padded, speculative, and learning while they answer, all over one loaded model.

Knows speculators, drafters and draft lengths; knows nothing of questions and clocks, nor how a drafter learns: whoever
runs the benchmark passes in what makes a learner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from dvi.bench.records import Arm, ArmAnswer, ArmPlan
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.verification import StrictRule, VerifyRule
from dvi.draft.catalogue import GOODPUT_BUCKETS
from dvi.draft.length_policies import LengthPolicy
from dvi.learner import Learner
from dvi.model.adapter_store import load_drafter
from dvi.model.drafter import DrafterConfig, build_drafter
from dvi.model.padded import PADDED_WIDTH, PaddedSplit
from dvi.records import SamplingParams
from dvi.settings import POLICIES, DraftSettings, SamplingSettings, SpecBenchSettings

OUR_ARMS = ("plain", "plain_padded", "speculative", "online", "online_untrained")
LOSSY_SUFFIX = "_lossy"


@dataclasses.dataclass(frozen=True)
class ArmOptions:
    """What all arms of a run have in common, ours and the rivals'.

    max_new_tokens    hard limit of an answer; prompt and answer together end at the model's context.
    temperature       0 is greedy; no other filter is on.
    num_draft_tokens  T, the most tokens drafted in a round.
    policy            how our arms choose up to T: a name of `dvi.settings.POLICIES`.
    batch_size        the most prompts answered together; the goodput rule measures its costs for as many.
    rule              what our arms that draft verify by.
    tells_decode_s    rivals too say how long they took after the first step, which costs them a call a step.
    """

    max_new_tokens: int = SamplingSettings.max_new_tokens
    temperature: float = SamplingSettings.temperature
    num_draft_tokens: int = DraftSettings.num_draft_tokens
    policy: str = SpecBenchSettings.policy
    batch_size: int = SpecBenchSettings.batch_size
    rule: VerifyRule = dataclasses.field(default_factory=StrictRule)
    tells_decode_s: bool = False
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_draft_tokens <= GOODPUT_BUCKETS[-1]:
            raise ValueError(
                f"num_draft_tokens must be in 1..{GOODPUT_BUCKETS[-1]}, got {self.num_draft_tokens}; try 4"
            )
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, got {self.policy!r}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be >= 1, got {self.batch_size}")
        self.sampling(seed=0)  # checks the other two

    def sampling(self, *, seed: int) -> SamplingParams:
        return SamplingParams(
            temperature=self.temperature, max_new_tokens=self.max_new_tokens, seed=seed, ignore_eos=self.ignore_eos
        )


MakeLearner = Callable[[SelfSpeculator], Learner]


class OurArm:
    """A speculator with a fixed rule for draft lengths, and perhaps a learner: its work falls inside `answer`."""

    def __init__(
        self, speculator: SelfSpeculator, policy: LengthPolicy, options: ArmOptions,
        *, learner: Learner | None = None,
    ) -> None:
        self.speculator, self.learner = speculator, learner
        self._policy, self._options = policy, options

    def answer(self, prompts: list[list[int]], *, seed: int) -> list[ArmAnswer]:
        """See `Arm.answer`; each prompt has draws of its own."""
        if self.learner is not None:
            self.learner.restart_clock()  # others answered meanwhile
        results = self.speculator.generate(
            prompts, self._options.sampling(seed=seed), batch_size=len(prompts), learner=self.learner,
            policy=self._policy, keep_transitions=False,
        )
        in_order = sorted(results, key=lambda result: result.index)
        return [ArmAnswer(r.token_ids, r.accept_lengths, r.stats, r.stats.decode_s) for r in in_order]


def plans_of_ours(
    speculator: SelfSpeculator, options: ArmOptions, *, adapter: str | Path | None = None,
    make_learner: MakeLearner | None = None, names: Iterable[str] = OUR_ARMS,
) -> list[ArmPlan]:
    """Plans of the named arms, in the order named. All share the speculator's model and split, with no second copy.

    adapter       saved drafter that `speculative` and `online` begin with; None is the speculator's own, as it is now.
    make_learner  a learner for a speculator whose drafter it may change; without, the arms that learn are n/a.
    With a lossy rule the arms that draft have names that end in LOSSY_SUFFIX, and titles that say so.
    The speculator's own drafter never changes. Raises ValueError for unknown names and an adapter that does not fit.
    """
    drafter = speculator.drafter if adapter is None else load_drafter(adapter, speculator.split)
    drafter.requires_grad_(False)
    facts = {
        "drafter": drafter.config.kind, "drafter_version": drafter.version, "adapter": adapter and str(adapter),
        "split_layer": speculator.split.split_layer, "policy": options.policy,
        "num_draft_tokens": options.num_draft_tokens,
    }
    label, suffix, is_lossy = f"{drafter.config.kind} drafter, T = {options.num_draft_tokens}", "", False
    if not options.rule.is_lossless:
        label, suffix, is_lossy = f"{label}, LOSSY ({options.rule.name})", LOSSY_SUFFIX, True
        facts |= {"level": "lossy", "verify_rule": options.rule.name}

    def plan(
        name: str, title: str, make_drafter: Callable[[], nn.Module], *, is_learning: bool, **other_facts: object
    ) -> ArmPlan:
        def build() -> Arm:
            twin = speculator.afresh(
                drafter=make_drafter(), rule=options.rule, policy=options.policy,
                num_draft_tokens=options.num_draft_tokens,
            )
            learner = make_learner(twin) if is_learning else None
            # A rule of the arm's own, its costs measured now: the twin would measure at the first answer.
            policy = twin.choose_policy([options.sampling(seed=0)], options.batch_size)
            return OurArm(twin, policy, options, learner=learner)

        found = ArmPlan(
            name + suffix, f"{title}, {label}", build, is_learning=is_learning, is_lossy=is_lossy,
            facts=facts | other_facts,
        )
        if is_learning and make_learner is None:
            return dataclasses.replace(found, build=None, na_reason="no learner given")
        return found

    makers: dict[str, Callable[[], ArmPlan]] = {
        "plain": lambda: ArmPlan("plain", "DVI plain", lambda: OurArm(speculator.afresh(), PLAIN, options)),
        "plain_padded": lambda: _padded_plan(speculator, options),
        "speculative": lambda: plan("speculative", "DVI speculative", lambda: drafter, is_learning=False),
        "online": lambda: plan("online", "DVI online", lambda: _copy(drafter, speculator), is_learning=True),
        "online_untrained": lambda: plan(
            "online_untrained", "DVI online from an untrained drafter", lambda: _untrained(drafter.config, speculator),
            is_learning=True, drafter_version=0, adapter=None,
        ),
    }
    return [makers[name]() for name in checked_names(names, OUR_ARMS)]


def checked_names(names: Iterable[str], choices: tuple[str, ...]) -> list[str]:
    """The names as a list. Raises ValueError for one that is not among the choices."""
    names = list(names)
    unknown = [name for name in names if name not in choices]
    if unknown:
        raise ValueError(f"arms must be among {', '.join(choices)}, got {unknown[0]!r}")
    return names


def _padded_plan(speculator: SelfSpeculator, options: ArmOptions) -> ArmPlan:
    """Plain decoding with every pass in one fixed shape, where the machine allows it."""
    title = f"DVI plain, passes padded to {PADDED_WIDTH} positions"
    try:
        padded = speculator.afresh(passes=PaddedSplit(speculator.split), mode="exact")
    except ValueError as refusal:
        return ArmPlan("plain_padded", title, None, na_reason=str(refusal))
    return ArmPlan("plain_padded", title, lambda: OurArm(padded, PLAIN, options), facts={"width": PADDED_WIDTH})


def _copy(drafter: nn.Module, speculator: SelfSpeculator) -> nn.Module:
    """A published copy beside the same frozen head; `copy.deepcopy` would copy the head too."""
    copied = build_drafter(
        speculator.split, drafter.config, draft_token_ids_V=drafter.draft_head.draft_token_ids_V
    ).requires_grad_(False)
    copied.publish(drafter, drafter.version)
    return copied


def _untrained(config: DrafterConfig, speculator: SelfSpeculator) -> nn.Module:
    """The drafter that a speculator without an adapter begins with, seed 0."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drafter = build_drafter(speculator.split, config).requires_grad_(False)
    drafter.publish(drafter, version=0)
    return drafter
