"""The front door: every request gets one good answer or an honest error, however the replicas behind it end."""

from __future__ import annotations

import asyncio
import collections
import json
import threading

import httpx2
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from dvi.records import SamplingParams
from dvi.serving.access import Access, load_access
from dvi.serving.front_door import DoorServer, FrontDoor, run_front_door
from dvi.serving.relay import conversation_of
from dvi.serving.replicas import Fleet
from dvi.serving.sockets import open_socket, url_of
from dvi.settings import RouteSettings
from tests.support.replica_doubles import FakeReplica, door_before, in_loop
from tests.support.serving_doubles import listening, stories_config, stories_loop

LONG = "It was a dark and stormy night. " * 10
URLS = tuple(f"http://127.0.0.1:{port}" for port in range(9001, 9005))
ALICE, OPS, MALLORY = "alice-0123456789abcdef", "ops-0123456789abcdef", "mallory-0123456789abc"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(json.dumps([
        {"name": "alice", "key": ALICE, "train": False}, {"name": "ops", "key": OPS, "admin": True},
    ]))  # fmt: skip
    path.chmod(0o600)
    return path


def complete(client, prompt="Once", **options):
    return client.post("/v1/completions", json={"prompt": prompt}, **options)


def error_of(response, status):
    assert response.status_code == status, response.text
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    return response.json()["error"]["code"]


def replica_of(response):
    assert response.status_code == 200, response.text
    return int(response.headers["x-dvi-replica"])


def scripted(*steps):
    """A script that does one step after another, one for each request, and the last for all that follow."""
    remaining = list(steps)

    async def script(exchange):
        await (remaining.pop(0) if len(remaining) > 1 else remaining[0])(exchange)

    return script


async def die(exchange):
    exchange.die()


async def say_hello(exchange):
    await exchange.answer({"hello": "world"})


def refuse(status, code="queue_full"):
    async def script(exchange):
        body = {"error": {"message": "no", "type": "x", "param": None, "code": code}}
        await exchange.answer(body, status=status, **{"Retry-After": "7"})

    return script


def stream(*chunks, then=None):
    async def script(exchange):
        await exchange.begin_stream()
        for chunk in chunks:
            await exchange.send_chunk(chunk)
        if then is not None:
            return await then(exchange)
        await exchange.write(b"0\r\n\r\n")

    return script


async def never(exchange):
    await asyncio.Event().wait()


# Who gets a request


def healthy_fleet(urls=URLS):
    fleet = Fleet(urls)
    for replica in fleet.replicas:
        replica.answered("healthy", {})
    return fleet


def test_two_hundred_requests_at_once_are_spread_evenly():
    """Catches a router that prefers a replica, and one that ignores what is under way."""
    fleet = healthy_fleet()
    counts = collections.Counter()
    for _ in range(200):
        replica = fleet.choose(None)
        replica.in_flight += 1
        counts[replica.number] += 1
    assert max(counts.values()) / (200 / len(URLS)) <= 1.3 and len(counts) == len(URLS)


@in_loop
async def test_two_hundred_requests_at_the_door_are_spread_evenly():
    """The same through sockets: catches requests that are not counted while they wait."""
    may_answer, num_here = asyncio.Event(), 0

    async def hold(exchange):
        nonlocal num_here
        num_here += 1
        if num_here == 200:
            may_answer.set()
        await may_answer.wait()
        await say_hello(exchange)

    replicas = [FakeReplica(hold) for _ in range(3)]
    async with door_before(*replicas) as (door, client):
        answers = await asyncio.gather(*(complete(client) for _ in range(200)))
        counts = collections.Counter(replica_of(answer) for answer in answers)
        assert max(counts.values()) / (200 / 3) <= 1.3
        assert all(replica.in_flight == 0 for replica in door.fleet.replicas)


def test_one_after_another_goes_round():
    """Catches a first replica that gets all the traffic of a quiet door."""
    fleet = healthy_fleet()
    assert [fleet.choose(None).number for _ in range(8)] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_what_a_replica_has_from_elsewhere_counts():
    """Catches a door that overloads a replica which others use too, and one that counts its own requests twice."""
    fleet = healthy_fleet(URLS[:2])
    busy, idle = fleet.replicas
    busy.in_flight = 2
    busy.take_metrics("dvi:num_requests_running 4.0\ndvi:num_requests_waiting 3.0\n", asked_s=0, answered_s=0)
    assert busy.load == 7
    idle.in_flight = 6
    assert fleet.choose(None) is idle


