"""How an asyncio loop learns that something of the library is ready: a pipe that it watches, one for each loop.

Knows neither stream nor recall. No thread of the library enters the interpreter for it, and one wake-up tells of
everything that became ready meanwhile.
"""

from __future__ import annotations

import asyncio
import struct
from weakref import WeakKeyDictionary

from mka import _direct
from mka._native import mka_bindings as _native


class Waiting:
    """One task that waits until a number rings."""

    __slots__ = ("_future", "rung")

    def __init__(self, *, rung: bool) -> None:
        self.rung = rung
        """Whether there may be something: it need not be waited for."""
        self._future: asyncio.Future[None] | None = None

    def ring(self) -> None:
        self.rung = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def wait(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[None]:
        """To be awaited while nothing has rung."""
        self._future = loop.create_future()
        return self._future


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
        for (number,) in struct.iter_unpack("<Q", _direct.rung(self.number)):
            waiting = self._waiting.get(number)
            if waiting is not None:
                waiting.ring()

    def expect(self, number: int, *, rung: bool) -> Waiting:
        """From now on `number` is told to what this returns."""
        waiting = Waiting(rung=rung)
        self._waiting[number] = waiting
        return waiting

    def forget(self, number: int) -> None:
        """Nobody waits for `number` any more."""
        self._waiting.pop(number, None)


_BELLS: WeakKeyDictionary[asyncio.AbstractEventLoop, Bell | None] = WeakKeyDictionary()


def of(loop: asyncio.AbstractEventLoop) -> Bell | None:
    """The bell of a loop; None if it can watch no pipe, as Windows' proactor: then threads wait in its place."""
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
