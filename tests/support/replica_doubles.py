"""Replicas without a model, whose every byte a test chooses, and a front door before them, in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import Callable

import httpx2

from dvi.serving.access import Access
from dvi.serving.front_door import DoorServer, FrontDoor
from dvi.serving.sockets import open_socket, url_of
from dvi.settings import RouteSettings

TIMEOUT_S = 20.0  # of a whole test: nothing that hangs survives


def in_loop(test: Callable) -> Callable:
    """An async test, run with a hard limit."""

    @functools.wraps(test)
    def run(*arguments, **options):
        async def limited():
            async with asyncio.timeout(TIMEOUT_S):
                await test(*arguments, **options)

        asyncio.run(limited())

    return run


class Exchange:
    """One request at a fake replica, and the means to answer it."""

    def __init__(self, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter) -> None:
        self.path, self.headers, self.body, self.writer = path, headers, body, writer

    async def answer(self, content: dict | str, *, status: int = 200, **headers: str) -> None:
        body = (content if isinstance(content, str) else json.dumps(content)).encode()
        kind = "text/plain" if isinstance(content, str) else "application/json"
        await self.write(self.head(status, {"Content-Type": kind, "Content-Length": str(len(body))} | headers) + body)

    async def begin_stream(self) -> None:
        await self.write(self.head(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"}))

    async def send_chunk(self, text: str) -> None:
        await self.write(b"%x\r\n%s\r\n" % (len(text.encode()), text.encode()))

    async def write(self, content: bytes) -> None:
        self.writer.write(content)
        await self.writer.drain()

    def die(self) -> None:
        """The connection is reset, as by a killed process."""
        self.writer.transport.abort()

    @staticmethod
    def head(status: int, headers: dict[str, str]) -> bytes:
        lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items()), "Connection: close"]
        return "\r\n".join([*lines, "", ""]).encode()


async def echo(exchange: Exchange) -> None:
    await exchange.answer({"path": exchange.path, "got": exchange.body.decode()})


class FakeReplica:
    """Speaks HTTP on a port of its own. script: what it does with a request that is not about itself."""

    def __init__(self, script=echo) -> None:
        self.script, self.exchanges = script, []
        self.health, self.health_status, self.metrics, self.key = {"status": "ok"}, 200, "", None
        self.hangs = False
        self.port, self._server, self._tasks = 0, None, set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listens, after a stop on the same port again."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._tasks.add(task := asyncio.current_task())
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._exchange(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", 0)))
        exchange = Exchange(first.split()[1], headers, body, writer)
        if self.hangs:
            await asyncio.Event().wait()
        if exchange.path == "/health":
            await exchange.answer(self.health, status=self.health_status)
        elif exchange.path == "/metrics":
            is_known = self.key is None or headers.get("authorization") == f"Bearer {self.key}"
            await exchange.answer(self.metrics if is_known else "", status=200 if is_known else 401)
        else:
            self.exchanges.append(exchange)
            await self.script(exchange)


@contextlib.asynccontextmanager
async def door_before(*replicas: FakeReplica, access: Access | None = None, polling_key: str | None = None, **settings):
    """(the door, a client of it). The door looks at its replicas once, and then only when told to, unless
    `health_every_s` says otherwise."""
    async with contextlib.AsyncExitStack() as stack:
        for replica in replicas:
            await replica.start()
            stack.push_async_callback(replica.stop)
        options = {"health_every_s": 60.0, "drain_s": 1.0} | settings
        chosen = RouteSettings(tuple(replica.url for replica in replicas), **options)
        door = FrontDoor(chosen, access or Access(), polling_key=polling_key)
        client = await stack.enter_async_context(serving(door, chosen))
        yield door, client


@contextlib.asynccontextmanager
async def serving(door: FrontDoor, settings: RouteSettings):
    with open_socket("127.0.0.1", 0) as listener:
        server, is_listening = DoorServer(door, settings), asyncio.Event()
        server.on_listening = is_listening.set
        task = asyncio.create_task(server.serve([listener]))
        await is_listening.wait()
        limits = httpx2.Limits(max_connections=None)
        try:
            async with httpx2.AsyncClient(base_url=url_of(listener), verify=False, limits=limits) as client:
                yield client
        finally:
            server.should_exit = True
            await task
