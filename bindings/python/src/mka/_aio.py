"""The classes for asyncio: engine, session, memory.

Waits, never works: work runs on threads of the library. `_sync` holds the twins.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, Unpack

from mka import _convert, _options
from mka._errors import translated
from mka._native import mka_bindings as _native
from mka._options import (
    EngineOptions,
    FeedOptions,
    Path,
    RecallOptions,
    SendOptions,
    Time,
)
from mka._streams import AsyncEvents, AsyncFeed
from mka._sync import ALL
from mka._values import (
    Chunk,
    Committed,
    Context,
    Hit,
    NewTurn,
    Receipt,
    Scope,
    SessionInfo,
    Stats,
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


class AsyncEngine:
    """An open memory folder with its model; made by `open`, closed by leaving `async with`."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.memory = AsyncMemory(native.memory())
        """The memory of every user: remember, recall, forget."""

    def session(
        self, *, user: str, session: str, agent: str | None = None
    ) -> Opening[AsyncSession]:
        """Opens a conversation, new or continued where it stopped; one handle of it at a time."""
        scope = _options.scope(user, agent, session)

        async def work() -> AsyncSession:
            with translated:
                return AsyncSession(await self._native.session(scope))

        return Opening(work)

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` as the model counts them."""
        with translated:
            count: int = self._native.count_tokens(text)
        return count

    @property
    def device(self) -> str:
        """Where the model runs."""
        with translated:
            device: str = self._native.device()
        return device

    @property
    def model_name(self) -> str | None:
        """Name of the model's folder or file; None without a model."""
        with translated:
            name: str | None = self._native.model_name()
        return name

    @property
    def trained_tokens(self) -> int | None:
        """Tokens that the model was trained on at once; None without a model."""
        with translated:
            tokens: int | None = self._native.trained_tokens()
        return tokens

    async def close(self) -> None:
        """Closes sessions and store, cancels what runs, and waits until the folder is free."""
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
        await self.close()


def open(path: Path, **options: Unpack[EngineOptions]) -> Opening[AsyncEngine]:
    """Opens the memory folder at `path`, created if missing: `async with mka.open(...) as engine` or `await`.

    Raises `LockedError` if it is open elsewhere, `IncompatibleError` if another embedder made it, `NotFoundError` naming
    every place where the model was looked for.
    """
    config = _options.engine_config(options)

    async def work() -> AsyncEngine:
        with translated:
            return AsyncEngine(await _native.NativeEngine.open(os.fspath(path), config))

    return Opening(work)


class AsyncSession:
    """One conversation; one stream of it at a time."""

    def __init__(self, native: Any) -> None:
        self._native = native

    @property
    def scope(self) -> Scope:
        """User, agent and session."""
        return _convert.scope(self._native.scope())

    def send(self, message: str, **options: Unpack[SendOptions]) -> AsyncEvents:
        """Answers `message`: recalls what belongs to it, streams the answer, commits both."""
        with translated:
            return AsyncEvents(self._native.send(message, _options.send_options(options)))

    def regenerate(self, **options: Unpack[SendOptions]) -> AsyncEvents:
        """Answers the last message again, in place of its answer."""
        with translated:
            return AsyncEvents(self._native.regenerate(_options.send_options(options)))

    def feed(self, text: str, **options: Unpack[FeedOptions]) -> AsyncFeed:
        """Takes in a document of any length at constant memory."""
        with translated:
            return AsyncFeed(self._native.feed(text, _options.feed_options(options)))

    async def context(self, query: str, *, budget_tokens: int) -> Context:
        """What memory holds on `query`, laid out for another model, never above the budget."""
        with translated:
            return _convert.context(await self._native.context(query, budget_tokens))

    @property
    def num_turns(self) -> int:
        """Number of turns in the session's log."""
        with translated:
            turns: int = self._native.num_turns()
        return turns

    async def peek_logits(self, text: str) -> NDArray[float32]:
        """Logits of the token after `text`, without changing the session: `(vocabulary,)`."""
        with translated:
            native = await self._native.peek_logits(text)
        return _convert.vectors(native)[0]

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


class AsyncMemory:
    """Remember, recall and forget, over every session of the engine."""

    def __init__(self, native: Any) -> None:
        self._native = native

    async def remember(
        self,
        turns: str | NewTurn | Sequence[NewTurn],
        *,
        user: str,
        session: str,
        agent: str | None = None,
    ) -> Committed:
        """Appends turns to a session as text memory, on disk when it returns; no model reads them."""
        scope = _options.scope(user, agent, session)
        with translated:
            return _convert.committed(
                await self._native.remember(scope, _options.new_turns(turns))
            )

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
        scope = _options.scope(user, agent, session)
        with translated:
            return _convert.hits(
                await self._native.recall(scope, query, _options.recall_options(options))
            )

    async def context(
        self,
        query: str,
        *,
        budget_tokens: int,
        user: str,
        agent: str | None = None,
        session: str | None = None,
    ) -> Context:
        """What memory holds on `query`, laid out for another model, never above the budget."""
        scope = _options.scope(user, agent, session)
        with translated:
            return _convert.context(
                await self._native.context(scope, query, budget_tokens)
            )

    async def forget(
        self,
        *,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        matching: str | None = None,
        turn: int | None = None,
        before: Time | None = None,
        everything: bool = False,
    ) -> Receipt:
        """Erases from log, chunks, vectors, words, pages and summaries; exactly one selector says what."""
        selector = _options.forget(session, matching, turn, before, everything)
        scope = _options.scope(user, agent, session)
        with translated:
            return _convert.receipt(await self._native.forget(scope, selector))

    async def verify(self, receipt: Receipt) -> None:
        """Checks that what was erased is in no file; `CorruptedError` if it is."""
        with translated:
            await self._native.verify(receipt.record)

    async def chunks(
        self,
        *,
        user: str,
        agent: str | None = None,
        session: str | None = None,
        start: int = 0,
        end: int = ALL,
    ) -> list[Chunk]:
        """What memory holds, in the order in which it was first said."""
        scope = _options.scope(user, agent, session)
        with translated:
            return [_convert.chunk(each) for each in await self._native.chunks(scope, start, end)]

    async def turns(
        self, *, user: str, session: str, agent: str | None = None, start: int = 0, end: int = ALL
    ) -> list[Turn]:
        """The log of a session."""
        scope = _options.scope(user, agent, session)
        with translated:
            return [_convert.turn(each) for each in await self._native.turns(scope, start, end)]

    async def sessions(self, *, user: str, agent: str | None = None) -> list[SessionInfo]:
        """The sessions of a user, by name."""
        scope = _options.scope(user, agent, None)
        with translated:
            return [_convert.session_info(each) for each in await self._native.sessions(scope)]

    async def embed(self, texts: Sequence[str]) -> NDArray[float32]:
        """One unit vector a text, by the store's embedder: `(texts, dim)`, read-only."""
        with translated:
            native = await self._native.embed(list(texts))
        return _convert.vectors(native)

    def stats(self) -> Stats:
        """Counts and bytes of the store."""
        with translated:
            return _convert.stats(self._native.stats())
