"""Streams: iterators over what is pulled in batches, which stop their work when they are left.

Knows no session.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

from mka import _bell, _direct, _values
from mka._errors import CancelledError, LockedError

T = TypeVar("T")
E = TypeVar("E", contravariant=True)
R = TypeVar("R", covariant=True)
O = TypeVar("O")

# Python sees a signal only between calls: one call waits this long at most.
_LIMIT_MS = 100


class _Outcome(Protocol[E, R]):
    """What comes of a stream that is run to its end."""

    def see(self, event: E, /) -> None: ...

    def whole(self) -> R: ...


class _Stream(Generic[T]):
    """The native stream and the events that came with the last call but were not asked for yet."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._number: int = native.number()
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
                batch = _direct.next_events(self._number, _LIMIT_MS)
            except KeyboardInterrupt:
                self._native.cancel()
                raise
            if batch is None:
                raise StopIteration
            self._ready.extend(batch)
        return self._ready.popleft()

    def _run(self, outcome: _Outcome[T, O]) -> O:
        for event in self:
            outcome.see(event)
        return outcome.whole()

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
    def __init__(self, native: Any) -> None:
        super().__init__(native)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._bell: _bell.Bell | None = None
        self._waiting: _bell.Waiting | None = None

    def __del__(self) -> None:
        self._leave()

    def _leave(self) -> None:
        """Nobody asks this stream's loop for it any more."""
        bell, self._bell = self._bell, None
        if bell is not None:
            bell.forget(self._number)

    def _enter(self, loop: asyncio.AbstractEventLoop) -> _bell.Waiting:
        """Waits in `loop` from now on; the first poll tells what there is."""
        self._leave()
        self._loop, bell = loop, _bell.of(loop)
        waiting = _bell.Waiting(loop, rung=True) if bell is None else bell.expect(self._number, loop, rung=True)
        self._bell, self._waiting = bell, waiting
        return waiting

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        while not self._ready:
            loop, waiting = asyncio.get_running_loop(), self._waiting
            if waiting is None or loop is not self._loop:
                waiting = self._enter(loop)
            elif waiting.is_waited_for:
                raise LockedError("events: another task waits for the next one, expected one task at a time")
            bell = self._bell
            try:
                if bell is None:
                    batch = await loop.run_in_executor(
                        None, _direct.next_events, self._number, _LIMIT_MS
                    )
                else:
                    await waiting
                    # Before the poll: what comes during it is told of again.
                    waiting.rung = False
                    batch = _direct.poll_events(self._number, bell.number)
            except BaseException:
                # The task was cancelled, or the work failed: either way it is over.
                self._native.cancel()
                waiting.rung = True
                raise
            if batch is None:
                waiting.rung = True
                raise StopAsyncIteration
            self._ready.extend(batch)
        return self._ready.popleft()

    async def _run(self, outcome: _Outcome[T, O]) -> O:
        async for event in self:
            outcome.see(event)
        return outcome.whole()

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


Watch = Callable[[_values.Progress], object]
"""Called with the progress of a feed."""


class _Feeding:
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
    """The events of one turn; leaving the loop, closing or dropping it cancels the turn within one token.

    What was generated before is kept as the turn's answer.
    """

    def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost."""
        return self._run(_Answer())


class AsyncEvents(_AsyncStream[_values.Event]):
    """The events of one turn; leaving the loop, closing or dropping it cancels the turn within one token.

    What was generated before is kept as the turn's answer. A task that is cancelled while it waits cancels the turn.
    """

    async def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost."""
        return await self._run(_Answer())


class Feed(_SyncStream[_values.FeedEvent]):
    """The progress of one document; leaving the loop, closing or dropping it stops at the next block.

    What was fed before is kept.
    """

    def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        return self._run(_Feeding(watch))


class AsyncFeed(_AsyncStream[_values.FeedEvent]):
    """The progress of one document; leaving the loop, closing or dropping it stops at the next block.

    What was fed before is kept.
    """

    async def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        return await self._run(_Feeding(watch))
