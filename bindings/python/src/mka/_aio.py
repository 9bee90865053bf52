"""The classes for asyncio: engine, session, memory.

Waits, never works: work runs on threads of the library. `_sync` holds the twins, over the same native objects.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, Unpack

from mka import _bell, _calls, _direct, _options
from mka._aio_streams import AsyncEvents, AsyncFeed
from mka._errors import translated
from mka._handles import EngineHandle, MemoryHandle, SessionHandle
from mka._native import mka_bindings as _native
from mka._filter import Filter
from mka._options import (
    EngineOptions,
    FeedOptions,
    Path,
    RecallOptions,
    SendOptions,
    Time,
)
from mka._sync import Engine
from mka._values import (
    Backup,
    Checkup,
    Chunk,
    Committed,
    Context,
    DiskUsage,
    Exported,
    Hit,
    Imported,
    NewTurn,
    Receipt,
    SessionInfo,
    ToolResult,
    Turn,
)

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


class _Closes(Protocol):
    async def close(self) -> None: ...


C = TypeVar("C", bound=_Closes)


class Opening(Generic[C], AbstractAsyncContextManager[C], Awaitable[C]):
    """Something on its way: `await` it, or open it with `async with`, which closes it too."""

    def __init__(self, work: Callable[[], Awaitable[C]]) -> None:
        self._work = work
        self._opened: C | None = None

    def __await__(self) -> Generator[Any, Any, C]:
        return self._work().__await__()

    async def __aenter__(self) -> C:
        self._opened = await self._work()
        return self._opened

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.close()


class AsyncEngine(EngineHandle):
    """An open memory folder with its model; made by `open`, closed by leaving `async with`."""

    def __init__(self, native: Any) -> None:
        super().__init__(native)
        self.memory = AsyncMemory(native.memory())
        """The memory of every user: remember, recall, forget."""

    @property
    def blocking(self) -> Engine:
        """The same open folder with blocking calls, for code that does not await; call it from threads of its own.

        Closing one engine closes the other, and the folder is free; a session is open through one handle of either.
        """
        return Engine(self._native)

    def session(
        self, *, user: str, session: str, agent: str | None = None
    ) -> Opening[AsyncSession]:
        """Opens a conversation, new or continued where it stopped; one handle of it at a time."""
        call = _calls.session(user, agent, session)

        async def work() -> AsyncSession:
            return AsyncSession(await call.awaited(self._native))

        return Opening(work)

    async def close(self) -> None:
        """Closes sessions and store, cancels what runs, and waits until the folder is free."""
        await _calls.CLOSE.awaited(self._native)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


def open(path: Path, **options: Unpack[EngineOptions]) -> Opening[AsyncEngine]:
    """Opens the memory folder at `path`, created if missing: `async with mka.open(...) as engine` or `await`.

    Raises `LockedError` if it is open elsewhere, `IncompatibleError` if another embedder made it, `NotFoundError` naming
    every place where the model was looked for.
    """
    call = _calls.open_engine(path, options)

    async def work() -> AsyncEngine:
        return AsyncEngine(await call.awaited(_native.NativeEngine))

    return Opening(work)


class AsyncSession(SessionHandle):
    """One conversation; one stream of it at a time."""

    def send(self, message: str, **options: Unpack[SendOptions]) -> AsyncEvents:
        """Answers `message`: recalls what belongs to it, streams the answer, commits both."""
        given = _options.send_options(options)
        return AsyncEvents(_calls.now(self._native, "send", message, given))

    def send_tool(
        self,
        results: str | ToolResult | Sequence[str | ToolResult],
        **options: Unpack[SendOptions],
    ) -> AsyncEvents:
        """Gives the model what the tools that its last answer called gave back, and answers.

        They stand where the chat template has a place for them, or else in a message of the user's; each is a turn of role
        `tool`. `system`, `tools`, `completion` and `joined` are without effect.
        """
        given = _options.tool_results(results)
        native = _options.send_options(options)
        return AsyncEvents(_calls.now(self._native, "send_tool", given, native))

    def regenerate(self, **options: Unpack[SendOptions]) -> AsyncEvents:
        """Answers the last message again, in place of its answer, whose metadata the new one has.

        The prompt stays as it was, with its beginning of an answer: `system`, `tools`, `recall_k`, `recall_filter`,
        `across_sessions`, `answer_prefix`, `completion`, `joined` and `metadata` are without effect. With the same
        `seed`, the answer is the same.

        In a session that was opened again since, or behind an answer of more than eight pages of 64 tokens, the window is
        filled from the log: of what it does not hold, text is recalled and pages are not.
        """
        given = _options.send_options(options)
        return AsyncEvents(_calls.now(self._native, "regenerate", given))

    def feed(self, text: str, **options: Unpack[FeedOptions]) -> AsyncFeed:
        """Takes in a document of any length at constant memory."""
        given = _options.feed_options(options)
        return AsyncFeed(_calls.now(self._native, "feed", text, given))

    def append(self, turns: str | NewTurn | Sequence[str | NewTurn]) -> AsyncFeed:
        """Takes in what was said elsewhere as if it had been said here: the model reads it and answers nothing.

        Roles are user and assistant; before a new session's first message may stand instructions, of role system. A `str`
        is what the user said now.
        """
        return AsyncFeed(_calls.now(self._native, "append", _options.new_turns(turns)))

    async def context(self, query: str, *, budget_tokens: int) -> Context:
        """What memory holds on `query`, laid out for another model, never above the budget.

        Every session of the user is looked into, or of the agent if the session has one.
        At most 32 memories are looked up for it.
        """
        return await _calls.session_context(query, budget_tokens).awaited(self._native)

    async def rewind(self, turn: int) -> None:
        """Takes every turn from `turn` on back, as if it had never been said: the next message follows what was before it.

        What is taken back stays in the log as retracted, keeps its number, and is not recalled.
        """
        await _calls.rewind(turn).awaited(self._native)

    def fork(self, session: str) -> Opening[AsyncSession]:
        """Begins another session of the same user and agent, which knows all that this one does and then goes its own way.

        Keys and values are shared, not copied. A turn from before the fork is one turn: forgetting it erases it in both.
        """
        call = _calls.fork(session)

        async def work() -> AsyncSession:
            return AsyncSession(await call.awaited(self._native))

        return Opening(work)

    async def peek_logits(self, text: str) -> NDArray[float32]:
        """Logits of the token after `text`, without changing the session: `(vocabulary,)`.

        Needs the wheel's extra `numpy`, and raises `ImportError` without it.
        """
        row: NDArray[float32] = await _calls.peek_logits(text).awaited(self._native)
        return row

    async def close(self) -> None:
        """Gives the session back and cancels its stream; another handle may open it."""
        self._native.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


class AsyncMemory(MemoryHandle):
    """Remember, recall and forget, over every session of the engine."""

    async def remember(
        self,
        turns: str | NewTurn | Sequence[str | NewTurn],
        *,
        user: str,
        session: str,
        agent: str | None = None,
    ) -> Committed:
        """Appends turns to a session as text memory, on disk when it returns; no model reads them.

        A `str` is what the user said now.
        """
        return await _calls.remember(turns, user, agent, session).awaited(self._native)

    async def replace(
        self,
        turn: int,
        new: str | NewTurn,
        *,
        user: str,
        session: str,
        agent: str | None = None,
    ) -> Committed:
        """Puts a fact right: remembers `new` in a session, then erases `turn` of it, as `forget` does.

        `new` has a number of its own, and is on disk before anything is erased: if that fails, both are there. Of what
        `turn` said nothing is left.
        """
        return await _calls.replace(turn, new, user, agent, session).awaited(self._native)

    async def recall(
        self,
        query: str,
        *,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        **options: Unpack[RecallOptions],
    ) -> list[Hit]:
        """The memories that answer `query` best, best first."""
        given = _options.recall_options(options)
        with translated:
            return await _recalled(self._number, query, (user, agent, session), given)

    async def context(
        self,
        query: str,
        *,
        budget_tokens: int,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        **options: Unpack[RecallOptions],
    ) -> Context:
        """What a recall finds on `query`, laid out for another model, never above the budget; 32 memories if `k` is left out.

        With `session` that session alone is looked into, without it every session of the user.
        """
        call = _calls.memory_context(query, budget_tokens, user, agent, session, options)
        return await call.awaited(self._native)

    async def forget(
        self,
        *,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        matching: str | None = None,
        filter: Filter | None = None,
        turn: int | Sequence[int] | None = None,
        before: Time | None = None,
        expired: Time | None = None,
        everything: bool = False,
    ) -> Receipt:
        """Erases from log, chunks, vectors, words, pages and summaries; exactly one selector says what.

        `turn` is a number in the log of `session`, which must be given with it, or several. `everything` is that session,
        or every one without it.
        `matching` erases every turn whose text, source name, subject or metadata contains it, letter case aside;
        `filter` every turn whose metadata it accepts: turns without the key, those of a chat too, are what `$ne`, `$nin`
        and `$not` accept. A filter that accepts every turn, or none, whatever their metadata, is refused.
        If anything is erased, a stream of this user that is under way ends with `CancelledError`.
        """
        call = _calls.forget(
            user, agent, session, matching, filter, turn, before, expired, everything
        )
        return await call.awaited(self._native)

    async def verify(self, receipt: Receipt | str) -> None:
        """Checks that what was erased is in no file; `CorruptedError` if it is.

        Of a receipt its `record` is enough, as it was kept.
        """
        await _calls.verify(receipt).awaited(self._native)

    async def chunks(
        self,
        *,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        start: int = 0,
        end: int = _calls.ALL,
        filter: Filter | None = None,
    ) -> list[Chunk]:
        """What memory holds, in the order in which it was first said; with `filter`, of turns whose metadata it accepts."""
        call = _calls.chunks(user, agent, session, start, end, filter)
        return await call.awaited(self._native)

    async def turns(
        self,
        *,
        user: str,
        session: str,
        agent: str | None = None,
        start: int = 0,
        end: int = _calls.ALL,
    ) -> list[Turn]:
        """The log of a session."""
        return await _calls.turns(user, agent, session, start, end).awaited(self._native)

    async def sessions(self, *, user: str, agent: str | None = None) -> list[SessionInfo]:
        """The sessions of a user, by name."""
        return await _calls.sessions(user, agent).awaited(self._native)

    async def embed(self, texts: Sequence[str]) -> NDArray[float32]:
        """One unit vector a text, by the store's embedder: `(texts, dim)`, read-only.

        Needs the wheel's extra `numpy`, and raises `ImportError` without it.
        """
        rows: NDArray[float32] = await _calls.embed(texts).awaited(self._native)
        return rows

    async def export(
        self,
        path: Path,
        *,
        user: str | None = None,
        agent: str | None = None,
        session: str | None = None,
    ) -> Exported:
        """Writes the log of a scope, or of every user without one, into a file as lines of JSON."""
        return await _calls.export(path, user, agent, session).awaited(self._native)

    async def import_(self, path: Path) -> Imported:
        """Appends the turns of an exported file to the sessions that they come from; those that are held are skipped."""
        return await _calls.import_log(path).awaited(self._native)

    async def backup(self, path: Path) -> Backup:
        """Copies the store as it is at one moment to a folder that does not exist yet; sessions go on meanwhile."""
        return await _calls.backup(path).awaited(self._native)

    async def doctor(self, *, repair: bool = False) -> Checkup:
        """Compares every checksum, and the indexes with the log; with `repair`, makes anew what can be derived."""
        return await _calls.doctor(repair).awaited(self._native)

    async def compact(self) -> None:
        """Gives all space on the disk back that nothing uses."""
        await _calls.COMPACT.awaited(self._native)

    async def disk_usage(self) -> DiskUsage:
        """What the store takes on the disk, and how much of it is in use."""
        return await _calls.DISK_USAGE.awaited(self._native)


async def _recalled(
    memory: int, query: str, whose: _direct.Whose, options: dict[str, Any]
) -> list[Hit]:
    """The hits of a query, awaited; cancelling the task lets go of the work."""
    loop = asyncio.get_running_loop()
    bell = _bell.of(loop)
    if bell is None:
        return await loop.run_in_executor(None, _direct.recall, memory, query, whose, options)
    recalling = _direct.begin_recall(memory, query, whose, options, bell.number)
    waiting = bell.expect(recalling.number, loop, rung=False)
    try:
        hits = None
        while hits is None:
            await waiting
            waiting.rung = False
            hits = recalling.hits()
        return hits
    finally:
        bell.forget(recalling.number)
        # A traceback may keep this frame, and a recall that is under way keeps its engine open.
        del recalling
