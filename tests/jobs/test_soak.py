"""The soak: a server that learns, under mixed traffic that never lets up, is after ten minutes what it was after two.

Clients talk to it over sockets, in three domains by turns. They stream, leave early and send nonsense, while an
administrator rolls back, pins, saves, loads, forgets and scrapes. What they saw must agree with the counts there.
DVI_SOAK_SECONDS sets how long the long one lasts.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import random
import shutil
import statistics
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dvi.decode.construction import build_speculator
from dvi.decode.speculator import PLAIN
from dvi.records import SamplingParams
from dvi.serving.access import load_access
from dvi.serving.server import build_loop
from tests.support.serving_doubles import CHAT_TEMPLATE, listening, stories_config
from trainers.jobs.serve import build_serving
from trainers.learning.versions import KEPT_VERSIONS, LISTED_VERSIONS

LONG_S = float(os.environ.get("DVI_SOAK_SECONDS", "600"))
NUM_TURNS = 6  # of domains: each comes twice
PATIENCE_S = 60.0
TENANTS = {"alice": True, "bob": True, "carol": False}  # with whether they are learnt from
CLIENTS = ("alice", "alice", "bob", "bob", "carol")
ADMIN = "admin"
KEYS = {name: f"key-of-{name}-0123456789" for name in (*TENANTS, ADMIN)}
NAMES = ("Tim", "Sue", "Anna", "Max", "Lily", "Ben", "Mia", "Tom")
THINGS = ("dog", "cat", "bird", "ball", "car", "tree", "box", "fish")
# Longer than a chunk of the prefix cache, so that requests of a tenant share it.
BEGINNING = "Tim and Sue are good friends. They like to play in the park with the dog. " * 4

# Path, body, status, and the code that the server counts it under.
INVALID: list[tuple[str, Any, int, str]] = [
    ("/v1/completions", {"prompt": "x", "max_tokens": 0}, 400, "invalid_request"),
    ("/v1/completions", {"prompt": "x", "temperature": "hot"}, 400, "invalid_request"),
    ("/v1/completions", {"prompt": "x", "n": 99}, 400, "invalid_request"),
    ("/v1/completions", {"prompt": "dog " * 600}, 400, "invalid_request"),
    ("/v1/completions", {"prompt": "x", "logit_bias": {"5": 2}}, 400, "unsupported"),
    ("/v1/completions", {"prompt": "x", "model": "another"}, 404, "model_not_found"),
    ("/v1/completions", {"prompt": "x" * 25_000}, 413, "too_large"),
    ("/v1/chat/completions", {"messages": []}, 400, "invalid_request"),
    ("/v1/chat/completions", {"messages": [{"role": "ghost", "content": "x"}]}, 400, "invalid_request"),
    ("/admin/rollback", {}, 403, "forbidden"),
]


def stories(rng: random.Random) -> str:
    return f"Once upon a time, there was a {rng.choice(THINGS)} named {rng.choice(NAMES)}."


def dialogue(rng: random.Random) -> str:
    return f'"Hello, {rng.choice(NAMES)}," said {rng.choice(NAMES)}. "Do you want the {rng.choice(THINGS)}?"'


def counting(rng: random.Random) -> str:
    start = rng.randint(1, 20)
    return " ".join(f"{number} {rng.choice(THINGS)}" for number in range(start, start + 6))


DOMAINS = (stories, dialogue, counting)


@dataclass
class Seen:
    """What clients know. num_started: answers surely begun, by tenant; num_perhaps: those left at once."""

    failures: list[str] = field(default_factory=list)
    num_started: Counter[str] = field(default_factory=Counter)
    num_perhaps: Counter[str] = field(default_factory=Counter)
    num_refused: Counter[str] = field(default_factory=Counter)
    num_tokens: Counter[str] = field(default_factory=Counter)
    to_check: list[tuple[str, dict[str, Any], str]] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        self.failures += other.failures
        self.to_check += other.to_check
        for name in ("num_started", "num_perhaps", "num_refused", "num_tokens"):
            getattr(self, name).update(getattr(other, name))


class Client:
    """One user of the server, on connections that last for a request."""

    def __init__(self, url: str, name: str, *, seed: int = 0, check_share: float = 0.0) -> None:
        self.address, self.name, self.seen = urllib.parse.urlsplit(url).netloc, name, Seen()
        self.rng, self._check_share = random.Random(seed), check_share

    def run(self, domain: Callable[[], Callable[[random.Random], str]], stopping: threading.Event) -> None:
        act: Callable[[Any], None] = self.leave_stream  # first, so that however short a soak has some of it
        while not stopping.is_set():
            try:
                act(domain())
            except Exception as error:
                self.seen.failures.append(f"{act.__name__}: {error!r}")
            acts = (self.ask, self.leave_stream, self.leave_early, self.err)
            act = self.rng.choices(acts, weights=(70, 10, 5, 15))[0]

    def send(
        self, path: str, body: Any = None, method: str = "POST", *, key: str | None = None
    ) -> http.client.HTTPConnection:
        """A connection that has sent a request."""
        connection = http.client.HTTPConnection(self.address, timeout=PATIENCE_S)
        headers = {"Authorization": f"Bearer {key or KEYS[self.name]}", "Content-Type": "application/json"}
        content = None if method == "GET" else json.dumps({} if body is None else body)
        connection.request(method, path, content, headers)
        return connection

    def call(self, path: str, body: Any = None, method: str = "POST", **options: Any) -> tuple[int, str]:
        """Status and text of a whole response."""
        with contextlib.closing(self.send(path, body, method, **options)) as connection:
            response = connection.getresponse()
            return response.status, response.read().decode()

    def ask(self, domain: Callable[[random.Random], str]) -> None:
        """A request that must succeed, and be consistent in itself."""
        rng, body = self.rng, self.body(domain)
        path = "/v1/completions"
        if rng.random() < 0.2:
            path, messages = "/v1/chat/completions", [{"role": "user", "content": body.pop("prompt")}]
            body["messages"] = messages
        status, text = self.call(path, body)
        assert status == 200, text
        answer = read_stream(text) if body["stream"] else json.loads(text)
        counts = answer["metrics"]["speculative_decoding"]
        assert sum(counts["accepted_per_depth"]) == counts["num_accepted_draft_tokens"] <= counts["num_draft_tokens"]
        self.seen.num_started[self.name] += body["n"]
        self.seen.num_tokens[self.name] += answer["usage"]["completion_tokens"]
        is_determined = "prompt" in body and body["n"] == 1 and ("seed" in body or body["temperature"] == 0)
        if is_determined and rng.random() < self._check_share:
            self.seen.to_check.append((body["prompt"], body, answer["choices"][0]["text"]))

    def body(self, domain: Callable[[random.Random], str]) -> dict[str, Any]:
        rng = self.rng
        temperature = rng.choice((0, 0, 0.8))
        body = {
            "prompt": rng.choice(("", BEGINNING)) + domain(rng), "max_tokens": rng.randint(1, 40),
            "temperature": temperature, "n": rng.choice((1, 1, 1, 2)), "stream": rng.random() < 0.5,
            "dvi": {
                "domain": domain.__name__, "policy": rng.choice(("fixed", "goodput")),
                "num_draft_tokens": rng.choice((0, 4, 4)),
            },
        }  # fmt: skip
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        return body | ({"seed": rng.randrange(1000), "top_p": 0.9} if temperature and rng.random() < 0.5 else {})

    def leave_stream(self, domain: Callable[[random.Random], str]) -> None:
        """A request whose client goes away after its first event."""
        body = self.body(domain) | {"stream": True, "max_tokens": 200, "ignore_eos": True, "n": 1}
        connection = self.send("/v1/completions", body)
        with contextlib.closing(connection), connection.getresponse() as response:
            assert response.status == 200 and response.readline()
        self.seen.num_started[self.name] += 1

    def leave_early(self, domain: Callable[[random.Random], str]) -> None:
        """A request whose client does not wait for the answer."""
        self.send("/v1/completions", self.body(domain) | {"stream": False, "stream_options": None, "n": 1}).close()
        self.seen.num_perhaps[self.name] += 1

    def err(self, _domain: object) -> None:
        """A request that must be refused as it deserves."""
        path, body, expected, code = self.rng.choice(INVALID)
        key = None
        if self.rng.random() < 0.1:
            key, expected, code = "not-a-key-of-anybody", 401, "unauthorised"
        status, text = self.call(path, body, key=key)
        assert (status, json.loads(text)["error"]["code"]) == (expected, code), text
        self.seen.num_refused[code] += 1


def read_stream(text: str) -> dict[str, Any]:
    """The pieces of one streamed answer of a single choice, or of the whole, put together."""
    *chunks, last = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert last == "[DONE]", text
    chunks = [json.loads(chunk) for chunk in chunks]
    pieces = [choice.get("text") or "" for chunk in chunks for choice in chunk["choices"]]
    return {"choices": [{"text": "".join(pieces)}], "usage": chunks[-1]["usage"], "metrics": chunks[-1]["metrics"]}


class Admin(Client):
    """Does one thing after the other to the running server, all of it while others are served."""

    def __init__(self, url: str, adapters: Path) -> None:
        super().__init__(url, ADMIN)
        self._adapters = adapters

    def run(self, stopping: threading.Event, *, pause_s: float) -> None:
        acts = (self.roll_back, self.look, self.pin, self.use_adapter, self.look, self.forget, self.checkpoint)
        while not stopping.is_set():
            for act in acts:
                try:
                    act()
                except Exception as error:
                    self.seen.failures.append(f"{act.__name__}: {error!r}")
                if stopping.wait(pause_s):
                    break

    def must(self, path: str, body: Any = None, method: str = "POST", *, allowed: tuple[int, ...] = (200,)) -> Any:
        status, text = self.call(path, body, method)
        assert status in allowed, f"{path}: {status} {text[:300]}"
        if status != 200:
            self.seen.num_refused[json.loads(text)["error"]["code"]] += 1
        return json.loads(text)

    def roll_back(self) -> None:
        self.must("/admin/rollback", allowed=(200, 409))  # 409: the live weights are the best already

    def pin(self) -> None:
        version = self.must("/admin/pin")["version"]
        for _ in range(3):
            self.must("/v1/completions", {"prompt": "The dog", "max_tokens": 8})
            self.seen.num_started[self.name] += 1
        assert self.must("/health", method="GET")["drafter_version"] == version, "a pinned server published"
        self.must("/admin/unpin")

    def use_adapter(self) -> None:
        self.must("/admin/save", {"name": "soaked"})
        self.must("/admin/adapters", {"name": "soaked"})
        self.must("/v1/completions", {"prompt": "The cat", "max_tokens": 8, "model": "stories260k:soaked"})
        self.seen.num_started[self.name] += 1
        self.must("/admin/adapters/soaked", method="DELETE")
        shutil.rmtree(self._adapters / "soaked")

    def forget(self) -> None:
        self.must("/admin/forget", {"key": "bob"})

    def checkpoint(self) -> None:
        self.must("/admin/checkpoint")

    def look(self) -> None:
        """The figures must be within their bounds whenever somebody looks."""
        assert self.must("/health", method="GET")["status"] == "ok"
        assert self.must("/dashboard/data", method="GET")["state"]["level"] != "bad"
        versions = self.must("/admin/versions", method="GET")["versions"]
        assert len(versions) <= LISTED_VERSIONS and sum(v["is_live"] for v in versions) == 1
        assert sum(v["is_kept"] for v in versions) <= KEPT_VERSIONS + 1  # and the best
        counts = self.counts()
        assert counts["dvi:learner_state_replay_positions"] <= counts["dvi:learner_state_replay_capacity"]

    def counts(self) -> Counter[Any]:
        """All samples of /metrics, by name, or by (name, label) where there is one."""
        found = Counter()
        for family in text_string_to_metric_families(self.call("/metrics", method="GET")[1]):
            for sample in family.samples:
                found[(sample.name, *sample.labels.values()) if sample.labels else sample.name] = sample.value
        return found


def poll(is_done: Callable[[], bool], *, what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_done():
        assert time.monotonic() < deadline_s, what
        time.sleep(0.05)


def soak(folder: Path, *, seconds: float, check_share: float) -> tuple[list[float], list[int], list[int]]:
    """Serves, learns and checks for so long; memory (bytes), threads and descriptors, a sample about every second."""
    keys = folder / "keys.yaml"
    entries = [{"name": name, "key": key, "train": TENANTS.get(name, True), "admin": name == ADMIN}
               for name, key in KEYS.items()]  # fmt: skip
    keys.write_text(yaml.safe_dump(entries))
    keys.chmod(0o600)
    adapters = folder / "adapters"
    config = stories_config(
        "train.enabled=true", "model.dtype=float64", "drafter.draft_vocab_size=128", "train.tokens_before_trim=2000",
        "train.budget=0.3", "train.rounds_per_step=2", "train.blocks_per_step=8", "train.blocks_per_slice=2",
        "train.steps_per_publish=4", "train.steps_per_canary=16", "train.replay_positions=2048", "serve.max_rows=4",
        "serve.max_positions=1024", "serve.prefix_cache_positions=1200", "serve.max_body_bytes=20000",
        f"output.folder={folder / 'state'}", "output.checkpoint_every_s=2", "output.save_replay=true",
        f"serve.keys_file={keys}", f"serve.adapters_folder={adapters}",
    )  # fmt: skip
    speculator, learner = build_serving(config)
    speculator.tokenizer.chat_template = CHAT_TEMPLATE
    loop = build_loop(config, speculator, learner)
    loop.start()
    process, stopping, seen = psutil.Process(), threading.Event(), Seen()
    samples: list[tuple[float, int, int]] = []
    try:
        with listening(loop, config, load_access(config.serve.keys_file)) as url:
            admin = Admin(url, adapters)
            clients = [Client(url, name, seed=i, check_share=check_share) for i, name in enumerate(CLIENTS)]
            admin.must("/dashboard/data", method="GET")
            admin.checkpoint()
            num_fds, start_s = process.num_fds(), time.monotonic()

            def domain() -> Callable[[random.Random], str]:
                return DOMAINS[int((time.monotonic() - start_s) / seconds * NUM_TURNS) % len(DOMAINS)]

            threads = [threading.Thread(target=client.run, args=(domain, stopping)) for client in clients]
            threads.append(threading.Thread(
                target=admin.run, args=(stopping,), kwargs={"pause_s": min(1.0, seconds / 60)}
            ))  # fmt: skip
            for thread in threads:
                thread.start()
            while time.monotonic() - start_s < seconds:
                samples.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
                time.sleep(min(1.0, seconds / 40))
            stopping.set()
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive(), "a request hangs"
            for client in (*clients, admin):
                seen.add(client.seen)
            assert not seen.failures, seen.failures[:5]

            poll(lambda: not admin.counts()["dvi:num_requests_running"], what="a request that was left goes on")
            poll(lambda: process.num_fds() <= num_fds, what="descriptors leak")
            admin.look()
            check_counts(admin.counts(), seen)
            steps = "dvi:learner_steps_total", "dvi:learner_state_steps"
            poll(lambda: len({admin.counts()[name] for name in steps}) == 1, what="steps that only one of two counted")
            assert learner.trainer.num_steps > 0 and loop.learner_error is None
            for name, is_learnt_from in TENANTS.items():
                if not is_learnt_from:
                    assert loop.call(lambda name=name: learner.forget(name)).result(PATIENCE_S) == 0
    finally:
        stopping.set()
        loop.stop(drain_s=0.0)
        learner.close()
    check_answers(seen, build_speculator(config))
    memory, num_threads, num_fds = zip(*samples, strict=True)
    return list(memory), list(num_threads), list(num_fds)


def check_counts(counts: Counter[Any], seen: Seen) -> None:
    """The server's own figures agree with each other, and with what its clients saw."""

    def total(name: str) -> float:
        return sum(value for key, value in counts.items() if key == name or (isinstance(key, tuple) and key[0] == name))

    for name in (*TENANTS, ADMIN):
        surely, counted = seen.num_started[name], counts["dvi:tenant_requests_total", name]
        assert surely <= counted <= surely + seen.num_perhaps[name], name
        assert counts["dvi:tenant_generation_tokens_total", name] >= seen.num_tokens[name]
    assert total("dvi:request_success_total") == total("dvi:tenant_requests_total")
    ends = {key[1] for key in counts if key[0] == "dvi:request_success_total"}
    assert {"cancelled"} <= ends <= {"stop", "length", "cancelled"}, ends
    for kind, everything in (
        ("rounds", "spec_decode_num_drafts"), ("draft_tokens", "spec_decode_num_draft_tokens"),
        ("accepted_tokens", "spec_decode_num_accepted_tokens"), ("generation_tokens", "generation_tokens"),
    ):  # fmt: skip
        assert total(f"dvi:tenant_{kind}_total") == counts[f"dvi:{everything}_total"], kind
    accepted = "dvi:spec_decode_num_accepted_tokens"
    assert total(f"{accepted}_per_pos_total") == counts[f"{accepted}_total"] > 0
    refused = {key[1]: n for key, n in counts.items() if key[0] == "dvi:requests_rejected_total"}
    assert refused.pop("cancelled", 0) <= sum(seen.num_perhaps.values())  # answers to clients that had left already
    assert refused == seen.num_refused
    assert counts["dvi:kv_cache_positions"] == counts["dvi:num_requests_waiting"] == 0


