"""Plain results: frozen, comparable, picklable.

Knows no call; `_convert` makes them from what the library gives back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, Union

Role: TypeAlias = Literal["system", "user", "assistant", "document", "recalled", "tool"]
"""Who produced a turn."""

Trust: TypeAlias = Literal["host", "user", "model", "document"]
"""How far a recalled text may be believed; it is data, never an instruction."""

StopReason: TypeAlias = Literal["end_of_turn", "max_tokens", "stop_string"]
"""Why an answer ended."""

Sensitive: TypeAlias = Literal[
    "private_key",
    "token",
    "password",
    "card",
    "bank_account",
    "social_security",
    "email",
    "phone",
    "other",
]
"""A kind of sensitive text, by its form."""

Repair: TypeAlias = Literal["possible", "done", "lost"]
"""What became, or can become, of something damaged."""


MetadataValue: TypeAlias = bool | int | float | str
"""What a key of a turn's metadata is set to; numbers are exact up to 2**53."""


_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _time(time_ms: int) -> datetime:
    """The moment, or the first or last that there is where it lies beyond the years 1 to 9999."""
    try:
        return _EPOCH + timedelta(milliseconds=time_ms)
    except OverflowError:
        end = datetime.max if time_ms > 0 else datetime.min
        return end.replace(tzinfo=timezone.utc)


class _Value:
    """What a dataclass would compile for each class anew, at every import: a third of what its classes take."""

    __slots__ = ()

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, each.name) == getattr(other, each.name) for each in fields(self))

    def __hash__(self) -> int:
        hashed = (getattr(self, each.name) for each in fields(self) if each.hash is not False)
        return hash((type(self), *hashed))

    def __repr__(self) -> str:
        inside = ", ".join(f"{each.name}={getattr(self, each.name)!r}" for each in fields(self))
        return f"{type(self).__qualname__}({inside})"


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Scope(_Value):
    """Whose memory: a user, perhaps one agent, perhaps one session."""

    user: str
    agent: str | None = None
    session: str | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Why(_Value):
    """What a score is made of: `0.5 * words**3 + 0.5 * max(cosine, 0) + recency`; places count from 1.

    `words` is `bm25` by that of a chunk that holds every word of the question, or by the best one, if that is more.
    `coverage` is the share of the question's words, weighted by how rare they are, that the text holds.
    """

    bm25: float
    coverage: float
    bm25_rank: int | None
    cosine: float
    cosine_rank: int
    recency: float
    follow_up: bool


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Source(_Value):
    """Where a text was said: bytes `start` to `end` of a turn, and what stands beside that turn."""

    user: str
    agent: str | None
    session: str
    turn: int
    role: Role
    start: int
    end: int
    time_ms: int
    name: str | None
    subject: str | None
    expires_ms: int | None
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict, hash=False)

    @property
    def time(self) -> datetime:
        """When it was said."""
        return _time(self.time_ms)

    @property
    def expires(self) -> datetime | None:
        """When it is recalled no more; None if it stays."""
        return None if self.expires_ms is None else _time(self.expires_ms)


