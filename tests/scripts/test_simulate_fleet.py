"""The fleet simulator against closed forms, and what it must neither lose nor invent."""

import importlib
import itertools
import json
import math
import sys

import numpy as np
import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "scripts/fleet"))
fleet = importlib.import_module("fleet_model")
fleet_queue = importlib.import_module("fleet_queue")
script = importlib.import_module("simulate_fleet")
sys.path.remove(str(ROOT / "scripts/fleet"))

COSTS_FILES = sorted((ROOT / "configs/fleet").glob("*.yaml"))
CPU = fleet.read_costs(ROOT / "configs/fleet/cpu_reference.yaml")
NODE = fleet.Link(name="node", members=8, latency_s=1e-3, bytes_per_s=1e9)


def exponential_rounds(mean_s: float = 1.0, num: int = 200_000) -> np.ndarray:
    """When each round of a line ends, in seconds."""
    return np.random.default_rng(0).exponential(mean_s, num).cumsum()


# Queues


def erlang_c_by_sum(load: float, num_slots: int) -> float:
    terms = [load**k / math.factorial(k) for k in range(num_slots)]
    last = load**num_slots / math.factorial(num_slots) * num_slots / (num_slots - load)
    return last / (sum(terms) + last)


@pytest.mark.parametrize(("load", "num_slots"), [(0.9, 1), (3.5, 4), (14.0, 16), (100.0, 120)])
def test_the_planned_wait_is_erlangs(load, num_slots):
    """Catches a slip in the logarithms of the sum, and B taken for C."""
    waits = erlang_c_by_sum(load, num_slots)
    expected_s = max(0.0, math.log(waits / 0.01) / ((num_slots - load) / 2.0))
    found_s = fleet_queue.wait_quantile(rate=load / 2.0, slot_s=2.0, num_slots=num_slots)
    assert found_s == pytest.approx(expected_s, rel=1e-9)


def test_the_planned_wait_does_not_overflow_for_a_whole_fleet():
    """Catches factorials: 160,000 rows are the largest fleet of the plan behind one queue."""
    waits_s = [fleet_queue.wait_quantile(rate=u * 160_000, slot_s=1.0, num_slots=160_000) for u in (0.5, 0.999, 1.0)]
    assert waits_s[0] == 0 <= waits_s[1] < 1 and waits_s[2] == math.inf


@pytest.mark.parametrize("num_slots", [1, 8])
def test_simulated_waits_of_exponential_requests_are_those_of_mmc(num_slots):
    """Catches rows that serve two requests at once, or none though one waits.

    5 %: the mean of 400,000 waits has an error of 1.4 % for one row at this load, since they depend on each other.
    """
    rng, num, slot_s = np.random.default_rng(1), 400_000, 0.5
    rate = 0.6 * num_slots / slot_s
    arrivals_s = fleet_queue.arrivals(rng, rate=rate, num=num, burst=1.0, burst_s=1.0)
    waits_s = fleet_queue.queue(arrivals_s, rng.exponential(slot_s, num), num_slots=num_slots)
    waits = erlang_c_by_sum(rate * slot_s, num_slots)
    expected_s = waits / (num_slots / slot_s - rate)
    assert waits_s.mean() == pytest.approx(expected_s, rel=0.05)
    assert (waits_s > 0).mean() == pytest.approx(waits, rel=0.05)
    planned_s = fleet_queue.wait_quantile(rate=rate, slot_s=slot_s, num_slots=num_slots)
    assert np.quantile(waits_s, 0.99) == pytest.approx(planned_s, rel=0.05)