def test_fifty_conversations_stay_where_they_are_and_come_back():
    """Catches a hash that moves everybody when one replica goes, and homes that depend on the order of events."""
    fleet = healthy_fleet()
    names = [f"conversation {number}" for number in range(50)]
    homes = {name: fleet.choose(name) for name in names}
    assert all(fleet.choose(name) is homes[name] for name in names for _ in range(5))
    assert {replica.number for replica in homes.values()} == {0, 1, 2, 3}
    lost = fleet.replicas[1]
    lost.refused_connection()
    assert all((fleet.choose(name) is home) == (home is not lost) for name, home in homes.items())
    lost.answered("healthy", {})
    assert all(fleet.choose(name) is home for name, home in homes.items())


def test_an_overloaded_replica_keeps_no_conversation():
    """Catches stickiness without bound: one busy conversation, or many of one hash, that wait beside idle replicas."""
    fleet = healthy_fleet()
    counts = collections.Counter()
    for _ in range(200):
        replica = fleet.choose("the same")
        replica.in_flight += 1
        counts[replica.number] += 1
    assert max(counts.values()) <= 1.25 * 200 / len(URLS) + 2


@in_loop
async def test_turns_of_a_conversation_meet_at_one_replica():
    """Catches a name that changes as the conversation grows, and the header that is not heard."""
    replicas = [FakeReplica(say_hello) for _ in range(4)]
    async with door_before(*replicas) as (_, client):
        seen = set()
        for number in range(10):
            messages = [{"role": "system", "content": LONG}, {"role": "user", "content": f"question {number}"}]
            homes = set()
            for turn in range(3):
                answer = await client.post("/v1/chat/completions", json={"messages": messages})
                homes.add(replica_of(answer))
                messages += [{"role": "assistant", "content": "x"}, {"role": "user", "content": f"turn {turn}"}]
            assert len(homes) == 1
            seen |= homes
        assert len(seen) > 1
        named = {replica_of(await complete(client, headers={"X-Conversation-Id": "7"})) for _ in range(6)}
        assert len(named) == 1


@pytest.mark.parametrize("body", [b"{", b"[1]", b'{"prompt": "short"}', b'{"prompt": []}', b'{"prompt": [[]]}',
                                  b'{"messages": [3]}', b'{"messages": []}', b"[" * 100_000])  # fmt: skip
def test_a_body_that_names_no_conversation_is_no_error(body):
    """Catches a door that stumbles over what the replica should refuse."""
    assert conversation_of(body, {}) is None


def test_keys_share_no_conversation():
    """Catches two tenants led to one replica by the same words, where one could feel the other's presence."""
    body = json.dumps({"prompt": LONG}).encode()
    longer = json.dumps({"prompt": LONG + "more", "n": 2}).encode()
    mine, theirs = {"authorization": "Bearer a"}, {"authorization": "Bearer b"}
    assert conversation_of(body, mine) == conversation_of(longer, mine) is not None
    assert conversation_of(body, mine) != conversation_of(body, theirs)


# Replicas that fail


@pytest.mark.parametrize("fault", [die, refuse(503, "draining"), refuse(429), stream(then=die)])
@in_loop
async def test_what_has_no_first_byte_is_asked_of_another(fault):
    """Catches a client that sees a fault of which nothing needed to reach it. The last: headers, and then no token."""
    bad, good = FakeReplica(fault), FakeReplica(say_hello)
    async with door_before(bad, good) as (_, client):
        answers = [await complete(client) for _ in range(3)]
        assert [answer.json() for answer in answers] == [{"hello": "world"}] * 3
        assert bad.exchanges and [exchange.body for exchange in bad.exchanges + good.exchanges]
        assert "dvi:front_door_retries_total{reason=" in (await client.get("/metrics")).text


@in_loop
async def test_a_whole_answer_that_is_cut_off_is_asked_of_another():
    """Catches half a JSON object that reaches the client."""

    async def half(exchange):
        await exchange.write(exchange.head(200, {"Content-Type": "application/json", "Content-Length": "100"}) + b"{")
        exchange.die()

    async with door_before(FakeReplica(half), FakeReplica(say_hello)) as (_, client):
        assert (await complete(client)).json() == {"hello": "world"}


