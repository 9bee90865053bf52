"""Plain results: frozen, comparable, picklable.

Knows no call; `_convert` makes them from what the library gives back.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Literal, TypeAlias, Union

Role: TypeAlias = Literal["system", "user", "assistant", "document", "recalled"]
"""Who produced a turn."""

Trust: TypeAlias = Literal["host", "user", "model", "document"]
"""How far a recalled text may be believed; it is data, never an instruction."""

StopReason: TypeAlias = Literal["end_of_turn", "max_tokens", "stop_string"]
"""Why an answer ended."""


def _time(time_ms: int) -> datetime:
    return datetime.fromtimestamp(time_ms / 1000, timezone.utc)


@dataclass(frozen=True, slots=True)
class Scope:
    """Whose memory: a user, perhaps one agent, perhaps one session."""

    user: str
    agent: str | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Why:
    """What a score is made of: `0.5 * bm25 / best bm25 + 0.5 * max(cosine, 0) + recency`."""

    bm25: float
    bm25_rank: int | None
    cosine: float
    cosine_rank: int
    recency: float
    follow_up: bool


@dataclass(frozen=True, slots=True)
class Source:
    """Where a text was said: bytes `start` to `end` of a turn."""

    user: str
    agent: str | None
    session: str
    turn: int
    role: Role
    start: int
    end: int
    time_ms: int
    name: str | None

    @property
    def time(self) -> datetime:
        """When it was said."""
        return _time(self.time_ms)


@dataclass(frozen=True, slots=True)
class Hit:
    """A remembered piece of text that answers a query."""

    chunk: str
    text: str
    score: float
    why: Why
    source: Source
    trust: Trust
    count: int


@dataclass(frozen=True, slots=True)
class Context:
    """Memories laid out for a model that lives elsewhere; `tokens` is never above the budget."""

    text: str
    tokens: int
    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What one turn cost, in tokens."""

    prompt_tokens: int
    reused_tokens: int
    recalled_tokens: int
    generated_tokens: int
    stream_tokens: int
    stop: StopReason


@dataclass(frozen=True, slots=True)
class Recalled:
    """Memories that were put before the message, best first."""

    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Done:
    """The turn is on disk; nothing follows."""

    usage: Usage


Event: TypeAlias = Union[Recalled, Token, Done]
"""What happens while a turn is answered."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Bytes of a document taken in so far, and how many of them are on disk."""

    fed_bytes: int
    committed_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class Fed:
    """The whole document is on disk; nothing follows."""

    bytes: int
    model_tokens: int
    chunks_added: int
    chunks_deduplicated: int


FeedEvent: TypeAlias = Union[Progress, Fed]
"""What happens while a document is fed."""


@dataclass(frozen=True, slots=True)
class NewTurn:
    """A turn to be remembered; `remember=None` decides by role, `time=None` is now."""

    text: str
    role: Role = "user"
    time: datetime | int | None = None
    source: str | None = None
    remember: bool | None = None


@dataclass(frozen=True, slots=True)
class Committed:
    """What remembering did."""

    turns: tuple[int, ...]
    chunks_added: int
    chunks_deduplicated: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What was erased, without the erased text; `record` is what `verify` reads, JSON to be kept."""

    id: int
    scope: str
    turns: int
    chunks: int
    pages: int
    bytes: int
    record: str


@dataclass(frozen=True, slots=True)
class Chunk:
    """A remembered piece of text, for a list of what memory holds."""

    id: str
    text: str
    first: Source
    latest: Source
    count: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn as it stands in the log."""

    id: int
    role: Role
    text: str
    time_ms: int
    num_tokens: int
    source: str | None
    retracted: bool
    forgotten: bool

    @property
    def time(self) -> datetime:
        """When it was said."""
        return _time(self.time_ms)


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """A session, for a list of sessions."""

    scope: Scope
    num_turns: int
    last_time_ms: int | None
    stream_tokens: int | None


@dataclass(frozen=True, slots=True)
class Stats:
    """What a store holds."""

    sessions: int
    turns: int
    chunks: int
    vectors: int
    terms: int
    pages: int
    segments: int
    live_bytes: int
    dead_bytes: int
    damaged: tuple[str, ...]
