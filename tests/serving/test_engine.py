"""The engine: whatever joins, leaves, is preempted, shares prefixes or changes drafters, each request's tokens are its
own.

All in float64, where batched and single-row passes agree to 1e-12 and no argmax hangs on it.
"""

from __future__ import annotations

import functools
import random
import time
from collections import defaultdict

import pytest
import torch

from dvi.decode.batch import DecodingBatch
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.draft.length_policies import CostTable
from dvi.records import SamplingParams
from dvi.serving.engine import PREFIX_CHUNK, Engine
from dvi.serving.request import DraftChoice, Request, RequestOutput, Timeouts
from dvi.serving.scheduler import SchedulerLimits
from tests.support.drafter_doubles import Letters, plain_text, random_drafter, randomise, small_config
from tests.support.exact_doubles import needs_kernels, self_check_left_out
from tests.support.tiny_models import tiny_model

VOCAB_SIZE = 64
FIXED, SHORT = (DraftChoice(policy="fixed", num_draft_tokens=t) for t in (3, 1))
COSTS = CostTable(draft_step_s={1: 1e-4}, verify_s={1: 1e-3, 80: 9e-3})  # measuring takes longer than these tests


@functools.cache
def speculator_of(mode: str = "fast", **changed) -> SelfSpeculator:
    model = tiny_model("llama", num_layers=3, vocab_size=VOCAB_SIZE, seed=3, **{"hidden_size": 16, **changed})
    with self_check_left_out():
        speculator = SelfSpeculator(model, None, split_layer=1, drafter=small_config(), mode=mode)
    speculator.drafter = random_drafter(speculator.split, seed=1, scale=0.02)
    return speculator


def engine_of(speculator: SelfSpeculator | None = None, *, prefix_positions: int = 0, **limits: int) -> Engine:
    limits = {"max_rows": 4, "max_positions": 4096, "prefill_tokens_per_step": 32} | limits
    return Engine(
        speculator or speculator_of(), SchedulerLimits(**limits), prefix_positions=prefix_positions, costs=COSTS
    )


def greedy(max_new_tokens: int = 12, **options) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, **{"ignore_eos": True, **options})


def request_of(request_id: int, prompt_ids: list[int], params: SamplingParams | None = None, **options) -> Request:
    options = {"draft": FIXED, "arrived_s": time.perf_counter()} | options
    return Request(request_id, prompt_ids, params or greedy(), **options)


def random_prompts(count: int, *, seed: int, longest: int = 60) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(VOCAB_SIZE) for _ in range(generator.randint(1, longest))] for _ in range(count)]


class Gathered:
    """All news of an engine's requests, put together."""

    def __init__(self) -> None:
        self.token_ids: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list] = defaultdict(list)
        self.text: dict[int, str] = defaultdict(str)
        self.last: dict[int, RequestOutput] = {}
        self.transitions: list = []
        self.num_preempted = self.num_steps = 0

    def step(self, engine: Engine) -> None:
        result = engine.step()
        self.num_steps += 1
        self.num_preempted += result.report.num_preempted
        self.transitions += result.transitions
        for output in result.outputs:
            self.take(output)

    def take(self, output: RequestOutput) -> None:
        assert output.request_id not in self.last, "news after the last"
        self.token_ids[output.request_id] += output.token_ids
        self.logprobs[output.request_id] += output.logprobs
        self.text[output.request_id] += output.text
        if output.finish_reason is not None:
            self.last[output.request_id] = output

    def run(self, engine: Engine, *, after_step=lambda: None) -> Gathered:
        while engine.has_work:
            self.step(engine)
            after_step()
            assert self.num_steps < 10_000, "the engine makes no progress"
        return self


def alone(request: Request, speculator: SelfSpeculator | None = None) -> list[int]:
    """The tokens of the same request on an engine of its own, without drafts."""
    engine = engine_of(speculator)
    engine.add(Request(0, request.prompt_ids, request.params, draft=DraftChoice(num_draft_tokens=0)))
    return Gathered().run(engine).token_ids[0]


