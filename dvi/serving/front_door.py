"""The front door: one HTTP address for several servers, as `dvi route`.

Who may come in, how the replicas are, their figures and their administration together; `dvi.serving.relay` passes the
requests on. Knows nothing of models. Keys, hosts and body sizes are checked as at a server, and each replica checks the
key again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import httpx2
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.exceptions import HTTPException

from dvi.serving import aggregation
from dvi.serving.access import API_KEY_VARIABLE, Access, is_loopback, load_access
from dvi.serving.connections import BoundedServer, http_options
from dvi.serving.front_page import PAGE_HEADERS, front_page
from dvi.serving.middleware import Middleware, error_response, read_body, routing_error
from dvi.serving.protocol import ADMIN_TIMEOUT_S, ApiError
from dvi.serving.relay import Message, Relay, conversation_of, message_of
from dvi.serving.replicas import Fleet, Replica
from dvi.serving.sockets import KEEP_ALIVE_S, MAX_HEADER_BYTES, open_socket, url_of
from dvi.settings import RouteSettings
from dvi.signals import SIGNAL_BASE
from dvi.software import VERSION
from dvi.terminal import say

OF_THE_DRAFTER = {"rollback", "pin", "unpin", "save"}  # actions that replicas which learn together do as one
IDLE_S = KEEP_ALIVE_S / 2  # the door closes idle connections before a replica does


class FrontDoor:
    """The application and what it knows of its replicas; `watching` keeps that up to date.

    polling_key  with which replicas are asked for their load; None: without one.
    """

    def __init__(self, settings: RouteSettings, access: Access, *, polling_key: str | None = None) -> None:
        self.fleet = Fleet(settings.replicas)
        self._retries: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._settings, self._access, self._polling_key = settings, access, polling_key
        # No proxies or passwords of the environment; as many connections as the door itself lets in.
        self._client = httpx2.AsyncClient(
            trust_env=False, follow_redirects=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_S),
            timeout=httpx2.Timeout(settings.answer_timeout_s, connect=settings.connect_timeout_s),
        )  # fmt: skip
        self.app = self._build()

    def _build(self) -> FastAPI:
        app = FastAPI(
            openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lambda _: self.watching()
        )
        app.add_middleware(
            Middleware, access=self._access, max_body_bytes=self._settings.max_body_bytes, on_rejected=self._on_rejected
        )
        app.add_exception_handler(ApiError, error_response)
        app.add_exception_handler(HTTPException, routing_error)
        for path in ("/v1/completions", "/v1/chat/completions"):
            app.add_api_route(path, self._generation, methods=["POST"], response_model=None)
        for path in ("/v1/models", "/v1/models/{model_id:path}"):
            app.add_api_route(path, self._pass_on, methods=["GET"], response_model=None)
        app.add_api_route("/version", self._version, methods=["GET"])
        app.add_api_route("/admin/{path:path}", self._admin, methods=["GET", "POST", "DELETE"], response_model=None)
        app.add_api_route("/health", self._health, methods=["GET"], response_model=None)
        app.add_api_route("/metrics", self._metrics, methods=["GET"], response_model=None)
        app.add_api_route("/dashboard", self._dashboard, methods=["GET"], response_model=None)
        return app

    def _on_rejected(self, code: str) -> None:
        self._rejected[code] += 1

    def _on_retry(self, reason: str) -> None:
        self._retries[reason] += 1

    # How the replicas are

    @contextlib.asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Looks at every replica once, and then again and again until the end."""
        async with self._client, asyncio.TaskGroup() as group:
            await asyncio.gather(*(self.look_at(replica) for replica in self.fleet.replicas))
            watches = [group.create_task(self._watch(replica)) for replica in self.fleet.replicas]
            try:
                yield
            finally:
                for watch in watches:
                    watch.cancel()

    async def _watch(self, replica: Replica) -> None:
        while True:
            await asyncio.sleep(self._settings.health_every_s)
            await self.look_at(replica)

    async def look_at(self, replica: Replica) -> None:
        """Asks a replica how it is, and for its load where it tells."""
        try:
            async with asyncio.timeout(self._settings.health_every_s):
                response = await self._client.get(f"{replica.url}/health")
                health = response.json()
                if not isinstance(health, dict):
                    raise ValueError("no server's health")
                is_draining = health.get("status") == "draining"
                replica.answered("healthy" if response.is_success else "draining" if is_draining else "down", health)
                if replica.state == "healthy":
                    await self._read_metrics(replica, self._polling_key and f"Bearer {self._polling_key}")
        except (TimeoutError, httpx2.TimeoutException):
            replica.missed()
        except (httpx2.RequestError, ValueError):  # or what answers there is no server
            replica.refused_connection()

    async def _read_metrics(self, replica: Replica, authorization: str | None) -> bool:
        """Whether the replica shows its figures to this key."""
        headers = {"Authorization": authorization} if authorization else {}
        asked_s = time.monotonic()
        response = await self._client.get(f"{replica.url}/metrics", headers=headers)
        if response.is_success:
            replica.take_metrics(response.text, asked_s=asked_s, answered_s=time.monotonic())
        return response.status_code not in (401, 403)

    # Passing on

    async def _generation(self, request: Request) -> Response:
        body = await read_body(request)
        return self._relay(message_of(request, body), conversation_of(body, request.headers))

    async def _pass_on(self, request: Request) -> Response:
        return self._relay(message_of(request), None)

    def _relay(self, message: Message, conversation: str | None) -> Relay:
        return Relay(
            message, conversation, fleet=self.fleet, client=self._client, on_retry=self._on_retry,
            again_s=self._settings.health_every_s,
        )  # fmt: skip

    # The door's own addresses

    async def _admin(self, request: Request) -> JSONResponse:
        """Asks every replica, or the first for all that learn together, and tells what each has answered."""
        if not request.scope["state"]["key"].is_admin:
            raise ApiError(403, "this needs an admin key", code="forbidden")
        body = await read_body(request) if request.method == "POST" else b""
        message = message_of(request, body)
        is_for_first = self._settings.learn_together and request.path_params["path"] in OF_THE_DRAFTER
        replicas = self.fleet.replicas[:1] if is_for_first else self.fleet.replicas
        answers = await asyncio.gather(*(self._ask(replica, message) for replica in replicas))
        statuses = {answer["status"] for answer in answers}
        num_done = sum(answer["status"] < 300 for answer in answers)
        if num_done == len(answers):
            return JSONResponse({"replicas": answers})
        error = ApiError(
            statuses.pop() if len(statuses) == 1 else 502,
            f"{num_done} of {len(answers)} replicas have done it; see replicas", code="not_all_replicas",
        )  # fmt: skip
        self._on_rejected(error.code)
        return JSONResponse(error.body | {"replicas": answers}, status_code=error.status)

    async def _ask(self, replica: Replica, message: Message) -> dict[str, Any]:
        try:
            async with asyncio.timeout(ADMIN_TIMEOUT_S + self._settings.connect_timeout_s):
                response = await self._client.send(message.to(replica.url, self._client))
            status, answer = response.status_code, response.json()
        except (httpx2.RequestError, TimeoutError, ValueError) as error:
            status, answer = 502, f"no answer: {type(error).__name__}"
        return {"replica": replica.number, "name": replica.name, "status": status, "answer": answer}

    async def _health(self, request: Request) -> JSONResponse:
        """Open to everybody; who has a key also learns how each replica is."""
        num_healthy = self.fleet.num_in("healthy")
        status = "down" if not num_healthy else "ok" if num_healthy == len(self.fleet.replicas) else "degraded"
        content: dict[str, Any] = {"status": status}
        if self._access.identify(request.headers.get("authorization")) is not None:
            content["replicas"] = [
                {"replica": r.number, "name": r.name, "state": r.state, "load": r.load, "health": r.health}
                for r in self.fleet.replicas
            ]
        return JSONResponse(content, status_code=200 if num_healthy else 503)

    async def _version(self) -> dict[str, str]:
        return {"version": VERSION}

    async def _metrics(self, request: Request) -> Response:
        families = await self._families(request.headers.get("authorization"))
        return Response(aggregation.expose([*families, *self._own_families()]), media_type=CONTENT_TYPE_LATEST)

    async def _dashboard(self, request: Request) -> HTMLResponse:
        families = await self._families(request.headers.get("authorization"))
        return HTMLResponse(front_page(self.fleet.replicas, families), headers=PAGE_HEADERS)

    async def _families(self, authorization: str | None) -> list[Metric]:
        """The replicas' figures together, those of healthy ones as they are now, asked for with the client's key.

        Raises ApiError where a replica refuses the key: what others have been shown is not for this client.
        """

        async def refresh(replica: Replica) -> None:
            is_allowed = True
            with contextlib.suppress(httpx2.RequestError, TimeoutError):
                async with asyncio.timeout(self._settings.health_every_s):
                    is_allowed = await self._read_metrics(replica, authorization)
            if not is_allowed:
                raise ApiError(
                    401, f"replica {replica.name} refuses this key; the door and all replicas must have the same keys",
                    code="unauthorised", headers={"WWW-Authenticate": 'Basic realm="dvi"'},
                )  # fmt: skip

        healthy = [replica for replica in self.fleet.replicas if replica.state == "healthy"]
        await asyncio.gather(*(refresh(replica) for replica in healthy))
        return aggregation.combine({r.name: (r.counts, r.state != "down") for r in self.fleet.replicas})

    def _own_families(self) -> list[Metric]:
        replicas = GaugeMetricFamily("dvi:replicas", "Replicas by state.", labels=["state"])
        for state in ("healthy", "draining", "down"):
            replicas.add_metric([state], self.fleet.num_in(state))
        flights = GaugeMetricFamily("dvi:front_door_requests", "Requests under way, by replica.", labels=["replica"])
        for replica in self.fleet.replicas:
            flights.add_metric([replica.name], replica.in_flight)
        families = [replicas, flights]
        for name, text, counts in (
            ("retries", "Requests sent to one more replica, by what became of them at the last one.", self._retries),
            ("rejected", "Requests that the front door itself refused or gave up.", self._rejected),
        ):
            family = CounterMetricFamily(f"dvi:front_door_{name}", text, labels=["reason"])
            for reason, count in counts.items():
                family.add_metric([reason], count)
            families.append(family)
        return families


