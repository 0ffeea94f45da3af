"""The front door's page: how the replicas are, and what they have done together since they were started.

Knows replicas and combined figures; a page without scripts that the browser asks for again every few seconds.
"""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Iterable, Sequence

from prometheus_client.core import Metric

from dvi.serving.aggregation import total
from dvi.serving.metrics.figures import ratio
from dvi.serving.replicas import Replica

REFRESH_S = 5
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; margin: 0 0 2rem; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid #ccc; }
.healthy { color: #17692f; } .draining { color: #8a5a00; } .down { color: #b3261e; font-weight: bold; }
"""
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def front_page(replicas: Sequence[Replica], families: Iterable[Metric]) -> str:
    """HTML. families: as `dvi.serving.aggregation.combine` gives them."""
    families = list(families)
    figures = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in _figures(families))
    rows = "".join(_row(replica) for replica in replicas)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>dvi: {len(replicas)} replicas</title>'
        f'<meta http-equiv="refresh" content="{REFRESH_S}"><style>{STYLE}</style></head><body>'
        f"<h1>{len(replicas)} replicas</h1><table><thead><tr><th>replica</th><th>state</th><th>learner</th>"
        f"<th>drafter version</th><th>load</th><th>figures</th></tr></thead><tbody>{rows}</tbody></table>"
        f"<h2>Together</h2><table><tbody>{figures}</tbody></table></body></html>"
    )


def _row(replica: Replica) -> str:
    # What a replica says of itself is its word, not ours.
    learner, version = (html.escape(str(replica.health.get(name, "-"))) for name in ("learner", "drafter_version"))
    url = html.escape(replica.url, quote=True)
    return (
        f'<tr><td>{html.escape(replica.name)}</td><td class="{replica.state}">{replica.state}</td><td>{learner}</td>'
        f'<td>{version}</td><td>{replica.load}</td><td><a href="{url}/dashboard">its dashboard</a></td></tr>'
    )


def _figures(families: list[Metric]) -> Iterable[tuple[str, str]]:
    drafted = total(families, "dvi:spec_decode_num_draft_tokens_total")
    accepted = total(families, "dvi:spec_decode_num_accepted_tokens_total")
    rounds = total(families, "dvi:spec_decode_num_drafts_total")
    acceptance = ratio(accepted, drafted)
    yield "acceptance", "-" if acceptance is None else f"{100 * acceptance:.1f} %"
    yield "mean accepted tokens", f"{1 + accepted / rounds:.2f}" if rounds else "-"
    waived = total(families, "dvi:spec_decode_num_waived_tokens_total")
    if waived:
        yield "accepted by a lossy rule alone", f"{waived:.0f}"
    for name, what in (
        ("dvi:generation_tokens_total", "generated tokens"), ("dvi:request_success_total", "ended requests"),
        ("dvi:num_requests_running", "running"), ("dvi:num_requests_waiting", "waiting"),
    ):  # fmt: skip
        yield what, f"{total(families, name):.0f}"