def test_requests_that_come_and_go_get_the_tokens_they_get_alone():
    """Catches rows that read each other's cache, anchors that do not move with their rows, chunks out of place."""
    drafted = accepted = 0
    for seed in range(12):
        generator, engine, gathered = random.Random(seed), engine_of(max_rows=3, prefill_tokens_per_step=16), Gathered()
        requests = [
            request_of(i, prompt, greedy(generator.randint(1, 20)), draft=generator.choice([FIXED, SHORT]))
            for i, prompt in enumerate(random_prompts(7, seed=seed))
        ]  # fmt: skip
        waiting = list(requests)
        while waiting or engine.has_work:
            for _ in range(generator.randint(0, 2)):
                if waiting:
                    engine.add(waiting.pop())
            gathered.step(engine)
            if generator.random() < 0.3:
                randomise(engine.drafters["default"], seed=seed, scale=0.02)
        for request in requests:
            assert gathered.token_ids[request.request_id] == alone(request), request
            drafted += gathered.last[request.request_id].stats.num_drafted
            accepted += gathered.last[request.request_id].stats.num_accepted
    assert 0 < accepted < drafted, "a test without acceptances and rejections says nothing"


NATIVE = {"hidden_size": 32, "head_dim": 32, "dtype": torch.bfloat16}


@pytest.mark.parametrize("shape", [{}, pytest.param(NATIVE, marks=needs_kernels)], ids=["padded", "native"])
def test_exact_mode_gives_equal_bits_through_preemption_prefix_reuse_and_drafter_swaps(shape):
    """Catches shapes that depend on batch mates, on T, on where a prefill was cut, or on whose cache a prefix was."""
    speculator, num_preempted, num_cached = speculator_of("exact", **shape), 0, 0
    assert (speculator.passes.fixed_width is None) == bool(shape)
    beginning = random_prompts(1, seed=99, longest=200)[0][:1] * 3 + list(range(60)) * 2
    for seed in range(2):
        engine = engine_of(speculator, max_rows=4, max_positions=420, prefill_tokens_per_step=40, prefix_positions=600)
        prompts = [beginning + prompt for prompt in random_prompts(3, seed=seed, longest=12)]
        requests = [request_of(i, prompt, greedy(90 - 20 * i)) for i, prompt in enumerate(prompts)]
        for request in requests:
            engine.add(request)
        swap = functools.partial(randomise, engine.drafters["default"], seed=seed, scale=0.02)
        gathered = Gathered().run(engine, after_step=swap)
        for request in requests:
            assert gathered.token_ids[request.request_id] == alone(request, speculator)
            num_cached += gathered.last[request.request_id].num_cached_tokens
        num_preempted += gathered.num_preempted
    assert num_preempted > 0 and num_cached > 0


def test_a_preempted_sample_goes_on_with_the_draws_it_would_have_had():
    """Catches draws keyed by rows, steps or rounds since admission instead of by the committed length."""
    params = greedy(60, temperature=1.0, top_p=0.95)
    requests = [
        request_of(i, prompt, SamplingParams(**{**vars(params), "seed": 10 + i}))
        for i, prompt in enumerate(random_prompts(4, seed=5, longest=30))
    ]
    tight, roomy = engine_of(max_positions=180), engine_of()
    for engine in (tight, roomy):
        for request in requests:
            engine.add(request)
    preempted, undisturbed = Gathered().run(tight), Gathered().run(roomy)
    assert preempted.num_preempted > 0 and undisturbed.num_preempted == 0
    assert preempted.token_ids == undisturbed.token_ids


def test_penalties_know_the_answer_from_the_prompt_after_a_preemption_too():
    """Catches what was generated counting as prompt once it has been prefilled again."""
    prompts = random_prompts(4, seed=6, longest=30)
    penalised = greedy(60, presence_penalty=1.5, frequency_penalty=0.5)
    requests = [request_of(i, prompt, penalised) for i, prompt in enumerate(prompts)]
    tight, roomy = engine_of(max_positions=180), engine_of()
    for engine in (tight, roomy):
        for request in requests:
            engine.add(request)
    preempted, undisturbed = Gathered().run(tight), Gathered().run(roomy)
    assert preempted.num_preempted > 0 and undisturbed.num_preempted == 0
    assert preempted.token_ids == undisturbed.token_ids
    by_the_book = {}
    for index, prompt in enumerate(prompts):
        by_the_book[index] = []
        for _ in range(60):
            with torch.no_grad():
                logits = speculator_of().model(torch.tensor([prompt + by_the_book[index]])).logits[0, -1].double()
            counts = torch.bincount(torch.tensor(by_the_book[index], dtype=torch.int64), minlength=len(logits))
            by_the_book[index].append(int((logits - 1.5 * (counts > 0) - 0.5 * counts).argmax()))
    assert undisturbed.token_ids == by_the_book


