"""Requests that wait for rows: how long, how many a second, and a simulation of both.

Knows rates, times and the number of rows (slots) behind one queue; knows nothing of models. Pure functions.
"""

from __future__ import annotations

import heapq
import math

import numpy as np


def wait_quantile(*, rate: float, slot_s: float, num_slots: int, quantile: float = 0.99) -> float:
    """Seconds that this share of requests waits less than: M/M/c, requests a second over num_slots rows.

    Erlang C: a request waits with probability C, and then exponentially with rate num_slots / slot_s - rate. Infinite
    when more comes than can be served. One queue for all rows, which a least-loaded front door comes close to.
    """
    load = rate * slot_s
    if load >= num_slots:
        return math.inf
    if load <= 0:
        return 0.0
    # 1 / Erlang B is a sum of falling factorials, 1 + c/a + c(c-1)/a^2 ..., in logarithms: it overflows otherwise.
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(num_slots, 0, -1) / load))))
    largest = float(logs.max())
    log_inverse_b = largest + math.log(float(np.exp(logs - largest).sum()))
    blocked = math.exp(-log_inverse_b)
    waits = blocked / (1 - load / num_slots * (1 - blocked))
    return max(0.0, math.log(waits / (1 - quantile)) / ((num_slots - load) / slot_s)) if waits > 0 else 0.0


def largest_rate(*, slot_s: float, num_slots: int, p99_wait_s: float) -> float:
    """Requests a second at which the 99th percentile of the wait is p99_wait_s, to a millionth."""
    low, high = 0.0, num_slots / slot_s
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if wait_quantile(rate=middle, slot_s=slot_s, num_slots=num_slots) <= p99_wait_s:
            low = middle
        else:
            high = middle
    return low


def replicas_for(rate: float, *, slot_s: float, rows: int, p99_wait_s: float) -> int:
    """The fewest replicas at which requests that come at this rate wait less than p99_wait_s, 99 times in 100."""
    low, high = 0, math.ceil(rate * slot_s / rows) + 1
    while wait_quantile(rate=rate, slot_s=slot_s, num_slots=high * rows) > p99_wait_s:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        waits_s = wait_quantile(rate=rate, slot_s=slot_s, num_slots=middle * rows)
        low, high = (low, middle) if waits_s <= p99_wait_s else (middle, high)
    return high


def arrivals(rng: np.random.Generator, *, rate: float, num: int, burst: float, burst_s: float) -> np.ndarray:
    """Times in seconds of num requests: Poisson, whose rate alternates every burst_s.

    rate is the mean; `burst` in 1..2 is the upper rate over it, the lower one is 2 - burst of it.
    """
    ordinals = np.cumsum(rng.exponential(size=num))  # in units of expected requests
    if burst == 1:
        return ordinals / rate
    num_halves = math.ceil(ordinals[-1] / rate / burst_s) + 2
    halves_s = np.arange(num_halves + 1) * burst_s
    expected = np.concatenate(([0.0], np.cumsum(np.tile([burst, 2 - burst], num_halves)[:num_halves]) * rate * burst_s))
    return np.interp(ordinals, expected, halves_s)


def sizes(rng: np.random.Generator, *, mean: float, sigma: float, num: int) -> np.ndarray:
    """Token counts >= 1, lognormal with this mean before rounding up."""
    return np.ceil(rng.lognormal(math.log(mean) - sigma**2 / 2, sigma, num)).astype(np.int64)


def queue(arrivals_s: np.ndarray, slots_s: np.ndarray, *, num_slots: int) -> np.ndarray:
    """Waits in seconds, request by request: first come, first served, by whichever row is free first."""
    free_s = [0.0] * num_slots
    waits_s = np.empty(len(arrivals_s))
    for index, (arrival_s, slot_s) in enumerate(zip(arrivals_s.tolist(), slots_s.tolist(), strict=True)):
        start_s = max(arrival_s, free_s[0])
        heapq.heapreplace(free_s, start_s + slot_s)
        waits_s[index] = start_s - arrival_s
    return waits_s
