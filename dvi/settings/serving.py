"""Where a server and a front door listen, who may use them, and how much of them."""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

from dvi.settings.choices import Count, NonNegative, Port, Positive, PositiveCount, Share


@dataclass(frozen=True)
class ServeSettings:
    """The server: where it listens, who may use it, and how much of it.

    host                      any other than a loopback address needs an API key.
    port                      0 takes a free one.
    model_name                what clients call the model; null is the last part of model.path, which they may also give
                              in full.
    keys_file                 a YAML list of {name, key or key_sha256, train, admin, adapters}, see
                              `dvi.serving.access`; null takes DVI_API_KEY and DVI_ADMIN_KEY from the environment.
                              Without any key only a loopback host is served.
    adapters_folder           saved drafters that admin routes load and save, by name.
    max_rows                  requests that decode together.
    max_positions             cached positions of all running requests together.
    max_waiting               requests that may wait while all rows are taken; more are told to come back later. Half of
                              max_rows: nobody then takes more than about half as long again as in a full server.
    prefill_tokens_per_step   prompt tokens read between two rounds, so that a long prompt holds nobody up.
    rounds_per_prefill        prompts are read before every so many-th round, as long as anybody decodes.
    max_token_latency_ms      per token after the first, for 99 requests of 100; null asks nothing.
    max_first_token_ms        from the end of the wait in the queue to the first token, likewise. With either of the two
                              the server measures this machine at its start, and then chooses how it runs by its own
                              traffic: max_rows, prefill_tokens_per_step and draft.num_draft_tokens are then the most
                              that it may choose. See docs/planning.md.
    prefix_cache_positions    cached positions kept of prompts and answers gone by, 0 keeps none.
    max_connections           at once; beyond them only /health is answered, and those that say nothing make way.
    max_prompt_tokens         null: as many as the model's context holds.
    max_new_tokens            the most a request may ask for; null: as the context allows.
    max_prompts               prompts in one request.
    max_n                     answers to each.
    max_stop                  stop strings, and stop token ids, of one request.
    max_stop_chars            length of a stop string.
    max_logprobs              likeliest tokens beside the chosen one.
    queue_timeout_s           since arrival: still in the queue,
    first_token_timeout_s     without a first token,
    total_timeout_s           or not ended.
    drain_s                   after SIGTERM, running requests may take so long to end.
    learn_sample_rate         share of the requests that the learner sees.
    trust_remote_code         run Python code that comes with the model.
    """

    host: str = "127.0.0.1"
    port: Port = 8000
    model_name: Annotated[str, MinLen(1)] | None = None
    keys_file: str | None = None
    adapters_folder: str = "runs/serve/adapters"
    max_rows: PositiveCount = 16
    max_positions: PositiveCount = 32768
    max_waiting: PositiveCount = 8
    prefill_tokens_per_step: PositiveCount = 256
    rounds_per_prefill: PositiveCount = 1
    max_token_latency_ms: Positive | None = None
    max_first_token_ms: Positive | None = None
    prefix_cache_positions: Count = 16384
    max_connections: PositiveCount = 1024
    max_body_bytes: PositiveCount = 2_000_000
    max_prompt_tokens: PositiveCount | None = None
    max_new_tokens: PositiveCount | None = None
    max_prompts: PositiveCount = 64
    max_n: PositiveCount = 8
    max_stop: Count = 16
    max_stop_chars: PositiveCount = 256
    max_logprobs: Count = 20
    queue_timeout_s: Positive = 60.0
    first_token_timeout_s: Positive = 120.0
    total_timeout_s: Positive = 600.0
    drain_s: NonNegative = 30.0
    learn_sample_rate: Share = 1.0
    trust_remote_code: bool = False

    @property
    def has_bound(self) -> bool:
        """Whether a plan, and not these numbers, says how the server runs."""
        return self.max_token_latency_ms is not None or self.max_first_token_ms is not None


@dataclass(frozen=True)
class ServeOutputSettings:
    """What a server leaves behind.

    folder       for all of it; a server started on the same folder goes on where the last one stopped.
    save_replay  also store the experience, which is users' text; without it a restarted learner gathers afresh.
    """

    folder: str = "runs/serve"
    checkpoint_every_s: Positive = 60.0
    save_replay: bool = False


@dataclass(frozen=True)
class RouteSettings:
    """The front door: one address for several servers, its replicas.

    replicas           their URLs, such as http://127.0.0.1:8001.
    port               0 takes a free one.
    keys_file          API keys, as for `dvi serve`, and best the replicas' own file: a request's key is checked here
                       and there.
    learn_together     the replicas learn one drafter, as ranks of one job: what is asked of the drafter is asked of the
                       first, for all.
    health_every_s     pause between two looks at a replica, and how long it may take to answer one.
    connect_timeout_s  for a connection to a replica, after which it counts as down.
    answer_timeout_s   silence of a replica after which a request fails; longer than its serve.total_timeout_s.
    drain_s            after SIGTERM, running requests may take so long to end.
    """

    replicas: tuple[str, ...]
    host: str = "127.0.0.1"
    port: Port = 8000
    keys_file: str | None = None
    learn_together: bool = False
    max_connections: PositiveCount = 1024
    max_body_bytes: PositiveCount = 2_000_000
    health_every_s: Positive = 2.0
    connect_timeout_s: Positive = 2.0
    answer_timeout_s: Positive = 660.0
    drain_s: NonNegative = 30.0

    def __post_init__(self) -> None:
        if not self.replicas or len(set(self.replicas)) < len(self.replicas):
            raise ValueError(
                f"replicas must be one URL or more, all different, got {list(self.replicas)}; "
                "try http://127.0.0.1:8001"
            )
        for url in self.replicas:
            parts = urllib.parse.urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
                raise ValueError(f"a replica must be a URL without user or query, got {url!r}; try http://127.0.0.1:8001")
