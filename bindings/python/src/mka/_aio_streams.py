"""Streams for asyncio: iterators over what is pulled in batches, which stop their work when they are closed or dropped.

Knows no session; `_streams` holds the twins.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, TypeVar

from mka import _bell, _direct, _values
from mka._errors import LockedError, translated
from mka._streams import LIMIT_MS, Answer, Feeding, Outcome, Stream, Watch

T = TypeVar("T")
O = TypeVar("O")


class _AsyncStream(Stream[T], AsyncIterator[T]):
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
                        None, _direct.next_events, self._number, LIMIT_MS
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

    async def _run(self, outcome: Outcome[T, O]) -> O:
        async for event in self:
            outcome.see(event)
        return outcome.whole()

    async def aclose(self) -> None:
        """Stops the work and waits until the session stands at what was done.

        An error of the work that was not read is raised here.
        """
        self._ready.clear()
        with translated:
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


class AsyncEvents(_AsyncStream[_values.Event]):
    """The events of one turn; closing or dropping it cancels the turn within one token.

    Leaving a loop drops a stream that nothing else holds; `async with` closes one that is kept in a variable.
    What was generated before is kept as the turn's answer. A task that is cancelled while it waits cancels the turn.
    """

    async def text(self) -> tuple[str, _values.Usage]:
        """Runs the turn to its end: the whole answer and its cost, without an `answer_prefix`, which is not streamed."""
        return await self._run(Answer())


class AsyncFeed(_AsyncStream[_values.FeedEvent]):
    """The progress of one document; closing or dropping it stops at the next block.

    Leaving a loop drops a stream that nothing else holds; `async with` closes one that is kept in a variable.
    What was fed before is kept.
    """

    async def finish(self, watch: Watch | None = None) -> _values.Fed:
        """Feeds to the end, telling `watch` of the progress."""
        return await self._run(Feeding(watch))
