"""What the command line asks of a running server.

Knows addresses, keys and answers; imports nothing heavy.
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from dvi.serving.access import ADMIN_KEY_VARIABLE


def ask_to_save(url: str, name: str, *, overwrite: bool = False) -> dict[str, Any]:
    """Has a server save its drafter: {name, folder (on the server), version}. Its key comes from DVI_ADMIN_KEY.

    overwrite: an adapter of that name may lose its place. Raises ValueError for what the server refuses, and where no
    server answers.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"the server's URL must begin with http:// or https://, got {url!r}; try http://127.0.0.1:8000")
    body, headers = json.dumps({"name": name, "overwrite": overwrite}).encode(), {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url.rstrip('/')}/admin/save", body, headers)
    if ADMIN_KEY_VARIABLE in os.environ:  # unredirected: a redirect may lead to somebody else
        request.add_unredirected_header("Authorization", f"Bearer {os.environ[ADMIN_KEY_VARIABLE]}")
    try:
        with urllib.request.urlopen(request) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            answer = error.read().decode("utf-8", "replace")
        try:
            answer = json.loads(answer)["error"]["message"]
        except (ValueError, LookupError, TypeError):  # somebody else's error
            answer = answer[:300]
        raise ValueError(f"{url} answers {error.code}: {answer}") from None
    except urllib.error.URLError as error:
        raise ValueError(f"{url} must be the address of a running server: {error.reason}") from error