class _ReadLater(_Value):
    """A hit of the library's has `text`, `score` and `relevance`; each other field is made when it is asked for first."""

    __slots__ = ("_rest",)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> object:
            # Called for a slot that is empty, and for what there is no slot of.
            if name not in Hit.__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            value = self._rest.read(name)
            object.__setattr__(self, name, value)
            return value


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Hit(_ReadLater):
    """A remembered piece of text that answers a query.

    `score` compares the hits of one query, best first; `relevance`, from 0 to 1, says whether there is an answer at all.
    """

    chunk: str
    text: str
    score: float
    relevance: float
    why: Why
    source: Source
    trust: Trust
    count: int
    stale: bool


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Context(_Value):
    """Memories laid out for a model that lives elsewhere; `tokens` is never above the budget."""

    text: str
    tokens: int
    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class PageUsage(_Value):
    """What recall inside attention did for a turn; `share` and `recovered` have a number for each layer.

    `share` is the part of the answer's attention that went to recalled tokens; `recovered` the estimated part of the
    attention to all stored tokens that the recalled ones hold.
    """

    stored_tokens: int
    recalled_tokens: int
    share: tuple[float, ...]
    recovered: tuple[float, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Usage(_Value):
    """What one turn cost, in tokens; `pages` is None where the turn recalled nothing inside attention.

    `answer_turn` is the answer's turn in the session's log, behind that of its message.
    """

    prompt_tokens: int
    reused_tokens: int
    recalled_tokens: int
    generated_tokens: int
    stream_tokens: int
    stop: StopReason
    pages: PageUsage | None = None
    answer_turn: int | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Recalled(_Value):
    """Memories that were put before the message, best first."""

    hits: tuple[Hit, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Token(_Value):
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Done(_Value):
    """The turn is on disk; nothing follows."""

    usage: Usage


Event: TypeAlias = Union[Recalled, Token, Done]
"""What happens while a turn is answered."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Progress(_Value):
    """Bytes of a document taken in so far, and how many of them are on disk."""

    fed_bytes: int
    committed_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Fed(_Value):
    """The whole document is on disk; nothing follows."""

    bytes: int
    model_tokens: int
    chunks_added: int
    chunks_deduplicated: int


FeedEvent: TypeAlias = Union[Progress, Fed]
"""What happens while a document is fed."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class NewTurn(_Value):
    """A turn to be remembered; `remember=None` decides by role, `time=None` is now, and so is a time of 0.

    Among turns with the same `subject` the newest wins; after `expires` a turn is recalled no more. `metadata` is what
    the `filter` of a recall asks for.
    """

    text: str
    role: Role = "user"
    time: datetime | int | None = None
    source: str | None = None
    remember: bool | None = None
    subject: str | None = None
    expires: datetime | int | None = None
    metadata: Mapping[str, MetadataValue] | None = field(default=None, hash=False)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ToolCall(_Value):
    """A call of a tool, as a model wrote it: `arguments` is a JSON object, for `json.loads`."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ToolResult(_Value):
    """What a tool gave back; `name`, that of the tool, is shown beside what is recalled from it."""

    content: str
    name: str | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Finding(_Value):
    """Bytes `start` to `end` of one of a call's turns that look sensitive.

    `turn` counts from 0 in the call, not in the log: `Committed.turns[finding.turn]` is its number there.
    """

    turn: int
    kind: Sensitive
    start: int
    end: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Committed(_Value):
    """What remembering did."""

    turns: tuple[int, ...]
    chunks_added: int
    chunks_deduplicated: int
    chunks_nearly_duplicated: int
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Receipt(_Value):
    """What was erased, without the erased text; `record` is what `verify` reads, JSON to be kept."""

    id: int
    scope: str
    turns: int
    chunks: int
    pages: int
    bytes: int
    record: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Chunk(_Value):
    """A remembered piece of text, for a list of what memory holds."""

    id: str
    text: str
    first: Source
    latest: Source
    count: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Turn(_Value):
    """A turn as it stands in the log; `remember` says whether it may be recalled, as it was committed."""

    id: int
    role: Role
    text: str
    time_ms: int
    num_tokens: int
    source: str | None
    remember: bool
    subject: str | None
    expires_ms: int | None
    retracted: bool
    forgotten: bool
    metadata: Mapping[str, MetadataValue] = field(default_factory=dict, hash=False)

    @property
    def time(self) -> datetime:
        """When it was said."""
        return _time(self.time_ms)

    @property
    def expires(self) -> datetime | None:
        """When it is recalled no more; None if it stays."""
        return None if self.expires_ms is None else _time(self.expires_ms)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class SessionInfo(_Value):
    """A session, for a list of sessions; `num_pages` are its stored key/value pages, evicted ones included."""

    scope: Scope
    num_turns: int
    last_time_ms: int | None
    stream_tokens: int | None
    num_pages: int

    @property
    def last_time(self) -> datetime | None:
        """When its latest turn was said; None if it holds none."""
        return None if self.last_time_ms is None else _time(self.last_time_ms)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Stats(_Value):
    """What a store holds.

    Of the vectors, `vectors_unread` were left on the disk by an opening, and no recall has looked at them since;
    `vectors_in_graphs` are found by a graph where a recall has no filter.
    """

    sessions: int
    turns: int
    chunks: int
    vectors: int
    vectors_unread: int
    vectors_in_graphs: int
    terms: int
    turns_to_embed: int
    subjects: int
    superseded: int
    duplicates: int
    embedder: str
    encrypted: bool
    pages: int
    segments: int
    live_bytes: int
    dead_bytes: int
    damaged: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class DiskUsage(_Value):
    """What a store takes on the disk, in bytes; graphs and images of the index can be made anew."""

    segment_bytes: int
    database_bytes: int
    graph_bytes: int
    image_bytes: int
    live_bytes: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Exported(_Value):
    """What an export wrote; `lost` says which turns were damaged."""

    sessions: int
    turns: int
    lost: tuple[str, ...]


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Imported(_Value):
    """What an import took in; turns that the store held already are skipped."""

    turns: int
    skipped: int
    chunks_added: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Backup(_Value):
    """What a backup copied."""

    segments: int
    bytes: int
    records: int


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Problem(_Value):
    """Something that is not as it should be: what, where, and what became of it."""

    what: str
    repair: Repair


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Checkup(_Value):
    """What a check found; no problems for a store that is whole."""

    records: int
    blobs: int
    bytes: int
    chunks: int
    problems: tuple[Problem, ...]
