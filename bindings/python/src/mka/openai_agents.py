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

from mka._aio import AsyncEngine
from mka._values import NewTurn, Turn

_ITEM = "openai-agents:item"
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}


def _text(item: dict[str, Any]) -> str:
    """What is said in an item, as far as it is text."""
    # The key may be there without a value: reasoning items and answers that only call tools have null.
    content = item.get("content") or ""
    if isinstance(content, str):
        return content
    parts = [part.get("text", "") for part in content if isinstance(part, dict)]
    return "\n".join(part for part in parts if isinstance(part, str) and part)


class MkaSession(SessionABC):
    """The history of one conversation, item by item; what users and assistants said can be recalled later.

    Each item stands in the session's log as JSON, which is never recalled, and its text after it as a turn that is.
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

    async def _records(self) -> list[Turn]:
        turns = await self._memory.turns(**self._scope)
        return [turn for turn in turns if turn.source == _ITEM and not turn.forgotten]

    async def get_items(self, limit: int | None = None) -> list[TResponseInputItem]:
        """The items so far, in the order in which they were said; with a limit, the latest."""
        if limit is None and self.session_settings is not None:
            limit = self.session_settings.limit
        records = await self._records()
        if limit is not None:
            records = records[-limit:] if limit > 0 else []
        return [json.loads(record.text) for record in records]

    async def add_items(self, items: list[TResponseInputItem]) -> None:
        """Appends items, all of them or none."""
        turns: list[NewTurn] = []
        for item in items:
            fields = cast(dict[str, Any], item)
            record = json.dumps(fields, ensure_ascii=False)
            turns.append(NewTurn(record, role="system", source=_ITEM, remember=False))
            role = _ROLES.get(str(fields.get("role")))
            text = _text(fields)
            if role in ("user", "assistant") and text:
                turns.append(NewTurn(text, role="user" if role == "user" else "assistant"))
        if turns:
            await self._memory.remember(turns, **self._scope)

    async def pop_item(self) -> TResponseInputItem | None:
        """Takes the latest item back and erases it with its text; None if there is none."""
        records = await self._records()
        if not records:
            return None
        last = records[-1]
        # The item's text, if it has one, is all that follows.
        for turn in await self._memory.turns(**self._scope, start=last.id):
            if not turn.forgotten:
                await self._memory.forget(**self._scope, turn=turn.id)
        item: TResponseInputItem = json.loads(last.text)
        return item

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
