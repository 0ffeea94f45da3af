"""What is asked of a server and how well it is drafted for: lengths of requests, acceptance by depth and traffic seen.

Knows counts alone; what measures them on a model is `dvi.planning.measurement`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

MIN_ACCEPTANCE, MAX_ACCEPTANCE = 0.001, 0.999  # what counts can show; also keeps log-odds finite
NEWTON_STEPS = 20
EASE_PRIOR = 2.0  # standard deviation, in log-odds
NEIGHBOURS = 8
FIT_TAUS = 200  # tried between the closest two points and ten times the whole span of a history


class RequestCounts(Protocol):
    """What is known of a request that has ended; `dvi.planning.drift.EndedRequest` and `RoundStats` have it."""

    prompt_tokens: int
    new_tokens: int
    drafted_per_depth: Sequence[int]
    accepted_per_depth: Sequence[int]


@dataclass(frozen=True)
class AcceptanceModel:
    """Acceptance at each depth, given that the depth was reached, while the drafter learns from n tokens of traffic.

    a_d(n) = final_d - (final_d - initial_d) exp(-n / tau): the learning curve. Depths beyond the last are as the last.
    """

    initial: tuple[float, ...]
    final: tuple[float, ...]
    tau_tokens: float = 1.0

    def __post_init__(self) -> None:
        if not self.initial or len(self.initial) != len(self.final):
            raise ValueError(f"initial and final must have as many depths, got {self.initial} and {self.final}")
        if not all(0 <= a <= 1 for a in (*self.initial, *self.final)):
            raise ValueError(f"an acceptance must be in [0, 1], got {self.initial} and {self.final}")
        if not 0 < self.tau_tokens < math.inf:
            raise ValueError(f"tau_tokens must be > 0 and finite, got {self.tau_tokens}")

    @classmethod
    def constant(cls, per_depth: Sequence[float]) -> AcceptanceModel:
        """Of a drafter that does not learn, or of which no history is known."""
        return cls(tuple(per_depth), tuple(per_depth))

    @classmethod
    def fit(cls, points: Sequence[tuple[float, float | Sequence[float]]]) -> AcceptanceModel:
        """Through (tokens seen, acceptance, of one depth or of each), by least squares.

        For each tau the curve is linear in initial and final; the best tau is looked for on a grid. Less than three
        different places show no curve: the newest acceptance is then taken as constant.
        """
        seen = np.array([tokens for tokens, _ in points], dtype=np.float64)
        acceptance_NT = np.array([np.atleast_1d(acceptance) for _, acceptance in points], dtype=np.float64)
        places = np.unique(seen)
        if len(places) < 3:
            return cls.constant(acceptance_NT[seen.argmax()].tolist())
        taus = np.geomspace(np.diff(places).min() / 2, 10 * (places[-1] - places[0]), FIT_TAUS)

        def solve(tau: float) -> tuple[float, np.ndarray]:
            decay = np.exp(-seen / tau)
            terms_N2 = np.stack([decay, 1 - decay], axis=1)
            ends_2T = np.linalg.lstsq(terms_N2, acceptance_NT, rcond=None)[0].clip(0, 1)
            return float(((terms_N2 @ ends_2T - acceptance_NT) ** 2).sum()), ends_2T

        tau = min(taus, key=lambda tau: solve(tau)[0])
        initial, final = solve(tau)[1].tolist()
        return cls(tuple(initial), tuple(final), float(tau))

    def at(self, tokens_seen: float) -> tuple[float, ...]:
        """Acceptance per depth after so many more tokens of traffic; infinity is the settled drafter's."""
        gone = math.exp(-tokens_seen / self.tau_tokens)
        return tuple(last - (last - first) * gone for first, last in zip(self.initial, self.final, strict=True))


@dataclass(frozen=True)
class Workload:
    """Requests, how they are drafted for, and what learning takes.

    lengths        (prompt tokens, new tokens) of each request of the sample; a prompt counts the tokens that are read.
    acceptance     by split layer.
    learner_share  of all time that goes into learning: `train.budget`, 0 without a learner.
    tokens_seen    where on the learning curve forecasts are made: tokens of traffic from now; infinity is settled.
    ease           of each request, how much higher than usual the log-odds of acceptance are; () where all are alike.
                   Hard ones are often short, and it is they that the 99th percentile of the token latency is made of.
    """

    lengths: tuple[tuple[int, int], ...]
    acceptance: Mapping[int, AcceptanceModel]
    learner_share: float = 0.0
    tokens_seen: float = 0.0
    ease: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.lengths or min(map(min, self.lengths)) < 1:
            raise ValueError("a workload needs requests of at least 1 prompt token and 1 new token each")
        if not 0 <= self.learner_share < 1:
            raise ValueError(f"learner_share must be in [0, 1), got {self.learner_share}; 0 is no learner")
        if self.ease and len(self.ease) != len(self.lengths):
            raise ValueError(f"ease must be of all {len(self.lengths)} requests or of none, got {len(self.ease)}")

    @classmethod
    def of_counts(
        cls, requests: Iterable[RequestCounts], *, split_layer: int, learner_share: float = 0.0
    ) -> Workload:
        """Of requests that have ended, at the split layer they were served with.

        Raises ValueError where nothing was drafted.
        """
        requests = list(requests)
        lengths = tuple((request.prompt_tokens, request.new_tokens) for request in requests)
        reached_NT = _padded([request.drafted_per_depth for request in requests])
        accepted_NT = _padded([request.accepted_per_depth for request in requests])
        if not reached_NT.sum():
            raise ValueError("no request was drafted for, so no acceptance is known; set draft.num_draft_tokens to 4")
        acceptance_T = (accepted_NT.sum(axis=0) / reached_NT.sum(axis=0)).clip(MIN_ACCEPTANCE, MAX_ACCEPTANCE)
        ease = tuple(_ease(reached_NT, accepted_NT, acceptance_T).tolist())
        return cls(lengths, {split_layer: AcceptanceModel.constant(acceptance_T.tolist())}, learner_share, ease=ease)

    def with_lengths(self, lengths: Sequence[tuple[int, int]]) -> Workload:
        """The same for requests of other lengths, each as easy as one of ours whose answer is about as long."""
        ease: tuple[float, ...] = ()
        if self.ease:
            log_new_N = np.log([new for _, new in self.lengths])
            nearest = (np.abs(log_new_N - math.log(new)).argsort(kind="stable")[:NEIGHBOURS] for _, new in lengths)
            ease = tuple(self.ease[places[index % len(places)]] for index, places in enumerate(nearest))
        return dataclasses.replace(self, lengths=tuple(lengths), ease=ease)

    def to_json(self) -> dict[str, object]:
        return {
            "lengths": [list(pair) for pair in self.lengths], "learner_share": self.learner_share,
            "tokens_seen": None if self.tokens_seen == math.inf else self.tokens_seen,  # None: settled
            "acceptance": acceptance_to_json(self.acceptance), "ease": list(self.ease),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict) -> Workload:
        """Raises ValueError, KeyError or TypeError for what `to_json` did not write."""
        tokens_seen = math.inf if data["tokens_seen"] is None else data["tokens_seen"]
        lengths = tuple((prompt, new) for prompt, new in data["lengths"])
        acceptance = acceptance_from_json(data["acceptance"])
        return cls(lengths, acceptance, data["learner_share"], tokens_seen, tuple(data["ease"]))


