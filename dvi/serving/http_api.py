"""The HTTP application: OpenAI's endpoints, health and metrics.

Ties bodies, prompts, the engine loop and replies together. Nothing a client sends reaches the engine before it is
checked, and nothing is learnt from a request that may not be. Errors have OpenAI's shape, whatever raised them.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dvi.serving.access import Access, ApiKey
from dvi.serving.admin_api import admin_routes
from dvi.serving.api_schema import (
    ChatBody,
    CompletionBody,
    GenerationBody,
    check_limits,
    draft_choice,
    new_tokens,
    refusal,
    sampling_params,
)
from dvi.serving.body_reading import parse_body
from dvi.serving.loop import EngineLoop
from dvi.serving.metrics.dashboard import routes as dashboard_routes
from dvi.serving.metrics.prometheus import exposition
from dvi.serving.middleware import Middleware, error_response, read_body, routing_error
from dvi.serving.model_names import ModelNames, last_part
from dvi.serving.prompts import PromptEncoder
from dvi.serving.protocol import ADAPTERS_HEADER, TRAIN_HEADER, ApiError
from dvi.serving.replies import Reply
from dvi.serving.request import DEFAULT_DRAFTER, Draining, QueueFull, RequestOutput, Timeouts
from dvi.serving.request import Request as EngineRequest
from dvi.serving.token_texts import TokenTexts
from dvi.serving.turns import Turns
from dvi.settings import ServeConfig
from dvi.software import VERSION

T = TypeVar("T")
Encoder = Callable[[], list[int]]

VERSION_HEADER, LEVEL_HEADER, RULE_HEADER = "X-DVI-Drafter-Version", "X-DVI-Level", "X-DVI-Verify-Rule"
POLL_S = 1.0  # how late a dead or hanging engine may be noticed
GRACE_S = 5.0  # the engine ends late requests itself; where it hangs, the door does so much later


def build_app(loop: EngineLoop, config: ServeConfig, access: Access) -> FastAPI:
    """The application over a started loop. Closing that is its owner's business, and so is `app.state.tokenising`.

    Raises ValueError where the model has no tokenizer.
    """
    api = _Api(loop, config)
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(
        Middleware, access=access, max_body_bytes=config.serve.max_body_bytes, on_rejected=api.on_rejected
    )
    app.add_exception_handler(ApiError, error_response)
    app.add_exception_handler(HTTPException, routing_error)
    app.state.tokenising = api.tokenising
    app.include_router(api.routes())
    app.include_router(admin_routes(loop, config, access))
    app.include_router(dashboard_routes(loop))
    return app


class _Api:
    def __init__(self, loop: EngineLoop, config: ServeConfig) -> None:
        self._loop, self._config = loop, config
        speculator = loop.engine.speculator
        if speculator.tokenizer is None:
            raise ValueError(f"{config.model.path} has no tokenizer; a server needs one")
        limits = loop.engine.scheduler.limits
        self._vocab_size = speculator.split.vocab_size
        self._context = min(speculator.max_positions, limits.max_positions - limits.headroom)
        max_tokens = min(config.serve.max_prompt_tokens or self._context, self._context - 1)
        self._encoder = PromptEncoder(
            speculator.tokenizer, vocab_size=speculator.split.num_input_ids, max_tokens=max_tokens
        )
        # A message is a token at least. What is a little too long is refused with better words later.
        self._max_items = max(max_tokens, config.serve.max_prompts) + 100
        self._tokens = TokenTexts(speculator.tokenizer)
        self._names = ModelNames(
            config.serve.model_name or last_part(config.model.path), config.model.path, created_s=int(time.time())
        )
        # One thread: text is tokenised beside the event loop, and a flood of long prompts takes one core at most. More
        # pieces than the engine has places would find none there either.
        self.tokenising = Turns("tokenise", max_waiting=limits.max_rows + limits.max_waiting)

    def on_rejected(self, code: str) -> None:
        if code != "cancelled":  # its client has left, or the server stops: it was let in
            self._loop.monitor.on_rejected(code)

    def routes(self) -> APIRouter:
        router = APIRouter()
        router.add_api_route("/v1/completions", self.completions, methods=["POST"], response_model=None)
        router.add_api_route("/v1/chat/completions", self.chat_completions, methods=["POST"], response_model=None)
        router.add_api_route("/v1/models", self.models, methods=["GET"])
        router.add_api_route("/v1/models/{model_id:path}", self.model, methods=["GET"])
        router.add_api_route("/version", self.version, methods=["GET"])
        router.add_api_route("/health", self.health, methods=["GET"], response_model=None)
        router.add_api_route("/metrics", self.metrics, methods=["GET"], response_model=None)
        return router

    # Endpoints

    async def completions(self, request: Request) -> Response:
        content, arrived_s = await read_body(request), time.perf_counter()
        body = parse_body(content, CompletionBody, max_items=self._max_items)
        check_limits(body, self._config.serve, vocab_size=self._vocab_size)
        encoders = [functools.partial(self._encoder.encode_at, body.prompts, i) for i in range(len(body.prompts))]
        return await self._answer(request, body, encoders, arrived_s)

    async def chat_completions(self, request: Request) -> Response:
        content, arrived_s = await read_body(request), time.perf_counter()
        body = parse_body(content, ChatBody, max_items=self._max_items)
        check_limits(body, self._config.serve, vocab_size=self._vocab_size)
        chat = [(message.role, message.text) for message in body.messages]
        return await self._answer(request, body, [functools.partial(self._encoder.encode_chat, chat)], arrived_s)

    async def models(self, request: Request) -> dict[str, Any]:
        return {"object": "list", "data": self._names.listing(self._adapters(request))}

    async def model(self, request: Request, model_id: str) -> dict[str, Any]:
        try:
            return self._names.entry(model_id, self._adapters(request))
        except ValueError as error:
            raise _no_model(error) from None

    async def version(self) -> dict[str, Any]:
        return {"version": VERSION}

    async def health(self) -> JSONResponse:
        """Open to everybody, so it tells states and no reasons."""
        loop = self._loop
        is_learner_well = loop.learner_error is None
        status = "ok" if is_learner_well else "degraded"
        if not loop.is_alive:
            status = "dead"
        elif loop.is_draining:
            status = "draining"
        learner = "off" if loop.learner is None else "on" if is_learner_well else "dead"
        return JSONResponse(
            {
                "status": status, "learner": learner, "is_pinned": loop.is_pinned,
                "drafter_version": self._drafter_version(),
            },
            status_code=200 if status in ("ok", "degraded") else 503,
        )  # fmt: skip

    async def metrics(self) -> Response:
        return Response(exposition(self._loop.monitor), media_type=CONTENT_TYPE_LATEST)

    # From a body to an answer

    async def _answer(
        self, request: Request, body: GenerationBody, encoders: list[Encoder], arrived_s: float
    ) -> Response:
        """encoders: of each prompt. arrived_s: when the body was here; all limits of time count from then."""
        try:
            drafter = self._names.find(body.model or None, self._adapters(request))
        except ValueError as error:
            raise _no_model(error) from None
        gone = asyncio.create_task(_disconnect(request))
        try:
            prompts = await _unless(gone, self._encode(request, encoders, arrived_s))
            requests = self._requests(request, body, prompts, drafter, arrived_s)
            flight = Flight(self._loop, requests)
        except BaseException as error:
            gone.cancel()
            if isinstance(error, QueueFull):
                raise _queue_full(error) from None
            if isinstance(error, Draining):
                raise ApiError(503, str(error), code="draining") from None
            if isinstance(error, ValueError):
                raise refusal(error) from None
            raise
        gone.add_done_callback(lambda task: task.cancelled() or flight.cancel())
        reply = Reply(
            is_chat=isinstance(body, ChatBody), model=body.model or self._names.served,
            prompt_tokens=[len(ids) for ids in prompts], num_answers=body.num_answers,
            has_logprobs=body.num_logprobs is not None, tokens=self._tokens,
        )
        try:
            first = await anext(flight)  # before the status line: a request that got no token in time gets a 504
            if body.stream:
                headers = _stamps(vars(first[1])) | {"Cache-Control": "no-store"}
                return _EventStream(_events(reply, flight, first, wants_usage=body.wants_usage), flight, gone, headers)
            reply.take(*first)
            async for index, output in flight:
                reply.take(index, output)
        except BaseException:
            flight.cancel()
            gone.cancel()
            raise
        gone.cancel()
        content = reply.whole()
        return JSONResponse(content, headers=_stamps(content["metrics"]["speculative_decoding"]))

    async def _encode(self, request: Request, encoders: list[Encoder], arrived_s: float) -> list[list[int]]:
        """Token ids of each prompt, a turn for each."""
        tenant, limit_s = request.scope["state"]["key"].name, self._config.serve.queue_timeout_s
        try:
            async with asyncio.timeout(limit_s - (time.perf_counter() - arrived_s)):
                return [await self.tokenising.run(tenant, encode) for encode in encoders]
        except TimeoutError:
            raise ApiError(504, f"still queued after {limit_s:g} s, which is the limit", code="timeout") from None

    def _requests(
        self, request: Request, body: GenerationBody, prompts: list[list[int]], drafter: str, arrived_s: float
    ) -> list[EngineRequest]:
        limits, key = self._config.serve, request.scope["state"]["key"]
        room = self._context - max(map(len, prompts))
        max_new_tokens = new_tokens(body, self._config.sampling, cap=limits.max_new_tokens, room=room)
        params = sampling_params(body, self._config.sampling, max_new_tokens=max_new_tokens)
        choice = draft_choice(body, self._config.draft, drafter=drafter, has_plan=limits.has_bound)
        may_train = self._may_train(request, body, key)
        timeouts = Timeouts(limits.queue_timeout_s, limits.first_token_timeout_s, limits.total_timeout_s)
        ids = [self._loop.next_request_id() for _ in params]
        return [
            EngineRequest(
                request_id=ids[index], call_id=ids[0], prompt_ids=prompts[index // body.num_answers], params=one,
                tenant=key.name, draft=choice, num_logprobs=body.num_logprobs, may_train=may_train,
                domain=body.dvi.domain, timeouts=timeouts, arrived_s=arrived_s,
            )
            for index, one in enumerate(params)
        ]

    def _may_train(self, request: Request, body: GenerationBody, key: ApiKey) -> bool:
        """Whether the learner may see this request: the key, a header and the body can each say no."""
        # A header that we do not understand was meant to say something, and only "no" harms nobody.
        header = request.headers.get(TRAIN_HEADER, "true").strip().lower()
        is_wanted = key.may_train and header in ("true", "1") and body.dvi.train
        return is_wanted and random.random() < self._config.serve.learn_sample_rate

    def _adapters(self, request: Request) -> set[str]:
        """The loaded adapters that whoever asks may use: a key, and a front door's header, can each leave some out."""
        key: ApiKey = request.scope["state"]["key"]
        adapters = {name for name in set(self._loop.engine.drafters) - {DEFAULT_DRAFTER} if key.may_use(name)}
        header = request.headers.get(ADAPTERS_HEADER)
        return adapters if header is None else adapters & {name.strip() for name in header.split(",")}

    def _drafter_version(self) -> int:
        return self._loop.engine.drafters[DEFAULT_DRAFTER].version


