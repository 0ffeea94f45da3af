"""One request passed on to a replica, and the answer passed back as it comes.

Knows HTTP, OpenAI's errors and which replica may be asked; nothing of models. A request is sent once more, to another
replica, only while its client has not got a byte; from then on what goes wrong is told in the answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import re
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2
from fastapi import Request, Response
from pydantic_core import from_json
from starlette.types import Receive, Scope, Send

from dvi.serving.protocol import ADAPTERS_HEADER, TRAIN_HEADER, ApiError
from dvi.serving.replicas import Fleet, Replica

CONVERSATION_HEADER, REQUEST_HEADER, REPLICA_HEADER = "x-conversation-id", "x-request-id", "x-dvi-replica"
MAX_ATTEMPTS = 3
MAX_DEATHS = 2  # of replicas that were lost with the request in hand: it may be the request that kills them
MIN_STICKY_CHARS = 240  # about a chunk of the prefix cache: of less there is nothing to find again
TOKEN_CHARS = 4  # of a prompt given as token ids

_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
_OF_THIS_HOP = _HOP_BY_HOP | {"host", "content-length", "accept-encoding", "expect"}
_OF_THAT_HOP = _HOP_BY_HOP | {"date", "server"}
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Refused(Exception):
    """A replica did not take the request up. response: its 429, which is the client's when nobody has room."""

    def __init__(self, reason: str, response: Response | None = None) -> None:
        super().__init__(reason)
        self.response = response


class Died(Exception):
    """A replica was lost with the request in hand, before the client had anything."""