def test_the_next_turn_of_a_conversation_finds_its_beginning_and_a_stranger_does_not():
    """Catches a cache that forgets answers, and one that tells tenants what others asked."""
    engine, prompt = engine_of(prefix_positions=1200), random_prompts(1, seed=1)[0] + [5] * PREFIX_CHUNK
    engine.add(request_of(0, prompt, greedy(80), tenant="one"))
    first = Gathered().run(engine)
    turn = prompt + first.token_ids[0] + [7, 8, 9]
    for index, tenant in enumerate(("one", "two", "")):
        engine.add(request_of(1 + index, turn, tenant=tenant))
    second = Gathered().run(engine)
    num_cached = [second.last[i].num_cached_tokens for i in (1, 2, 3)]
    assert num_cached[0] > len(prompt) and num_cached[0] % PREFIX_CHUNK == 0, "the answer's chunks count too"
    assert num_cached[1:] == [0, 0]
    assert second.token_ids[1] == second.token_ids[2] == second.token_ids[3]
    assert engine.prefixes.forget("one") > 0
    engine.add(request_of(9, turn, tenant="one"))
    assert Gathered().run(engine).last[9].num_cached_tokens == 0


def test_a_long_prompt_stalls_nobody_by_more_than_its_share():
    """Catches a prefill done in one piece while others wait for their next token."""
    engine, gathered = engine_of(prefill_tokens_per_step=16), Gathered()
    engine.add(request_of(0, [5, 6, 7], greedy(60)))
    gathered.step(engine)
    engine.add(request_of(1, random_prompts(1, seed=3, longest=200)[0] + [3] * 200, greedy(2)))
    while 1 not in gathered.token_ids:
        before = len(gathered.token_ids[0])
        result = engine.step()
        assert result.report.num_prefill_tokens <= 16
        for output in result.outputs:
            gathered.take(output)
        if 0 not in gathered.last:
            assert len(gathered.token_ids[0]) > before


def test_logprobs_are_the_verifiers_own_log_softmax():
    """Catches the drafter's, the warped distribution's, or another position's."""
    speculator = speculator_of()
    engine, prompt = engine_of(), [5, 9, 33, 2]
    params = greedy(9, temperature=0.7, top_k=3, repetition_penalty=1.3, seed=4)
    engine.add(request_of(0, prompt, params, num_logprobs=3))
    engine.add(request_of(1, [7], greedy(5)))
    gathered = Gathered().run(engine)
    ids = gathered.token_ids[0]
    with torch.no_grad():
        logits = speculator.model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.float().log_softmax(-1)
    assert [one.token_id for one in gathered.logprobs[0]] == ids
    for one, row in zip(gathered.logprobs[0], expected, strict=True):
        assert one.logprob == pytest.approx(float(row[one.token_id]), abs=1e-4)
        values, tokens = row.topk(3)
        assert [token for token, _ in one.top] == tokens.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert not gathered.logprobs[1]


def test_a_cancelled_request_frees_its_row_before_the_next_round():
    """Catches rows that decode for nobody, waiting requests that cannot be cancelled, and news after the end."""
    engine, gathered = engine_of(max_rows=2), Gathered()
    requests = [request_of(i, prompt, greedy(30)) for i, prompt in enumerate(random_prompts(4, seed=8))]
    for request in requests:
        engine.add(request)
    for _ in range(6):
        gathered.step(engine)
    for request_id in (0, 3):  # one runs, one waits
        gathered.take(engine.cancel(request_id))
    assert engine.cancel(0) is None and engine.cancel(99) is None
    gathered.run(engine)
    assert gathered.last[0].finish_reason == gathered.last[3].finish_reason == "cancelled"
    for index in (1, 2):
        assert gathered.token_ids[index] == alone(requests[index])
    assert len(gathered.token_ids[0]) < 30 and not gathered.token_ids[3]
    assert engine.scheduler.num_running == 0 and not any(lane.batch.sequences for lane in engine._lanes.values())


