"""Two ranks against one process, as ratios in one run: throughput, acceptance, and what keeping together costs.

Every process has one thread, pinned to a core of its own, and runs `dvi train` on the same settings. Three figures:

throughput   tokens/s of each of two ranks, over those of a process by itself on the same core and prompts, once while
             the other core idles and once while another process, that knows nothing of it, runs there: two processes
             share the memory, whether they learn together or not. In turns A B C C B A, medians; the first requests of
             a run are not counted. Drafts are of a fixed length, so that no arm draws another table of costs.
acceptance   on held-out rows with the drafter frozen, after N requests learnt from by one process, and by two ranks
             with N/2 each, from an untrained drafter; train.budget=1, so that steps follow the requests and no clock.
synchrony    of two ranks: seconds in collectives over those of serving, waits left out; processor time of a process,
             all its threads counted, for each token, over that of one by itself; bytes that a rank sends an update.

Prints tables and one JSON line last. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dvi.config import load_config
from dvi.settings import TrainConfig
from dvi.traffic import Messages, read_prompts

CONSOLE = Console(stderr=True)
# One server has all that is slow to import; every process is a fork of it.
CONTEXT = multiprocessing.get_context("forkserver")
ALONE, BESIDE, RANKS = ARMS = ("one process, other core idle", "one process beside another", "two ranks")
ADAPTER = "checkpoints/reference-11m-drafter"
STREAMS = Path("dvi/bench/data/streams")
LOADAVG_BOUND = 0.5  # other work beyond this takes time from the arms: said beside the figures, not hidden
LONGEST_RUN_S = 900.0
GRACE_S = 5.0  # for a process that has said all to end by itself


@dataclass(frozen=True)
class Replica:
    """One process's run. Seconds and tokens are those of serving, from the end of its uncounted requests on.

    cpu_s             processor time, of all threads.
    serving_s         of the whole run, as sync_s, sync_bytes and num_steps are; those are 0 for a single process.
    """

    num_tokens: int
    wall_s: float
    cpu_s: float
    serving_s: float
    num_steps: int
    sync_s: float = 0.0
    sync_bytes: int = 0
    acceptance: float | None = None
    mean_accepted_tokens: float | None = None

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.wall_s


# Processes


def run_replica(config: TrainConfig, num_uncounted: int) -> Replica:
    """Runs the job in this process; of its summary and its clocks what is measured here."""
    from trainers.jobs import train
    from trainers.jobs.progress import RunDisplay

    marks: list[tuple[int, float, float]] = []  # tokens, wall and processor seconds as each request ends

    class Clocks(RunDisplay):
        """Hears of every request that ends."""

        def finish_request(self, stats, *args, **options) -> None:
            super().finish_request(stats, *args, **options)
            usage = resource.getrusage(resource.RUSAGE_SELF)
            marks.append((stats.new_tokens, time.perf_counter(), usage.ru_utime + usage.ru_stime))

    train.RunDisplay = Clocks  # this process runs nothing else
    summary = train.run_training(config, console=Console(quiet=True))
    first, last = marks[num_uncounted - 1], marks[-1]
    own = summary["ranks"][int(os.environ["RANK"])] if "ranks" in summary else summary
    after = summary.get("after") or {}
    return Replica(
        num_tokens=sum(tokens for tokens, _, _ in marks[num_uncounted:]), wall_s=last[1] - first[1],
        cpu_s=last[2] - first[2], serving_s=own["serving_s"], num_steps=summary["steps"],
        sync_s=own.get("sync_s", 0.0), sync_bytes=own.get("sync_bytes", 0), acceptance=after.get("acceptance"),
        mean_accepted_tokens=after.get("mean_accepted_tokens"),
    )  # fmt: skip


def _work(pipe: Connection, core: int, environment: dict[str, str], config: TrainConfig, num_uncounted: int) -> None:
    # Before torch starts threads, which inherit it.
    os.sched_setaffinity(0, {core})
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    pipe.send(run_replica(config, num_uncounted))


def run_together(configs: Iterable[TrainConfig], cores: list[int], *, are_ranks: bool, num_uncounted: int) -> list:
    """The replicas' figures, all started at once, each on its core: ranks of one job, or jobs of their own.

    Raises RuntimeError when one dies or takes longer than LONGEST_RUN_S; none outlives this call.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes, processes = [], []
    for rank, (config, core) in enumerate(zip(configs, cores, strict=True)):
        environment = {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "1"}
        if are_ranks:
            environment |= {
                "WORLD_SIZE": str(len(cores)), "RANK": str(rank), "LOCAL_RANK": str(rank),
                "LOCAL_WORLD_SIZE": str(len(cores)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        mine, theirs = CONTEXT.Pipe(duplex=False)
        processes.append(CONTEXT.Process(target=_work, args=(theirs, core, environment, config, num_uncounted)))
        processes[-1].start()
        theirs.close()
        pipes.append(mine)
    deadline_s = time.monotonic() + LONGEST_RUN_S
    try:
        return [_receive(pipe, deadline_s) for pipe in pipes]
    finally:
        for process in processes:
            process.join(GRACE_S)
            process.kill()
            process.join()


def _receive(pipe: Connection, deadline_s: float) -> Replica:
    if not wait([pipe], max(deadline_s - time.monotonic(), 0)):
        raise RuntimeError(f"a process did not end within {LONGEST_RUN_S:g} s")
    try:
        return pipe.recv()
    except EOFError:
        raise RuntimeError("a process died; its error is above") from None


# Figures


class Bench:
    """All runs, each with its settings, its prompts and a folder of its own."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self._arguments, self._folder, self._num_runs = arguments, folder, 0
        self._paths = sorted(arguments.data.glob("*.jsonl")) if arguments.data.is_dir() else [arguments.data]

    def _config(self, name: str, *overrides: str) -> TrainConfig:
        """Settings of a run in a folder of its own."""
        self._num_runs += 1
        arguments = self._arguments
        return load_config(arguments.config, [
            "data.batch_size=1", "draft.policy=fixed", "eval.limit=0", "output.tensorboard=false",
            f"sampling.max_new_tokens={arguments.max_tokens}", f"eval.max_new_tokens={arguments.max_tokens}",
            "output.checkpoint_every_s=1e9", f"output.folder={self._folder}/{name}-{self._num_runs}", *overrides,
            *arguments.overrides,
        ], schema=TrainConfig)  # fmt: skip

    def _write(self, name: str, prompts: list[Messages]) -> str:
        path = self._folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in prompts), encoding="utf-8")
        return f"data.prompts={path}"

    def turns(self) -> list[dict[str, list[Replica]]]:
        """Per turn the replicas of each arm, by core."""
        arguments = self._arguments
        cores, num_each = arguments.cores, arguments.requests + arguments.uncounted
        limit = num_each * len(cores)
        prompts = read_prompts(self._paths, split="traffic", limit=limit, shuffle_seed=0)
        if len(prompts) < limit:
            raise ValueError(f"--requests needs {limit} rows in {arguments.data}, got {len(prompts)}; try fewer")
        # Two ranks take every other row: so each core meets the same prompts in all arms.
        shares = [self._write(f"core-{core}", prompts[rank :: len(cores)]) for rank, core in enumerate(cores)]
        common = ["data.shuffle_seed=null", f"drafter.adapter={json.dumps(arguments.adapter)}"]
        together, options = self._write("all", prompts), {"num_uncounted": arguments.uncounted}

        def run(arm: str) -> list[Replica]:
            if arm == RANKS:
                config = self._config("ranks", together, *common)
                return run_together([config] * len(cores), cores, are_ranks=True, **options)
            configs = [self._config("single", share, *common) for share in shares]
            if arm == BESIDE:
                return run_together(configs, cores, are_ranks=False, **options)
            return [
                run_together([config], [core], are_ranks=False, **options)[0]
                for config, core in zip(configs, cores, strict=True)
            ]

        found: list[dict[str, list[Replica]]] = []
        for turn in track(range(arguments.repeats), "throughput", console=CONSOLE):
            order = ARMS if turn % 2 == 0 else ARMS[::-1]
            found.append({arm: run(arm) for arm in order})
        return found

    def lessons(self) -> list[tuple[Replica, Replica]]:
        """Per seed, rank 0 of two and the single process, measured after the same requests."""
        cores = self._arguments.cores
        two = [
            run_together([self._lesson(seed)] * len(cores), cores, are_ranks=True, num_uncounted=1)[0]
            for seed in track(range(self._arguments.seeds), "acceptance, two ranks", console=CONSOLE)
        ]
        one: list[Replica] = []
        # A lesson takes no times, so single processes may run side by side.
        for first in track(range(0, len(two), len(cores)), "acceptance, one process", console=CONSOLE):
            configs = [self._lesson(seed) for seed in range(first, min(first + len(cores), len(two)))]
            one += run_together(configs, cores[: len(configs)], are_ranks=False, num_uncounted=1)
        return list(zip(two, one, strict=True))

    def _lesson(self, seed: int) -> TrainConfig:
        arguments = self._arguments
        return self._config(
            "lesson", f"data.prompts={json.dumps([str(path) for path in self._paths])}", f"data.shuffle_seed={seed}",
            f"data.limit={arguments.learn_requests}", f"train.seed={seed}", "train.budget=1", "drafter.adapter=null",
            f"eval.limit={arguments.held_out}",
        )  # fmt: skip


def throughput_ratios(turns: list[dict[str, list[Replica]]], base: str) -> dict[str, float]:
    """Medians over turns and cores of two ranks' tokens/s, and processor time a token, over those of the base's arm."""
    pairs = [pair for turn in turns for pair in zip(turn[RANKS], turn[base], strict=True)]
    return {
        "tokens_per_s": statistics.median(rank.tokens_per_s / one.tokens_per_s for rank, one in pairs),
        "cpu_per_token": statistics.median(
            (rank.cpu_s / rank.num_tokens) / (one.cpu_s / one.num_tokens) for rank, one in pairs
        ),
    }


def acceptance_ratios(pairs: list[tuple[Replica, Replica]]) -> dict[str, float]:
    """Means over seeds of two ranks' acceptance over one process's, and the lowest of a seed."""
    ratios = {
        name: [getattr(two, name) / getattr(one, name) for two, one in pairs]
        for name in ("mean_accepted_tokens", "acceptance")
    }
    return {name: statistics.mean(values) for name, values in ratios.items()} | {
        f"lowest_{name}": min(values) for name, values in ratios.items()
    }


def synchrony(turns: list[dict[str, list[Replica]]]) -> dict[str, float]:
    """Of two ranks: the share of serving's time that goes into collectives, and bytes a rank sends an update."""
    ranks = [replica for turn in turns for replica in turn[RANKS]]
    return {
        "sync_share": statistics.median(rank.sync_s / rank.serving_s for rank in ranks),
        "bytes_per_update": statistics.median(rank.sync_bytes / max(rank.num_steps, 1) for rank in ranks),
    }


def print_tables(turns: list[dict], results: dict, pairs: list) -> None:
    table = Table(title="throughput of each replica, medians")
    for heading in ("arm", "tokens/s", "processor ms a token", "two ranks over it", "processor time over it"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for arm in ARMS:
        replicas = [replica for turn in turns for replica in turn[arm]]
        ratios = results["throughput"].get(arm)
        table.add_row(
            arm, f"{statistics.median(r.tokens_per_s for r in replicas):.0f}",
            f"{1e3 * statistics.median(r.cpu_s / r.num_tokens for r in replicas):.2f}",
            *([f"{ratios['tokens_per_s']:.3f}", f"{ratios['cpu_per_token']:.3f}"] if ratios else ["", ""]),
        )  # fmt: skip
    CONSOLE.print(table)
    sync = results["synchrony"]
    CONSOLE.print(
        f"synchronisation: {100 * sync['sync_share']:.2f} % of serving's time, "
        f"{sync['bytes_per_update'] / 1e6:.3f} MB a rank and update"
    )
    table = Table(title="acceptance on held-out requests after as many requests in all")
    for heading in ("seed", "MAT, two ranks", "MAT, one process", "acceptance, two ranks", "acceptance, one process"):
        table.add_column(heading, justify="right")
    for seed, (two, one) in enumerate(pairs):
        table.add_row(
            str(seed), f"{two.mean_accepted_tokens:.3f}", f"{one.mean_accepted_tokens:.3f}", f"{two.acceptance:.3f}",
            f"{one.acceptance:.3f}",
        )  # fmt: skip
    CONSOLE.print(table)
    ratios = results["acceptance"]
    CONSOLE.print(
        f"two ranks over one process, mean of seeds: mean accepted tokens {ratios['mean_accepted_tokens']:.3f}, "
        f"acceptance {ratios['acceptance']:.3f}"
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/online/reference.yaml")
    parser.add_argument("--cores", type=int, nargs=2, help="one for each process; default the first two")
    parser.add_argument("--adapter", default=ADAPTER, help="drafter that throughput starts from; none: untrained")
    parser.add_argument("--data", type=Path, default=STREAMS, help="a JSONL file or a folder of them")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every arm")
    parser.add_argument("--requests", type=int, default=40, help="of each process in a turn")
    parser.add_argument("--uncounted", type=int, default=5, help="requests of each process before those")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=2, help="of the comparison of acceptance")
    parser.add_argument("--learn-requests", type=int, default=200, help="learnt from in all, for the acceptance")
    parser.add_argument("--held-out", type=int, default=24, help="requests that acceptance is measured on")
    parser.add_argument("--quick", action="store_true", help="minutes fewer: one turn, one seed, fewer requests")
    parser.add_argument("overrides", nargs="*", help="settings of all runs, such as train.budget=0.1")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments = argparse.Namespace(**vars(arguments) | {
            "repeats": 1, "requests": 15, "uncounted": 3, "seeds": 1, "learn_requests": 80, "held_out": 10
        })  # fmt: skip
    if arguments.adapter == "none":
        arguments.adapter = None
    available = sorted(os.sched_getaffinity(0))
    arguments.cores = arguments.cores or available[:2]
    if len(set(arguments.cores) & set(available)) < 2:
        parser.error(f"--cores must be two different ones of {available}, got {arguments.cores}")
    return arguments


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    CONTEXT.set_forkserver_preload(["torch", "transformers", "accelerate", "trainers.jobs.train"])
    load, start_s = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(arguments, Path(folder))
        turns, pairs = bench.turns(), bench.lessons()
    results = {
        "throughput": {base: throughput_ratios(turns, base) for base in (ALONE, BESIDE)},
        "synchrony": synchrony(turns), "acceptance": acceptance_ratios(pairs),
    }  # fmt: skip
    print_tables(turns, results, pairs)
    if load > LOADAVG_BOUND:
        CONSOLE.print(f"the machine was busy before the run (load {load:.1f}): do not quote these figures")
    print(json.dumps({
        "benchmark": "ranks", "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "load_before": load, "seconds": round(time.perf_counter() - start_s, 1),
        "settings": vars(arguments) | {"data": str(arguments.data)}, "results": results,
        "turns": [{arm: [asdict(r) for r in turn[arm]] for arm in ARMS} for turn in turns],
        "seeds": [{"two": asdict(two), "one": asdict(one)} for two, one in pairs],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
