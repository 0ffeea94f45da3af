"""Profiles and workloads: measured once, kept by fingerprint, read again as written; what is wrong is said."""

import dataclasses
import json
import logging
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.planning import measurement
from dvi.planning.measurement import fingerprint_of, measure_workload, obtain_profile
from dvi.planning.profile import LatencyProfile, PassSeconds, default_folder, profile_path, read_profile, write_profile
from dvi.planning.simulator import Simulator
from dvi.planning.workload import AcceptanceModel, Workload, read_acceptance, read_lengths
from dvi.records import SamplingParams, ServingPlan
from tests.support.exact_doubles import self_check_left_out
from tests.support.planning_doubles import synthetic
from tests.support.tiny_models import tiny_model

PASSES = PassSeconds(
    contexts=(100, 300), rows=(1, 4), draft_tokens=(0, 2), widths=(1, 11),
    round_s=(((1.0, 3.0), (4.0, 6.0)), ((1.2, 3.2), (4.4, 6.4))), prefill_s=((1.0, 2.0), (1.0, 2.2)),
)  # fmt: skip


@pytest.fixture(scope="module")
def speculator():
    return SelfSpeculator(tiny_model("llama", dtype=torch.float32), None, split_layer=1)


@pytest.fixture
def quick(monkeypatch):
    """A smaller grid, and fewer requests."""
    monkeypatch.setattr(measurement, "ROWS", (1, 2))
    monkeypatch.setattr(measurement, "DRAFT_TOKENS", (0, 2, 4))
    monkeypatch.setattr(measurement, "WIDTHS", (1, 8, 64))
    monkeypatch.setattr(measurement, "ENGINE_LOADS", ((1, 1), (2, 3)))
    monkeypatch.setattr(measurement, "ENGINE_NEW", 8)


# Numbers


def test_rounds_are_linear_between_and_beyond_what_was_measured():
    """Catches a wrong axis, an extrapolation that clamps, and a context that is not taken off."""
    base_B, growth_B = PASSES.rounds(6, 1)
    assert growth_B.tolist() == pytest.approx([0, 1e-3, 1e-3 * 4 / 3, 1e-3 * 5 / 3, 2e-3, 2e-3 * 7 / 6, 2e-3 * 4 / 3])
    assert base_B[[1, 4]].tolist() == pytest.approx([2 - 0.1, 5 - 0.2])
    assert base_B[6] + 100 * growth_B[6] == pytest.approx(7)
    assert PASSES.rounds(1, 4)[0][1] == pytest.approx(4.9)


def test_a_long_piece_is_read_in_the_widest_passes_each_behind_the_last():
    """Catches a prompt priced as one pass wider than any that runs."""
    base_W, growth_W = PASSES.prefill(25)
    one, rest = PASSES.prefill(11)[0][11], PASSES.prefill(3)[0][3]
    behind = growth_W[11] * 11 + growth_W[3] * 22
    assert base_W[25] == pytest.approx(2 * one + rest + behind)
    assert growth_W[25] == pytest.approx(2 * growth_W[11] + growth_W[3]) and base_W[0] == growth_W[0] == 0


def test_noise_does_not_make_more_rows_cheaper():
    """Catches tables that fall: the limits of a box take the fewest rows for the cheapest round."""
    noisy = dataclasses.replace(PASSES, round_s=(((2.0, 3.0), (1.9, 6.0)), ((2.0, 3.0), (1.5, 6.0))))
    base_B, growth_B = noisy.rounds(8, 0)
    assert (np.diff(base_B) >= 0).all() and (np.diff(growth_B) >= 0).all() and base_B[1] > 0


@pytest.mark.parametrize("changed", [
    {"rows": (4, 1)}, {"contexts": (100, 100)}, {"round_s": PASSES.round_s[:1]}, {"prefill_s": ((1.0, math.nan),) * 2},
    {"prefill_s": ((0.0, 1.0),) * 2},
])  # fmt: skip
def test_a_grid_that_is_none_is_refused(changed):
    """Catches a damaged file that becomes forecasts of nonsense."""
    with pytest.raises(ValueError, match=next(iter(changed))):
        dataclasses.replace(PASSES, **changed)


# On disk


def test_a_profile_is_read_as_it_was_written(tmp_path):
    """Catches a field that JSON changes or forgets."""
    profile = dataclasses.replace(synthetic(3)[0], fingerprint={"cpu": "of my own", "cores": 2, "gpu": None})
    write_profile(tmp_path, profile)
    assert read_profile(tmp_path, profile.fingerprint) == profile
    assert read_profile(tmp_path, {**profile.fingerprint, "cores": 4}) is None


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b'{"format": 1}', b'{"format": 2, "passes": []}'])
def test_a_damaged_profile_is_reported_and_not_used(tmp_path, caplog, content):
    """Catches a half-written file that stops a server from starting."""
    path = profile_path(tmp_path, {"cpu": "x"})
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert read_profile(tmp_path, {"cpu": "x"}) is None
    assert str(path) in caplog.text and "measured anew" in caplog.text


