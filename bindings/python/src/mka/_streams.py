"""Streams: iterators over what is pulled in batches, which stop their work when they are closed or dropped.

Knows no session, and nothing of asyncio: `_aio_streams` does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from mka import _direct, _values
from mka._errors import CancelledError, translated

T = TypeVar("T")
E = TypeVar("E", contravariant=True)
R = TypeVar("R", covariant=True)
O = TypeVar("O")

# Python sees a signal only between calls: one call waits this long at most.
LIMIT_MS = 100


class Outcome(Protocol[E, R]):
    """What comes of a stream that is run to its end."""

    def see(self, event: E, /) -> None: ...

    def whole(self) -> R: ...


class Stream(Generic[T]):
    """The native stream and the events that came with the last call but were not asked for yet."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._number: int = native.number()
        self._ready: deque[T] = deque()

    def cancel(self) -> None:
        """Stops the work within one token, from any thread; the stream then ends."""
        self._native.cancel()


class _SyncStream(Stream[T], Iterator[T]):
    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._ready:
            try:
                batch = _direct.next_events(self._number, LIMIT_MS)
            except KeyboardInterrupt:
                self._native.cancel()
                raise
            if batch is None:
                raise StopIteration
            self._ready.extend(batch)
        return self._ready.popleft()

    def _run(self, outcome: Outcome[T, O]) -> O:
        for event in self:
            outcome.see(event)
        return outcome.whole()

    def close(self) -> None:
        """Stops the work and waits until the session stands at what was done.

        An error of the work that was not read is raised here.
        """
        self._ready.clear()
        with translated:
            self._native.close_blocking()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Answer:
    """What a turn said, as far as it was seen."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.usage: _values.Usage | None = None

    def see(self, event: _values.Event) -> None:
        if isinstance(event, _values.Token):
            self.parts.append(event.text)
        elif isinstance(event, _values.Done):
            self.usage = event.usage

    def whole(self) -> tuple[str, _values.Usage]:
        if self.usage is None:
            raise CancelledError("send: cancelled before the turn was done")
        return "".join(self.parts), self.usage


Watch = Callable[[_values.Progress], object]
"""Called with the progress of a feed."""


class Feeding:
    """What a feed did, telling `watch` of its progress."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.fed: _values.Fed | None = None

    def see(self, event: _values.FeedEvent) -> None:
        if isinstance(event, _values.Fed):
            self.fed = event
        elif self.watch is not None:
            self.watch(event)

    def whole(self) -> _values.Fed:
        if self.fed is None:
            raise CancelledError("feed: cancelled before the document was done")
        return self.fed


class Events(_SyncStream[_values.Event]):
    """The events of one turn; closing or dropping it cancels the turn within one token.

    Leaving a loop drops a stream that nothing else holds; `with` closes one that is kept in a variable.
    What was generated before is kept as the turn's answer.
    """

    def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost, without an `answer_prefix`, which is not streamed."""
        return self._run(Answer())


class Feed(_SyncStream[_values.FeedEvent]):
    """The progress of one document; closing or dropping it stops at the next block.

    Leaving a loop drops a stream that nothing else holds; `with` closes one that is kept in a variable.
    What was fed before is kept.
    """

    def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        return self._run(Feeding(watch))
