"""What a serving rank and a learner rank tell each other, as bytes: experience one way, drafters the other.

Knows records, tensors and safetensors; knows nothing of channels or learning. Nothing is pickled, and nothing that
arrives is believed: what does not fit raises MessageError.
"""
# N positions of a message, S stretches, W positions of a stretch, D hidden size, V vocabulary.

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dvi.model.drafter import MAX_DEPTH
from dvi.records import DrafterVersion, LossWeights, Transitions, UpdateReport
from trainers.learning.experience import COLUMNS
from trainers.learning.versions import State
from trainers.ranks.channel import Kind, Message

# What is known of a stretch besides its columns, one column each of an int64 table.
FACTS = ("round", "request_id", "start_position", "width", "num_drafted", "num_accepted", "drafter_version",
         "num_waived", "is_prefill", "tenant")  # fmt: skip
# A rank's own ids lie below it and its number above, so that no two ranks' requests are one to the replay.
REQUESTS_PER_RANK = 1 << 48
TRIMMED_TO = "draft_head.draft_token_ids_V"
FACTS_TENSOR = "facts"  # JSON in a drafter's message; no parameter has the name
NONE = type(None)


class MessageError(ValueError):
    """A message that no other rank of this version can have packed for this model."""


# Experience


class Round(NamedTuple):
    """What one call of `Learner.observe` brought, on the CPU; it is there once `arrival` has come (None: already)."""

    stretches: list[Transitions]
    arrival: torch.cuda.Event | None

    @property
    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.query()


def copy_to_host(transitions: list[Transitions]) -> Round:
    """Copies of the stretches on the CPU. Nobody waits for the device; a few launches, however many stretches."""
    columns = columns_of(transitions)
    device = columns[COLUMNS[0]].device
    # On a CPU the concatenation has copied already. From a GPU, non_blocking lands in pinned memory.
    columns = {name: column.to("cpu", non_blocking=True) for name, column in columns.items()}
    arrival = None
    if device.type == "cuda":
        arrival = torch.cuda.Event()
        arrival.record(torch.cuda.current_stream(device))
    return Round(split_columns(transitions, columns), arrival)


def columns_of(transitions: list[Transitions]) -> dict[str, Tensor]:
    """All stretches' positions, one after the other."""
    return {name: torch.cat([getattr(stretch, name) for stretch in transitions]) for name in COLUMNS}


def split_columns(transitions: list[Transitions], columns: dict[str, Tensor]) -> list[Transitions]:
    """The same stretches over other columns, as views of them."""
    parts = {name: column.split([len(stretch) for stretch in transitions]) for name, column in columns.items()}
    return [
        dataclasses.replace(stretch, **{name: parts[name][i] for name in COLUMNS})
        for i, stretch in enumerate(transitions)
    ]


def pack_experience(rounds: Iterable[list[Transitions]], ended: list[int]) -> Message:
    """Rounds of stretches on the CPU, at least one of them, and the ids of requests that have ended since."""
    rounds = list(rounds)
    stretches = [stretch for transitions in rounds for stretch in transitions]
    tenants = sorted({stretch.tenant for stretch in stretches})
    table = [
        [
            index, s.request_id, s.start_position, len(s), s.num_drafted, s.num_accepted, s.drafter_version,
            s.num_waived, int(s.is_prefill), tenants.index(s.tenant),
        ]
        for index, transitions in enumerate(rounds) for s in transitions
    ]  # fmt: skip
    tensors = columns_of(stretches) | {
        "stretches_SF": torch.tensor(table), "ended": torch.tensor(ended, dtype=torch.int64),
        "tenants": _json_tensor(tenants),
    }  # fmt: skip
    return Message(Kind.EXPERIENCE, safetensors.torch.save(tensors))


