"""A session of the OpenAI Agents SDK that lives in an mka memory, and a tool by which an agent recalls.

Needs the wheel's extra `openai-agents`. Knows no model: the SDK's agent brings its own.

```python
session = mka.openai_agents.MkaSession(engine, user="ada", session_id="trip")
agent = Agent(name="planner", tools=[mka.openai_agents.recall_tool(engine, user="ada")])
await Runner.run(agent, "Where do we stay in Kyoto?", session=session)
```
"""

from __future__ import annotations

import json
from typing import Any, cast

from agents import Tool, TResponseInputItem, function_tool
from agents.memory import SessionABC, SessionSettings

from mka import _said
from mka._aio import AsyncEngine
from mka._values import NewTurn, Role, Turn

_ITEM = "openai-agents:item"
_ROLES: dict[str, Role] = {"user": "user", "assistant": "assistant"}


def _turns(item: dict[str, Any]) -> list[NewTurn]:
    """An item's record and, if a user or an assistant said something in it, that."""
    role = _ROLES.get(str(item.get("role")))
    # The key may be there without a value: reasoning items and answers that only call tools have null.
    left, lengths, text = _said.taken_out(item.get("content"), lambda part: True, "\n")
    if role is None or not text:
        return [_record(item)]
    # The text stands in its turn alone: what is erased there is nowhere else.
    record = _record({_said.MARK: lengths, "item": {**item, "content": left}})
    return [record, NewTurn(text, role=role, metadata={_said.MARK: True})]


def _record(fields: dict[str, Any]) -> NewTurn:
    line = json.dumps(fields, ensure_ascii=False)
    return NewTurn(line, role="system", source=_ITEM, remember=False)


def _items(turns: list[Turn]) -> list[tuple[int, dict[str, Any]]]:
    """The items of a session's log, each with the number of its record; what is erased of one takes it out."""
    said = {turn.id: turn for turn in turns if not turn.forgotten}
    found: list[tuple[int, dict[str, Any]]] = []
    for turn in turns:
        if turn.source != _ITEM or turn.forgotten:
            continue
        item: dict[str, Any] = json.loads(turn.text)
        # Records of sessions from before are the items themselves, with their text.
        if _said.MARK in item:
            lengths, item = item[_said.MARK], item["item"]
            if turn.id + 1 not in said:
                continue
            item["content"] = _said.put_back(item["content"], lengths, said[turn.id + 1].text, "\n")
        found.append((turn.id, item))
    return found


class MkaSession(SessionABC):
    """The history of one conversation, item by item; what users and assistants said can be recalled later.

    Each item stands in the session's log as JSON, which is never recalled, and its text after it as a turn that is. What a
    user or an assistant said stands in that turn alone, so that `forget` finds its words as they are; every other text, as
    the output of a tool, stands in JSON, where `matching` finds it as JSON writes it. An item of which either turn is
    erased is gone from the session.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        user: str,
        session_id: str,
        agent: str | None = None,
        session_settings: SessionSettings | None = None,
    ) -> None:
        self.session_id = session_id
        self.session_settings = session_settings
        self._memory = engine.memory
        self._scope: dict[str, Any] = {"user": user, "agent": agent, "session": session_id}

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The items so far, in the order in which they were said; with a limit, the latest."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        items = [item for _, item in _items(await self._memory.turns(**self._scope))]
        if limit is not None:
            items = items[-limit:] if limit > 0 else []
        return cast(list[TResponseInputItem], items)

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Appends items, all of them or none."""
        turns = [turn for item in items for turn in _turns(cast(dict[str, Any], item))]
        if turns:
            await self._memory.remember(turns, **self._scope)

    async def pop_item(self) -> TResponseInputItem | None:
        """Takes the latest item back and erases it with its text; None if there is none."""
        turns = await self._memory.turns(**self._scope)
        items = _items(turns)
        if not items:
            return None
        record, item = items[-1]
        # The item's text, if it has one, is all that follows.
        gone = [turn.id for turn in turns if turn.id >= record and not turn.forgotten]
        await self._memory.forget(**self._scope, turn=gone)
        return cast(TResponseInputItem, item)

    async def clear_session(self) -> None:
        """Erases every item of this session."""
        await self._memory.forget(**self._scope, everything=True)


def recall_tool(engine: AsyncEngine, *, user: str, budget_tokens: int = 800) -> Tool:
    """A tool by which an agent looks up what this user's sessions said."""

    @function_tool(name_override="recall_memory")
    async def recall(query: str) -> str:
        """Looks up what was said in earlier conversations.

        Args:
            query: What to look for, in plain words.
        """
        context = await engine.memory.context(query, user=user, budget_tokens=budget_tokens)
        return context.text or "Nothing is remembered about this."

    return recall