def test_profiles_lie_in_the_users_cache(monkeypatch, tmp_path):
    """Catches a cache that ignores where the user wants caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "dvi" / "profiles"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == Path.home() / ".cache" / "dvi" / "profiles"


# Measured


def test_what_was_measured_is_not_measured_again_and_more_is_added(speculator, quick, tmp_path, monkeypatch):
    """Catches a cache that is never met, an entry that drives out another, and a wait that nobody is told of."""
    parts = []
    monkeypatch.setattr(measurement, "doing", lambda what: nullcontext(parts.append(what)))
    first, is_new = obtain_profile(speculator, folder=tmp_path, budget_s=0)
    assert is_new and set(first.passes) == {(1, 1)} and len(parts) == 2
    again, is_new = obtain_profile(speculator, folder=tmp_path, budget_s=0)
    assert not is_new and again == first and len(parts) == 2
    more, is_new = obtain_profile(speculator, split_layers=(1, 2), folder=tmp_path, budget_s=0)
    assert is_new and set(more.passes) == {(1, 1), (2, 1)} and more.passes[1, 1] == first.passes[1, 1]
    assert parts[2:] == ["measuring rounds and prompts at split layer 2"]
    anew, is_new = obtain_profile(speculator, folder=tmp_path, budget_s=0, remeasure=True)
    assert is_new and anew != first


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_measured_profile_is_one_to_forecast_by_and_leaves_the_model_as_it_was(quick, tmp_path, mode):
    """Catches a pass that exact mode, other split layers or short contexts cannot run, and state left behind."""
    model = tiny_model("llama", dtype=torch.float32, max_position_embeddings=160)
    with self_check_left_out():
        speculator = SelfSpeculator(model, None, split_layer=1, mode=mode)
    prompt, params = list(range(3, 23)), SamplingParams(max_new_tokens=20, ignore_eos=True)
    before = next(speculator.generate([prompt], params)).token_ids
    profile, _ = obtain_profile(speculator, split_layers=(0, 1), folder=tmp_path, budget_s=0)
    assert next(speculator.generate([prompt], params)).token_ids == before
    workload = Workload(((20, 20),), {layer: AcceptanceModel.constant((0.5,)) for layer in (0, 1)})
    forecasts = Simulator(profile, workload, num_requests=4).forecast(
        [ServingPlan(layer, 2, 2, 64) for layer in (0, 1)]
    )
    assert all(math.isfinite(forecast.tokens_per_s) and forecast.tokens_per_s > 0 for forecast in forecasts)


def test_a_fingerprint_tells_models_modes_and_precision_apart(speculator):
    """Catches a profile of another model that is taken for this one's."""
    with self_check_left_out():
        others = [
            SelfSpeculator(tiny_model("llama", dtype=torch.float64), None, split_layer=1),
            SelfSpeculator(tiny_model("llama", dtype=torch.float32, num_layers=3), None, split_layer=1),
            SelfSpeculator(tiny_model("llama", dtype=torch.float32), None, split_layer=1, mode="exact"),
            SelfSpeculator(tiny_model("llama", dtype=torch.float32), None, split_layer=1, path="views"),
        ]
    prints = [json.dumps(fingerprint_of(one), sort_keys=True) for one in (speculator, *others)]
    assert len(set(prints)) == len(prints)
    same = SelfSpeculator(tiny_model("llama", dtype=torch.float32), None, split_layer=2)
    assert fingerprint_of(same) == fingerprint_of(speculator)  # split layers are entries of one profile


def test_overheads_are_found_in_steps_and_none_is_negative():
    """Catches coefficients in the wrong order, and an interruption that becomes a cost of every step."""
    rng = np.random.default_rng(0)
    terms_NK = np.stack([rng.integers(low, high, 300) for low, high in ((1, 2), (1, 9), (1, 40), (0, 2))], axis=1)
    seconds_N = terms_NK @ (3e-4, 2e-5, 0.0, 1e-3) + rng.normal(0, 1e-6, 300)
    seconds_N[::50] += 0.1
    found = measurement._least_squares(terms_NK, seconds_N)
    assert found == pytest.approx([3e-4, 2e-5, 0.0, 1e-3], abs=2e-6) and min(found) >= 0


def test_a_workload_is_what_the_model_answers(speculator):
    """Catches lengths of other requests, and acceptance that a shorter draft cut off."""
    prompts = [list(range(3, 3 + size)) for size in (5, 9, 14)]
    workload = measure_workload(speculator, prompts, max_new_tokens=12)
    plain = list(speculator.generate(prompts, SamplingParams(max_new_tokens=12), policy=PLAIN))
    assert sorted(workload.lengths) == sorted((one.stats.prompt_tokens, one.stats.new_tokens) for one in plain)
    assert set(workload.acceptance) == {1}
    assert len(measure_workload(speculator, prompts, max_new_tokens=2, batch_size=1, budget_s=0).lengths) == 1