def _queue_full(error: QueueFull) -> ApiError:
    seconds = max(1, round(error.retry_after_s))
    return ApiError(429, str(error), code="queue_full", headers={"Retry-After": str(seconds)})


def _no_model(error: ValueError) -> ApiError:
    return ApiError(404, str(error), code="model_not_found", param="model")


class Flight:
    """The requests of one HTTP call while the engine works on them: an iterator over (choice index, news).

    Ends when each has ended well. Raises ApiError for the first that does not, and when the engine dies or hangs.
    """

    def __init__(self, loop: EngineLoop, requests: list[EngineRequest]) -> None:
        """Submits them; raises what `EngineLoop.submit` raises."""
        self._engine_loop, self._event_loop = loop, asyncio.get_running_loop()
        self._news: asyncio.Queue[RequestOutput] = asyncio.Queue()
        self._open = {request.request_id: index for index, request in enumerate(requests)}
        self._deadline_s = requests[0].arrived_s + requests[0].timeouts.total_s + GRACE_S
        loop.submit(requests, self._on_output)

    @property
    def has_ended(self) -> bool:
        return not self._open

    def cancel(self) -> None:
        """Gives up what still runs. Nothing happens where nothing does."""
        if self._open:
            self._engine_loop.cancel(list(self._open))

    def __aiter__(self) -> Flight:
        return self

    async def __anext__(self) -> tuple[int, RequestOutput]:
        if self.has_ended:
            raise StopAsyncIteration
        output = await self._next_news()
        index = self._open[output.request_id]
        if output.finish_reason is not None:
            del self._open[output.request_id]
        if output.finish_reason == "timeout":
            raise ApiError(504, output.error or "the request took too long", code="timeout")
        if output.finish_reason == "displaced":
            raise _queue_full(QueueFull(self._engine_loop.engine.scheduler.retry_after_s))
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "the server failed; try again", code="engine_error")
        if output.finish_reason == "cancelled":
            raise ApiError(503, "the request was given up; the server is stopping", code="cancelled")
        return index, output

    async def _next_news(self) -> RequestOutput:
        while True:
            try:
                return await asyncio.wait_for(self._news.get(), POLL_S)
            except TimeoutError:
                if not self._engine_loop.is_alive:
                    raise ApiError(503, "the engine has died; see the server's log", code="engine_dead") from None
                if time.perf_counter() > self._deadline_s:
                    raise ApiError(504, "the engine does not answer", code="timeout") from None

    def _on_output(self, output: RequestOutput) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody is there to be told
            self._event_loop.call_soon_threadsafe(self._news.put_nowait, output)