@in_loop
async def test_a_stream_whose_replica_dies_ends_with_an_error_and_is_not_asked_again():
    """Catches silence, an event torn in two, and text that is generated twice into one stream."""
    first = stream('data: {"n": 1}\n\ndata: {"n"', ': 2}\n\ndata: {"to', then=die)
    replicas = [FakeReplica(first), FakeReplica(first)]
    async with door_before(*replicas) as (_, client):
        answer = await complete(client)
        *events, rest = answer.text.split("\n\n")
        contents = [json.loads(event.removeprefix("data: ")) for event in events]
        assert rest == "" and contents[:2] == [{"n": 1}, {"n": 2}]
        assert contents[2]["error"]["code"] == "replica_lost" and len(contents) == 3
        assert sum(len(replica.exchanges) for replica in replicas) == 1


@in_loop
async def test_a_stream_passes_byte_for_byte_and_event_by_event():
    """Catches a door that gathers events before it passes them on."""
    may_go_on = asyncio.Event()

    async def script(exchange):
        await exchange.begin_stream()
        await exchange.send_chunk("data: one\n\n")
        await may_go_on.wait()  # until the client has the first
        await exchange.send_chunk("data: [DONE]\n\n")
        await exchange.write(b"0\r\n\r\n")

    async with (
        door_before(FakeReplica(script)) as (_, client),
        client.stream("POST", "/v1/completions", json={"prompt": "x", "stream": True}) as answer,
    ):
        received = b""
        async for chunk in answer.aiter_raw():
            received += chunk
            may_go_on.set()
        assert received == b"data: one\n\ndata: [DONE]\n\n"


@in_loop
async def test_a_client_that_leaves_is_given_up_at_the_replica():
    """Catches answers that nobody reads and that hold a place in the replica."""
    is_gone = asyncio.Event()

    async def script(exchange):
        await exchange.begin_stream()
        try:
            while True:
                await exchange.send_chunk("data: more\n\n")
                await asyncio.sleep(0.001)
        except ConnectionError:
            is_gone.set()

    async with door_before(FakeReplica(script)) as (door, client):
        async with client.stream("POST", "/v1/completions", json={"prompt": "x"}) as answer:
            await anext(answer.aiter_raw())
            assert door.fleet.replicas[0].in_flight == 1
        await is_gone.wait()
        while door.fleet.replicas[0].in_flight:
            await asyncio.sleep(0.001)


@in_loop
async def test_a_request_that_kills_replicas_does_not_kill_them_all():
    """Catches retries that carry a poisonous request through the whole fleet."""
    replicas = [FakeReplica(die) for _ in range(4)]
    async with door_before(*replicas) as (_, client):
        assert error_of(await complete(client), 502) == "replica_lost"
        assert sum(len(replica.exchanges) for replica in replicas) == 2


@in_loop
async def test_a_full_fleet_says_when_to_come_back():
    """Catches a 429 that becomes a 503, and its Retry-After lost."""
    async with door_before(FakeReplica(refuse(429)), FakeReplica(refuse(429))) as (_, client):
        answer = await complete(client)
        assert error_of(answer, 429) == "queue_full" and answer.headers["retry-after"] == "7"


@in_loop
async def test_errors_of_the_request_are_not_tried_again():
    """Catches a fault of the client's that is repeated at every replica."""
    replicas = [FakeReplica(refuse(400, "invalid_request")), FakeReplica(refuse(500, "engine_error"))]
    async with door_before(*replicas) as (_, client):
        assert error_of(await complete(client), 400) == "invalid_request"
        assert error_of(await complete(client), 500) == "engine_error"
        assert [len(replica.exchanges) for replica in replicas] == [1, 1]


@in_loop
async def test_without_replicas_there_is_an_honest_503_until_one_comes_back():
    """Catches a door that hangs or dies with its replicas, and one that has to be told of their return."""
    replicas = [FakeReplica(say_hello), FakeReplica(say_hello)]
    async with door_before(*replicas, health_every_s=0.05) as (door, client):
        for replica in replicas:
            await replica.stop()
        answer = await complete(client)
        assert error_of(answer, 503) == "no_replica" and answer.headers["retry-after"] == "1"
        health = await client.get("/health")
        assert health.status_code == 503 and health.json()["status"] == "down"
        await replicas[1].start()
        while door.fleet.num_in("healthy") == 0:
            await asyncio.sleep(0.01)
        assert (await complete(client)).json() == {"hello": "world"}
        health = await client.get("/health")
        assert health.status_code == 200 and health.json()["status"] == "degraded"
        await replicas[0].start()


