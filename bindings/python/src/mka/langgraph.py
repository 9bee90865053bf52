"""A LangGraph store in an mka memory: items by namespace and key, found by words and meaning.

Needs the wheel's extra `langgraph`. Knows no graph.

```python
store = mka.langgraph.MkaStore(engine)
graph = builder.compile(store=store)
store.put(("memories", "ada"), "hotel", {"text": "The hotel is in Kyoto."})
store.search(("memories", "ada"), query="where do we stay")
```
"""

from __future__ import annotations

import asyncio
import copy
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from math import inf
from typing import Any

from langgraph.store.base import (
    BaseStore,
    GetOp,
    InvalidNamespaceError,
    Item,
    ListNamespacesOp,
    MatchCondition,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    get_text_at_path,
    tokenize_path,
)

from mka._sync import Engine
from mka._values import NewTurn

_AGENT = "langgraph"
_ITEM = "langgraph:item"
_MAX_NAMESPACE_BYTES = 256
_MOST_RECALLS = 32
"""Recalls of one search: one more than the places that one text is looked for in."""
_WRITING = threading.Lock()
"""Held from the reading of a namespace to the erasing of what a write replaced: one engine may have several stores."""

Namespace = tuple[str, ...]


@dataclass(slots=True)
class _Stored:
    """An item and the turns that hold it: its text, if that is searched, and its record.

    Before them stand those of an item of the same key that it replaced, as far as they are not erased.
    """

    item: Item
    turns: list[int]


_Read = Callable[[Namespace], dict[str, _Stored]]
"""The items of a namespace by their keys, what was written last at the end."""


