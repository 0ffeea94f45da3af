"""What a learner was shown, in counts: how much traffic, and how well it was drafted first and lately.

Knows lengths and outcomes of rounds; knows nothing of what was said.
"""

from __future__ import annotations

import dataclasses

from dvi.records import RoundStats, Transitions

WINDOW_DRAFTED = 1024  # drafted tokens: an acceptance of 0.5 is then known to within 2 points
NUM_RECENT_REQUESTS = 4096  # far more than decode at a time, so that no request is forgotten before its end


class TrafficCounts:
    """Counts of what a learner was shown: in all, and in the first and the newest full window of WINDOW_DRAFTED.

    `state_dict` has plain numbers alone, nothing of what was said.
    """

    def __init__(self) -> None:
        self.num_requests = 0
        self.total, self._window = RoundStats(), RoundStats()
        self.first: RoundStats | None = None
        self.newest: RoundStats | None = None
        self._recent: dict[int, None] = {}  # request ids in the order they came, as an ordered set

    def count(self, transitions: list[Transitions]) -> None:
        for stretch in transitions:
            if stretch.request_id not in self._recent:
                self.num_requests += 1
                self._recent[stretch.request_id] = None
                if len(self._recent) > NUM_RECENT_REQUESTS:
                    del self._recent[next(iter(self._recent))]
            if stretch.is_prefill:
                self.total.prompt_tokens += len(stretch)
                continue
            for stats in (self.total, self._window):
                stats.count_round(
                    num_drafted=stretch.num_drafted, num_accepted=stretch.num_accepted, num_waived=stretch.num_waived,
                    num_kept=len(stretch),
                )
        if self._window.num_drafted >= WINDOW_DRAFTED:
            self.first, self.newest = self.first or self._window, self._window
            self._window = RoundStats()

    def state_dict(self) -> dict[str, object]:
        windows = {
            name: None if stats is None else dataclasses.asdict(stats)
            for name, stats in (("total", self.total), ("window", self._window), ("first", self.first),
                                ("newest", self.newest))
        }  # fmt: skip
        return {"num_requests": self.num_requests, **windows}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.num_requests = state["num_requests"]
        self.total, self._window, self.first, self.newest = (
            None if state[name] is None else RoundStats(**state[name])
            for name in ("total", "window", "first", "newest")
        )
