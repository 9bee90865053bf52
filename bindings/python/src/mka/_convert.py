"""From native records to the plain values of the package.

Knows no call.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from mka import _filter
from mka import _values as values
from mka._native import mka_bindings as _native

if TYPE_CHECKING:
    from numpy import float32
    from numpy.typing import NDArray


def _by_name(enum: Any) -> dict[Any, Any]:
    return {member: member.name.lower() for member in enum}


_ROLE = _by_name(_native.Role)
_TRUST = _by_name(_native.Trust)
_SENSITIVE = _by_name(_native.Sensitive)
_REPAIR = _by_name(_native.Repair)


def scope(native: Any) -> values.Scope:
    return values.Scope(native.user, native.agent, native.session)


def source(native: Any) -> values.Source:
    return values.Source(
        native.user,
        native.agent,
        native.session,
        native.turn,
        _ROLE[native.role],
        native.start,
        native.end,
        native.time_ms,
        native.name,
        native.subject,
        native.expires_ms,
        _filter.plain(native.metadata),
    )


def hit(native: Any) -> values.Hit:
    why = native.why
    return values.Hit(
        native.chunk,
        native.text,
        native.score,
        native.relevance,
        values.Why(
            why.bm25,
            why.coverage,
            why.bm25_rank,
            why.cosine,
            why.cosine_rank,
            why.recency,
            why.follow_up,
        ),
        source(native.source),
        _TRUST[native.trust],
        native.count,
        native.stale,
    )


def hits(native: Iterable[Any]) -> list[values.Hit]:
    return [hit(each) for each in native]


def context(native: Any) -> values.Context:
    return values.Context(native.text, native.tokens, tuple(hits(native.hits)))


def committed(native: Any) -> values.Committed:
    return values.Committed(
        tuple(native.turns),
        native.chunks_added,
        native.chunks_deduplicated,
        native.chunks_nearly_duplicated,
        tuple(
            values.Finding(each.turn, _SENSITIVE[each.kind], each.start, each.end)
            for each in native.findings
        ),
    )


def receipt(native: Any) -> values.Receipt:
    return values.Receipt(
        native.id,
        native.scope,
        native.turns,
        native.chunks,
        native.pages,
        native.bytes,
        native.record,
    )


def chunk(native: Any) -> values.Chunk:
    return values.Chunk(
        native.id, native.text, source(native.first), source(native.latest), native.count
    )


def chunks(native: Iterable[Any]) -> list[values.Chunk]:
    return [chunk(each) for each in native]


def turn(native: Any) -> values.Turn:
    return values.Turn(
        native.id,
        _ROLE[native.role],
        native.text,
        native.time_ms,
        native.num_tokens,
        native.source,
        native.remember,
        native.subject,
        native.expires_ms,
        native.retracted,
        native.forgotten,
        _filter.plain(native.metadata),
    )


def session_info(native: Any) -> values.SessionInfo:
    return values.SessionInfo(
        scope(native.scope),
        native.num_turns,
        native.last_time_ms,
        native.stream_tokens,
        native.num_pages,
    )


def turns(native: Iterable[Any]) -> list[values.Turn]:
    return [turn(each) for each in native]


def sessions(native: Iterable[Any]) -> list[values.SessionInfo]:
    return [session_info(each) for each in native]


def stats(native: Any) -> values.Stats:
    return values.Stats(
        native.sessions,
        native.turns,
        native.chunks,
        native.vectors,
        native.vectors_unread,
        native.vectors_in_graphs,
        native.terms,
        native.turns_to_embed,
        native.subjects,
        native.superseded,
        native.duplicates,
        native.embedder,
        native.encrypted,
        native.pages,
        native.segments,
        native.live_bytes,
        native.dead_bytes,
        tuple(native.damaged),
    )


def disk_usage(native: Any) -> values.DiskUsage:
    return values.DiskUsage(
        native.segment_bytes,
        native.database_bytes,
        native.graph_bytes,
        native.image_bytes,
        native.live_bytes,
    )


def exported(native: Any) -> values.Exported:
    return values.Exported(native.sessions, native.turns, tuple(native.lost))


def imported(native: Any) -> values.Imported:
    return values.Imported(native.turns, native.skipped, native.chunks_added)


def backup(native: Any) -> values.Backup:
    return values.Backup(native.segments, native.bytes, native.records)


def checkup(native: Any) -> values.Checkup:
    problems = (values.Problem(each.what, _REPAIR[each.repair]) for each in native.problems)
    return values.Checkup(
        native.records, native.blobs, native.bytes, native.chunks, tuple(problems)
    )


def numpy(operation: str) -> Any:
    """The module, which is an extra of the wheel."""
    # Imported here: most programs never ask for vectors, and numpy takes longer to import than mka.
    try:
        import numpy
    except ImportError as error:
        text = f"{operation}: numpy is not installed, expected the wheel's extra: pip install 'mka[numpy]'"
        raise ImportError(text, name="numpy") from error
    return numpy


def vectors(native: Any) -> NDArray[float32]:
    """Rows of float32 over the library's own bytes, read-only: no number is copied."""
    module = numpy("vectors")
    rows: NDArray[float32] = module.frombuffer(native.data, dtype=module.float32)
    return rows.reshape(-1, native.dim) if native.dim else rows.reshape(0, 0)