@in_loop
async def test_a_draining_replica_gets_nothing_new_and_finishes_what_it_has():
    """Catches a drain that cuts answers off, or that new requests prolong."""
    may_end = asyncio.Event()

    async def hold(exchange):
        await may_end.wait()
        await say_hello(exchange)

    leaving, staying = FakeReplica(hold), FakeReplica(say_hello)
    async with door_before(leaving, staying) as (door, client):
        early = asyncio.create_task(complete(client))
        while not leaving.exchanges:
            await asyncio.sleep(0.001)
        leaving.health, leaving.health_status = {"status": "draining"}, 503
        await door.look_at(door.fleet.replicas[0])
        assert door.fleet.replicas[0].state == "draining"
        assert {replica_of(await complete(client)) for _ in range(4)} == {1}
        may_end.set()
        assert replica_of(await early) == 0


@in_loop
async def test_what_waits_for_a_hanging_replica_is_asked_of_another():
    """Catches a stopped process whose clients wait for answer_timeout_s: its sockets are open, and nothing comes."""
    replicas = [FakeReplica(never), FakeReplica(never)]
    async with door_before(*replicas, health_every_s=0.05) as (door, client):
        waiting = asyncio.create_task(complete(client))
        while not any(replica.exchanges for replica in replicas):
            await asyncio.sleep(0.001)
        hanging, other = sorted(replicas, key=lambda replica: -len(replica.exchanges))
        other.script = say_hello
        hanging.hangs = True
        assert (await waiting).json() == {"hello": "world"}
        assert door.fleet.replicas[replicas.index(hanging)].state == "down"


@in_loop
async def test_a_stream_from_a_hanging_replica_ends_with_an_error():
    """Catches a stream that stays open for ever once its replica has stopped."""
    replica = FakeReplica(stream('data: {"n": 1}\n\n', then=never))
    async with (
        door_before(replica, health_every_s=0.05) as (_, client),
        client.stream("POST", "/v1/completions", json={"prompt": "x"}) as answer,
    ):
        pieces = answer.aiter_raw()
        received = await anext(pieces)
        replica.hangs = True
        async for piece in pieces:
            received += piece
    assert b"replica_lost" in received


@in_loop
async def test_silence_ends_with_a_timeout():
    """Catches a request that outlives every limit at a replica whose health is well."""
    async with door_before(FakeReplica(never), FakeReplica(never), answer_timeout_s=0.1) as (_, client):
        assert error_of(await complete(client), 504) == "timeout"


# Headers, keys and the door's own addresses


@in_loop
async def test_headers_of_the_hop_stay_and_all_others_pass():
    """Catches a lost Authorization or opt-out, a request id that changes, and hop-by-hop headers that break framing."""

    async def script(exchange):
        await exchange.answer({"ok": 1}, **{"X-DVI-Drafter-Version": "4", "Keep-Alive": "timeout=1"})

    replica = FakeReplica(script)
    async with door_before(replica) as (_, client):
        headers = {
            "Authorization": "Bearer x", "X-DVI-Train": "false", "X-Request-Id": "mine-1", "Connection": "X-Secret",
            "X-Secret": "s", "TE": "trailers",
        }  # fmt: skip
        answer = await complete(client, headers=headers)
        got = replica.exchanges[0].headers
        assert (got["authorization"], got["x-dvi-train"], got["x-request-id"]) == ("Bearer x", "false", "mine-1")
        assert not {"x-secret", "te", "transfer-encoding"} & got.keys() and got["host"] == f"127.0.0.1:{replica.port}"
        assert answer.headers["x-dvi-drafter-version"] == "4" and answer.headers["x-request-id"] == "mine-1"
        assert "keep-alive" not in answer.headers and len(answer.headers.get_list("date")) == 1
        unnamed = await complete(client, headers={"X-Request-Id": "has a space"})
        assert len(unnamed.headers["x-request-id"]) == 32
        assert replica.exchanges[1].headers["x-request-id"] == unnamed.headers["x-request-id"]


