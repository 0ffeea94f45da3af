"""What a lossy answer is worth: how far it follows the strict one, how likely the model finds it, and its number.

Pure functions over token ids and text, and one pass of the model. Knows no rules, arms or files.
"""
# S tokens of an answer, V vocabulary.

from __future__ import annotations

import re
from decimal import Decimal
from itertools import takewhile

import torch

from dvi.decode.speculator import SelfSpeculator
from dvi.inspect.audit import logits_in_one_pass

ANSWER_MARK = "####"  # GSM8K's, before the final number
# No minus after a digit or a letter: in 12-5 it takes away.
_NUMBER = re.compile(r"(?<!\w)-?\d[\d,]*(?:\.\d+)?")


def final_number(text: str) -> str | None:
    """The number that an answer ends with: the first one after the last ####, else the last of all; None without any.

    As plain decimal digits: "$1,000.00" gives "1000".
    """
    _, mark, end = text.rpartition(ANSWER_MARK)
    found = _NUMBER.findall(end)
    if not found:
        return None
    return f"{Decimal(found[0 if mark else -1].replace(',', '')).normalize():f}"


def shared_share(token_ids: list[int], strict_ids: list[int]) -> float:
    """Tokens before the first difference, as a share of the longer of two texts, not empty: 1 only for equal ones."""
    pairs = zip(token_ids, strict_ids, strict=False)
    num_shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return num_shared / max(len(token_ids), len(strict_ids))


def negative_log_likelihood(speculator: SelfSpeculator, prompt_ids: list[int], token_ids: list[int]) -> float:
    """Nats of the whole answer under the model itself, at temperature 1, by its own plain forward over both texts."""
    text = [*prompt_ids, *token_ids]
    log_probs_SV = logits_in_one_pass(speculator.model, text[:-1], start=len(prompt_ids) - 1).log_softmax(-1)
    ids_S1 = torch.tensor(token_ids, device=log_probs_SV.device)[:, None]
    return -float(log_probs_SV.gather(1, ids_S1).sum())
