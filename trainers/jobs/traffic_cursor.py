"""The way through a job's traffic: which requests there are, and which of them are done.

Knows settings and indices; knows nothing of models or learning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dvi.settings import TrainConfig, WarmupConfig
from dvi.traffic import Messages, NoPromptsError, as_messages, hold_out, read_dataset, read_prompts

# Of generated text, were all answers as long as they may be: what 200 of the demo's prompts have, from which a drafter
# from scratch came to 1.87 on the bundled model, as easy as any to draft for (docs/training.md#your-own-prompts).
LITTLE_TOKENS = 20_000


class TrafficCursor:
    """Which requests are done: all before first_open, and those of done_ahead, which overtook it in a batch."""

    def __init__(self, first_open: int = 0, done_ahead: Iterable[int] = ()) -> None:
        self.first_open, self.done_ahead = first_open, set(done_ahead)

    @classmethod
    def union(cls, places: Iterable[dict[str, object]]) -> TrafficCursor:
        """What is done in any of these places, each with first_open and done_ahead."""
        places = list(places)
        first_open = max(place["first_open"] for place in places)
        cursor = cls(first_open, {i for place in places for i in place["done_ahead"] if i >= first_open})
        cursor._advance()
        return cursor

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
    config: TrainConfig | WarmupConfig, *, answer_field: str | None = None, parse: Callable = as_messages,
    say: Callable[[str], object] = lambda line: None,
) -> tuple[Iterable, list]:
    """The requests to serve (a list where their number is known) and the held-out ones, as `parse` gives them.

    Of prompts without rows of the eval split a tenth is held out, the same whenever they are read; see `hold_out`.

    answer_field, parse: see `dvi.traffic.read_dataset`. say: is told in a line what was held out without being asked.
    Raises ValueError when no traffic is named, or what `dvi.traffic` raises.
    """
    data, limit = config.data, config.eval.limit
    order = {"shuffle_seed": data.shuffle_seed, "epochs": data.epochs}
    form = {"parse": parse, "field": data.field}
    if data.dataset is not None:
        source = {"split": data.dataset_split, "answer_field": answer_field} | form
        held_out = list(read_dataset(data.dataset, limit=limit, **source)) if limit else []
        return DatasetTraffic(data.dataset, {"skip": limit, "limit": data.limit} | source | order), held_out
    if not data.prompts:
        raise ValueError("data.prompts or data.dataset must name the traffic, such as configs/demo/prompts.jsonl")
    kind = {"split": data.split, "domains": data.domains} | form
    held_out, found = [], []
    if limit and data.split != "eval":
        try:
            held_out = read_prompts(data.prompts, limit=limit, **(kind | {"split": "eval"}))
        except NoPromptsError:
            held_out = found = hold_out(read_prompts(data.prompts, **kind), limit=limit)
    traffic = read_prompts(data.prompts, limit=data.limit, leave_out=found, **kind, **order)
    if found:
        say(
            f"held out {len(found)} of {len(found) + len(traffic) // data.epochs} prompts to measure on, as no row has "
            "split: eval; they are the same in every run, and never learnt from"
        )
    return traffic, held_out


def what_to_expect(config: TrainConfig | WarmupConfig, traffic: Iterable) -> str | None:
    """A line about traffic that is little for a drafter that begins untrained; None for enough, or nobody knows."""
    if config.drafter.adapter is not None or not config.train.enabled or not isinstance(traffic, list):
        return None
    num_prompts = len(traffic) // config.data.epochs
    longest = getattr(config, "sampling", None) or config.warmup
    num_tokens = num_prompts * longest.max_new_tokens
    if num_tokens >= LITTLE_TOKENS:
        return None
    return (
        f"{num_prompts} prompts of at most {longest.max_new_tokens} new tokens are little for a drafter from scratch, "
        "expect little: on a model of 135 M it came to 1.44 tokens a round after 480 prompts (47,000 tokens), plain "
        "decoding has 1 (docs/training.md); give some thousands, or begin from a drafter.adapter"
    )


class DatasetTraffic:
    """A streamed dataset that can be read from its start more than once."""

    def __init__(self, name: str, options: dict[str, object]) -> None:
        self._name, self._options = name, options

    def __iter__(self) -> Iterator:
        return read_dataset(self._name, **self._options)