@in_loop
async def test_the_door_is_no_way_round_the_checks(keys_file):
    """Catches a body, a key or a Host that a server would refuse, and an admin's address open to users."""
    replica = FakeReplica(say_hello)
    async with door_before(replica, access=load_access(keys_file), max_body_bytes=100) as (_, client):
        alice, ops = {"Authorization": f"Bearer {ALICE}"}, {"Authorization": f"Bearer {OPS}"}
        for path in ("/v1/models", "/metrics", "/dashboard", "/admin/versions", "/nowhere"):
            assert error_of(await client.get(path), 401) == "unauthorised"
            assert error_of(await client.get(path, headers={"Authorization": f"Bearer {MALLORY}"}), 401)
        assert "replicas" not in (await client.get("/health")).json()
        assert len((await client.get("/health", headers=alice)).json()["replicas"]) == 1
        assert error_of(await complete(client, "x" * 200, headers=alice), 413) == "too_large"
        assert error_of(await client.post("/v1/completions", content=b"{}", headers=alice), 415) == "invalid_request"
        assert error_of(await client.get("/admin/versions", headers=alice), 403) == "forbidden"
        assert not replica.exchanges
        assert (await client.get("/admin/versions", headers=ops)).status_code == 200
        assert (await complete(client, headers=alice)).status_code == 200
        # The replica has no keys, so only the door knows that nothing is to be learnt from alice.
        assert replica.exchanges[-1].headers["x-dvi-train"] == "false"
    async with door_before(FakeReplica()) as (_, client):
        assert error_of(await complete(client, headers={"Host": "evil.example"}), 403) == "wrong_host"
        assert error_of(await client.get("/nowhere"), 404) == "not_found"


@in_loop
async def test_forget_reaches_every_replica_and_says_where_it_did_not():
    """Catches experience that is still there although its owner was told it is gone."""

    async def forget(exchange):
        await exchange.answer({"positions": json.loads(exchange.body)["key"] == "alice"})

    replicas = [FakeReplica(forget), FakeReplica(forget), FakeReplica(forget)]
    async with door_before(*replicas) as (_, client):
        done = await client.post("/admin/forget", json={"key": "alice"})
        assert done.status_code == 200
        assert [one["answer"] for one in done.json()["replicas"]] == [{"positions": True}] * 3
        await replicas[1].stop()
        partly = await client.post("/admin/forget", json={"key": "alice"})
        assert error_of(partly, 502) == "not_all_replicas"
        assert [one["status"] for one in partly.json()["replicas"]] == [200, 502, 200]
        await replicas[1].start()
        for replica in replicas:
            replica.script = refuse(409, "conflict")
        assert error_of(await client.post("/admin/rollback", json={}), 409) == "not_all_replicas"


@in_loop
async def test_metrics_add_up_and_keep_what_a_lost_replica_has_counted():
    """Catches a sum that falls when a replica goes, figures read without the client's key, and the door's own lost."""
    running = "dvi:num_requests_running"
    text = f"# TYPE dvi:x_total counter\ndvi:x_total {{}}\n# TYPE {running} gauge\n{running} {{}}\n"
    one, two = FakeReplica(), FakeReplica()
    one.metrics, two.metrics = text.format(3, 1), text.format(4, 2)
    one.key = two.key = ALICE
    async with door_before(one, two, connect_timeout_s=1.0) as (door, client):
        headers = {"Authorization": f"Bearer {ALICE}"}
        lines = (await client.get("/metrics", headers=headers)).text.splitlines()
        assert {"dvi:x_total 7.0", "dvi:num_requests_running 3.0", 'dvi:replicas{state="healthy"} 2.0'} <= set(lines)
        assert error_of(await client.get("/metrics"), 401) == "unauthorised"  # also once they are known here
        await two.stop()
        await door.look_at(door.fleet.replicas[1])
        lines = (await client.get("/metrics", headers=headers)).text.splitlines()
        assert {"dvi:x_total 7.0", "dvi:num_requests_running 1.0", 'dvi:replicas{state="down"} 1.0'} <= set(lines)
        await two.start()


@in_loop
async def test_replicas_with_keys_tell_their_load_to_the_polling_key():
    """Catches polls without a key, after which the door sees only its own requests."""
    replica = FakeReplica()
    replica.metrics, replica.key = "dvi:num_requests_running 5.0\n", ALICE
    async with door_before(replica, polling_key=ALICE) as (door, _):
        assert door.fleet.replicas[0].load == 5
    async with door_before(FakeReplica(), polling_key=None) as (door, _):
        assert door.fleet.replicas[0].load == 0