class DoorServer(BoundedServer):
    """uvicorn over a front door. A first SIGTERM or SIGINT lets running answers end, a second one ends the process."""

    def __init__(self, door: FrontDoor, settings: RouteSettings) -> None:
        super().__init__(uvicorn.Config(
            door.app, ws="none", lifespan="on", log_config=None, access_log=False, server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S, h11_max_incomplete_event_size=MAX_HEADER_BYTES,
            timeout_graceful_shutdown=math.ceil(settings.drain_s),
            **http_options(settings.max_connections, descriptors_each=2),  # one to a replica beside each of a client
        ))  # fmt: skip
        self.on_listening: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.on_listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            os._exit(SIGNAL_BASE + sig)
        self.should_exit = True

    def end_with_parent(self) -> None:
        """Waits for the end of stdin, which comes however its writer ends, and ends `serve`."""
        sys.stdin.buffer.read()
        self.should_exit = True


def run_front_door(settings: RouteSettings, *, listener: socket.socket | None = None) -> None:
    """Serves until a signal ends it. Blocks; signals need the main thread.

    listener: what the process that started this one listens on, whose end, seen at stdin, is this one's end, too, and
    which speaks for both.
    DVI_API_KEY, where it is set, is the key with which replicas are asked for their load. Raises ValueError for a port
    in use, keys that cannot be read, and a host that strangers reach while there are no keys.
    """
    access = load_access(settings.keys_file)
    if access.is_open and not is_loopback(settings.host):
        raise ValueError(
            f"host {settings.host} can be reached from other machines and there is no API key; give --keys-file or set "
            f"{API_KEY_VARIABLE}, or try --host 127.0.0.1"
        )
    door = FrontDoor(settings, access, polling_key=os.environ.get(API_KEY_VARIABLE))
    server = DoorServer(door, settings)
    if listener is not None:
        threading.Thread(target=server.end_with_parent, name="parent", daemon=True).start()
        server.run(sockets=[listener])
        return
    with open_socket(settings.host, settings.port) as listener:
        url = url_of(listener)

        def announce() -> None:
            num_healthy, num_all = door.fleet.num_in("healthy"), len(settings.replicas)
            say(f"{num_healthy} of {num_all} replicas at {url}, figures at {url}/dashboard")

        server.on_listening = announce
        server.run(sockets=[listener])