def _padded(counts: Sequence[Sequence[int]]) -> np.ndarray:
    """[N, T] counts per depth, 0 beyond the depths that a request came to."""
    num_depths = max(map(len, counts), default=0)
    return np.array([[*row, *[0] * (num_depths - len(row))] for row in counts], dtype=np.float64)


def _ease(reached_NT: np.ndarray, accepted_NT: np.ndarray, acceptance_T: np.ndarray) -> np.ndarray:
    """[N] the likeliest shift of each request's log-odds, by Newton's method.

    The wide prior keeps those finite that accepted all or nothing. It hardly shrinks the rest, although what few draws
    say of one request is mostly chance: so the simulated requests differ as the real ones did. Shrunk by the spread
    that all of them show they would not, the hard and short ones least; docs/planning.md.
    """
    log_odds_T = np.log(acceptance_T / (1 - acceptance_T))
    shift_N = np.zeros(len(reached_NT))
    for _ in range(NEWTON_STEPS):
        chance_NT = 1 / (1 + np.exp(-(log_odds_T + shift_N[:, None])))
        slope_N = (accepted_NT - reached_NT * chance_NT).sum(axis=1) - shift_N / EASE_PRIOR**2
        bend_N = (reached_NT * chance_NT * (1 - chance_NT)).sum(axis=1) + EASE_PRIOR**-2
        shift_N += np.clip(slope_N / bend_N, -1, 1)
    return shift_N


def acceptance_to_json(acceptance: Mapping[int, AcceptanceModel]) -> dict[str, object]:
    return {str(layer): dataclasses.asdict(model) for layer, model in sorted(acceptance.items())}


def acceptance_from_json(data: dict) -> dict[int, AcceptanceModel]:
    """By split layer. A model is what `acceptance_to_json` wrote, or simply its acceptance per depth, as a list."""
    models = {}
    for layer, given in data.items():
        if isinstance(given, list):
            models[int(layer)] = AcceptanceModel.constant(given)
        else:
            ends = {name: tuple(given[name]) for name in ("initial", "final")}
            models[int(layer)] = AcceptanceModel(**{**given, **ends})
    return models


def read_acceptance(path: str | Path) -> dict[int, AcceptanceModel]:
    """From a JSON file: {split layer: acceptance per depth, or a whole `AcceptanceModel`}, or a sweep's report.json.

    Of a sweep the row with the longest drafts is taken for each split layer, and of several the fastest.
    Raises ValueError, which names the file, for anything else.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if "rows" not in data:
            return acceptance_from_json(data)
        longest: dict[int, dict] = {}
        for row in data["rows"]:  # from fastest to slowest
            known = longest.get(row["split_layer"])
            if known is None or row["num_draft_tokens"] > known["num_draft_tokens"]:
                longest[row["split_layer"]] = row
        return {layer: AcceptanceModel.constant(row["acceptance_per_depth"]) for layer, row in longest.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must hold acceptance by split layer, such as {{\"2\": [0.7, 0.6]}}, or be a sweep's report.json: "
            f"{error}"
        ) from error


def read_lengths(path: str | Path) -> tuple[tuple[int, int], ...]:
    """(prompt tokens, new tokens) of each line of a JSONL file with the keys prompt_tokens and new_tokens.

    Raises ValueError, with file and line, for a line that lacks one or holds no whole number of at least 1.
    """
    lengths = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{place}: no JSON ({error})") from error
            pair = tuple(row.get(key) if isinstance(row, dict) else None for key in ("prompt_tokens", "new_tokens"))
            if not all(type(value) is int and value >= 1 for value in pair):
                raise ValueError(
                    f"{place}: prompt_tokens and new_tokens must be whole numbers >= 1, got {line.strip()[:60]}"
                )
            lengths.append(pair)
    if not lengths:
        raise ValueError(f"{path} holds no request; a line is {{\"prompt_tokens\": 120, \"new_tokens\": 80}}")
    return tuple(lengths)