def unpack_experience(
    body: bytes, *, rank: int, hidden_size: int, vocab_size: int, device: torch.device
) -> tuple[list[list[Transitions]], list[int]]:
    """The rounds, on this device, and the ids of ended requests; all ids are made the rank's own.

    Raises MessageError for what `pack_experience` cannot have made of a model of these sizes.
    """
    tensors = _tensors(body)
    _check(tensors.keys() == {*COLUMNS, "stretches_SF", "ended", "tenants"}, f"tensors {sorted(tensors)}")
    table_SF, ended, tenants = tensors.pop("stretches_SF"), tensors.pop("ended"), _json_value(tensors.pop("tenants"))
    is_table = table_SF.dtype == torch.int64 and table_SF.dim() == 2 and table_SF.shape[1] == len(FACTS)
    _check(is_table and len(table_SF) > 0, f"a table of shape {list(table_SF.shape)}")
    _check(ended.dtype == torch.int64 and ended.dim() == 1, f"ended of shape {list(ended.shape)}")
    _check(isinstance(tenants, list) and all(isinstance(name, str) for name in tenants), "tenants")
    facts = {name: table_SF[:, i] for i, name in enumerate(FACTS)}
    _check_facts(facts, num_tenants=len(tenants))
    _check(bool(((ended >= 0) & (ended < REQUESTS_PER_RANK)).all()), "ids of ended requests")
    num_positions = int(facts["width"].sum())
    for name, column in tensors.items():
        shape = [num_positions, hidden_size] if name.endswith("D") else [num_positions]
        is_kind = column.dtype == torch.int64 if "token_ids" in name else column.dtype.is_floating_point
        _check(is_kind and list(column.shape) == shape, f"{name} {list(column.shape)} {column.dtype}")
    for name, lowest in (("token_ids_W", 0), ("draft_token_ids_W", -1)):
        _check(bool(((tensors[name] >= lowest) & (tensors[name] < vocab_size)).all()), f"{name} outside the vocabulary")
    columns = {name: column.to(device) for name, column in tensors.items()}
    return _rounds(facts, columns, tenants, rank), (ended + rank * REQUESTS_PER_RANK).tolist()


def _check_facts(facts: dict[str, Tensor], *, num_tenants: int) -> None:
    width, num_accepted, num_drafted = facts["width"], facts["num_accepted"], facts["num_drafted"]
    is_prefill = facts["is_prefill"] == 1
    checks = {
        "round": (facts["round"].diff() >= 0).all() & (facts["round"][0] >= 0),
        "request_id": (facts["request_id"] >= 0) & (facts["request_id"] < REQUESTS_PER_RANK),
        "start_position": (facts["start_position"] >= 0) & (facts["start_position"] < 1 << 40),
        # A round commits what was accepted and one token more, less what a stop cut off; prompt text has no drafts.
        "width": (width >= 1) & (width < 1 << 31) & (is_prefill | (width <= num_accepted + 1)),
        "num_drafted": (num_drafted >= 0) & (num_drafted <= torch.where(is_prefill, 0, MAX_DEPTH)),
        "num_accepted": (num_accepted >= 0) & (num_accepted <= num_drafted),
        "drafter_version": facts["drafter_version"] >= 0,
        "num_waived": (facts["num_waived"] >= 0) & (facts["num_waived"] <= num_accepted),
        "is_prefill": facts["is_prefill"] == facts["is_prefill"].clamp(0, 1),
        "tenant": (facts["tenant"] >= 0) & (facts["tenant"] < num_tenants),
    }
    for name, is_well in checks.items():
        _check(bool(is_well.all()), f"{name} out of range")


def _rounds(
    facts: dict[str, Tensor], columns: dict[str, Tensor], tenants: list[str], rank: int
) -> list[list[Transitions]]:
    parts = {name: column.split(facts["width"].tolist()) for name, column in columns.items()}
    rounds: dict[int, list[Transitions]] = {}
    rows = zip(*(facts[name].tolist() for name in FACTS), strict=True)
    for i, (index, request_id, start, _width, num_drafted, num_accepted, version, num_waived, is_prefill, tenant) in (
        enumerate(rows)
    ):
        rounds.setdefault(index, []).append(Transitions(
            request_id=rank * REQUESTS_PER_RANK + request_id, start_position=start, num_drafted=num_drafted,
            num_accepted=num_accepted, drafter_version=version, num_waived=num_waived,
            is_prefill=bool(is_prefill), tenant=tenants[tenant], **{name: parts[name][i] for name in COLUMNS},
        ))  # fmt: skip
    return list(rounds.values())


# Drafters


