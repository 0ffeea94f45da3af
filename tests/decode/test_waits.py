"""One wait for the device per round, and none while it drafts and verifies."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dvi.decode.batch import DecodingBatch
from dvi.decode.round import RowState, draft_and_verify
from dvi.decode.sampling import SamplingBatch, SeenTokens
from dvi.decode.sequence import Sequence
from dvi.decode.verification import StrictRule
from dvi.draft.companion_length import CompanionLength
from dvi.draft.companions import Companion, EmaCompanion, ExitCompanion, OlderCompanion, SelfCompanion
from dvi.draft.costs import CostTable
from dvi.draft.length_policies import ConfidenceStop, FixedLength
from dvi.model.drafter import build_drafter
from dvi.model.llama_path import DirectPath
from dvi.model.split import SplitModel
from dvi.records import SamplingParams
from tests.support.drafter_doubles import random_drafter, small_config
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64


class CountWaits(TorchDispatchMode):
    """Counts operations that make the host wait for the device, or whose result's shape depends on data."""

    WAITS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.nonzero", "aten.equal")

    def __init__(self) -> None:
        super().__init__()
        self.num_waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_waits += str(func.overloadpacket) in self.WAITS
        return func(*args, **(kwargs or {}))


def test_a_round_waits_for_the_device_once(monkeypatch):
    """One small transfer per round; on a CPU, where it costs nothing, drafting also asks if all rows stopped."""
    model = tiny_model("llama", num_layers=2, hidden_size=16, vocab_size=VOCAB_SIZE)
    split = SplitModel(model, split_layer=1)
    drafter = random_drafter(split, seed=1)
    fetched = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: fetched.append(tensor.shape) or tolist(tensor))
    for name in ("item", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a second wait for the device"))
    for num_draft_tokens in (0, 3):
        batch = DecodingBatch(
            split, drafter, max_rows=2, capacity=0, policy=FixedLength(num_draft_tokens), rule=StrictRule(),
            wants_transitions=True,
        )  # fmt: skip
        for index, prompt in enumerate([[5, 9, 33], [7]]):
            batch.admit(Sequence(index, prompt, SamplingParams(), lambda _token: None, max_new_tokens=16))
        fetched.clear()
        with CountWaits() as waits:
            batch.round()
        assert fetched == [(2, num_draft_tokens + 5)]
        assert waits.num_waits == num_draft_tokens  # the CPU's early end


META_PARAMS = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.2},
    "sampled": {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.01, "presence_penalty": 0.1},
    "gumbel": {"temperature": 1.0, "coupling": "gumbel"},
}


def companion_length(companion: Companion) -> CompanionLength:
    costs = CostTable(draft_step_s={1: 0.1}, verify_s={1: 1.0})
    return CompanionLength((3,), costs, companion, is_on_cpu=False)


@pytest.mark.parametrize(
    "policy",
    [
        FixedLength(3), ConfidenceStop(3, threshold=0.4), companion_length(SelfCompanion()),
        companion_length(ExitCompanion(torch.nn.Identity())), companion_length(OlderCompanion()),
        companion_length(EmaCompanion()),
    ],
)
@pytest.mark.parametrize("name", list(META_PARAMS))
@pytest.mark.parametrize("path", ["direct", "views"])
def test_drafting_and_judging_never_read_a_value_or_make_a_shape_from_one(path, name, policy):
    """On meta tensors there is no data: every `.item()`, `if tensor`, mask index or nonzero raises. It is also the
    branch that other devices take: no early end, writes by position, weights not packed."""
    model = tiny_model("llama", num_layers=2, hidden_size=16, vocab_size=VOCAB_SIZE, dtype=torch.float32)
    split = SplitModel(model, split_layer=1, path="views")
    drafter = build_drafter(split, small_config())
    model.to("meta")
    split.device, split.head_weight_VD = torch.device("meta"), model.lm_head.weight
    if path == "direct":
        split.path, split._path = "direct", DirectPath(model, split_layer=1)
        split._linear_head = split._path.head
    drafter.to("meta").draft_head._frozen = (model.lm_head.weight, None)
    drafter.publish(drafter, 1)
    params = [SamplingParams(seed=i, **META_PARAMS[name]) for i in range(2)]
    sampling = SamplingBatch(params, vocab_size=VOCAB_SIZE, device=split.device)
    seen = SeenTokens(2, VOCAB_SIZE, split.device) if sampling.has_penalties else None
    rows = slice(0, 2)
    cache = split.make_cache(2, 16)
    last_token_B = torch.zeros(2, dtype=torch.int64, device="meta")
    room_B = torch.zeros(2, dtype=torch.int64, device="meta")
    state = RowState(rows, room_B, last_token_B, torch.zeros(2, 16, device="meta"), sampling, seen)
    if policy.companion is not None:
        policy.companion.follow(drafter, [])
    with torch.no_grad():
        verified = draft_and_verify(
            split, drafter, cache, state, policy, 3, StrictRule(), wants_log_probs=True
        )
    num_scores = 0 if policy.companion is None else 6
    assert verified.for_host_BH.shape == (2, 8 + num_scores)
    assert verified.draft.hidden_BUD.shape == (2, 4, 16)