def test_the_queue_keeps_order_and_never_holds_more_than_its_rows():
    """Catches requests that overtake each other, and a row taken twice, with more rows than one."""
    rng = np.random.default_rng(2)
    arrivals_s = np.sort(rng.uniform(0, 50, 500))
    slots_s = rng.exponential(0.5, 500)
    starts_s = arrivals_s + fleet_queue.queue(arrivals_s, slots_s, num_slots=4)
    ends_s = starts_s + slots_s
    assert (np.diff(starts_s) >= 0).all()
    running = [int(((starts_s <= start_s) & (ends_s > start_s)).sum()) for start_s in starts_s]
    assert max(running) == 4
    # Nobody waits while a row is free.
    assert all(count == 4 for count, s, a in zip(running, starts_s, arrivals_s, strict=True) if s > a)


def test_bursts_keep_the_mean_rate_and_reach_their_peak():
    """Catches a burst that adds traffic, or one that is averaged away."""
    times_s = fleet_queue.arrivals(np.random.default_rng(3), rate=100, num=200_000, burst=1.6, burst_s=5)
    whole = int(times_s[-1] // 10) * 10
    counts, _ = np.histogram(times_s, bins=np.arange(0, whole + 1, 5))
    assert counts.mean() / 5 == pytest.approx(100, rel=0.01)
    assert counts[0::2].mean() / 5 == pytest.approx(160, rel=0.02) and counts[1::2].mean() / 5 == pytest.approx(
        40, rel=0.03
    )


def test_the_largest_rate_and_the_fewest_replicas_are_each_others_inverse():
    """Catches a search that stops one replica or one percent away from the bound."""
    for replicas in (1, 5, 40):
        rate = fleet_queue.largest_rate(slot_s=2.0, num_slots=16 * replicas, p99_wait_s=0.5)
        for factor, expected in ((0.9999, replicas), (1.0001, replicas + 1)):
            found = fleet_queue.replicas_for(factor * rate, slot_s=2.0, rows=16, p99_wait_s=0.5)
            assert found == expected


def test_sizes_have_the_mean_that_was_asked_for():
    """Catches a lognormal whose median was taken for its mean; rounding up adds at most one."""
    drawn = fleet_queue.sizes(np.random.default_rng(4), mean=500, sigma=1.0, num=400_000)
    assert 500 * 0.99 < drawn.mean() < 501 * 1.01 and drawn.min() >= 1


def test_a_full_replica_gives_as_many_tokens_as_its_requests_ask_for():
    """Catches prefill or learning counted for one row and not for all: tokens in are tokens out."""
    one = fleet.replica(CPU, prompt_tokens=100, answer_tokens=64, mat=2.0)
    assert one.tokens_per_s == pytest.approx(CPU.rows * 64 / one.slot_s)
    busy_s = 100 * CPU.prefill_token_s + 64 * CPU.round_s(0) / one.speed_up / CPU.rows
    assert one.tokens_per_s * busy_s / 64 == pytest.approx(1 - CPU.budget)


def test_drafting_that_does_not_pay_is_left_out():
    """Catches a plan slower than plain decoding, which the length rule would never run."""
    assert fleet.replica(CPU, prompt_tokens=100, answer_tokens=64, mat=1.0).speed_up == 1
    single = CPU.model_copy(update={"rows": 1})
    law = 2.27 * single.round_s(0) / single.round_s(4)
    assert law > 1
    assert fleet.replica(single, prompt_tokens=1, answer_tokens=64, mat=2.27).speed_up == pytest.approx(law)


# Synchronisation


def ring_all_reduce(values_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A ring, message by message: the reduced values of every member, and the chunks that each sent."""
    values, num = values_NC.copy(), len(values_NC)
    sent = np.zeros(num, dtype=int)
    for phase in ("scatter", "gather"):
        for turn in range(num - 1):
            messages = []
            for member in range(num):
                chunk = (member - turn + (phase == "gather")) % num
                messages.append(((member + 1) % num, chunk, values[member, chunk]))
                sent[member] += 1
            for receiver, chunk, value in messages:
                values[receiver, chunk] = value + (values[receiver, chunk] if phase == "scatter" else 0)
    return values, sent


@pytest.mark.parametrize("members", [2, 3, 8])
def test_ring_bytes_are_those_of_a_ring(members):
    """Catches a factor of two, and n where n - 1 is sent; no byte is sent that nobody receives."""
    values = np.arange(members * members, dtype=float).reshape(members, members)
    reduced, sent = ring_all_reduce(values)
    assert (reduced == values.sum(0)).all()
    per_chunk = 1000.0
    assert (sent * per_chunk == pytest.approx(fleet.ring_bytes(members, members * per_chunk))) and len(set(sent)) == 1
    assert sent.sum() * per_chunk == pytest.approx(2 * (members - 1) * members * per_chunk)


def test_a_long_ring_of_small_messages_gives_way_to_a_tree():
    """Catches an all-reduce of thousands priced at thousands of latencies."""
    assert fleet.all_reduce_s(NODE, members=1, update_bytes=1e6) == 0
    assert fleet.all_reduce_s(NODE, members=2, update_bytes=1e6) == pytest.approx(2e-3 + 1e-3)
    assert fleet.all_reduce_s(NODE, members=1024, update_bytes=1e3) == pytest.approx(20 * (1e-3 + 1e-6))
    assert fleet.all_reduce_s(NODE, members=4, update_bytes=1e9) == pytest.approx(6e-3 + 1.5)


@pytest.mark.parametrize("num_replicas", [1, 8, 200])
def test_the_longest_of_exponential_rounds_is_a_harmonic_number(num_replicas):
    """Catches rounds drawn as often as they occur: a tick meets long ones more often, and then some of each is over.

    For exponential rounds what is left is exponential again, so the longest of n is 1 + 1/2 + ... + 1/n.
    """
    late_s = fleet.overshoots(np.random.default_rng(5), exponential_rounds(), (4000, num_replicas))
    assert late_s.max(1).mean() == pytest.approx(sum(1 / k for k in range(1, num_replicas + 1)), rel=0.04)


def test_a_planned_meeting_waits_for_the_longest_round():
    """Catches the wait of one level taken for another's: H_n - 1 for the n replicas below."""
    costs = CPU.model_copy(update={"links": CPU.links[:2]})
    node, cluster = fleet.plan_levels(costs, exponential_rounds(0.01), num_replicas=64, share=0.01, seed=0)
    assert (node.members, node.replicas, cluster.members, cluster.replicas) == (8, 8, 8, 64)
    for level in (node, cluster):
        assert level.wait_s == pytest.approx(0.01 * sum(1 / k for k in range(2, level.replicas + 1)), rel=0.04)


@pytest.mark.parametrize("num_replicas", [2, 8, 9, 64, 1000])
def test_the_hierarchy_holds_all_replicas_and_its_share_of_the_time(num_replicas):
    """Catches replicas that no level reaches, meetings off the steps of the level below, and a plan over its bound."""
    ends_s = exponential_rounds(0.02)
    levels = fleet.plan_levels(CPU, ends_s, num_replicas=num_replicas, share=0.01, seed=0)
    assert levels[-1].replicas == num_replicas
    assert sum(level.share for level in levels) <= 0.01
    assert all(outer.every % inner.every == 0 for inner, outer in itertools.pairwise(levels))
    num_outer = max(5, 2000 // num_replicas)
    found = fleet.simulate_meetings(CPU, levels, ends_s, num_replicas=num_replicas, num_outer=num_outer, seed=1)
    assert 0 < found.reduce_share <= 0.01
    assert all(CPU.step_s + level.wait_s + level.reduce_s <= level.every * CPU.step_every_s for level in levels)


def test_one_level_simulated_waits_as_was_planned():
    """Catches waiting that is counted for the slowest too, or once for a group in place of for each replica."""
    ends_s = exponential_rounds(0.02)
    levels = fleet.plan_levels(CPU, ends_s, num_replicas=8, share=0.01, seed=0)
    found = fleet.simulate_meetings(CPU, levels, ends_s, num_replicas=8, num_outer=5000, seed=1)
    assert found.wait_s == pytest.approx(8 * 5000 * levels[0].wait_s, rel=0.03)
    assert found.reduce_share == pytest.approx(levels[0].share)
    assert found.standing_share == pytest.approx((found.wait_s + found.reduce_s) / found.elapsed_s)
    assert found.reduce_s == pytest.approx(8 * 5000 * levels[0].reduce_s)
    assert found.elapsed_s == pytest.approx(8 * 5000 * levels[0].every * CPU.step_every_s)


# Learning


def test_the_learning_curve_passes_through_what_was_measured_and_promises_no_more():
    """Catches an interpolation off the points, and acceptance that grows for ever."""
    for steps, mat in CPU.mat_by_steps.items():
        assert fleet.mat_after(CPU, steps) == pytest.approx(mat)
    last = max(CPU.mat_by_steps)
    assert fleet.mat_after(CPU, 100 * last) == CPU.mat_by_steps[last]


def test_a_larger_batch_gains_in_proportion_at_first_and_never_beyond_the_critical_batch():
    """Catches a fleet of 10,000 that learns 10,000 times as fast."""
    small = CPU.model_copy(update={"critical_blocks": 1e9})
    assert fleet.batch_gain(CPU, 1) == pytest.approx(1)
    assert fleet.batch_gain(small, 8) == pytest.approx(8, rel=1e-3)
    assert fleet.batch_gain(CPU, 1e9) == pytest.approx(1 + CPU.critical_blocks / CPU.blocks_per_step)


def test_a_dedicated_learner_uses_and_sheds_all_that_is_offered():
    """Catches experience lost on the way, bytes of shed positions shipped, and the learner counted as a server."""
    for num_replicas in (2, 8, 10_000):
        found = fleet.ship(CPU, num_replicas=num_replicas, tokens_per_s=500.0)
        assert found.offered == (num_replicas - 1) * 500.0
        assert found.used + found.shed_share * found.offered == pytest.approx(found.offered)
        assert found.bytes_per_s == pytest.approx(found.used * CPU.transition_bytes)
        assert found.reuse >= 1
    with pytest.raises(ValueError, match="at least 2 replicas, got 1"):
        fleet.ship(CPU, num_replicas=1, tokens_per_s=500.0)


def test_a_slow_link_to_the_learner_sheds_more():
    """Catches shipping that is bounded by the learner's steps alone."""
    slow = CPU.model_copy(update={"links": (NODE.model_copy(update={"bytes_per_s": 1e5}),)})
    assert fleet.ship(slow, num_replicas=64, tokens_per_s=500.0).bytes_per_s == pytest.approx(1e5)


# Adapters and failures


@pytest.mark.parametrize("fan_out", [2, 8])
def test_a_tree_is_no_deeper_than_its_replicas_need(fan_out):
    """Catches logarithms off by one at full levels: breadth first, parent of i is (i - 1) // fan_out."""
    depths = [0]
    for index in range(1, 5000):
        depths.append(depths[(index - 1) // fan_out] + 1)
    assert [fleet.tree_depth(count, fan_out) for count in range(1, 5001)] == depths


def test_a_tree_sends_each_copy_in_turn_and_a_store_answers_in_turn():
    """Catches a fan-out that costs nothing."""
    assert fleet.tree_s(NODE, num_replicas=73, fan_out=8, num_bytes=1e6) == pytest.approx(2 * (1e-3 + 8e-3))
    expected_s = 11_000 / CPU.store_requests_per_s + 1e6 / CPU.store_bytes_per_s
    assert fleet.store_s(CPU, num_replicas=11_000, num_bytes=1e6) == pytest.approx(expected_s)


def test_failures_are_those_of_a_renewal_process():
    """Catches a factor in hours or halves, by drawing a job's life: up, down, and what it learns again."""
    rng, num = np.random.default_rng(6), 200_000
    costs = CPU.model_copy(update={"mtbf_h": 100.0, "rejoin_s": 60.0, "checkpoint_every_s": 40.0})
    up_s = rng.exponential(costs.mtbf_h * 3600 / 100, num)
    redone_s = up_s % 40.0
    whole_s = up_s.sum() + num * 60.0
    found = fleet.failures(costs, job_replicas=100)
    assert found.per_day == pytest.approx(num / whole_s * 86_400, rel=0.02)
    assert found.serving_share == pytest.approx(num * 60.0 / whole_s, rel=0.02)
    assert found.learning_share == pytest.approx((redone_s.sum() + num * 60.0) / whole_s, rel=0.02)


# Files and program


@pytest.mark.parametrize("path", COSTS_FILES, ids=lambda path: path.stem)
def test_every_costs_file_reads_and_serves_at_all_sizes(path):
    """Catches a field forgotten in one of the files, and links that leave replicas out."""
    costs = fleet.read_costs(path)
    for num_replicas in (2, 8, 512, 10_000):
        assert fleet.group_sizes(costs, num_replicas)[-1][2] == num_replicas


def test_a_wrong_costs_file_is_refused_by_the_name_of_its_field(tmp_path):
    """Catches a misspelt cost that silently keeps another value."""
    path = tmp_path / "costs.yaml"
    path.write_text(COSTS_FILES[0].read_text().replace("step_s:", "stepp_s:", 1))
    with pytest.raises(ValueError, match="stepp_s"):
        fleet.read_costs(path)


@pytest.fixture(scope="module")
def program():
    """Runs the program with small fleets; gives its JSON line."""

    def run(*arguments: str) -> str:
        script.main(["--costs", str(ROOT / "configs/fleet/cpu_reference.yaml"), "--replicas", "2", "16", *arguments])

    return run


def test_the_program_draws_its_figure_and_repeats_itself(program, capsys, tmp_path):
    """Catches a seed that is not used everywhere, a line that is no JSON, and a figure that fails."""
    lines = []
    for name in ("a.png", "b.png"):
        program("--rate", "50", "--figure", str(tmp_path / name))
        lines.append(capsys.readouterr().out.splitlines()[-1])
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert lines[0] == lines[1]
    report = json.loads(lines[0])
    assert [found["num_replicas"] for found in report["fleets"]] == [2, 16]
    serving = report["fleets"][1]["serving"]
    assert serving["tokens_per_s"] == pytest.approx(serving["requests_per_s"] * 64)
    assert 8 <= report["replicas_for_rate"] <= 16


def test_a_value_out_of_bounds_ends_the_program_with_its_name(program, capsys):
    """Catches a traceback where the user mistyped."""
    with pytest.raises(SystemExit):
        program("--burst", "3")
    assert "--burst must be in 1..2, got 3" in capsys.readouterr().err


@pytest.mark.slow
def test_measuring_this_machine_gives_a_file_that_plans(capsys, monkeypatch, tmp_path):
    """Catches a measured field that the costs do not know, and processes of the all-reduce that never end."""
    monkeypatch.syspath_prepend(ROOT / "scripts/fleet")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "scripts/fleet"))  # the processes of the all-reduce import it too
    script.main([
        "--costs", str(ROOT / "configs/fleet/cpu_reference.yaml"), "--replicas", "2",
        "--measure", str(tmp_path / "costs.yaml"), "--model", str(ROOT / "checkpoints/reference-11m"),
        "--adapter", str(ROOT / "checkpoints/reference-11m-drafter"),
        "--prompts", str(ROOT / "configs/demo/prompts.jsonl"),
    ])  # fmt: skip
    costs = fleet.read_costs(tmp_path / "costs.yaml")
    assert costs.source.startswith(str(ROOT / "checkpoints/reference-11m")) and costs.links[1:] == CPU.links[1:]
    assert costs.round_s(4) > 0 and costs.round_s(0) > 0 and costs.critical_blocks > 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["source"] == costs.source