class Published(NamedTuple):
    """A drafter as the learner published it last: weights, all versions it knows of, and its newest report."""

    state: State
    versions: list[DrafterVersion]
    report: UpdateReport | None

    @property
    def version(self) -> int:
        return self.versions[-1].version


def pack_drafter(published: Published) -> Message:
    facts = {
        "versions": [dataclasses.asdict(version) for version in published.versions],
        "report": None if published.report is None else dataclasses.asdict(published.report),
    }
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in published.state.items()}
    return Message(Kind.DRAFTER, safetensors.torch.save(state | {FACTS_TENSOR: _json_tensor(facts)}))


def unpack_drafter(body: bytes, drafter: nn.Module) -> Published:
    """What `pack_drafter` gave, once it is certain that `drafter` can take it. Raises MessageError when it cannot."""
    state = _tensors(body)
    facts = _json_value(state.pop(FACTS_TENSOR, torch.zeros(0, dtype=torch.uint8)))
    try:
        report = facts["report"]
        if report is not None:
            report = UpdateReport(**report | {"weights": LossWeights(**report["weights"])})
        published = Published(state, [DrafterVersion(**record) for record in facts["versions"]], report)
    except (TypeError, KeyError) as error:
        raise MessageError(f"a drafter's facts do not parse: {error}") from error
    are_numbers = all(type(record.version) is int for record in published.versions)
    _check(are_numbers and bool(published.versions), "versions that are none")
    _check_state(state, drafter)
    return published


def _check_state(state: State, drafter: nn.Module) -> None:
    own, token_ids_V = drafter.state_dict(), state.get(TRIMMED_TO)
    shapes = {name: tensor.shape for name, tensor in own.items()}
    if token_ids_V is not None:
        _check(token_ids_V.dtype == torch.int64 and token_ids_V.dim() == 1, "token ids of a trim that are none")
        ids = token_ids_V.tolist()
        # Trimmed already, it can take no other ids.
        allowed = range(drafter.draft_head.vocab_size) if TRIMMED_TO not in own else own[TRIMMED_TO].tolist()
        _check(bool(ids) and ids == sorted(set(ids)) and set(ids) <= set(allowed), "token ids of a trim out of range")
        shapes[TRIMMED_TO] = token_ids_V.shape
        shapes["draft_head.lora_B"] = torch.Size([len(ids), *shapes["draft_head.lora_B"][1:]])
    found = {name: tensor.shape for name, tensor in state.items()}
    _check(found == shapes, f"weights of shapes {found}, not {shapes}")
    _check(all(bool(tensor.isfinite().all()) for tensor in state.values()), "weights that are not finite")


def publish(published: Published, drafter: nn.Module) -> None:
    """Makes the drafter serve what `unpack_drafter` gave; its head is trimmed first where theirs is."""
    token_ids_V = published.state.get(TRIMMED_TO)
    if token_ids_V is not None and drafter.draft_head.draft_token_ids_V is None:
        drafter.draft_head.trim(token_ids_V.to(drafter.draft_head.lora_A.device))
    drafter.load_state_dict(published.state)
    drafter.publish(drafter, published.version)


# Facts


def pack_facts(kind: Kind, **facts: object) -> Message:
    """A message of plain values, as JSON has them."""
    return Message(kind, json.dumps(facts).encode())


def unpack_facts(body: bytes, **types: type | tuple[type, ...]) -> dict:
    """The message's values. Raises MessageError unless they have these names and types."""
    facts = _parsed(body)
    is_well = isinstance(facts, dict) and facts.keys() == types.keys()
    _check(is_well and all(isinstance(facts[name], expected) for name, expected in types.items()), f"facts {facts}")
    return facts


def _tensors(body: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(body)
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype that torch does not have
        raise MessageError(f"a message does not parse: {error}") from error


def _json_tensor(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _json_value(tensor: Tensor) -> object:
    _check(tensor.dtype == torch.uint8 and tensor.dim() == 1, "facts that are no bytes")
    return _parsed(tensor.numpy().tobytes())


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except ValueError as error:
        raise MessageError(f"facts do not parse: {error}") from error


def _check(is_well: bool, what: str) -> None:
    if not is_well:
        raise MessageError(f"a message must be one that another rank of this version packed, got {what}")