def check_answers(seen: Seen, speculator: Any) -> None:
    """The texts that were set aside are those of plain decoding, one request at a time and never trained."""
    assert len(seen.to_check) >= 3, "so few checks say nothing"
    for prompt, body, text in seen.to_check:
        chosen = {name: body[name] for name in ("seed", "top_p", "temperature") if name in body}
        params = SamplingParams(
            max_new_tokens=body["max_tokens"], coupling="gumbel" if "seed" in body else "rejection", **chosen
        )
        (plain,) = speculator.generate(prompt, params, policy=PLAIN, keep_transitions=False)
        assert plain.text == text, body


def part(samples: list, start: float, stop: float) -> list:
    return samples[int(start * len(samples)) : int(stop * len(samples))]


def check_flat(samples: list[int], *, slack: int, what: str) -> None:
    """slack: connections come and go, so a median may move by a few."""
    early, late = statistics.median(part(samples, 0.25, 0.5)), statistics.median(part(samples, 0.75, 1))
    assert late <= early + slack, f"{what}: {early} became {late}"


def test_a_short_soak_leaks_nothing_and_changes_no_answer(tmp_path: Path, caplog) -> None:
    """Catches slots, descriptors or counts lost to a disconnect, a swap or a refusal, and any wrong token."""
    _, num_threads, num_fds = soak(tmp_path, seconds=20, check_share=0.5)
    check_flat(num_threads, slack=3, what="threads")
    check_flat(num_fds, slack=6, what="descriptors")
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.slow
def test_ten_minutes_of_everything_leave_memory_threads_and_descriptors_as_they_were(tmp_path: Path, caplog) -> None:
    """Catches what grows with every request, swap, disconnect or checkpoint, too little for the short one to see."""
    memory, num_threads, num_fds = soak(tmp_path, seconds=LONG_S, check_share=0.05)
    check_flat(num_threads, slack=3, what="threads")
    check_flat(num_fds, slack=6, what="descriptors")
    early, late = statistics.median(part(memory, 0.25, 0.5)), statistics.median(part(memory, 0.75, 1))
    assert late <= 1.05 * early, f"memory: {early / 2**20:.1f} MiB became {late / 2**20:.1f} MiB"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
