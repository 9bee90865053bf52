"""The blocking classes: engine, session, memory.

Knows no event loop; `_aio` holds the twins, over the same native objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack

from mka import _calls, _direct, _options
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
from mka._streams import Events, Feed
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

    from mka._aio import AsyncEngine


class Engine(EngineHandle):
    """An open memory folder with its model; made by `open_sync`, closed by leaving `with`."""

    def __init__(self, native: Any) -> None:
        super().__init__(native)
        self.memory = Memory(native.memory())
        """The memory of every user: remember, recall, forget."""

    @property
    def asyncio(self) -> AsyncEngine:
        """The same open folder with calls that are awaited, in any event loop.

        Closing one engine closes the other, and the folder is free; a session is open through one handle of either.
        """
        # Imported here: an import of mka is for many half as long without asyncio.
        from mka._aio import AsyncEngine

        return AsyncEngine(self._native)

    def session(self, *, user: str, session: str, agent: str | None = None) -> Session:
        """Opens a conversation, new or continued where it stopped; one handle of it at a time."""
        return Session(_calls.session(user, agent, session).run_interruptibly(self._native))

    def close(self) -> None:
        """Closes sessions and store, cancels what runs, and waits until the folder is free."""
        _calls.CLOSE.run(self._native)

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
    return Engine(_calls.open_engine(path, options).run_interruptibly(_native.NativeEngine))


class Session(SessionHandle):
    """One conversation; one stream of it at a time."""

    def send(self, message: str, **options: Unpack[SendOptions]) -> Events:
        """Answers `message`: recalls what belongs to it, streams the answer, commits both."""
        given = _options.send_options(options)
        return Events(_calls.now(self._native, "send", message, given))

    def send_tool(
        self,
        results: str | ToolResult | Sequence[str | ToolResult],
        **options: Unpack[SendOptions],
    ) -> Events:
        """Gives the model what the tools that its last answer called gave back, and answers.

        They stand where the chat template has a place for them, or else in a message of the user's; each is a turn of role
        `tool`. `system`, `tools`, `completion` and `joined` are without effect.
        """
        given = _options.tool_results(results)
        native = _options.send_options(options)
        return Events(_calls.now(self._native, "send_tool", given, native))

    def regenerate(self, **options: Unpack[SendOptions]) -> Events:
        """Answers the last message again, in place of its answer, whose metadata the new one has.

        The prompt stays as it was, with its beginning of an answer: `system`, `tools`, `recall_k`, `recall_filter`,
        `across_sessions`, `answer_prefix`, `completion`, `joined` and `metadata` are without effect. With the same
        `seed`, the answer is the same.

        In a session that was opened again since, or behind an answer of more than eight pages of 64 tokens, the window is
        filled from the log: of what it does not hold, text is recalled and pages are not.
        """
        given = _options.send_options(options)
        return Events(_calls.now(self._native, "regenerate", given))

    def feed(self, text: str, **options: Unpack[FeedOptions]) -> Feed:
        """Takes in a document of any length at constant memory."""
        given = _options.feed_options(options)
        return Feed(_calls.now(self._native, "feed", text, given))

    def append(self, turns: str | NewTurn | Sequence[str | NewTurn]) -> Feed:
        """Takes in what was said elsewhere as if it had been said here: the model reads it and answers nothing.

        Roles are user and assistant; before a new session's first message may stand instructions, of role system. A `str`
        is what the user said now.
        """
        return Feed(_calls.now(self._native, "append", _options.new_turns(turns)))

    def context(self, query: str, *, budget_tokens: int) -> Context:
        """What memory holds on `query`, laid out for another model, never above the budget.

        Every session of the user is looked into, or of the agent if the session has one.
        At most 32 memories are looked up for it.
        """
        return _calls.session_context(query, budget_tokens).run(self._native)

    def rewind(self, turn: int) -> None:
        """Takes every turn from `turn` on back, as if it had never been said: the next message follows what was before it.

        What is taken back stays in the log as retracted, keeps its number, and is not recalled.
        """
        _calls.rewind(turn).run(self._native)

    def fork(self, session: str) -> Session:
        """Begins another session of the same user and agent, which knows all that this one does and then goes its own way.

        Keys and values are shared, not copied. A turn from before the fork is one turn: forgetting it erases it in both.
        """
        return Session(_calls.fork(session).run(self._native))

    def peek_logits(self, text: str) -> NDArray[float32]:
        """Logits of the token after `text`, without changing the session: `(vocabulary,)`.

        Needs the wheel's extra `numpy`, and raises `ImportError` without it.
        """
        row: NDArray[float32] = _calls.peek_logits(text).run(self._native)
        return row

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


class Memory(MemoryHandle):
    """Remember, recall and forget, over every session of the engine."""

    def remember(
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
        return _calls.remember(turns, user, agent, session).run(self._native)

    def replace(
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
        return _calls.replace(turn, new, user, agent, session).run(self._native)

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
        given = _options.recall_options(options)
        with translated:
            return _direct.recall(self._number, query, (user, agent, session), given)

    def context(
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
        return call.run(self._native)

    def forget(
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
        return call.run(self._native)

    def verify(self, receipt: Receipt | str) -> None:
        """Checks that what was erased is in no file; `CorruptedError` if it is.

        Of a receipt its `record` is enough, as it was kept.
        """
        _calls.verify(receipt).run(self._native)

    def chunks(
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
        return call.run(self._native)

    def turns(
        self,
        *,
        user: str,
        session: str,
        agent: str | None = None,
        start: int = 0,
        end: int = _calls.ALL,
    ) -> list[Turn]:
        """The log of a session."""
        return _calls.turns(user, agent, session, start, end).run(self._native)

    def sessions(self, *, user: str, agent: str | None = None) -> list[SessionInfo]:
        """The sessions of a user, by name."""
        return _calls.sessions(user, agent).run(self._native)

    def embed(self, texts: Sequence[str]) -> NDArray[float32]:
        """One unit vector a text, by the store's embedder: `(texts, dim)`, read-only.

        Needs the wheel's extra `numpy`, and raises `ImportError` without it.
        """
        rows: NDArray[float32] = _calls.embed(texts).run(self._native)
        return rows

    def export(
        self,
        path: Path,
        *,
        user: str | None = None,
        agent: str | None = None,
        session: str | None = None,
    ) -> Exported:
        """Writes the log of a scope, or of every user without one, into a file as lines of JSON."""
        return _calls.export(path, user, agent, session).run_interruptibly(self._native)

    def import_(self, path: Path) -> Imported:
        """Appends the turns of an exported file to the sessions that they come from; those that are held are skipped."""
        return _calls.import_log(path).run_interruptibly(self._native)

    def backup(self, path: Path) -> Backup:
        """Copies the store as it is at one moment to a folder that does not exist yet; sessions go on meanwhile."""
        return _calls.backup(path).run_interruptibly(self._native)

    def doctor(self, *, repair: bool = False) -> Checkup:
        """Compares every checksum, and the indexes with the log; with `repair`, makes anew what can be derived."""
        return _calls.doctor(repair).run_interruptibly(self._native)

    def compact(self) -> None:
        """Gives all space on the disk back that nothing uses."""
        _calls.COMPACT.run_interruptibly(self._native)

    def disk_usage(self) -> DiskUsage:
        """What the store takes on the disk, and how much of it is in use."""
        return _calls.DISK_USAGE.run(self._native)