class MkaStore(BaseStore):
    """Items in the memory of one user of the store; give each of your users a namespace, or a store of their own.

    A namespace is a session, an item a turn of JSON that is never recalled, followed by a turn of the text that is. Time
    to live is not supported. Every read is of the log, so that what was erased, or written by another store of the same
    engine, is seen at once: it costs a reading of the namespace, a search or a list one of each namespace in question.

    `delete` erases an item. `Memory.forget(matching=..)` finds words in the JSON of an item as JSON writes them: of words
    with a quotation mark or a line break it erases the text that is recalled, and leaves the item.
    """

    supports_ttl = False

    def __init__(
        self, engine: Engine, *, user: str = "langgraph", fields: Iterable[str] = ("$",)
    ) -> None:
        self._memory = engine.memory
        self._user = user
        self._fields = list(fields)

    def _stored_namespaces(self, prefix: Namespace = ()) -> list[Namespace]:
        """Namespaces under a prefix that something was ever written to."""
        infos = self._memory.sessions(user=self._user, agent=_AGENT)
        namespaces = [tuple(json.loads(info.scope.session or "[]")) for info in infos]
        return [namespace for namespace in namespaces if namespace[: len(prefix)] == prefix]

    def _read(self, namespace: Namespace) -> dict[str, _Stored]:
        session = self._session(namespace)
        if len(session.encode()) > _MAX_NAMESPACE_BYTES:
            return {}
        held: dict[str, _Stored] = {}
        current: _Stored | None = None
        for turn in self._memory.turns(user=self._user, agent=_AGENT, session=session):
            if turn.forgotten:
                current = None
            # A text has its key for a source, whatever the key is.
            elif turn.role == "system" and turn.source == _ITEM:
                item = self._item(namespace, json.loads(turn.text))
                before = held.pop(item.key, None)
                turns = [*(before.turns if before else ()), turn.id]
                # What is written anew comes last.
                current = held[item.key] = _Stored(item, turns)
            elif current is not None and (turn.source or "") == current.item.key:
                current.turns.append(turn.id)
        return held

    @staticmethod
    def _item(namespace: Namespace, record: dict[str, Any]) -> Item:
        return Item(
            value=record["value"],
            key=record["key"],
            namespace=namespace,
            created_at=datetime.fromisoformat(record["created_at"]),
            updated_at=datetime.fromisoformat(record["updated_at"]),
        )

    @staticmethod
    def _session(namespace: Namespace) -> str:
        return json.dumps(namespace, ensure_ascii=False, separators=(",", ":"))

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Runs operations: reads see the store as it was before, then the last write of each key is done."""
        results: list[Result] = []
        writes: dict[tuple[Namespace, str], PutOp] = {}
        # One reading of a namespace for all reads of the batch; each result has a value of its own.
        read = cache(self._read)
        for op in ops:
            match op:
                case GetOp():
                    stored = read(op.namespace).get(op.key)
                    results.append(copy.deepcopy(stored.item) if stored else None)
                case SearchOp():
                    results.append(self._search(op, read))
                case ListNamespacesOp():
                    results.append(self._namespaces(op, read))
                case PutOp():
                    writes[op.namespace, op.key] = op
                    results.append(None)
                case _:
                    raise ValueError(f"batch: operation {op!r}, expected one of LangGraph's")
        for write in writes.values():
            with _WRITING:
                self._put(write)
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """`batch`, off the event loop."""
        return await asyncio.to_thread(self.batch, list(ops))

    def _put(self, op: PutOp) -> None:
        session = self._session(op.namespace)
        if len(session.encode()) > _MAX_NAMESPACE_BYTES:
            raise InvalidNamespaceError(
                f"namespace {op.namespace}: {len(session.encode())} bytes as JSON,"
                f" expected at most {_MAX_NAMESPACE_BYTES}"
            )
        old = self._read(op.namespace).get(op.key)
        gone = old.turns if old else []
        if op.value is not None:
            now = datetime.now(timezone.utc)
            created = old.item.created_at if old else now
            record = {
                "key": op.key,
                "value": op.value,
                "created_at": created.isoformat(),
                "updated_at": now.isoformat(),
            }
            turns = [
                NewTurn(
                    json.dumps(record, ensure_ascii=False),
                    role="system",
                    source=_ITEM,
                    remember=False,
                )
            ]
            if op.index is not False:
                paths = self._fields if op.index is None else op.index
                texts = [
                    text
                    for path in paths
                    for text in get_text_at_path(
                        # "$" is the whole value, and no path to be cut.
                        op.value,
                        path if path == "$" else tokenize_path(path),
                    )
                ]
                said = "\n".join(text for text in texts if text)
                if said:
                    turns.append(NewTurn(said, role="document", source=op.key))
            done = self._memory.remember(turns, user=self._user, agent=_AGENT, session=session)
            # Numbers begin anew once the whole session is erased: then what was read is gone.
            gone = [turn for turn in gone if turn < done.turns[0]]
        # The new item stands before the old one goes: a crash between leaves both, and the later one counts. What cannot be
        # erased is still there, and goes with the next write of the key.
        if gone:
            self._memory.forget(user=self._user, agent=_AGENT, session=session, turn=gone)

    def _search(self, op: SearchOp, read: _Read) -> list[SearchItem]:
        held = {
            (namespace, key): stored
            for namespace in self._stored_namespaces(op.namespace_prefix)
            for key, stored in read(namespace).items()
            if _matches(stored.item.value, op.filter)
        }
        scores: dict[tuple[Namespace, str], float] = {}
        if op.query:
            for namespace in {namespace for namespace, _ in held}:
                scores |= self._scores(namespace, read(namespace), op.query)
        # What was not found stands behind what was, in its own order.
        order = sorted(held, key=lambda where: scores.get(where, -inf), reverse=True)
        page = order[op.offset : op.offset + op.limit]
        return [
            SearchItem(
                namespace=held[where].item.namespace,
                key=held[where].item.key,
                value=copy.deepcopy(held[where].item.value),
                created_at=held[where].item.created_at,
                updated_at=held[where].item.updated_at,
                score=scores.get(where),
            )
            for where in page
        ]

    def _scores(
        self, namespace: Namespace, items: dict[str, _Stored], query: str
    ) -> dict[tuple[Namespace, str], float]:
        """What the items of a namespace score, by their best piece.

        A recall names one place of a text, so this namespace is asked alone, and asked again without the places that it
        named until it has named every place of a text that stands in several, word for word or nearly.
        """
        by_turn = {turn: key for key, stored in items.items() for turn in stored.turns}
        scores: dict[tuple[Namespace, str], float] = {}
        # A text counts as much for each item that has it: how new its place is would tell them apart.
        by_chunk: dict[str, float] = {}
        named: set[int] = set()
        # What stands in more places than that is too common to tell items apart.
        for _ in range(_MOST_RECALLS):
            hits = self._memory.recall(
                query,
                user=self._user,
                agent=_AGENT,
                session=self._session(namespace),
                # Filtered items may stand between: ask for all of them.
                k=max(4 * len(items), 16),
                except_turns=sorted(named),
                # A search has nothing to do with what was written last.
                follow_up=False,
            )
            for hit in hits:
                score = by_chunk.setdefault(hit.chunk, hit.score)
                key = by_turn.get(hit.source.turn)
                if key is not None:
                    scores[namespace, key] = max(score, scores.get((namespace, key), -inf))
            more = {hit.source.turn for hit in hits if hit.count > 1} - named
            if not more:
                break
            named |= more
        return scores

    def _namespaces(self, op: ListNamespacesOp, read: _Read) -> list[Namespace]:
        found = {
            namespace
            for namespace in self._stored_namespaces()
            if all(_fits(namespace, each) for each in op.match_conditions or ()) and read(namespace)
        }
        if op.max_depth is not None:
            found = {namespace[: op.max_depth] for namespace in found}
        return sorted(found)[op.offset : op.offset + op.limit]


def _fits(namespace: Namespace, condition: MatchCondition) -> bool:
    path = condition.path
    if len(namespace) < len(path):
        return False
    part = namespace[: len(path)] if condition.match_type == "prefix" else namespace[-len(path) :]
    return all(want in ("*", have) for want, have in zip(path, part, strict=True))


_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "$eq": lambda have, want: bool(have == want),
    "$ne": lambda have, want: bool(have != want),
    "$gt": lambda have, want: have is not None and float(have) > float(want),
    "$gte": lambda have, want: have is not None and float(have) >= float(want),
    "$lt": lambda have, want: have is not None and float(have) < float(want),
    "$lte": lambda have, want: have is not None and float(have) <= float(want),
}


def _matches(value: dict[str, Any], wanted: dict[str, Any] | None) -> bool:
    for field, want in (wanted or {}).items():
        have = value.get(field)
        if isinstance(want, dict) and any(name.startswith("$") for name in want):
            for name, operand in want.items():
                if name not in _COMPARE:
                    raise ValueError(f"filter: operator {name}, expected one of {', '.join(_COMPARE)}")
                if not _COMPARE[name](have, operand):
                    return False
        elif have != want:
            return False
    return True
