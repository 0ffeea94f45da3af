"""What a server and a front door agree on beside OpenAI's API: errors, headers, and how long an action may take.

Imports nothing heavy: a front door is up at once.
"""

from __future__ import annotations

from typing import Any

TRAIN_HEADER = "X-DVI-Train"
ADAPTERS_HEADER = "X-DVI-Adapters"  # names, with commas between: this request may use these alone
ADMIN_TIMEOUT_S = 120.0  # an action waits for the round, and a large drafter for its disk


class ApiError(Exception):
    """An answer other than 2xx: OpenAI's error object. `code` also names the reason in the metrics."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers

    @property
    def body(self) -> dict[str, Any]:
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(message: str, *, param: str | None = None, status: int = 400) -> ApiError:
    return ApiError(status, message, code="invalid_request", param=param)
