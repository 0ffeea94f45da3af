"""The names by which clients ask for the model and its adapters.

Knows names; knows nothing of requests or drafters. The model goes by the name it is served as and by the path it was
loaded from; an adapter by either of them, a colon and its own name.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvi.serving.request import DEFAULT_DRAFTER

MAX_LISTED = 20  # names in an error message


@dataclass(frozen=True)
class ModelNames:
    """served: the name in listings and answers. path: as the settings give it. created_s: since the epoch."""

    served: str
    path: str
    created_s: int = 0

    def listing(self, adapters: Collection[str]) -> list[dict[str, Any]]:
        """OpenAI's model objects: of the model, and of it with each of these adapters."""
        of_adapters = [self._entry(self._id(adapter), self.served) for adapter in sorted(adapters)]
        return [self._entry(self.served), *of_adapters]

    def find(self, model: str | None, adapters: Collection[str]) -> str:
        """The drafter that this name asks for; none at all asks for the model with its own.

        Raises ValueError, with the names there are, for every other.
        """
        for base in (self.served, self.path):
            if model is None or model == base:
                return DEFAULT_DRAFTER
            adapter = model.removeprefix(f"{base}:")
            if adapter != model and adapter in adapters:
                return adapter
        names = [self.served, *(self._id(adapter) for adapter in sorted(adapters))]
        more = f" and {len(names) - MAX_LISTED} more, see GET /v1/models" if len(names) > MAX_LISTED else ""
        raise ValueError(f"there is no model {model[:64]!r} here; there are {', '.join(names[:MAX_LISTED])}{more}")

    def entry(self, model: str, adapters: Collection[str]) -> dict[str, Any]:
        """The model object of a name, which it has as its id. Raises ValueError as `find` does."""
        drafter = self.find(model, adapters)
        return self._entry(model, None if drafter == DEFAULT_DRAFTER else self.served)

    def _id(self, adapter: str) -> str:
        return f"{self.served}:{adapter}"

    def _entry(self, model: str, parent: str | None = None) -> dict[str, Any]:
        return {
            "id": model, "object": "model", "created": self.created_s, "owned_by": "dvi", "root": self.path,
            "parent": parent,
        }  # fmt: skip


def last_part(path: str) -> str:
    """What a model is called that nobody has named: the last part of its path or hub name."""
    return Path(path).name or Path(path).resolve().name or "model"