@dataclass(frozen=True)
class Message:
    """A request as any replica gets it. headers: names in small letters; path: with a slash before it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def to(self, url: str, client: httpx2.AsyncClient) -> httpx2.Request:
        return client.build_request(self.method, url + self.path, headers=self.headers, content=self.body or None)


def message_of(request: Request, body: bytes = b"") -> Message:
    """What is sent on of a request that was let in: all but this hop's headers, with a request id.

    What a key may not do is said in headers, for replicas that have no keys of their own.
    """
    dropped = {name.strip().lower() for name in request.headers.get("connection", "").split(",")} | _OF_THIS_HOP
    headers = {name: value for name, value in request.headers.items() if name not in dropped}
    if not _REQUEST_ID.fullmatch(headers.get(REQUEST_HEADER, "")):
        headers[REQUEST_HEADER] = uuid.uuid4().hex
    headers["accept-encoding"] = "identity"  # events are read here
    key = request.scope["state"]["key"]
    if not key.may_train:
        headers[TRAIN_HEADER.lower()] = "false"
    if key.adapters is not None:
        headers[ADAPTERS_HEADER.lower()] = ",".join(sorted(key.adapters))
    return Message(request.method, request.scope["raw_path"].decode("latin-1"), headers, body)


def conversation_of(body: bytes, headers: Mapping[str, str]) -> str | None:
    """A name for the conversation that a request goes on with, so that it finds its beginning in a prefix cache.

    Of the header X-Conversation-Id, or else of how the text begins: a chat up to its first message of a user, a prompt
    with its first MIN_STICKY_CHARS characters. None where the text is too short for a prefix cache. Different API keys
    never share a conversation, as they share no prefixes.
    """
    name: Any = headers.get(CONVERSATION_HEADER)
    if name is None:
        try:
            name = _beginning(from_json(body))
        except ValueError:
            return None  # the replica says what is wrong with it
    if name is None:
        return None
    return hashlib.sha256(json.dumps([headers.get("authorization"), name]).encode()).hexdigest()


def _beginning(content: Any) -> Any:
    if not isinstance(content, dict):
        return None
    messages, prompt = content.get("messages"), content.get("prompt")
    if isinstance(messages, list):
        if len(json.dumps(messages)) < MIN_STICKY_CHARS:
            return None
        is_user = [isinstance(message, dict) and message.get("role") == "user" for message in messages]
        return messages[: is_user.index(True) + 1] if any(is_user) else messages[:1]
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        prompt = prompt[0]  # of several prompts, the first speaks for all
    num_needed = MIN_STICKY_CHARS // TOKEN_CHARS if isinstance(prompt, list) else MIN_STICKY_CHARS
    return prompt[:num_needed] if isinstance(prompt, str | list) and len(prompt) >= num_needed else None


class Relay(Response):
    """The answer of a replica, asked for when this is sent.

    on_retry  told why a request had to go to one more replica: "unreachable", "full", "unavailable" or "died".
    again_s   after so long a client may try again when no replica takes its request.
    """

    def __init__(
        self, message: Message, conversation: str | None, *, fleet: Fleet, client: httpx2.AsyncClient,
        on_retry: Callable[[str], None], again_s: float,
    ) -> None:
        self._message, self._conversation, self._fleet, self._client = message, conversation, fleet, client
        self._on_retry, self._again_s = on_retry, again_s
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({answering, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            is_cut_off = answering.cancel()  # closes the connection, and so the replica gives the request up
        await asyncio.wait({answering})
        if not is_cut_off:
            answering.result()

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Tries one replica after another until the client gets something. Raises ApiError where it gets nothing."""
        tried: list[Replica] = []
        reason, refusal, num_deaths = "", None, 0
        while len(tried) < MAX_ATTEMPTS and num_deaths < MAX_DEATHS:
            replica = self._fleet.choose(self._conversation, without=tried)
            if replica is None:
                break
            if reason:
                self._on_retry(reason)
            tried.append(replica)
            try:
                return await self._relay(replica, send)
            except Refused as refused:
                reason, refusal = str(refused), refused.response or refusal
            except Died:
                reason, num_deaths = "died", num_deaths + 1
        if num_deaths:
            raise ApiError(502, "the replicas that had this request were lost; try again", code="replica_lost")
        if refusal is not None:
            return await refusal(scope, receive, send)
        headers = {"Retry-After": str(math.ceil(self._again_s))}
        raise ApiError(503, "no replica takes requests now; try again", code="no_replica", headers=headers)

    async def _relay(self, replica: Replica, send: Send) -> None:
        """One replica's whole answer. While the client has nothing: raises Refused, Died, or ApiError for a 504."""
        has_begun = False

        async def pass_back(content: bytes, *, status: int = 200, head: dict[str, str] | None = None) -> None:
            nonlocal has_begun
            if not has_begun:
                has_begun = True
                headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in (head or {}).items()]
                await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": content, "more_body": True})

        try:
            async with replica.flight(), self._ask(replica) as response:
                head = self._head(replica, response)
                if response.status_code == 429:
                    raise Refused("full", Response(await _whole(response), 429, head))
                if response.status_code == 503:
                    raise Refused("unavailable")
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    async for events in _events(response.aiter_raw()):
                        await pass_back(events, status=response.status_code, head=head)
                else:
                    await pass_back(await _whole(response), status=response.status_code, head=head)
        except (httpx2.ConnectError, httpx2.ConnectTimeout):
            replica.refused_connection()
            raise Refused("unreachable") from None
        except httpx2.ReadTimeout:
            error = ApiError(504, "the replica does not answer", code="timeout")
            if not has_begun:
                raise error from None
            await pass_back(_event(error))
        except (httpx2.TransportError, TimeoutError):
            if not has_begun:
                raise Died from None
            await pass_back(_event(ApiError(502, "the replica was lost; try again", code="replica_lost")))
        await send({"type": "http.response.body", "body": b""})

    @contextlib.asynccontextmanager
    async def _ask(self, replica: Replica) -> AsyncIterator[httpx2.Response]:
        response = await self._client.send(self._message.to(replica.url, self._client), stream=True)
        try:
            yield response
        finally:
            await response.aclose()

    def _head(self, replica: Replica, response: httpx2.Response) -> dict[str, str]:
        kept = {name: value for name, value in response.headers.items() if name not in _OF_THAT_HOP}
        return kept | {REQUEST_HEADER: self._message.headers[REQUEST_HEADER], REPLICA_HEADER: str(replica.number)}


async def _whole(response: httpx2.Response) -> bytes:
    return b"".join([chunk async for chunk in response.aiter_raw()])


async def _events(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Whole events, as soon as they are whole: one that is torn when its replica dies would spoil the next."""
    held = b""
    async for chunk in chunks:
        whole, end, held = (held + chunk).rpartition(b"\n\n")
        if whole:
            yield whole + end
    if held:
        yield held


def _event(error: ApiError) -> bytes:
    return f"data: {json.dumps(error.body)}\n\n".encode()


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
