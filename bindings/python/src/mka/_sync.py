"""The blocking classes: engine, session, memory.

Knows no event loop; `_aio` holds the twins.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

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
from mka._streams import Events, Feed
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

T = TypeVar("T")

ALL = (1 << 63) - 1


def _interruptible(work: Callable[[], T]) -> T:
    """Runs long work so that Ctrl-C is seen at once: elsewhere, while this thread waits."""
    if threading.current_thread() is not threading.main_thread():
        return work()
    result: Future[T] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="mka-open", daemon=True).start()
    return result.result()


class Engine:
    """An open memory folder with its model; made by `open_sync`, closed by leaving `with`."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self.memory = Memory(native.memory())
        """The memory of every user: remember, recall, forget."""

    def session(self, *, user: str, session: str, agent: str | None = None) -> Session:
        """Opens a conversation, new or continued where it stopped; one handle of it at a time."""
        scope = _options.scope(user, agent, session)
        with translated:
            native = _interruptible(lambda: self._native.session_blocking(scope))
        return Session(native)

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

    def close(self) -> None:
        """Closes sessions and store, cancels what runs, and waits until the folder is free."""
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


def open_sync(path: Path, **options: Unpack[EngineOptions]) -> Engine:
    """Opens the memory folder at `path`, created if missing; the blocking twin of `open`.

    Raises `LockedError` if it is open elsewhere, `IncompatibleError` if another embedder made it, `NotFoundError` naming
    every place where the model was looked for.
    """
    config = _options.engine_config(options)
    with translated:
        return Engine(
            _interruptible(lambda: _native.NativeEngine.open_blocking(os.fspath(path), config))
        )


class Session:
    """One conversation; one stream of it at a time."""

    def __init__(self, native: Any) -> None:
        self._native = native

    @property
    def scope(self) -> Scope:
        """User, agent and session."""
        return _convert.scope(self._native.scope())

    def send(self, message: str, **options: Unpack[SendOptions]) -> Events:
        """Answers `message`: recalls what belongs to it, streams the answer, commits both."""
        with translated:
            return Events(self._native.send(message, _options.send_options(options)))

    def regenerate(self, **options: Unpack[SendOptions]) -> Events:
        """Answers the last message again, in place of its answer."""
        with translated:
            return Events(self._native.regenerate(_options.send_options(options)))

    def feed(self, text: str, **options: Unpack[FeedOptions]) -> Feed:
        """Takes in a document of any length at constant memory."""
        with translated:
            return Feed(self._native.feed(text, _options.feed_options(options)))

    def context(self, query: str, *, budget_tokens: int) -> Context:
        """What memory holds on `query`, laid out for another model, never above the budget."""
        with translated:
            return _convert.context(self._native.context_blocking(query, budget_tokens))

    @property
    def num_turns(self) -> int:
        """Number of turns in the session's log."""
        with translated:
            turns: int = self._native.num_turns()
        return turns

    def peek_logits(self, text: str) -> NDArray[float32]:
        """Logits of the token after `text`, without changing the session: `(vocabulary,)`."""
        with translated:
            native = self._native.peek_logits_blocking(text)
        return _convert.vectors(native)[0]

    def close(self) -> None:
        """Gives the session back and cancels its stream; another handle may open it."""
        self._native.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Memory:
    """Remember, recall and forget, over every session of the engine."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def remember(
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
                self._native.remember_blocking(scope, _options.new_turns(turns))
            )

    def recall(
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
                self._native.recall_blocking(scope, query, _options.recall_options(options))
            )

    def context(
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
                self._native.context_blocking(scope, query, budget_tokens)
            )

    def forget(
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
            return _convert.receipt(self._native.forget_blocking(scope, selector))

    def verify(self, receipt: Receipt) -> None:
        """Checks that what was erased is in no file; `CorruptedError` if it is."""
        with translated:
            self._native.verify_blocking(receipt.record)

    def chunks(
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
            return [_convert.chunk(each) for each in self._native.chunks_blocking(scope, start, end)]

    def turns(
        self, *, user: str, session: str, agent: str | None = None, start: int = 0, end: int = ALL
    ) -> list[Turn]:
        """The log of a session."""
        scope = _options.scope(user, agent, session)
        with translated:
            return [_convert.turn(each) for each in self._native.turns_blocking(scope, start, end)]

    def sessions(self, *, user: str, agent: str | None = None) -> list[SessionInfo]:
        """The sessions of a user, by name."""
        scope = _options.scope(user, agent, None)
        with translated:
            return [_convert.session_info(each) for each in self._native.sessions_blocking(scope)]

    def embed(self, texts: Sequence[str]) -> NDArray[float32]:
        """One unit vector a text, by the store's embedder: `(texts, dim)`, read-only."""
        with translated:
            native = self._native.embed_blocking(list(texts))
        return _convert.vectors(native)

    def stats(self) -> Stats:
        """Counts and bytes of the store."""
        with translated:
            return _convert.stats(self._native.stats())
