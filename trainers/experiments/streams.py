"""Streams of real prompts by domain: which requests come in which phase.

Knows prompt files and names; decodes nothing.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import dvi.bench
from dvi.traffic import Messages, read_prompts

BUNDLED = Path(dvi.bench.__file__).parent / "data" / "streams"
MIXED = "mixed"  # a stream of all domains at once, and the name of all their prompts together
NUM_MIXED_PHASES = 3  # it is as long as so many phases of the others


@dataclass(frozen=True)
class Phase:
    """Traffic of one domain, or of all for MIXED."""

    domain: str
    num_requests: int


@dataclass(frozen=True)
class Stream:
    """Phases one after another; the name is part of file names."""

    name: str
    phases: tuple[Phase, ...]

    @property
    def num_requests(self) -> int:
        return sum(phase.num_requests for phase in self.phases)

    @property
    def domains(self) -> list[str]:
        """Each once, in the order they come."""
        return list(dict.fromkeys(phase.domain for phase in self.phases))

    def alone(self, domain: str) -> Stream:
        """As many requests of one domain: what it converges to. A stream of nothing else is that itself."""
        phases = (Phase(domain, self.num_requests),)
        return self if phases == self.phases else Stream(f"converged-{domain}-{self.num_requests}", phases)


def parse_stream(text: str, *, phase_requests: int, domains: dict[str, Path]) -> Stream:
    """The stream that "math,medical,math" or "mixed" names. Raises ValueError for names not among `domains`."""
    names = [name.strip() for name in text.split(",")]
    if names == [MIXED]:
        return Stream(MIXED, (Phase(MIXED, NUM_MIXED_PHASES * phase_requests),))
    unknown = [name for name in names if name not in domains]
    if unknown:
        raise ValueError(
            f"a stream must be {MIXED!r} or domains of {', '.join(sorted(domains))}, got {unknown[0]!r} in {text!r}; "
            "data adds a folder of DOMAIN.jsonl files"
        )
    return Stream("-".join(names), tuple(Phase(name, phase_requests) for name in names))


def domain_files(data: Path | None) -> dict[str, Path]:
    """Prompt files by domain. Raises ValueError when the folder holds none."""
    added = {} if data is None else {path.stem: path for path in sorted(data.glob("*.jsonl"))}
    if data is not None and not added:
        raise ValueError(f"data must be a folder of DOMAIN.jsonl files, got {data} without any")
    return {path.stem: path for path in sorted(BUNDLED.glob("*.jsonl"))} | added


def read_phases(stream: Stream, files: dict[str, Path], *, shuffle_seed: int | None) -> list[list[Messages]]:
    """The requests of each phase: a domain that returns goes on with rows that were not served yet.

    Raises ValueError when a domain has fewer rows than the stream asks of it.
    """
    rows = {
        domain: iter(read_prompts(paths_of(domain, files), split="traffic", shuffle_seed=_seed(domain, shuffle_seed)))
        for domain in stream.domains
    }
    phases = [list(itertools.islice(rows[phase.domain], phase.num_requests)) for phase in stream.phases]
    for domain in stream.domains:
        wanted = sum(phase.num_requests for phase in stream.phases if phase.domain == domain)
        found = sum(len(rows) for rows, phase in zip(phases, stream.phases, strict=True) if phase.domain == domain)
        if found < wanted:
            raise ValueError(
                f"domain {domain} must have at least {wanted} traffic rows for stream {stream.name}, got {found}; "
                "lower data.limit"
            )
    return phases


def paths_of(domain: str, files: dict[str, Path]) -> list[Path]:
    """The files of a domain, or of all of them for MIXED."""
    return sorted(files.values()) if domain == MIXED else [files[domain]]


def _seed(domain: str, shuffle_seed: int | None) -> int | None:
    """Of a domain's order; all domains together are always shuffled."""
    return shuffle_seed or 0 if domain == MIXED else shuffle_seed
