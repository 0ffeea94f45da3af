"""Profiles and workloads of machines that do not exist: random but sane, for tests of simulation and search."""

from __future__ import annotations

import random

from dvi.planning.profile import LatencyProfile, Overheads, PassSeconds
from dvi.planning.workload import AcceptanceModel, Workload

ROWS, DRAFT_TOKENS, WIDTHS, CONTEXTS = (1, 2, 4, 8, 16, 32), (0, 1, 2, 4, 8), (1, 32, 128, 512), (16, 512)
NUM_LENGTHS = 64


def synthetic(seed: int) -> tuple[LatencyProfile, Workload]:
    """A machine and its traffic: 1..3 split layers, tensor-parallel degrees 1, up to 2 or up to 4.

    A pass costs a constant and something for each position, whichever is more, as where weights are read or where
    arithmetic bounds it; a draft step costs its layers' share. More processes divide the work and add their talk.
    """
    chance = random.Random(seed)
    split_layers = sorted(chance.sample((0, 1, 2, 3, 4, 6, 8), chance.randint(1, 3)))
    degrees = (1, 2, 4)[: chance.randint(1, 3)]
    weights_s, position_s = 10 ** chance.uniform(-3, -1.5), 10 ** chance.uniform(-4.5, -3)
    talk_s, drafter_s = weights_s * chance.uniform(0.02, 0.3), weights_s * chance.uniform(0.01, 0.1)
    cached_s = position_s * chance.uniform(0, 0.002)
    sharpness = chance.uniform(1, 4)

    def pass_s(num_positions: float, num_rows: int, context: int, degree: int) -> float:
        attention_s = cached_s * num_rows * context
        smooth_max = (weights_s**sharpness + (position_s * num_positions) ** sharpness) ** (1 / sharpness)
        return (smooth_max + attention_s) / degree + talk_s * (degree - 1) ** 0.5

    passes = {
        (layer, degree): PassSeconds(
            contexts=CONTEXTS, rows=ROWS, draft_tokens=DRAFT_TOKENS, widths=WIDTHS,
            round_s=tuple(tuple(tuple(
                pass_s(rows * (draft + 1), rows, context, degree)
                + draft * (drafter_s + layer / 16 * pass_s(rows, rows, context, degree))
                for draft in DRAFT_TOKENS) for rows in ROWS) for context in CONTEXTS),
            prefill_s=tuple(tuple(pass_s(width, 1, context * width, degree) for width in WIDTHS)
                            for context in CONTEXTS),
        )
        for layer in split_layers for degree in degrees
    }  # fmt: skip
    overheads = Overheads(*(weights_s * chance.uniform(0, share) for share in (0.1, 0.01, 0.002, 0.1)))
    top, fall = chance.uniform(0.3, 0.9), chance.uniform(0.85, 1)
    acceptance = {
        layer: AcceptanceModel.constant([min(top + 0.02 * layer, 0.95) * fall**depth for depth in range(4)])
        for layer in split_layers
    }
    prompt, new = 10 ** chance.uniform(1, 2.3), 10 ** chance.uniform(1, 2.3)
    lengths = tuple(
        (max(round(chance.lognormvariate(0, 0.6) * prompt), 1), max(round(chance.lognormvariate(0, 0.6) * new), 1))
        for _ in range(NUM_LENGTHS)
    )
    spread = chance.uniform(0, 1.2)
    ease = tuple(chance.gauss(0, spread) for _ in range(NUM_LENGTHS))
    return LatencyProfile(passes, overheads), Workload(
        lengths, acceptance, learner_share=chance.choice((0.0, 0.05)), ease=ease
    )
