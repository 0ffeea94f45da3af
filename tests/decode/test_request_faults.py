"""What is wrong with one request is told to the one who asked, and ends that request alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AddedToken

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.speculator import PLAIN, SelfSpeculator
from dvi.decode.text import TextStream
from dvi.records import SamplingParams
from dvi.serving.engine import Engine
from tests.serving.test_engine import Gathered, alone, engine_of, greedy, random_prompts, request_of
from tests.support.drafter_doubles import small_config
from tests.support.paths import STORIES
from tests.support.serving_doubles import client_of, stories_config, stories_loop
from tests.support.tiny_models import tiny_model

SHORT = SamplingParams(max_new_tokens=8, ignore_eos=True)


@pytest.fixture(scope="module")
def speculator() -> SelfSpeculator:
    """Its tokenizer has one token more than the model has embeddings."""
    found = SelfSpeculator.from_pretrained(STORIES, split_layer=1, policy="fixed", drafter=small_config())
    found.tokenizer.add_tokens([AddedToken("[PAD]", special=False)])
    return found


# Tokens that the model does not know


def test_a_text_with_a_token_beyond_the_embedding_is_refused_by_name(speculator):
    """Catches an IndexError out of the embedding, with every other answer of the batch lost."""
    with pytest.raises(ValueError, match=r"integers in 0..511, as the model has no others, got 512 \('\[PAD\]' of the"):
        speculator.encode("hello [PAD]")
    with pytest.raises(ValueError, match=r"0..511, as the model has no others, got -1$"):
        speculator.encode([3, -1])
    with pytest.raises(ValueError, match=r"0..511, as the model has no others, got 10000$"):
        speculator.encode([3, 10**4])


def test_a_model_with_fewer_embeddings_than_logits_is_asked_for_what_it_can_read():
    """Catches the head taken for the embedding: what can be said need not be readable."""
    split = SelfSpeculator(tiny_model("llama"), None, split_layer=1, drafter=small_config()).split
    assert split.num_input_ids == split.vocab_size == 64


def test_a_server_answers_400_for_a_token_that_the_model_does_not_know_and_serves_on():
    """Catches one user's text that ends everybody's answers, and at the third time the engine."""
    config = stories_config()
    with stories_loop(config) as loop:
        loop.engine.speculator.tokenizer.add_tokens([AddedToken("[PAD]", special=False)])
        with client_of(loop, config) as client:
            for _ in range(2):
                texts = client.post("/v1/completions", json={"prompt": ["fine", "hello [PAD]"], "max_tokens": 2})
                chat = [{"role": "user", "content": "what is [PAD]?"}]
                chats = client.post("/v1/chat/completions", json={"messages": chat, "max_tokens": 2})
                for answer in (texts, chats):
                    assert answer.status_code == 400
                    assert "got 512 ('[PAD]' of the tokenizer)" in answer.json()["error"]["message"]
            assert client.post("/v1/completions", json={"prompt": "hello", "max_tokens": 2}).status_code == 200
            assert client.get("/health").json()["status"] == "ok"


# Generate


def test_a_list_of_prompts_is_checked_before_anything_runs_and_the_bad_one_named(speculator, monkeypatch):
    """Catches an hour of decoding that a bad prompt at the end throws away."""
    monkeypatch.setattr(DecodingBatch, "open", lambda *_: pytest.fail("something ran"))
    with pytest.raises(ValueError, match=r"prompts\[2\]: token ids must be integers in 0..511"):
        speculator.generate(["one", "two", "hello [PAD]"], SHORT)
    with pytest.raises(ValueError, match=r"prompts\[1\]: a prompt must hold at least 1 token"):
        speculator.generate([[5], []], SHORT)


def test_of_prompts_that_come_one_by_one_a_bad_one_ends_alone(speculator, caplog):
    """Catches answers that are lost because another prompt of the stream cannot be encoded."""
    good = ["Once upon a time", "Lily and Tom"]
    expected = {r.index: r.token_ids for r in speculator.generate(good, SHORT)}
    results = list(speculator.generate(iter([good[0], "hello [PAD]", good[1]]), SHORT, batch_size=2))
    by_index = {result.index: result for result in results}
    assert [by_index[i].token_ids for i in (0, 2)] == [expected[0], expected[1]]
    assert (by_index[1].finish_reason, by_index[1].token_ids) == ("error", [])
    assert "got 512" in by_index[1].error and "got 512" in caplog.text
    assert by_index[0].error is None


def test_a_prompt_that_fails_while_it_is_read_frees_its_row(speculator, monkeypatch):
    """Catches a row that stays taken, and garbage in it for whoever comes next."""
    whole, prompts = DecodingBatch.prefill, ["Once upon a time", "The dog was", "Lily and Tom"]
    expected = {r.index: r.token_ids for r in speculator.generate(prompts, SHORT, batch_size=2)}

    def fail_second(batch: DecodingBatch, sequence: Sequence, max_positions: int) -> list:
        experience = whole(batch, sequence, max_positions) if sequence.prompt_ids != second else None
        if experience is None:
            raise RuntimeError("out of memory")
        return experience

    second = speculator.encode(prompts[1])
    monkeypatch.setattr(DecodingBatch, "prefill", fail_second)
    results = {r.index: r for r in speculator.generate(prompts, SHORT, batch_size=2)}
    assert results[1].error == "out of memory" and results[1].finish_reason == "error"
    assert [results[i].token_ids for i in (0, 2)] == [expected[0], expected[2]]


@pytest.mark.parametrize("place", ["in a round", "in its text"])
def test_a_request_that_fails_while_it_decodes_ends_alone(speculator, monkeypatch, place):
    """Catches a batch that is lost with one of its rows, or a learner that is taught the failed one's round."""
    prompts = ["Once upon a time", "The dog was"]
    expected = {r.index: r.token_ids for r in speculator.generate(prompts, SHORT)}
    if place == "in its text":
        whole = TextStream.push
        streams = []

        def push(stream: TextStream, token_id: int) -> bool:
            streams.append(stream) if stream not in streams else None
            if streams.index(stream) == 1 and len(stream.text) > 3:
                raise KeyError("no such token")
            return whole(stream, token_id)

        monkeypatch.setattr(TextStream, "push", push)
    else:
        on_device, failures = DecodingBatch._on_device, iter([False, True])

        def fail_once(batch: DecodingBatch, state: object, num_draft_tokens: int) -> object:
            if next(failures, False):
                raise IndexError("index out of range")
            return on_device(batch, state, num_draft_tokens)

        monkeypatch.setattr(DecodingBatch, "_on_device", fail_once)
    results = {r.index: r for r in speculator.generate(prompts, SHORT)}
    assert results[0].token_ids == expected[0] and results[0].error is None
    assert results[1].finish_reason == "error" and results[1].error


