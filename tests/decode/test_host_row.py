"""What crosses to the host arrives under its own name."""

from __future__ import annotations

import pytest
import torch

from dvi.decode.host_row import HostRow, fetch, for_host, judged_on_host
from dvi.decode.verification import verify_greedy
from dvi.records import Draft, Verdict


def draft_of(num_drafts: int, scores_BTC: torch.Tensor | None = None) -> Draft:
    """Two rows with num_drafts ids each, 10, 11 ... and 20, 21 ..., all counted in the second row alone."""
    ids_BT = torch.arange(num_drafts) + torch.tensor([[10], [20]])
    return Draft(
        ids_BT, torch.tensor([min(num_drafts, 1), num_drafts]), torch.zeros(2, num_drafts + 1, 4), num_positions=None,
        probs_BTV=None, log_probs_BT=None, drafter_version=0, companion_scores_BTC=scores_BTC,
    )


VERDICT = Verdict(torch.tensor([0, 2]), torch.tensor([7, 8]), num_waived_B=torch.tensor([0, 1]))


@pytest.mark.parametrize("has_scores", [False, True])
@pytest.mark.parametrize("num_drafts", [2, 3])
def test_what_is_written_on_the_device_is_read_by_name(num_drafts, has_scores):
    """Catches a column written in one place and read in another, with and without a companion's scores."""
    scores_BTC = torch.arange(4 * num_drafts).view(2, num_drafts, 2) / 16 if has_scores else None
    draft = draft_of(num_drafts, scores_BTC)
    first, second = fetch(for_host(draft, VERDICT, torch.tensor([True, False])), draft)
    scores = [[tuple(pair) for pair in row] for row in scores_BTC.tolist()] if has_scores else [None, None]
    ids = draft.token_ids_BT.tolist()
    assert first == HostRow(ids[0], scores[0], True, 7, num_waived=0, num_accepted=0, num_drafted=1)
    assert second == HostRow(ids[1], scores[1], False, 8, num_waived=1, num_accepted=2, num_drafted=num_drafts)
    assert (first.committed, second.committed) == ([7], [20, 21, 8])


def test_a_round_without_drafts_commits_its_one_token():
    """A lossless rule waives nothing, and says so by leaving the count out."""
    draft = draft_of(0)
    verdict = Verdict(torch.zeros(2, dtype=torch.int64), torch.tensor([7, 8]))
    rows = fetch(for_host(draft, verdict, torch.tensor([True, True])), draft)
    assert [(row.committed, row.num_waived, row.num_drafted) for row in rows] == [([7], 0, 0), ([8], 0, 0)]


@pytest.mark.parametrize("num_drafts", [0, 1, 4])
def test_a_verdict_on_the_host_is_the_one_in_tensors(num_drafts):
    """Catches a host that reads a draft that does not count, or takes the token after another place."""
    generator = torch.Generator().manual_seed(num_drafts)
    for _ in range(50):
        draft = draft_of(num_drafts)
        draft.token_ids_BT = torch.randint(2, (2, num_drafts), generator=generator)
        draft.num_drafted_B = torch.randint(num_drafts + 1, (2,), generator=generator)
        target_ids_BU = torch.randint(2, (2, num_drafts + 1), generator=generator)
        final_sum_B = torch.tensor([float("nan"), 3.0])
        verdict = verify_greedy(draft.token_ids_BT, draft.num_drafted_B, target_ids_BU)
        rows = judged_on_host(draft, target_ids_BU, final_sum_B)
        assert rows == fetch(for_host(draft, verdict, final_sum_B.isfinite()), draft)
