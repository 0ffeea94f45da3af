"""A load run over HTTP: throughput and latencies by concurrency, speculation on and off, training on and off; overload.

Two servers run side by side on the same weights and the same drafter, one frozen and one learning; requests choose
drafts or none. Every concurrency is measured in turns, A B C D D C B A, by fixed work: so many requests of so many
tokens, each stream starting its next one when one ends; one turn of every arm goes before, uncounted. No prompt comes
twice to the learning server: it would have learnt the answer. While it is not measured it is pinned, so that it does
not learn on the others' time. Prints tables and one JSON line last.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dvi.traffic import as_text, read_prompts

CONSOLE = Console(stderr=True)
START_PATIENCE_S = 300.0
ARMS = ("plain", "plain, learning", "speculative", "speculative, learning")
LOADAVG_BOUND = 1.5  # other work beyond this makes two-core figures meaningless: said beside them, not hidden


@dataclass
class Answer:
    """One request as its client saw it. gaps_s: between pieces of text, the first piece excluded."""

    status: int
    seconds: float = 0.0
    first_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    speculation: dict = field(default_factory=dict)


@dataclass
class Segment:
    """One arm's share of one concurrency."""

    seconds: float
    answers: list[Answer]

    @property
    def tokens_per_s(self) -> float:
        return sum(answer.num_tokens for answer in self.answers) / self.seconds


