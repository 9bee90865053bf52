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
import json
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
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

Namespace = tuple[str, ...]


@dataclass(slots=True)
class _Stored:
    """An item and the turns that hold it: its text, if that is searched, and its record.

    Before them stand those of an item of the same key that it replaced, as far as they are not erased.
    """

    item: Item
    turns: list[int]


class MkaStore(BaseStore):
    """Items in the memory of one user of the store; give each of your users a namespace, or a store of their own.

    A namespace is a session, an item a turn of JSON that is never recalled, followed by a turn of the text that is. Time
    to live is not supported.

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
        self._lock = threading.RLock()
        self._items: dict[Namespace, dict[str, _Stored]] | None = None

    # What is on disk, read once: one engine at a time has the folder, so nobody else writes to it.
    def _loaded(self) -> dict[Namespace, dict[str, _Stored]]:
        if self._items is None:
            items: dict[Namespace, dict[str, _Stored]] = {}
            for info in self._memory.sessions(user=self._user, agent=_AGENT):
                assert info.scope.session is not None
                namespace = tuple(json.loads(info.scope.session))
                held = items.setdefault(namespace, {})
                current: _Stored | None = None
                for turn in self._memory.turns(
                    user=self._user, agent=_AGENT, session=info.scope.session
                ):
                    if turn.forgotten:
                        current = None
                    # A text has its key for a source, whatever the key is.
                    elif turn.role == "system" and turn.source == _ITEM:
                        item = self._item(namespace, json.loads(turn.text))
                        before = held.get(item.key)
                        turns = [*(before.turns if before else ()), turn.id]
                        # What is written anew comes last, as it does while the store is written.
                        held.pop(item.key, None)
                        current = held[item.key] = _Stored(item, turns)
                    elif current is not None:
                        current.turns.insert(-1, turn.id)
            self._items = items
        return self._items

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
        session = json.dumps(namespace, ensure_ascii=False, separators=(",", ":"))
        if len(session.encode()) > _MAX_NAMESPACE_BYTES:
            raise InvalidNamespaceError(
                f"namespace {namespace}: {len(session.encode())} bytes as JSON,"
                f" expected at most {_MAX_NAMESPACE_BYTES}"
            )
        return session

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Runs operations: reads see the store as it was before, then the last write of each key is done."""
        results: list[Result] = []
        writes: dict[tuple[Namespace, str], PutOp] = {}
        with self._lock:
            for op in ops:
                match op:
                    case GetOp():
                        stored = self._loaded().get(op.namespace, {}).get(op.key)
                        results.append(stored.item if stored else None)
                    case SearchOp():
                        results.append(self._search(op))
                    case ListNamespacesOp():
                        results.append(self._namespaces(op))
                    case PutOp():
                        writes[op.namespace, op.key] = op
                        results.append(None)
                    case _:
                        raise ValueError(f"batch: operation {op!r}, expected one of LangGraph's")
            for write in writes.values():
                self._put(write)
        return results

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """`batch`, off the event loop."""
        return await asyncio.to_thread(self.batch, list(ops))

    def _put(self, op: PutOp) -> None:
        session = self._session(op.namespace)
        items = self._loaded()
        old = items.get(op.namespace, {}).get(op.key)
        current, num_current = old, 0
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
            held_by = [*(old.turns if old else ()), *reversed(done.turns)]
            current = _Stored(self._item(op.namespace, record), held_by)
            num_current = len(turns)
            held = items.setdefault(op.namespace, {})
            # Last, as it is where the store is read from the disk.
            held.pop(op.key, None)
            held[op.key] = current
        if current is None:
            return
        # The new item stands before the old one goes: a crash between leaves both, and the later one counts. What cannot be
        # erased is still there, and goes with the next write of the key.
        gone = current.turns[: len(current.turns) - num_current]
        if gone:
            self._memory.forget(user=self._user, agent=_AGENT, session=session, turn=gone)
            del current.turns[: len(gone)]
        if not current.turns:
            del items[op.namespace][op.key]
            if not items[op.namespace]:
                del items[op.namespace]

    def _search(self, op: SearchOp) -> list[SearchItem]:
        prefix = op.namespace_prefix
        held = {
            (namespace, key): stored
            for namespace, items in self._loaded().items()
            if namespace[: len(prefix)] == prefix
            for key, stored in items.items()
            if _matches(stored.item.value, op.filter)
        }
        scores: dict[tuple[Namespace, str], float] = {}
        if op.query:
            for namespace in {namespace for namespace, _ in held}:
                scores |= self._scores(namespace, op.query)
        # What was not found stands behind what was, in its own order.
        order = sorted(held, key=lambda where: scores.get(where, -inf), reverse=True)
        page = order[op.offset : op.offset + op.limit]
        return [
            SearchItem(
                namespace=held[where].item.namespace,
                key=held[where].item.key,
                value=held[where].item.value,
                created_at=held[where].item.created_at,
                updated_at=held[where].item.updated_at,
                score=scores.get(where),
            )
            for where in page
        ]

    def _scores(self, namespace: Namespace, query: str) -> dict[tuple[Namespace, str], float]:
        """What the items of a namespace score, by their best piece.

        A recall names one place of a text, so this namespace is asked alone, and asked again without the places that it
        named until it has named every place of a text that stands in several, word for word or nearly.
        """
        items = self._loaded()[namespace]
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

    def _namespaces(self, op: ListNamespacesOp) -> list[Namespace]:
        found = {
            namespace
            for namespace, items in self._loaded().items()
            if items and all(_fits(namespace, each) for each in op.match_conditions or ())
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
