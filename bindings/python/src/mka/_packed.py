"""Reads events and hits, and writes the request of a recall, each in one piece of bytes.

Knows no call; `bindings/src/packed.rs` is the other side, and the two are changed together.
"""

from __future__ import annotations

from functools import partial
from struct import Struct, error as StructError
from typing import Any

from mka import _values as values
from mka._errors import InternalError, InvalidArgumentError

# A frozen dataclass sets each of its fields by a call. What follows has the same slots and can be set: filled, it becomes
# the frozen one, at a quarter of the price.


class _Hit(values.Unread):
    __slots__ = ("chunk", "text", "score", "relevance", "why", "source", "trust", "count", "stale")


class _Token:
    __slots__ = ("text",)


_ROLES: tuple[values.Role, ...] = ("system", "user", "assistant", "document", "recalled")
_TRUSTS: tuple[values.Trust, ...] = ("host", "user", "model", "document")
_STOPS: tuple[values.StopReason, ...] = ("end_of_turn", "max_tokens", "stop_string")

_U32 = Struct("<I")
# Of a hit what is read at once, and what when it is asked for.
_SOURCE = Struct("<4I2fIfIf?QBQQq")
_HIT = Struct(f"<2I2fBI?{_SOURCE.size}x")
_SOURCE_AT = _HIT.size - _SOURCE.size
_USAGE = Struct("<B5QB")
_PAGES = Struct("<2Q")
_PROGRESS = Struct("<3Q")
_FED = Struct("<4Q")
_TOKEN_KIND, _RECALLED_KIND, _DONE_KIND, _PROGRESS_KIND, _FED_KIND = 1, 2, 3, 4, 5

# The length of a text that is absent.
_NONE = (1 << 32) - 1


def _why_and_source(
    data: bytes, start: int, text: str, at: int
) -> tuple[values.Why, values.Source]:
    """What is left of a hit: its fixed part begins at `start`, and its texts at `at`."""
    (
        user_length, agent_length, session_length, name_length,
        bm25, coverage, bm25_rank, cosine, cosine_rank, recency, follow_up,
        turn, role, first, last, time_ms,
    ) = _SOURCE.unpack_from(data, start)  # fmt: skip
    user = text[at : at + user_length]
    at += user_length
    agent = name = None
    if agent_length != _NONE:
        agent = text[at : at + agent_length]
        at += agent_length
    session = text[at : at + session_length]
    at += session_length
    if name_length != _NONE:
        name = text[at : at + name_length]
    why = values.Why(bm25, coverage, bm25_rank or None, cosine, cosine_rank, recency, follow_up)
    source = values.Source(user, agent, session, turn, _ROLES[role], first, last, time_ms, name)
    return why, source


def hits(data: bytes) -> list[values.Hit]:
    """The hits of a block."""
    (count,) = _U32.unpack_from(data)
    end = 4 + count * _HIT.size
    text = data[end:].decode()
    start, at = 4 + _SOURCE_AT, 0
    new = object.__new__
    found: list[Any] = []
    for length, behind, score, relevance, trust, times, stale in _HIT.iter_unpack(data[4:end]):
        hit: Any = new(_Hit)
        hit.chunk = text[at : at + 32]
        at += 32
        hit.text = text[at : at + length]
        at += length
        hit._unread = partial(_why_and_source, data, start, text, at)
        at += behind
        start += _HIT.size
        hit.score = score
        hit.relevance = relevance
        hit.trust = _TRUSTS[trust]
        hit.count = times
        hit.stale = stale
        hit.__class__ = values.Hit
        found.append(hit)
    return found


def _shares(data: bytes, at: int) -> tuple[tuple[float, ...], int]:
    (layers,) = _U32.unpack_from(data, at)
    return Struct(f"<{layers}f").unpack_from(data, at + 4), at + 4 + 4 * layers


def _done(data: bytes, at: int) -> tuple[values.Done, int]:
    stop, prompt, reused, quoted, generated, stream, has_pages = _USAGE.unpack_from(data, at)
    at += _USAGE.size
    pages: values.PageUsage | None = None
    if has_pages:
        stored, recalled = _PAGES.unpack_from(data, at)
        share, at = _shares(data, at + _PAGES.size)
        recovered, at = _shares(data, at)
        pages = values.PageUsage(stored, recalled, share, recovered)
    usage = values.Usage(prompt, reused, quoted, generated, stream, _STOPS[stop], pages)
    return values.Done(usage), at