def test_a_request_out_of_time_ends_alone_and_says_why():
    """Catches timeouts that nobody looks at, and a row that stays behind."""
    engine, gathered = engine_of(max_rows=1), Gathered()
    engine.add(request_of(0, [5, 6], greedy(40)))
    engine.add(request_of(1, [7], greedy(4), timeouts=Timeouts(queue_s=1e-6)))
    engine.add(request_of(2, [9], greedy(4)))
    gathered.run(engine)
    assert gathered.last[1].finish_reason == "timeout" and "queued" in gathered.last[1].error
    assert gathered.last[0].finish_reason == gathered.last[2].finish_reason == "length"


def test_a_round_that_fails_costs_the_newest_request_alone(monkeypatch):
    """Catches an out-of-memory error that ends the server, or rows left half committed by it."""
    engine, gathered = engine_of(), Gathered()
    requests = [request_of(i, prompt, greedy(20)) for i, prompt in enumerate(random_prompts(3, seed=2))]
    for request in requests:
        engine.add(request)
    for _ in range(8):
        gathered.step(engine)
    whole, failures = DecodingBatch._on_device, iter([True])

    def fail_once(batch: DecodingBatch, state: object, num_draft_tokens: int) -> object:
        verified = whole(batch, state, num_draft_tokens)
        if next(failures, False):
            raise RuntimeError("out of memory")
        return verified

    monkeypatch.setattr(DecodingBatch, "_on_device", fail_once)
    gathered.run(engine)
    failed = [i for i, last in gathered.last.items() if last.finish_reason == "error"]
    assert failed == [2], "the newest"
    assert "out of memory" not in gathered.last[2].error
    for request in requests:
        if request.request_id not in failed:
            assert gathered.token_ids[request.request_id] == alone(request)


def test_a_verifier_gone_nan_ends_its_own_request_and_poisons_nothing():
    """Catches NaN states that reach the replay, the prefix cache or a neighbour."""
    speculator = speculator_of()
    engine, gathered = engine_of(prefix_positions=1200), Gathered()
    embedding, poison = speculator.model.get_input_embeddings(), 63
    plain = DraftChoice(num_draft_tokens=0)  # nobody drafts the poison
    healthy, sick = (
        request_of(i, prompt, greedy(4), draft=plain) for i, prompt in enumerate(([5, 9, 33], [7] * 10 + [poison]))
    )
    expected = alone(healthy)
    assert poison not in [*healthy.prompt_ids, *expected]
    saved = embedding.weight[poison].clone()
    try:
        with torch.no_grad():
            embedding.weight[poison] = torch.nan
        for request in (sick, healthy):
            engine.add(request)
        gathered.run(engine)
    finally:
        with torch.no_grad():
            embedding.weight[poison] = saved
    assert gathered.last[1].finish_reason == "error" and not gathered.token_ids[1]
    assert gathered.token_ids[0] == expected and gathered.last[0].finish_reason == "length"
    assert all(stretch.target_hidden_WD.isfinite().all() for stretch in gathered.transitions)
    # The row that was sick serves again, beside a longer one, up to whose end its own masked slots are read.
    engine.add(request_of(2, [5, 9, 33], greedy(4), draft=plain))
    engine.add(request_of(3, [8] * 40, greedy(4), draft=plain))
    assert gathered.run(engine).token_ids[2] == expected
    for chunk in engine.prefixes._chunks.values():
        assert all(t.isfinite().all() for both in chunk.keys_and_values.values() for t in both)