@in_loop
async def test_the_page_shows_every_replica_and_runs_nothing_it_is_told():
    """Catches a replica that writes scripts into the page."""
    replica = FakeReplica()
    replica.health = {"status": "ok", "learner": "<script>alert(1)</script>", "drafter_version": 12}
    async with door_before(replica) as (_, client):
        page = await client.get("/dashboard")
        assert page.status_code == 200 and "<script>" not in page.text and "&lt;script&gt;" in page.text
        assert f'href="{replica.url}/dashboard"' in page.text and "<td>12</td>" in page.text
        assert "script-src" not in page.headers["content-security-policy"]


@pytest.mark.parametrize("replicas", [(), ("http://a", "http://a"), ("ftp://a",), ("http://user:secret@a",), ("a:1",)])
def test_replicas_that_cannot_be_are_refused(replicas):
    """Catches a door that starts and then never finds anybody."""
    with pytest.raises(ValueError, match=r"try http://127\.0\.0\.1:8001"):
        RouteSettings(replicas)


def test_a_door_without_keys_is_for_this_machine(monkeypatch):
    """Catches an open door on the network."""
    monkeypatch.delenv("DVI_API_KEY", raising=False)
    monkeypatch.delenv("DVI_ADMIN_KEY", raising=False)
    with pytest.raises(ValueError, match=r"host 0.0.0.0 can be reached .* give --keys-file"):
        run_front_door(RouteSettings(URLS, host="0.0.0.0", port=0))


# With real servers


@pytest.fixture(scope="module")
def real_door():
    """(URL of a door, the loops behind it): two real servers, each with the tiny model."""
    config = stories_config()
    with (
        stories_loop(config) as one, stories_loop(config) as two,
        listening(one, config) as first, listening(two, config) as second, open_socket("127.0.0.1", 0) as listener,
    ):  # fmt: skip
        settings = RouteSettings((first, second), drain_s=1.0)
        server = DoorServer(FrontDoor(settings, Access()), settings)
        is_listening = threading.Event()
        server.on_listening = is_listening.set
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
        thread.start()
        try:
            assert is_listening.wait(10)
            yield url_of(listener), (one, two)
        finally:
            server.should_exit = True
            thread.join(10)


def test_the_openai_client_sees_one_server(real_door):
    """Catches anything on the way that a client notices: answers, streams, usage, errors, models."""
    url, loops = real_door
    (expected,) = loops[0].engine.speculator.generate("Once upon", SamplingParams(max_new_tokens=12))
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        for _ in range(4):
            answer = client.completions.create(model="stories260k", prompt="Once upon", max_tokens=12)
            assert answer.choices[0].text == expected.text and answer.usage.completion_tokens == 12
            chunks = list(client.completions.create(
                model="stories260k", prompt="Once upon", max_tokens=12, stream=True,
                stream_options={"include_usage": True},
            ))  # fmt: skip
            assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected.text
            assert chunks[-1].usage.completion_tokens == 12
        chat = client.chat.completions.create(
            model="stories260k", messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert chat.choices[0].message.role == "assistant"
        assert [model.id for model in client.models.list()] == ["stories260k"]
        with pytest.raises(openai.BadRequestError, match="max_tokens"):
            client.completions.create(model="stories260k", prompt="x", max_tokens=100_000)
    assert all(loop.monitor.readings(with_history=False).total.finished["length"] > 0 for loop in loops)


def test_acceptance_of_the_sums_is_accepted_over_drafted(real_door):
    """Catches a mean of the replicas' rates, which counts an idle replica as much as a busy one."""
    url, loops = real_door
    for prompt, max_tokens in (("Once upon", 30), ("The cat", 4)):
        httpx2.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": max_tokens}).raise_for_status()
    families = text_string_to_metric_families(httpx2.get(f"{url}/metrics").text)
    values = {sample.name: sample.value for family in families for sample in family.samples if not sample.labels}
    rounds = [loop.monitor.readings(with_history=False).total.rounds for loop in loops]
    drafted, accepted = sum(r.num_drafted for r in rounds), sum(r.num_accepted for r in rounds)
    assert drafted > 0 and values["dvi:spec_decode_num_draft_tokens_total"] == drafted
    acceptance = values["dvi:spec_decode_num_accepted_tokens_total"] / values["dvi:spec_decode_num_draft_tokens_total"]
    assert acceptance == accepted / drafted


