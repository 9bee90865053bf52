"""How an asyncio loop learns that something of the library is ready: a pipe that it watches, one for each loop.

Knows neither stream nor recall. No thread of the library enters the interpreter for it, and one wake-up tells of
everything that became ready meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextvars import Context
from weakref import WeakKeyDictionary

from mka import _direct
from mka._native import mka_bindings as _native


class Waiting:
    """One task that waits until a number rings: a future of its own kind, whose task goes on within the ring.

    asyncio's own future has the loop come round once more before its task goes on, at every token. No task runs while
    the loop tells of a descriptor, so that one may go on there.
    """

    __slots__ = ("_asyncio_future_blocking", "_cancelled", "_context", "_loop", "_wake", "rung")

    def __init__(self, loop: asyncio.AbstractEventLoop, *, rung: bool) -> None:
        self.rung = rung
        """Whether there may be something: it need not be waited for."""
        self._loop = loop
        self._asyncio_future_blocking = False
        self._wake: Callable[[Waiting], object] | None = None
        self._context: Context | None = None
        self._cancelled: tuple[object, ...] | None = None

    @property
    def is_waited_for(self) -> bool:
        """Whether a task waits now."""
        return self._wake is not None

    def ring(self) -> None:
        self.rung = True
        wake, context = self._wake, self._context
        if wake is not None and context is not None:
            self._wake = self._context = None
            context.run(wake, self)

    def __await__(self) -> Generator[Waiting, None, None]:
        """Until it rings. One task at a time."""
        if not self.rung:
            self._asyncio_future_blocking = True
            yield self

    # What a task asks of that which it waits for.

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def add_done_callback(self, wake: Callable[[Waiting], object], *, context: Context) -> None:
        self._wake, self._context = wake, context

    def cancel(self, msg: object = None) -> bool:
        wake, context = self._wake, self._context
        if wake is None:
            return False
        self._wake = self._context = None
        self._cancelled = () if msg is None else (msg,)
        self._loop.call_soon(wake, self, context=context)
        return True

    def result(self) -> None:
        cancelled, self._cancelled = self._cancelled, None
        if cancelled is not None:
            raise asyncio.CancelledError(*cancelled)


class Bell:
    """What the library rings for one loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._native = _native.NativeBell()
        descriptor = self._native.descriptor()
        if descriptor is None:
            raise NotImplementedError
        self.number: int = self._native.number()
        self._waiting: dict[int, Waiting] = {}
        # The loop holds the bell from now on, and the bell the descriptor.
        loop.add_reader(descriptor, self._rung)

    def _rung(self) -> None:
        for number in _direct.rung(self.number):
            waiting = self._waiting.get(number)
            if waiting is not None:
                waiting.ring()

    def expect(self, number: int, loop: asyncio.AbstractEventLoop, *, rung: bool) -> Waiting:
        """From now on `number` is told to what this returns, for a task of the bell's `loop`."""
        waiting = Waiting(loop, rung=rung)
        self._waiting[number] = waiting
        return waiting

    def forget(self, number: int) -> None:
        """Nobody waits for `number` any more."""
        self._waiting.pop(number, None)


_BELLS: WeakKeyDictionary[asyncio.AbstractEventLoop, Bell | None] = WeakKeyDictionary()


def of(loop: asyncio.AbstractEventLoop) -> Bell | None:
    """The bell of a loop; None if it can watch no pipe, as Windows' proactor: who waits then does so in another way."""
    try:
        return _BELLS[loop]
    except KeyError:
        pass
    try:
        bell: Bell | None = Bell(loop)
    except NotImplementedError:
        bell = None
    _BELLS[loop] = bell
    return bell
