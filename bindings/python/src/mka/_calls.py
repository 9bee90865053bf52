"""Calls of the library as values, which the blocking and the asyncio classes make in their own way.

Knows what goes in and how what comes out is converted; not who waits for it.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Generic, TypeVar

from mka import _convert, _filter, _options, _values
from mka._errors import translated
from mka._native import mka_bindings as _native
from mka._filter import Filter
from mka._options import EngineOptions, Path, RecallOptions, Time

T = TypeVar("T")

ALL = (1 << 63) - 1


def _check(value: Any) -> None:
    """Refuses text that is no Unicode: where the generated code does, what the call is made on stays held for ever."""
    if isinstance(value, str):
        if not value.isascii():
            value.encode()
    elif isinstance(value, (list, tuple)):
        for each in value:
            _check(each)
    elif isinstance(value, dict):
        _check(list(value))
        _check(list(value.values()))
    elif type(value).__module__ == _native.__name__ and not isinstance(value, Enum):
        # A record of the library's: its fields.
        _check(list(vars(value).values()))


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A call of a native object: its async form is `name`, the blocking one `name_blocking`."""

    name: str
    arguments: tuple[Any, ...]
    convert: Callable[[Any], T]

    def run(self, native: Any) -> T:
        """Blocks the thread; Ctrl-C is seen when the call is done."""
        with translated:
            _check(self.arguments)
            return self.convert(getattr(native, f"{self.name}_blocking")(*self.arguments))

    async def awaited(self, native: Any) -> T:
        """Cancelling the task ends the waiting, and export, import, backup and doctor; other work goes on."""
        with translated:
            _check(self.arguments)
            return self.convert(await getattr(native, self.name)(*self.arguments))

    def run_interruptibly(self, native: Any) -> T:
        """Blocks the thread, for long work: Ctrl-C is seen at once, and does what cancelling a task does."""
        # Only the main thread is interrupted; another one waits as it is.
        if threading.current_thread() is not threading.main_thread():
            return self.run(native)
        # Imported here: an import of mka is for many half as long without.
        import asyncio
        from concurrent.futures import Future

        # An event loop of its own, elsewhere: this thread may be running one.
        loop = asyncio.new_event_loop()
        task = loop.create_task(self.awaited(native))
        outcome: Future[T] = Future()

        def work() -> None:
            try:
                outcome.set_result(loop.run_until_complete(task))
            except BaseException as error:
                outcome.set_exception(error)
            finally:
                loop.close()

        threading.Thread(target=work, name=f"mka-{self.name}", daemon=True).start()
        try:
            return outcome.result()
        except KeyboardInterrupt:
            if not outcome.done():
                loop.call_soon_threadsafe(task.cancel)
            raise


def _as_it_is(native: Any) -> Any:
    return native


def open_engine(path: Path, options: EngineOptions) -> Call[Any]:
    return Call("open", (os.fspath(path), _options.engine_config(options)), _as_it_is)


def session(user: str, agent: str | None, session: str) -> Call[Any]:
    return Call("session", (_options.scope(user, agent, session),), _as_it_is)


CLOSE: Call[None] = Call("close", (), _as_it_is)


def remember(
    turns: str | _values.NewTurn | Sequence[str | _values.NewTurn],
    user: str,
    agent: str | None,
    session: str,
) -> Call[_values.Committed]:
    scope = _options.scope(user, agent, session)
    return Call("remember", (scope, _options.new_turns(turns)), _convert.committed)


def replace(
    turn: int, new: str | _values.NewTurn, user: str, agent: str | None, session: str
) -> Call[_values.Committed]:
    if not isinstance(new, (str, _values.NewTurn)):
        raise TypeError(f"new: {type(new).__name__}, expected str or NewTurn")
    scope = _options.scope(user, agent, session)
    (new_turn,) = _options.new_turns(new)
    return Call("replace", (scope, turn, new_turn), _convert.committed)


def memory_context(
    query: str,
    budget_tokens: int,
    user: str,
    agent: str | None,
    session: str | None,
    options: RecallOptions,
) -> Call[_values.Context]:
    scope = _options.scope(user, agent, session)
    given = _options.context_options(options)
    return Call("context", (scope, query, budget_tokens, given), _convert.context)


def session_context(query: str, budget_tokens: int) -> Call[_values.Context]:
    return Call("context", (query, budget_tokens), _convert.context)


def rewind(turn: int) -> Call[None]:
    return Call("rewind", (turn,), _as_it_is)


def fork(session: str) -> Call[Any]:
    return Call("fork", (session,), _as_it_is)


def peek_logits(text: str) -> Call[Any]:
    _convert.numpy("peek_logits")
    return Call("peek_logits", (text,), lambda native: _convert.vectors(native)[0])


def forget(
    user: str,
    agent: str | None,
    session: str | None,
    matching: str | None,
    filter: Filter | None,
    turn: int | Sequence[int] | None,
    before: Time | None,
    expired: Time | None,
    everything: bool,
) -> Call[_values.Receipt]:
    selector = _options.forget(session, matching, filter, turn, before, expired, everything)
    scope = _options.scope(user, agent, session)
    return Call("forget", (scope, selector), _convert.receipt)


def verify(receipt: _values.Receipt | str) -> Call[None]:
    if isinstance(receipt, _values.Receipt):
        receipt = receipt.record
    if not isinstance(receipt, str):
        raise TypeError(f"verify: {type(receipt).__name__}, expected a Receipt or its record, a str")
    return Call("verify", (receipt,), _as_it_is)


def chunks(
    user: str,
    agent: str | None,
    session: str | None,
    start: int,
    end: int,
    filter: Filter | None,
) -> Call[list[_values.Chunk]]:
    scope = _options.scope(user, agent, session)
    given = None if filter is None else _filter.native(filter)
    return Call("chunks", (scope, start, end, given), _convert.chunks)


def turns(
    user: str, agent: str | None, session: str, start: int, end: int
) -> Call[list[_values.Turn]]:
    return Call("turns", (_options.scope(user, agent, session), start, end), _convert.turns)


def sessions(user: str, agent: str | None) -> Call[list[_values.SessionInfo]]:
    return Call("sessions", (_options.scope(user, agent, None),), _convert.sessions)


def embed(texts: Sequence[str]) -> Call[Any]:
    # Before the library works on what could not be handed out.
    _convert.numpy("embed")
    return Call("embed", (list(texts),), _convert.vectors)


def export(
    path: Path, user: str | None, agent: str | None, session: str | None
) -> Call[_values.Exported]:
    scope = _options.export_scope(user, agent, session)
    return Call("export", (scope, os.fspath(path)), _convert.exported)


def import_log(path: Path) -> Call[_values.Imported]:
    return Call("import_log", (os.fspath(path),), _convert.imported)


def backup(path: Path) -> Call[_values.Backup]:
    return Call("backup", (os.fspath(path),), _convert.backup)


def doctor(repair: bool) -> Call[_values.Checkup]:
    return Call("doctor", (repair,), _convert.checkup)


COMPACT: Call[None] = Call("compact", (), _as_it_is)

DISK_USAGE: Call[_values.DiskUsage] = Call("disk_usage", (), _convert.disk_usage)


def now(native: Any, name: str, *arguments: Any) -> Any:
    """What a native object gives at once; of a stream, the object to read it from."""
    with translated:
        _check(arguments)
        return getattr(native, name)(*arguments)


# A thread of the library must not be inside an interpreter that is going away.
atexit.register(_native.shut_down)
