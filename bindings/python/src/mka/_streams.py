"""Streams: iterators over what is pulled in batches, which stop their work when they are left.

Knows no session.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from mka import _convert, _values
from mka._errors import CancelledError, translated

T = TypeVar("T")

# Python sees a signal only between calls: one call waits this long at most.
_LIMIT_MS = 100


class _Stream(Generic[T]):
    """The native stream and the events that came with the last call but were not asked for yet."""

    def __init__(self, native: Any, convert: Callable[[Any], T]) -> None:
        self._native = native
        self._convert = convert
        self._ready: deque[T] = deque()

    def cancel(self) -> None:
        """Stops the work within one token, from any thread; the stream then ends."""
        self._native.cancel()


class _SyncStream(_Stream[T], Iterator[T]):
    def __iter__(self) -> Self:
        return self

    def __next__(self) -> T:
        while not self._ready:
            try:
                with translated:
                    batch = self._native.next_batch_blocking(_LIMIT_MS)
            except KeyboardInterrupt:
                self._native.cancel()
                raise
            if batch is None:
                raise StopIteration
            self._ready.extend(map(self._convert, batch))
        return self._ready.popleft()

    def close(self) -> None:
        """Stops the work and waits until the session stands at what was done."""
        self._ready.clear()
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


class _AsyncStream(_Stream[T], AsyncIterator[T]):
    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._ready:
            try:
                with translated:
                    batch = await self._native.next_batch()
            except BaseException:
                # The task was cancelled, or the work failed: either way it is over.
                self._native.cancel()
                raise
            if batch is None:
                raise StopAsyncIteration
            self._ready.extend(map(self._convert, batch))
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Stops the work and waits until the session stands at what was done."""
        self._ready.clear()
        await self._native.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


class _Answer:
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


class Events(_SyncStream[_values.Event]):
    """The events of one turn; leaving the loop, closing or dropping it cancels the turn within one token.

    What was generated before is kept as the turn's answer.
    """

    def __init__(self, native: Any) -> None:
        super().__init__(native, _convert.event)

    def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost."""
        answer = _Answer()
        for event in self:
            answer.see(event)
        return answer.whole()


class AsyncEvents(_AsyncStream[_values.Event]):
    """The events of one turn; leaving the loop, closing or dropping it cancels the turn within one token.

    What was generated before is kept as the turn's answer. A task that is cancelled while it waits cancels the turn.
    """

    def __init__(self, native: Any) -> None:
        super().__init__(native, _convert.event)

    async def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost."""
        answer = _Answer()
        async for event in self:
            answer.see(event)
        return answer.whole()


Watch = Callable[[_values.Progress], object]
"""Called with the progress of a feed."""


class Feed(_SyncStream[_values.FeedEvent]):
    """The progress of one document; leaving the loop, closing or dropping it stops at the next block.

    What was fed before is kept.
    """

    def __init__(self, native: Any) -> None:
        super().__init__(native, _convert.feed_event)

    def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        for event in self:
            if isinstance(event, _values.Fed):
                return event
            if watch is not None:
                watch(event)
        raise CancelledError("feed: cancelled before the document was done")


class AsyncFeed(_AsyncStream[_values.FeedEvent]):
    """The progress of one document; leaving the loop, closing or dropping it stops at the next block.

    What was fed before is kept.
    """

    def __init__(self, native: Any) -> None:
        super().__init__(native, _convert.feed_event)

    async def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        async for event in self:
            if isinstance(event, _values.Fed):
                return event
            if watch is not None:
                watch(event)
        raise CancelledError("feed: cancelled before the document was done")
