"""The catalogue: length policies and companions by their names.

Knows what each is made of; which one suits a run, and when costs are measured, is for whoever asks.
"""

from __future__ import annotations

from collections.abc import Callable

from dvi.draft.companion_length import CompanionLength
from dvi.draft.companion_model import ModelCompanion
from dvi.draft.companions import Companion, EmaCompanion, ExitCompanion, OlderCompanion, SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import ConfidenceStop, FixedLength, GoodputLength, LengthPolicy
from dvi.draft.lookup import Lookup
from dvi.draft.node_budget import NodeBudget
from dvi.model.split import SplitModel
from dvi.settings import check_companion

GOODPUT_BUCKETS = (1, 2, 3, 4, 6, 8)
NODE_BUCKETS = (1, 2, 4, 8, 16, 32)  # nodes behind the root at which passes of a tree are timed


def buckets_of(source: str, num_draft_tokens: int) -> tuple[int, ...]:
    """At which numbers of drafts passes are timed for a source of `dvi.settings.SOURCES`."""
    return NODE_BUCKETS if source == "lookup" else goodput_buckets(num_draft_tokens)


def goodput_buckets(num_draft_tokens: int) -> tuple[int, ...]:
    """The draft lengths that rules which weigh costs choose from."""
    return tuple(t for t in GOODPUT_BUCKETS if t <= num_draft_tokens)


def make_policy(
    name: str, num_draft_tokens: int, *, source: str, max_nodes: int, confidence_threshold: float,
    costs: Callable[[], CostTable],
    companion: Callable[[], Companion], is_on_cpu: bool, can_pack: bool,
) -> LengthPolicy | NodeBudget:
    """A draft-length rule by its name, which has learnt nothing yet; the fixed one where nothing is to be drafted.
    Where lookups propose, a budget of at most max_nodes: by costs for a rule that weighs them, else of all nodes.

    name: of `dvi.settings.POLICIES`; "auto" is goodput here: whoever knows better does not ask for it.
    costs: of a round's parts on this machine, asked for by the rules that weigh them, goodput and companion.
    """
    if source == "lookup" and num_draft_tokens:
        return NodeBudget(Lookup(), max_nodes, None if name == "fixed" else costs())
    buckets = goodput_buckets(num_draft_tokens)
    makers: dict[str, Callable[[], LengthPolicy]] = {
        "fixed": lambda: FixedLength(num_draft_tokens),
        "confidence": lambda: ConfidenceStop(num_draft_tokens, threshold=confidence_threshold),
        "goodput": lambda: GoodputLength(buckets, costs()),
        "companion": lambda: CompanionLength(buckets, costs(), companion(), is_on_cpu=is_on_cpu, can_pack=can_pack),
    }
    makers["auto"] = makers["goodput"]
    return makers[name if num_draft_tokens else "fixed"]()


def make_companion(name: str, *, split: SplitModel, companion_split: SplitModel | None) -> Companion:
    """A companion by its name, of `dvi.settings.COMPANIONS`. One serves one policy.

    companion_split: the companion that is a model of its own. Raises ValueError for "model" without it.
    """
    if name == "model" and companion_split is None:
        check_companion(name, None)
    makers: dict[str, Callable[[], Companion]] = {
        "self": SelfCompanion,
        "exit": lambda: ExitCompanion(split.final_norm),
        "older": OlderCompanion,
        "ema": EmaCompanion,
        "model": lambda: ModelCompanion(companion_split),
    }
    return makers[name]()
