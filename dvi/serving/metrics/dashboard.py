"""The dashboard: one self-contained page, and the figures that it asks for every second.

Knows the monitor's snapshot and what the engine loop says of itself; computes nothing.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.responses import HTMLResponse, JSONResponse

from dvi.serving.metrics.figures import printable
from dvi.serving.metrics.headline import headline

if TYPE_CHECKING:
    from dvi.serving.loop import EngineLoop

PAGE = resources.files("dvi.serving.metrics").joinpath("dashboard.html").read_text(encoding="utf-8")


def routes(loop: EngineLoop) -> APIRouter:
    """GET /dashboard and GET /dashboard/data. Who may read them is for the application to say."""
    router = APIRouter()

    @router.get("/dashboard", include_in_schema=False)
    def page() -> HTMLResponse:
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    # Not async: a snapshot is made in a worker thread, beside the event loop that streams answers.
    @router.get("/dashboard/data", include_in_schema=False)
    def data() -> JSONResponse:
        return JSONResponse(status(loop), headers={"Cache-Control": "no-store"})

    return router


def status(loop: EngineLoop) -> dict:
    """The monitor's snapshot, its "headline", and "state": how the server is, as "level" ("good", "warn" or "bad") and
    "text".
    """
    snapshot = loop.monitor.snapshot()
    level, text = _state(loop, snapshot)
    return snapshot | {
        "headline": headline(snapshot, has_learner=loop.learner is not None),
        "state": {"level": level, "text": printable(text, max_length=200)},
    }


def _state(loop: EngineLoop, snapshot: dict) -> tuple[str, str]:
    """The gravest thing comes first."""
    update = snapshot["update"]
    if not loop.is_alive:
        return "bad", "the engine has stopped"
    if loop.learner_error is not None:
        return "bad", f"serving, but learning has stopped: {loop.learner_error}"
    if loop.is_draining:
        return "warn", "draining: takes no more requests"
    if loop.is_pinned:
        return "warn", f"serving, pinned to v{snapshot['drafter_version']}"
    if loop.learner is None:
        return "good", "serving, learning is off"
    if update is None:
        return "good", "serving, gathering experience" if snapshot["total"]["num_rounds"] else "waiting for traffic"
    return "good", f"serving and learning: {update['phase']}, step {update['step']}"


def _policy(page: str) -> str:
    """A Content-Security-Policy by which only this page's own style and script work, and only this server is asked."""
    sources = {}
    for tag in ("style", "script"):
        text = re.search(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        sources[tag] = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return (
        f"default-src 'none'; style-src 'sha256-{sources['style']}'; script-src 'sha256-{sources['script']}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


PAGE_HEADERS = {
    "Content-Security-Policy": _policy(PAGE),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