def test_experience_bears_its_tenant_and_leaves_out_who_will_not_teach():
    """Catches an opt-out that is forgotten between the door and the replay."""
    engine = engine_of()
    engine.add(request_of(0, [5, 9, 33], tenant="willing"))
    engine.add(request_of(1, [7, 8], tenant="private", may_train=False))
    gathered = Gathered().run(engine)
    assert {stretch.tenant for stretch in gathered.transitions} == {"willing"}
    assert {stretch.request_id for stretch in gathered.transitions} == {0}


def test_seeded_gumbel_samples_do_not_depend_on_company_or_drafter():
    """Catches coupled requests that share a batch with others, whose noise is another's."""
    params = greedy(20, temperature=1.0, seed=7, coupling="gumbel")
    expected = None
    for seed in range(3):
        engine = engine_of()
        randomise(engine.drafters["default"], seed=seed, scale=0.02)
        engine.add(request_of(0, [5, 9, 33], params))
        for index, prompt in enumerate(random_prompts(seed, seed=seed), start=1):
            engine.add(request_of(index, prompt, greedy(10, temperature=0.8, seed=index)))
        found = Gathered().run(engine).token_ids[0]
        assert expected in (None, found)
        expected = found
    result = next(iter(speculator_of().generate([[5, 9, 33]], [params], policy=PLAIN, batch_size=1)))
    assert expected == result.token_ids


def test_each_adapter_drafts_for_its_own_requests():
    """Catches a choice of drafter that is accepted and ignored."""
    engine = engine_of()
    other = random_drafter(engine.speculator.split, seed=9, scale=0.02)
    other.publish(other, version=41)
    engine.drafters["other"] = other
    requests = [
        request_of(0, [5, 9, 33], greedy(30)),
        request_of(1, [5, 9, 33], greedy(30), draft=DraftChoice("other", "fixed", 3)),
    ]
    for request in requests:
        engine.add(request)
    with pytest.raises(ValueError, match="other"):
        engine.add(request_of(2, [5], draft=DraftChoice("missing")))
    gathered = Gathered()
    gathered.step(engine)
    with pytest.raises(ValueError, match="in use"):
        engine.unload("other")
    gathered.run(engine)
    assert gathered.token_ids[0] == gathered.token_ids[1]
    assert gathered.last[1].drafter_version == 41 != gathered.last[0].drafter_version
    assert gathered.last[0].stats.num_accepted != gathered.last[1].stats.num_accepted
    engine.unload("other")


def test_stop_strings_end_a_request_and_are_never_shown():
    """Catches pieces that leak the beginning of a stop string while a stream runs."""
    speculator = speculator_of()
    prompt = [5, 9, 33]
    ids, _ = plain_text(speculator, prompt, greedy(30))
    text = Letters().decode(ids)
    stop = text[10:13]
    speculator.tokenizer = Letters()
    try:
        engine = engine_of(speculator)
        engine.add(request_of(0, prompt, greedy(30, stop_strings=(stop,))))
        gathered = Gathered().run(engine)
    finally:
        speculator.tokenizer = None
    assert gathered.text[0] == text[: text.index(stop)] and gathered.last[0].finish_reason == "stop"


def test_the_report_adds_up_to_what_the_requests_saw():
    """Catches counts lost between rows, lanes and domains."""
    engine, totals, by_domain = engine_of(), [0, 0, 0], [0, 0]
    for i, prompt in enumerate(random_prompts(6, seed=4)):
        engine.add(request_of(i, prompt, greedy(10 + i), domain="odd" if i % 2 else ""))
    gathered = Gathered()
    while engine.has_work:
        result = engine.step()
        rounds = result.report.rounds
        for index, count in enumerate((rounds.num_rounds, rounds.num_drafted, rounds.new_tokens)):
            totals[index] += count
        odd = result.report.rounds_by_domain.get("odd")
        if odd is not None:
            by_domain[0] += odd.num_rounds
            by_domain[1] += odd.new_tokens
        for output in result.outputs:
            gathered.take(output)
    stats = [gathered.last[i].stats for i in range(6)]
    assert totals == [sum(getattr(s, name) for s in stats) for name in ("num_rounds", "num_drafted", "new_tokens")]
    assert by_domain == [sum(getattr(s, name) for s in stats[1::2]) for name in ("num_rounds", "new_tokens")]
    assert result.report.num_running == result.report.num_waiting == 0
