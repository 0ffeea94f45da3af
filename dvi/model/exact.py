"""Exact mode: passes that give a position the same bits whatever its batch, its drafts and the cuts of its prefill.

There are two kinds. The native path as it is: its kernels compute every row in one order of operations. And elsewhere
passes padded to one shape, see `dvi.model.padded`. A self-check decides, on the machine and for the model that decode.
What a round does with the logits afterwards, `dvi.decode.sampling` and verdicts, goes row by row as it is.
"""
# B rows, Q positions of a pass, S positions of a text.

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dvi.model.devices import is_gpu
from dvi.model.kv_cache import RollbackCache
from dvi.model.native.path import NativePath
from dvi.model.padded import PADDED_DTYPES, PaddedSplit
from dvi.model.ragged import Packing
from dvi.model.split import SplitModel
from dvi.model.tree import Tree
from dvi.progress import shown_as

# Positions of one pass, by which two rows of the batch are read again: products go by other tiles after 4, 8, 12 and 24
# rows, and one row is not like two.
WIDTHS = ((1, 9, 16, 32), (33, 17, 5, 2, 1))
# A round of three rows, committed so far: a block of 16 keys is full, was just begun, is one short of full. Then how
# many positions of each are verified, and how many of them count where a round is packed.
LENGTHS, VERIFIED, COUNTED = (16, 33, 47), 5, (2, 5, 1)
# A tree by the parents of its nodes after the root, and the nodes of the one path in it that is the text's.
TREE, PATH = [0, 0, 2, 2, 1, 4], [0, 2, 4, 6]

log = logging.getLogger(__name__)


def passes_for(split: SplitModel, mode: str) -> tuple[SplitModel | PaddedSplit, str]:
    """What decoding in this mode runs on, and what is promised of it: "exact" or "fast".

    "auto" is exact where that costs nothing: on the native path. Raises ValueError as `exact_passes` does.
    """
    if mode == "fast" or (mode == "auto" and split.path != "native"):
        return split, "fast"
    try:
        return exact_passes(split), "exact"
    except ValueError as refusal:
        if mode == "exact":
            raise
        log.warning("tokens are promised up to rounding only: %s", refusal)
        return split, "fast"


def may_be_exact(model: nn.Module, dtype: torch.dtype, *, device: str, path: str) -> bool:
    """Whether there are passes to be checked for a model of this shape, which need have no weights."""
    if is_gpu(device) or dtype in PADDED_DTYPES:
        return True
    return path in ("auto", "native") and NativePath.takes(model, dtype)


def exact_passes(split: SplitModel) -> SplitModel | PaddedSplit:
    """The model's passes of the cheaper kind that there is. Raises ValueError, with the reason, where there is none."""
    if split.path == "native":
        check_bits(split)
        return split
    if split.device.type == "cpu" and split.dtype not in PADDED_DTYPES:
        raise ValueError(
            f"exact mode in {split.dtype} is for {NativePath.TAKES}, got {type(split.model).__name__} on the "
            f"{split.path} path; use dtype float32, or mode=fast"
        )
    return PaddedSplit(split)


@torch.no_grad()
@shown_as("checking exact mode on this machine")
def check_bits(split: SplitModel) -> None:
    """Compares all bits of what one prefill of a batch gives with other ways to the same positions.

    Rows alone, in passes of many widths and with a cache of another size; a round of rows of unequal lengths, whose
    shallow states are made step by step; the same packed; the text's path in a tree. Raises ValueError with the first
    value that differs.
    """
    generator, length = torch.Generator().manual_seed(0), sum(WIDTHS[0])
    ids_BS = torch.randint(split.num_input_ids, (len(LENGTHS), length), generator=generator).to(split.device)
    cache = split.make_cache(len(LENGTHS), length)
    reference = _states_of_pass(split, ids_BS, cache)
    _check_alone(split, ids_BS, reference)
    cache.set_lengths(list(LENGTHS))
    _check_round(split, ids_BS, reference, cache)
    _check_tree(split, ids_BS, reference, cache)