def events(data: bytes) -> list[Any]:
    """The events of a batch, of a turn or of a feed."""
    batch: list[Any] = []
    at, end = 0, len(data)
    while at < end:
        kind = data[at]
        at += 1
        if kind == _TOKEN_KIND:
            start = at + 4
            at = start + _U32.unpack_from(data, at)[0]
            token: Any = object.__new__(_Token)
            token.text = data[start:at].decode()
            token.__class__ = values.Token
            batch.append(token)
        elif kind == _DONE_KIND:
            done, at = _done(data, at)
            batch.append(done)
        elif kind == _RECALLED_KIND:
            start = at + 4
            at = start + _U32.unpack_from(data, at)[0]
            batch.append(values.Recalled(tuple(hits(data[start:at]))))
        elif kind == _PROGRESS_KIND:
            batch.append(values.Progress(*_PROGRESS.unpack_from(data, at)))
            at += _PROGRESS.size
        elif kind == _FED_KIND:
            batch.append(values.Fed(*_FED.unpack_from(data, at)))
            at += _FED.size
        else:
            raise InternalError(f"events: kind {kind} at byte {at - 1}, expected 1 to 5")
    return batch


# Options with a number, in their order: the format of each, and the bit that says that it is given.
_NUMBERS = {
    "k": ("Q", 1 << 4),
    "before_turn": ("Q", 1 << 5),
    "since": ("q", 1 << 6),
    "until": ("q", 1 << 7),
    "as_of": ("q", 1 << 8),
    "now": ("q", 1 << 9),
    "half_life": ("Q", 1 << 10),
    "min_score": ("f", 1 << 11),
    "min_relevance": ("f", 1 << 12),
}
_HEAD = Struct("<IB5I")
_OPTIONS = Struct("<" + "".join(form for form, _ in _NUMBERS.values()))
_NO_OPTIONS = bytes(_OPTIONS.size)


def _flags(given: dict[str, Any]) -> int:
    bits = 1 if given.get("across_sessions") else 0
    if given.get("stale"):
        bits |= 1 << 1
    follow_up = given.get("follow_up")
    if follow_up is not None:
        bits |= 1 << 3 | (1 << 2 if follow_up else 0)
    return bits


def recall_request(
    query: str, user: str, agent: str | None, session: str | None, given: dict[str, Any]
) -> bytes:
    """Scope, query and options of a recall; times are in milliseconds, `roles` are names, `filter` is JSON.

    Raises `StructError` for a number that is none or outside its range; `check` says which.
    """
    bits, roles, tail, filter_json = 0, 0, _NO_OPTIONS, None
    if given:
        bits = _flags(given)
        for name, (_, bit) in _NUMBERS.items():
            if name in given:
                bits |= bit
        tail = _OPTIONS.pack(*(given.get(name, 0) for name in _NUMBERS))
        filter_json = given.get("filter")
        for role in given.get("roles", ()):
            roles |= 1 << _ROLES.index(role)
    # `str.encode`, not the method: what is no text is a TypeError.
    encode = str.encode
    user_text, query_text = encode(user), encode(query)
    agent_text = b"" if agent is None else encode(agent)
    session_text = b"" if session is None else encode(session)
    filter_text = b"" if filter_json is None else encode(filter_json)
    head = _HEAD.pack(
        bits,
        roles,
        len(user_text),
        _NONE if agent is None else len(agent_text),
        _NONE if session is None else len(session_text),
        len(query_text),
        _NONE if filter_json is None else len(filter_text),
    )
    return b"".join((head, tail, user_text, agent_text, session_text, query_text, filter_text))


def check(name: str, number: object) -> None:
    """Raises the error that says what is wrong with a number, if something is."""
    if name not in _NUMBERS:
        return
    form, _ = _NUMBERS[name]
    try:
        Struct(form).pack(number)
    except StructError as error:
        if isinstance(number, int):
            raise InvalidArgumentError(f"recall: {name} {number}: {error}") from None
        raise TypeError(f"recall: {name} is {type(number).__name__}, expected a number") from None


__all__ = ["StructError", "check", "events", "hits", "recall_request"]
