"""Where a text ends: the ids that end it, of everything in a model's folder that names one.

Knows models' settings and tokenizers; knows nothing of decoding. One source, for whoever decodes beside us as well:
generation config, model config and tokenizer need not name the same tokens, and whoever believes one of them alone goes
on past the end that another names.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """The ids that end a text, ascending: of generation config, model config and tokenizer together."""
    named = [
        model.generation_config.eos_token_id, model.config.eos_token_id, model.config.get_text_config().eos_token_id,
        None if tokenizer is None else tokenizer.eos_token_id,
    ]
    lists = ([] if ids is None else [ids] if isinstance(ids, int) else ids for ids in named)
    return sorted({token_id for ids in lists for token_id in ids})


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The tokens that a text does not show, and how they are written: those with a role and those without one."""
    added = {token_id: token.content for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)) | added


def named_in(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """The special tokens whose writing is found in one of the texts."""
    texts = list(texts)
    if not texts:
        return {}
    return {i: word for i, word in special_tokens(tokenizer).items() if any(word in text for text in texts)}
