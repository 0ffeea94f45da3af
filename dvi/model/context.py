"""How long a text a model is run on: its context, or less where its rotary angles would follow the longest row.

Knows configs; knows nothing of weights. Rotary embeddings of the kinds longrope and dynamic choose one table of angles
for a whole pass, by the highest position in it. Past their original length a row's states would so depend on its batch
mates, and keys cached before, or for another text, on a table that no longer holds. Up to it the table is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

UNBOUNDED = 2**31
SHORTEST = 32  # an original length below this serves nobody


def max_positions_of(config: Any) -> int:
    """Positions of a prompt and its answer together, for a model of this config."""
    return min(_context(config), *(length for _, length in _stretching(config)), UNBOUNDED)


def why_shorter(config: Any) -> str | None:
    """Why `max_positions_of` is less than the model's own context; None where it is not."""
    if max_positions_of(config) == _context(config):
        return None
    kind, length = min(_stretching(config), key=lambda one: one[1])
    return (
        f"its {kind} rotary embedding changes with the longest text of a batch beyond {length} positions, so texts end "
        f"there and not at {_context(config)}"
    )


def has_bounded_positions(config: Any) -> bool:
    """Whether a position beyond `max_positions_of` would change what the others of its pass compute."""
    return any(True for _ in _stretching(config))


def _context(config: Any) -> int:
    return getattr(config, "max_position_embeddings", None) or UNBOUNDED


def _stretching(config: Any) -> Iterator[tuple[str, int]]:
    """(kind, original length) of each rotary embedding whose table depends on the longest row."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer_type = [value for value in given.values() if isinstance(value, Mapping)]
    for parameters in by_layer_type or [given]:
        kind = str(parameters.get("rope_type", parameters.get("type", "default")))
        if kind == "longrope" or "dynamic" in kind:
            lengths = (
                parameters.get("original_max_position_embeddings"),
                getattr(config, "original_max_position_embeddings", None),
                _context(config),
            )
            yield kind, min(length for length in lengths if length)