# The engine


def fails_for(engine: Engine, request_id: int, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """Plants an exception that one request brings about."""
    error = LookupError("planted")
    if place == "when it is admitted":
        whole = engine.speculator.new_sequence

        def new_sequence(prompt_ids: list[int], params: SamplingParams, **options: object) -> object:
            if options["request_id"] == request_id:
                raise error
            return whole(prompt_ids, params, **options)

        monkeypatch.setattr(engine.speculator, "new_sequence", new_sequence)
    elif place == "while it is read":
        prefill = DecodingBatch.prefill

        def fail(batch: DecodingBatch, sequence: Sequence, max_positions: int) -> list:
            if sequence.request_id == request_id:
                raise error
            return prefill(batch, sequence, max_positions)

        monkeypatch.setattr(DecodingBatch, "prefill", fail)
    else:
        extend, news = Sequence.extend, Engine._news

        def extend_or_fail(sequence: Sequence, committed: list[int]) -> int:
            if sequence.request_id == request_id and len(sequence.token_ids) > 3 and place == "in its text":
                raise error
            return extend(sequence, committed)

        def news_or_fail(engine: Engine, active: object, *, is_last: bool = False) -> object:
            if active.request.request_id == request_id and place == "in its news" and not is_last:
                raise error
            return news(engine, active, is_last=is_last)

        monkeypatch.setattr(Sequence, "extend", extend_or_fail)
        monkeypatch.setattr(Engine, "_news", news_or_fail)


@pytest.mark.parametrize("place", ["when it is admitted", "while it is read", "in its text", "in its news"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_whatever_one_request_raises_ends_it_alone(monkeypatch, place, failing):
    """Catches an exception of another kind than out of memory that ends the step, and with it everybody."""
    requests = [request_of(i, prompt, greedy(12)) for i, prompt in enumerate(random_prompts(3, seed=4, longest=20))]
    expected = {request.request_id: alone(request) for request in requests}
    engine, gathered = engine_of(prefix_positions=600), Gathered()
    fails_for(engine, failing, monkeypatch, place)
    for request in requests:
        engine.add(request)
    gathered.run(engine)
    for request_id, last in gathered.last.items():
        if request_id == failing:
            assert (last.finish_reason, last.error) == (
                "error", "the server could not compute this request; try again"
            )  # fmt: skip
        else:
            assert gathered.token_ids[request_id] == expected[request_id]
    assert engine.scheduler.num_running == engine.scheduler.num_waiting == 0 and not engine.has_work


def test_a_round_fails_at_the_row_that_joined_last_wherever_it_lies(monkeypatch):
    """Catches the last row taken for the newest: rows move into the gaps that others leave."""
    engine, gathered = engine_of(), Gathered()
    lengths = (4, 30, 30)  # the first one ends, and the third moves into its place
    requests = [
        request_of(i, prompt, greedy(length))
        for i, (prompt, length) in enumerate(zip(random_prompts(3, seed=2, longest=5), lengths, strict=True))
    ]
    for request in requests:
        engine.add(request)
    while 0 not in gathered.last:
        gathered.step(engine)
    whole, failures = DecodingBatch._on_device, iter([True])

    def fail_once(batch: DecodingBatch, state: object, num_draft_tokens: int) -> object:
        if next(failures, False):
            raise IndexError("index out of range")
        return whole(batch, state, num_draft_tokens)

    monkeypatch.setattr(DecodingBatch, "_on_device", fail_once)
    gathered.run(engine)
    assert [gathered.last[i].finish_reason for i in range(3)] == ["length", "length", "error"]


# Rotary embeddings that stretch


def stretching(kind: str) -> dict[str, object]:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    if kind == "longrope":
        parameters |= {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    return {"rope_parameters": parameters, "max_position_embeddings": 256 if kind == "longrope" else 64}


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_no_text_is_longer_than_a_rotary_table_that_would_change_for_its_batch_mates(kind):
    """Catches a short request's tokens that change when a long one decodes beside it (Phi-3, Phi-4-mini)."""
    model = tiny_model("llama", hidden_size=32, **stretching(kind))
    speculator = SelfSpeculator(model, None, split_layer=1, drafter=small_config(), policy="fixed")
    assert speculator.max_positions == 64
    reason = "its longrope rotary embedding changes with the longest text of a batch beyond 64" * (kind == "longrope")
    with pytest.raises(ValueError, match=f"shorter than the model's context of 64 tokens, got 100.*{reason}"):
        speculator.encode([5] * 100)
    # The long one decodes up to the very end, where drafts are made for positions beyond it.
    short, long = [3, 9, 27], [(7 * i) % 64 for i in range(40)]
    params = dataclasses.replace(SHORT, max_new_tokens=40)
    for policy in (None, PLAIN):
        alone_ids = next(speculator.generate(short, params, policy=policy)).token_ids
        beside = {r.index: r.token_ids for r in speculator.generate([short, long], params, policy=policy)}
        assert beside[0] == alone_ids and len(beside[1]) == 24
    with torch.no_grad():
        ids = torch.tensor([long])
        for _ in range(24):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert ids[0, 40:].tolist() == beside[1], "what the plain model says"


def test_a_table_that_stretches_from_the_start_is_refused():
    """Catches a model that loads and can answer nothing."""
    settings = stretching("longrope")
    settings["rope_parameters"]["original_max_position_embeddings"] = 16
    with pytest.raises(ValueError, match=r"cannot be split: its longrope rotary embedding .* beyond 16 positions"):
        SelfSpeculator(tiny_model("llama", hidden_size=32, **settings), None, split_layer=1)