def _check_alone(split: SplitModel, ids_BS: Tensor, reference: Sequence[Tensor]) -> None:
    length = ids_BS.shape[1]
    for row, widths in enumerate(WIDTHS):
        cache, position_S = split.make_cache(1, 4 * length), torch.arange(length, device=split.device)
        for position_Q in position_S.split(widths):
            way = f"alone, in a pass of {len(position_Q)} from {position_Q[0]} on"
            found = _states_of_pass(split, ids_BS[row, position_Q][None], cache)
            cache.commit([len(position_Q)])
            _compare(split, [x_BSX[row, position_Q][None] for x_BSX in reference], found, position_Q[None], way)


def _check_round(split: SplitModel, ids_BS: Tensor, reference: Sequence[Tensor], cache: RollbackCache) -> None:
    """The whole rectangle, and packed."""
    position_BQ = cache.lengths_B[:, None] + torch.arange(VERIFIED, device=split.device)
    ids_BQ, placement = ids_BS.gather(1, position_BQ), cache.place(offset=0, width=VERIFIED)
    expected = _at(reference, position_BQ)
    steps = [split.shallow(ids_BQ[:, i : i + 1], cache, cache.place(offset=i, width=1)) for i in range(VERIFIED)]
    hidden_BQD = torch.cat(steps, dim=1)
    final_BQD = split.deep(hidden_BQD, ids_BQ, cache, placement)
    _compare(split, expected, (hidden_BQD, final_BQD, split.head(final_BQD)), position_BQ, "drafted and verified")
    packing = Packing(torch.tensor(COUNTED, device=split.device), width=VERIFIED)
    final_MD = split.deep_packed(packing.pack(hidden_BQD), cache, placement, packing)
    found = packing.pack(hidden_BQD), final_MD, split.head(final_MD)
    expected = [packing.pack(x_BQX) for x_BQX in expected]
    _compare(split, expected, found, position_BQ.flatten()[packing.kept_M], "in a packed round")


def _check_tree(split: SplitModel, ids_BS: Tensor, reference: Sequence[Tensor], cache: RollbackCache) -> None:
    tree = Tree.of_parents([TREE] * len(ids_BS), split.device)
    position_BN = cache.lengths_B[:, None] + tree.depths_BN
    position_BQ = position_BN[:, PATH]
    ids_BN = (ids_BS.gather(1, position_BN) + 1) % split.num_input_ids  # other tokens beside the text's
    ids_BN[:, PATH] = ids_BS.gather(1, position_BQ)
    found = [x_BNX[:, PATH] for x_BNX in _states_of_pass(split, ids_BN, cache, tree=tree)]
    _compare(split, _at(reference, position_BQ), found, position_BQ, "as a path in a tree")


def _at(states: Sequence[Tensor], position_BQ: Tensor) -> list[Tensor]:
    row_B1 = torch.arange(len(position_BQ), device=position_BQ.device)[:, None]
    return [x_BSX[row_B1, position_BQ] for x_BSX in states]


def _states_of_pass(
    split: SplitModel, ids_BQ: Tensor, cache: RollbackCache, *, tree: Tree | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    placement = cache.place(offset=0, width=ids_BQ.shape[1], tree=tree)
    hidden_BQD = split.shallow(ids_BQ, cache, placement)
    final_BQD = split.deep(hidden_BQD, ids_BQ, cache, placement)
    return hidden_BQD, final_BQD, split.head(final_BQD)


def _compare(
    split: SplitModel, expected: Sequence[Tensor], found: Sequence[Tensor], positions: Tensor, way: str
) -> None:
    """positions: of all but the tensors' last dimension."""
    for name, one, other in zip(("h_k", "h_L", "logits"), expected, found, strict=True):
        if not torch.equal(one, other):
            *row, column = (one != other).nonzero()[0].tolist()
            place = (*row, column)
            raise ValueError(
                f"exact mode is not possible for {split.dtype} on this machine: {name}[{column}] of position "
                f"{positions[tuple(row)]} is {one[place]:.9g} in the prefill of a batch and {other[place]:.9g} {way}; "
                "use mode=fast, or path_kind=direct with float32"
            )