class Server:
    """A `dvi serve` process on a free port of this machine."""

    def __init__(self, config: str, folder: str, overrides: list[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [
            sys.executable, "-m", "dvi", "serve", config, f"serve.port={self.port}", f"output.folder={folder}",
            *overrides,
        ]  # fmt: skip
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline_s = time.monotonic() + START_PATIENCE_S
        while True:
            try:
                self.ask("/health")
                return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > deadline_s:
                    raise RuntimeError(f"the server did not start: {' '.join(command)}") from None
                time.sleep(0.2)

    def ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(60)


async def ask(port: int, body: dict) -> Answer:
    """One streamed chat completion over a connection of its own."""
    payload, start_s = json.dumps(body).encode(), time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(payload) + payload
    )
    try:
        answer = Answer(status=int((await reader.readline()).split()[1]))
        last_s = 0.0
        async for line in reader:
            if not line.startswith(b"data: {"):
                continue
            now_s, event = time.perf_counter(), json.loads(line[6:])
            if event.get("error"):
                answer.status = 599
            if event.get("usage"):
                answer.num_tokens = event["usage"]["completion_tokens"]
            if event.get("metrics"):
                answer.speculation = event["metrics"]["speculative_decoding"]
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                if last_s:
                    answer.gaps_s.append(now_s - last_s)
                else:
                    answer.first_s = now_s - start_s
                last_s = now_s
    finally:
        writer.close()
    answer.seconds = time.perf_counter() - start_s
    return answer


class Traffic:
    """Requests from real prompts, the same order for every arm that starts at the same place."""

    def __init__(self, paths: list[Path], *, model: str, max_tokens: int, longest_chars: int) -> None:
        prompts = [as_text(messages)[:longest_chars] for messages in read_prompts(paths)]
        random.Random(0).shuffle(prompts)
        self._prompts, self._model, self._max_tokens = prompts, model, max_tokens

    def place(self, start: int, arm: str) -> int:
        """Where an arm's turn begins: the same for all, except that the learning server meets nothing twice."""
        return start + (len(self._prompts) // 2 if arm == ARMS[1] else 0)

    def bodies(self, start: int, *, drafts: bool) -> Iterator[dict]:
        for index in itertools.count(start):
            body = {
                "model": self._model, "stream": True, "stream_options": {"include_usage": True},
                "messages": [{"role": "user", "content": self._prompts[index % len(self._prompts)]}],
                "max_tokens": self._max_tokens, "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            yield body if drafts else body | {"dvi": {"num_draft_tokens": 0}}


async def closed_loop(port: int, bodies: Iterator[dict], *, streams: int, num_requests: int) -> Segment:
    """`streams` clients that each ask again as soon as they have their answer, num_requests in all."""
    left = itertools.islice(bodies, num_requests)
    answers: list[Answer] = []

    async def client() -> None:
        for body in left:
            answers.append(await ask(port, body))

    start_s = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(streams)))
    return Segment(time.perf_counter() - start_s, answers)


async def open_loop(port: int, bodies: Iterator[dict], *, requests_per_s: float, seconds: float) -> Segment:
    """Requests at a fixed rate, whatever becomes of those before."""
    start_s, tasks = time.perf_counter(), []
    for index in range(int(requests_per_s * seconds)):
        await asyncio.sleep(max(start_s + index / requests_per_s - time.perf_counter(), 0))
        tasks.append(asyncio.create_task(ask(port, next(bodies))))
    answers = await asyncio.gather(*tasks)
    return Segment(time.perf_counter() - start_s, answers)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def figures(segments: list[Segment]) -> dict[str, float]:
    everybody = [answer for segment in segments for answer in segment.answers]
    answers = [answer for answer in everybody if answer.status == 200]
    first_s, gaps_s = [a.first_s for a in answers], [gap for a in answers for gap in a.gaps_s]
    return {
        "tokens_per_s": statistics.median(segment.tokens_per_s for segment in segments),
        "first_token_p50_ms": 1e3 * percentile(first_s, 0.5), "first_token_p99_ms": 1e3 * percentile(first_s, 0.99),
        "gap_p50_ms": 1e3 * percentile(gaps_s, 0.5), "gap_p99_ms": 1e3 * percentile(gaps_s, 0.99),
        "mean_accepted_tokens": statistics.mean(a.speculation["mean_acceptance_length"] for a in answers),
        "num_failed": len(everybody) - len(answers),
    }  # fmt: skip


@contextmanager
def only(server: Server, learning: Server) -> Iterator[None]:
    """The learning server learns only while it is the one that is measured."""
    if server is learning:
        learning.ask("/admin/unpin", {})
    try:
        yield
    finally:
        if server is learning:
            learning.ask("/admin/pin", {})


def measure(arguments: argparse.Namespace, frozen: Server, learning: Server, traffic: Traffic) -> dict[int, dict]:
    arms = {
        ARMS[0]: (frozen, False), ARMS[1]: (learning, False), ARMS[2]: (frozen, True), ARMS[3]: (learning, True)
    }  # fmt: skip
    results: dict[int, dict] = {}
    start = 0
    learning.ask("/admin/pin", {})
    for streams in arguments.streams:
        segments: dict[str, list[Segment]] = {arm: [] for arm in ARMS}
        num_requests = max(streams * arguments.rounds, 6)
        for arm, (server, drafts) in arms.items():  # not counted: the length rule first learns what this size costs
            with only(server, learning):
                bodies = traffic.bodies(traffic.place(start, arm), drafts=drafts)
                asyncio.run(closed_loop(server.port, bodies, streams=streams, num_requests=num_requests))
        order = [arm for repeat in range(arguments.repeats) for arm in (ARMS if repeat % 2 == 0 else ARMS[::-1])]
        for turn, arm in enumerate(track(order, f"{streams} streams", console=CONSOLE)):
            server, drafts = arms[arm]
            if turn % len(ARMS) == 0:
                start += num_requests
            with only(server, learning):
                bodies = traffic.bodies(traffic.place(start, arm), drafts=drafts)
                segments[arm].append(asyncio.run(closed_loop(
                    server.port, bodies, streams=streams, num_requests=num_requests
                )))  # fmt: skip
        start += num_requests
        results[streams] = {arm: figures(segments[arm]) for arm in ARMS}
        # Ratios within a turn, so that a machine that drifts moves both sides.
        for name, arm, base in (
            ("speculation", ARMS[2], ARMS[0]), ("speculation while learning", ARMS[3], ARMS[0]),
            ("training", ARMS[3], ARMS[2]),
        ):  # fmt: skip
            pairs = zip(segments[arm], segments[base], strict=True)
            results[streams][f"ratio: {name}"] = statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
    return results


def overload(arguments: argparse.Namespace, frozen: Server, traffic: Traffic) -> dict[str, float]:
    """Ten times what the server can do, against what it does when just full."""
    rows = arguments.full_streams
    full = asyncio.run(closed_loop(
        frozen.port, traffic.bodies(0, drafts=True), streams=rows, num_requests=3 * rows
    ))  # fmt: skip
    capacity = len(full.answers) / full.seconds
    flood = asyncio.run(open_loop(
        frozen.port, traffic.bodies(1000, drafts=True), requests_per_s=10 * capacity,
        seconds=arguments.overload_seconds,
    ))  # fmt: skip
    accepted = [a for a in flood.answers if a.status == 200]
    refused = [a.seconds for a in flood.answers if a.status == 429]
    full_p99_s, accepted_p99_s = percentile([a.seconds for a in full.answers], 0.99), percentile(
        [a.seconds for a in accepted], 0.99
    )
    return {
        "capacity_requests_per_s": capacity, "offered_requests_per_s": 10 * capacity, "num_accepted": len(accepted),
        "num_refused": len(refused), "num_other": len(flood.answers) - len(accepted) - len(refused),
        "full_p99_s": full_p99_s, "accepted_p99_s": accepted_p99_s,
        "accepted_over_full_p99": accepted_p99_s / full_p99_s,
        "refused_p50_ms": 1e3 * percentile(refused, 0.5), "refused_p99_ms": 1e3 * percentile(refused, 0.99),
        "accepted_tokens_per_s": sum(a.num_tokens for a in accepted) / flood.seconds,
        "full_tokens_per_s": full.tokens_per_s,
    }  # fmt: skip


def print_tables(results: dict[int, dict], flood: dict[str, float] | None) -> None:
    table = Table(title="load over HTTP")
    for heading in ("streams", "arm", "tokens/s", "first token p50/p99 ms", "gap p50/p99 ms", "MAT", "failed"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for streams, result in results.items():
        for arm in ARMS:
            f = result[arm]
            table.add_row(
                str(streams), arm, f"{f['tokens_per_s']:.0f}",
                f"{f['first_token_p50_ms']:.0f} / {f['first_token_p99_ms']:.0f}",
                f"{f['gap_p50_ms']:.1f} / {f['gap_p99_ms']:.1f}", f"{f['mean_accepted_tokens']:.2f}",
                str(f["num_failed"]),
            )  # fmt: skip
    CONSOLE.print(table)
    ratios = Table(title="ratios of tokens/s, medians of turns")
    for heading in ("streams", "speculative / plain", "speculative, learning / plain", "learning / frozen"):
        ratios.add_column(heading, justify="right")
    for streams, result in results.items():
        ratios.add_row(str(streams), *(f"{v:.2f}" for key, v in result.items() if key.startswith("ratio")))
    CONSOLE.print(ratios)
    if flood is not None:
        lines = Table(title="ten times overload")
        for heading in ("", "value"):
            lines.add_column(heading)
        for name, value in flood.items():
            lines.add_row(name, f"{value:.3g}")
        CONSOLE.print(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/online/serve.yaml")
    parser.add_argument("--adapter", help="a saved drafter to start from; default untrained")
    parser.add_argument("--data", type=Path, help="a JSONL file or a folder of them; default the demo's prompts")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--repeats", type=int, default=4, help="turns of every arm")
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream in a turn")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--longest-chars", type=int, default=1200, help="prompts are cut to so many characters")
    parser.add_argument("--full-streams", type=int, default=16, help="streams that just fill the server")
    parser.add_argument("--overload-seconds", type=float, default=60.0, help="0 leaves the overload out")
    parser.add_argument("overrides", nargs="*", help="settings of both servers, such as model.num_threads=1")
    arguments = parser.parse_args()
    paths = [Path("configs/demo/prompts.jsonl")] if arguments.data is None else (
        sorted(arguments.data.glob("*.jsonl")) if arguments.data.is_dir() else [arguments.data]
    )
    overrides = [f"drafter.adapter={json.dumps(arguments.adapter)}", *arguments.overrides]
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = []
        for name, enabled in (("frozen", "false"), ("learning", "true")):
            server = Server(arguments.config, f"{folder}/{name}", [*overrides, f"train.enabled={enabled}"])
            stack.callback(server.close)
            servers.append(server)
        traffic = Traffic(
            paths, model=servers[0].ask("/v1/models")["data"][0]["id"], max_tokens=arguments.max_tokens,
            longest_chars=arguments.longest_chars,
        )  # fmt: skip
        results = measure(arguments, *servers, traffic)
        flood = overload(arguments, servers[0], traffic) if arguments.overload_seconds else None
    print_tables(results, flood)
    if load > LOADAVG_BOUND:
        CONSOLE.print(f"the machine was busy before the run (load {load:.1f}): do not quote these figures")
    print(json.dumps({
        "benchmark": "serving", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_before": load, "settings": vars(arguments) | {"data": str(arguments.data)}, "results": results,
        "overload": flood,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