# Workloads


def counts(prompt, new, drafted, accepted):
    return SimpleNamespace(
        prompt_tokens=prompt, new_tokens=new, drafted_per_depth=drafted, accepted_per_depth=accepted
    )


def test_counts_of_requests_become_their_acceptance_and_ease():
    """Catches depths out of line where requests came to different ones, and an ease of the wrong sign."""
    workload = Workload.of_counts(
        [counts(10, 30, [10, 8], [8, 6]), counts(20, 40, [10], [2]), counts(5, 6, [], [])], split_layer=2
    )
    assert workload.lengths == ((10, 30), (20, 40), (5, 6))
    assert workload.acceptance[2].at(0) == pytest.approx((0.5, 0.75))
    easy, hard, unknown = workload.ease
    assert easy > 0.5 and hard < -0.5 and unknown == 0
    with pytest.raises(ValueError, match=r"no acceptance is known; set draft\.num_draft_tokens"):
        Workload.of_counts([counts(5, 6, [], [])], split_layer=2)


def test_requests_of_other_lengths_are_as_easy_as_those_of_theirs():
    """Catches traffic from a file that loses how short answers differ from long ones."""
    lengths = tuple((10, new) for new in (*range(5, 15), *range(200, 210)))
    workload = Workload(lengths, {1: AcceptanceModel.constant((0.5,))}, ease=(-1.0,) * 10 + (1.0,) * 10)
    assert workload.with_lengths([(7, 6), (7, 300), (7, 9)]).ease == (-1.0, 1.0, -1.0)


def test_a_workload_is_read_as_it_was_written():
    """Catches what JSON has no word for: infinity, and keys that are numbers."""
    workload = dataclasses.replace(synthetic(4)[1], tokens_seen=math.inf)
    assert Workload.from_json(json.loads(json.dumps(workload.to_json(), allow_nan=False))) == workload


def test_a_learning_curve_is_found_in_its_own_points():
    """Catches a fit that swaps the ends or loses tau."""
    curve = AcceptanceModel((0.3, 0.2), (0.8, 0.7), tau_tokens=5000.0)
    found = AcceptanceModel.fit([(tokens, curve.at(tokens)) for tokens in (0, 1000, 3000, 6000, 20000)])
    assert found.initial == pytest.approx(curve.initial, abs=0.01)
    assert found.final == pytest.approx(curve.final, abs=0.01) and found.tau_tokens == pytest.approx(5000, rel=0.05)
    assert AcceptanceModel.fit([(0, 0.3), (500, 0.6)]) == AcceptanceModel.constant((0.6,))


def test_lengths_are_read_and_bad_rows_named(tmp_path):
    """Catches a bad row that is skipped, or an error that leaves the reader to find it."""
    path = tmp_path / "lengths.jsonl"
    path.write_text('{"prompt_tokens": 12, "new_tokens": 3}\n\n{"prompt_tokens": 1, "new_tokens": 9, "id": "x"}\n')
    assert read_lengths(path) == ((12, 3), (1, 9))
    for line in ('{"prompt_tokens": 12}', '{"prompt_tokens": 0, "new_tokens": 3}', "[12, 3]", "twelve",
                 '{"prompt_tokens": 1.5, "new_tokens": 3}', '{"prompt_tokens": true, "new_tokens": 3}'):  # fmt: skip
        path.write_text('{"prompt_tokens": 12, "new_tokens": 3}\n' + line + "\n")
        with pytest.raises(ValueError, match=r"lengths\.jsonl, line 2"):
            read_lengths(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no request"):
        read_lengths(path)


def test_acceptance_of_split_layers_comes_from_a_file_or_a_sweep(tmp_path):
    """Catches keys that stay text, and a sweep's shortest drafts in place of its longest."""
    path = tmp_path / "acceptance.json"
    path.write_text('{"2": [0.7, 0.6], "4": {"initial": [0.5], "final": [0.9], "tau_tokens": 100.0}}')
    found = read_acceptance(path)
    assert found == {2: AcceptanceModel.constant((0.7, 0.6)), 4: AcceptanceModel((0.5,), (0.9,), 100.0)}
    path.write_text(json.dumps({"rows": [
        {"split_layer": 1, "num_draft_tokens": length, "acceptance_per_depth": [0.5] * length} for length in (2, 6, 4)
    ]}))  # fmt: skip
    assert read_acceptance(path) == {1: AcceptanceModel.constant([0.5] * 6)}
    for content in ('{"two": [0.7]}', '{"2": [1.7]}', '{"2": 0.7}', "[]", "{"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"acceptance\.json must hold acceptance by split layer"):
            read_acceptance(path)


def test_a_profile_of_other_passes_only_says_what_there_is():
    """Catches a KeyError in place of the pairs that were measured."""
    with pytest.raises(ValueError, match=r"split_layer 3 with tensor_parallel 2 must be .*; there are 1 with 1"):
        LatencyProfile({(1, 1): PASSES}).of(3, 2)