class _EventStream(StreamingResponse):
    """Server-sent events; however the response ends, nothing of it goes on."""

    def __init__(
        self, events: AsyncIterator[str], flight: Flight, gone: asyncio.Task[None], headers: dict[str, str]
    ) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._flight, self._gone = flight, gone

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            self._flight.cancel()
            self._gone.cancel()


async def _events(
    reply: Reply, flight: Flight, first: tuple[int, RequestOutput], *, wants_usage: bool
) -> AsyncIterator[str]:
    """The stream's events. What goes wrong from here on is told in an event of its own, after which it ends."""
    try:
        for chunk in reply.opening():
            yield _event(chunk)
        news = first
        while news is not None:
            index, output = news
            chunk = reply.chunk(index, output, is_last=flight.has_ended and not wants_usage)
            if chunk is not None:
                yield _event(chunk | {"usage": None} if wants_usage else chunk)
            news = await anext(flight, None)
        if wants_usage:
            yield _event(reply.usage_chunk())
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield _event(error.body)


def _stamps(facts: dict[str, Any]) -> dict[str, str]:
    """Headers that say by what an answer came about."""
    return {
        VERSION_HEADER: str(facts["drafter_version"]), LEVEL_HEADER: facts["level"], RULE_HEADER: facts["verify_rule"]
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _disconnect(request: Request) -> None:
    """Returns when the client has gone, or has its answer."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Task[None], work: Coroutine[Any, Any, T]) -> T:
    """What the work gives. Once the client is gone it is given up, and this raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, task}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
