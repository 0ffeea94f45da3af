"""Generation: requests through a batch until they end, and their results.

Knows a batch, a learner and how a request begins, which is passed in; knows nothing of prompts or tokenizers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

from dvi.decode.batch import DecodingBatch
from dvi.decode.sequence import Sequence
from dvi.decode.text import TextStream
from dvi.learner import Learner
from dvi.records import GenerationResult, SamplingParams, Transitions

Request = TypeVar("Request")
Begun = tuple[Sequence, TextStream | None]

_LOG = logging.getLogger(__name__)


class Generation:
    """One run over a batch.

    request_ids   gives each request its number.
    learner       observes every round's transitions and may step between rounds; without one they are in the results.
    level         what is promised of the tokens, for the results.
    is_lock_step  other ranks compute the same, or wait: what goes wrong with one request ends the run.
    """

    def __init__(
        self, batch: DecodingBatch, *, request_ids: Iterator[int], learner: Learner | None, level: str,
        is_lock_step: bool = False,
    ) -> None:
        self._batch, self._learner, self._level, self._is_lock_step = batch, learner, level, is_lock_step
        self._request_ids = request_ids
        self._running: dict[int, tuple[int, TextStream | None, list[Transitions]]] = {}

    def results(
        self, requests: Iterable[Request], begin: Callable[[int, int, Request], Begun]
    ) -> Iterator[GenerationResult]:
        """As the requests end, each with its index. begin: of (number, index, request), when a row is free for it."""
        batch, waiting = self._batch, enumerate(requests)
        is_exhausted = False
        while True:
            while batch.has_room and not is_exhausted:
                item = next(waiting, None)
                if item is None:
                    is_exhausted = True
                    break
                index, request = item
                request_id, sequence = next(self._request_ids), None
                try:
                    sequence, stream = begin(request_id, index, request)
                    experience = batch.admit(sequence)
                except Exception as error:
                    yield self._failed(error, index, sequence or _never_begun(request_id))
                    continue
                self._running[request_id] = (index, stream, [])
                self._teach(experience)
            if not batch.sequences:
                return
            try:
                transitions = batch.round()
            except Exception as error:
                if self._is_lock_step:  # the other ranks have computed it, or wait
                    raise
                batch.newest.fail(error)
            else:
                self._teach(transitions)
            if self._learner is not None:
                self._learner.step_if_due()
            for sequence in batch.take_finished():
                yield self._result(sequence, *self._running.pop(sequence.request_id))

    def pieces(self, sequence: Sequence, text: TextStream) -> Generator[str, None, GenerationResult]:
        """Of one request's text, as rounds finish; returns the whole result."""
        experience = self._batch.admit(sequence)
        while True:
            if self._learner is not None:
                self._learner.observe(experience)
                self._learner.step_if_due()
            if sequence.finish_reason is not None:
                break
            experience = self._batch.round()
            if piece := text.read():
                yield piece
        text.close()
        if piece := text.read(is_final=True):
            yield piece
        self._batch.take_finished()
        return self._result(sequence, 0, text, [])

    def _failed(self, error: Exception, index: int, sequence: Sequence) -> GenerationResult:
        """The result of a request that did not come to decode. In lock-step the error itself: all ranks have it."""
        if self._is_lock_step:
            raise error
        sequence.fail(error)
        if sequence in self._batch.prefilling:
            self._batch.remove(sequence)
        return self._result(sequence, index, None, [])

    def _teach(self, transitions: list[Transitions]) -> None:
        if self._learner is not None:
            self._learner.observe(transitions)
        else:
            for stretch in transitions:
                self._running[stretch.request_id][2].append(stretch)

    def _result(
        self, sequence: Sequence, index: int, stream: TextStream | None, kept: list[Transitions]
    ) -> GenerationResult:
        if sequence.error is not None:
            _LOG.error("request %d failed: %s", index, sequence.error, exc_info=sequence.error)
        elif stream is not None:
            stream.close()
        return GenerationResult(
            index=index, request_id=sequence.request_id, text="" if stream is None else stream.text,
            token_ids=sequence.token_ids, finish_reason=sequence.finish_reason, stats=sequence.stats,
            drafter_version=self._batch.drafter.version, level=self._level,
            accept_lengths=sequence.kept_per_round, transitions=kept,
            error=None if sequence.error is None else str(sequence.error) or type(sequence.error).__name__,
        )


def _never_begun(request_id: int) -> Sequence:
    return Sequence(request_id, [], SamplingParams(), lambda _: None, max_new_tokens=0)
