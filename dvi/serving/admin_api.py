"""The routes under /admin: drafter versions, adapters, the plan in force, checkpoints and forgetting.

Every one asks the engine loop and waits for its answer, so what is reported as done is done. What cannot be done is an
error with its reason.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable
from concurrent.futures import Future
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request

from dvi.serving.access import ADMIN_KEY_VARIABLE, Access, adapter_folder, check_name
from dvi.serving.api_schema import KeyBody, NameBody, SaveBody, VersionBody
from dvi.serving.body_reading import parse_body
from dvi.serving.loop import EngineLoop
from dvi.serving.middleware import read_body
from dvi.serving.protocol import ADMIN_TIMEOUT_S, ApiError, invalid
from dvi.serving.request import DEFAULT_DRAFTER, Draining
from dvi.settings import ServeConfig

T = TypeVar("T")


def admin_routes(loop: EngineLoop, config: ServeConfig, access: Access) -> APIRouter:
    """For keys with admin rights; on a server without keys, for everybody."""

    def need_admin(request: Request) -> None:
        if not access.has_admin:
            raise ApiError(
                403, f"this server has no admin key; set {ADMIN_KEY_VARIABLE} or admin: true in serve.keys_file",
                code="forbidden",
            )  # fmt: skip
        if not request.scope["state"]["key"].is_admin:
            raise ApiError(403, "this needs an admin key", code="forbidden")

    router = APIRouter(prefix="/admin", dependencies=[Depends(need_admin)])
    root = config.serve.adapters_folder

    @router.get("/versions")
    async def versions() -> dict[str, Any]:
        known = await _answer(loop.admin.versions())
        return {"versions": [dataclasses.asdict(version) for version in known], "is_pinned": loop.is_pinned}

    @router.post("/rollback")
    async def rollback(request: Request) -> dict[str, Any]:
        body = parse_body(await read_body(request), VersionBody)
        return dataclasses.asdict(await _answer(loop.admin.rollback(body.version)))

    @router.post("/pin")
    async def pin(request: Request) -> dict[str, Any]:
        body = parse_body(await read_body(request), VersionBody)
        return dataclasses.asdict(await _answer(loop.admin.pin(body.version)))

    @router.post("/unpin")
    async def unpin(request: Request) -> dict[str, Any]:
        await read_body(request)
        await _answer(loop.admin.unpin())
        return {"is_pinned": loop.is_pinned}

    @router.get("/plan")
    async def plan() -> dict[str, Any]:
        snapshot = loop.monitor.snapshot()
        return {"plan": snapshot["plan"], "replans": snapshot["replans"]}

    @router.get("/adapters")
    async def adapters() -> dict[str, Any]:
        drafters = dict(loop.engine.drafters)
        return {"adapters": [{"name": name, "version": drafters[name].version} for name in sorted(drafters)]}

    @router.post("/adapters")
    async def load(request: Request) -> dict[str, Any]:
        name = parse_body(await read_body(request), NameBody).name
        folder = _folder(root, name)
        if not folder.is_dir():
            raise ApiError(404, f"there is no adapter {name!r} in {root}", code="not_found", param="name")
        await _answer(loop.admin.load_adapter(name, folder))
        return {"name": name, "version": loop.engine.drafters[name].version}

    @router.delete("/adapters/{name}")
    async def unload(name: str) -> dict[str, Any]:
        _folder(root, name)
        if name not in loop.engine.drafters:
            raise ApiError(404, f"no adapter {name!r} is loaded", code="not_found", param="name")
        await _answer(loop.admin.unload_adapter(name))
        return {"name": name}

    @router.post("/save")
    async def save(request: Request) -> dict[str, Any]:
        body = parse_body(await read_body(request), SaveBody)
        name, folder = body.name, _folder(root, body.name)
        if folder.exists() and not body.overwrite:
            raise ApiError(
                409, f"there is an adapter {name!r} already in {root}; overwrite (dvi export --force) replaces it",
                code="conflict", param="name",
            )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        await _answer(loop.admin.save_adapter(folder))
        return {"name": name, "folder": str(folder), "version": loop.engine.drafters[DEFAULT_DRAFTER].version}

    @router.post("/forget")
    async def forget(request: Request) -> dict[str, Any]:
        body = parse_body(await read_body(request), KeyBody)
        try:
            tenant = body.key and check_name(body.key, what="key")  # "" is everybody's, where there are no keys
        except ValueError as error:
            raise invalid(str(error), param="key") from None
        num_positions = await _answer(loop.admin.forget(tenant))
        if config.output.save_replay and loop.learner is not None:
            await _answer(loop.learner.last_write)  # the files have forgotten only then
        return {"positions": num_positions}

    @router.post("/checkpoint")
    async def checkpoint(request: Request) -> dict[str, Any]:
        await read_body(request)
        if loop.learner is None:
            raise ApiError(409, "this server does not learn, so it has nothing to save", code="conflict")
        written = await _answer(loop.call(loop.learner.checkpoint))
        return {"folder": str(await _answer(written))}

    return router


def _folder(root: str, name: str) -> Any:
    try:
        return adapter_folder(root, name)
    except ValueError as error:
        raise invalid(str(error), param="name") from None


async def _answer(future: Future[T]) -> T:
    """What the engine's thread answers. A ValueError there is the state's no: 409; a refusing disk is 507."""
    try:
        answer: Awaitable[T] = asyncio.wrap_future(future)
        return await asyncio.wait_for(answer, ADMIN_TIMEOUT_S)
    except ValueError as error:
        raise ApiError(409, str(error), code="conflict") from None
    except Draining as error:
        raise ApiError(503, str(error), code="draining") from None
    except TimeoutError:
        raise ApiError(504, "the engine does not answer", code="timeout") from None
    except ConnectionError as error:
        raise ApiError(503, str(error), code="peer_lost") from None
    except OSError as error:
        raise ApiError(507, f"the disk refuses: {error}", code="storage") from None
