"""The way through a job's traffic: which requests there are, and which of them are done.

Knows settings and indices; knows nothing of models or learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dvi.settings import TrainConfig, WarmupConfig
from dvi.traffic import Messages, NoPromptsError, as_messages, read_dataset, read_prompts


class TrafficPosition:
    """Which requests are done: all before first_open, and those of done_ahead, which overtook it in a batch."""

    def __init__(self, first_open: int = 0, done_ahead: Iterable[int] = ()) -> None:
        self.first_open, self.done_ahead = first_open, set(done_ahead)

    @classmethod
    def union(cls, places: Iterable[dict[str, object]]) -> TrafficPosition:
        """What is done in any of these places, each with first_open and done_ahead."""
        places = list(places)
        first_open = max(place["first_open"] for place in places)
        position = cls(first_open, {i for place in places for i in place["done_ahead"] if i >= first_open})
        position._advance()
        return position

    @property
    def num_done(self) -> int:
        return self.first_open + len(self.done_ahead)

    def finish(self, index: int) -> None:
        self.done_ahead.add(index)
        self._advance()

    def _advance(self) -> None:
        while self.first_open in self.done_ahead:
            self.done_ahead.remove(self.first_open)
            self.first_open += 1

    def is_done(self, index: int) -> bool:
        return index < self.first_open or index in self.done_ahead

    def open_requests(self, traffic: Iterable[Messages]) -> Iterator[tuple[int, Messages]]:
        """(index, prompt) of what was not done when this was called."""
        first_open, done_ahead = self.first_open, frozenset(self.done_ahead)
        return ((i, p) for i, p in enumerate(traffic) if i >= first_open and i not in done_ahead)


def read_traffic(
    config: TrainConfig | WarmupConfig, *, answer_field: str | None = None, parse: Callable = as_messages
) -> tuple[Iterable, list]:
    """The requests to serve (a list where their number is known) and the held-out ones, as `parse` gives them.

    answer_field, parse: see `dvi.traffic.read_dataset`.
    Raises ValueError when no traffic is named, or what `dvi.traffic` raises.
    """
    data, limit = config.data, config.eval.limit
    order = {"shuffle_seed": data.shuffle_seed, "epochs": data.epochs}
    form = {"parse": parse}
    if data.dataset is not None:
        source = {"split": data.dataset_split, "field": data.text_field, "answer_field": answer_field} | form
        held_out = list(read_dataset(data.dataset, limit=limit, **source)) if limit else []
        return DatasetTraffic(data.dataset, {"skip": limit, "limit": data.limit} | source | order), held_out
    if not data.prompts:
        raise ValueError("data.prompts or data.dataset must name the traffic, such as configs/demo/prompts.jsonl")
    traffic = read_prompts(data.prompts, split=data.split, domains=data.domains, limit=data.limit, **order, **form)
    if not limit or data.split == "eval":
        return traffic, []
    try:
        return traffic, read_prompts(data.prompts, split="eval", domains=data.domains, limit=limit, **form)
    except NoPromptsError:
        return traffic, []


class DatasetTraffic:
    """A streamed dataset that can be read from its start more than once."""

    def __init__(self, name: str, options: dict[str, object]) -> None:
        self._name, self._options = name, options

    def __iter__(self) -> Iterator:
        return read_dataset(self._name, **self._options)
