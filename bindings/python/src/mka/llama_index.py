"""A memory block for LlamaIndex: what leaves the short-term memory is remembered, and recalled by what is asked.

Needs the wheel's extra `llama-index`. Knows no model: the agent brings its own.

```python
block = mka.llama_index.MkaMemoryBlock(engine=engine, user="ada", session="trip")
memory = Memory.from_defaults(session_id="trip", memory_blocks=[block])
```
"""

from __future__ import annotations

from typing import Any

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.memory import BaseMemoryBlock

from mka._aio import AsyncEngine
from mka._values import NewTurn


class MkaMemoryBlock(BaseMemoryBlock[str]):
    """Recalled text, quoted and attributed, within a budget."""

    name: str = Field(default="mka", description="The name of the memory block.")
    priority: int = Field(default=1, description="Cut after short-term memory, by asking for less.")
    engine: AsyncEngine = Field(description="An open engine.", exclude=True)
    user: str = Field(description="Whose memory.")
    session: str = Field(description="In which session it is remembered; every session is recalled.")
    agent: str | None = Field(default=None, description="Which agent's, if any.")
    budget_tokens: int = Field(default=800, description="Most tokens of recalled text.")

    _query: str = PrivateAttr(default="")

    async def _context(self, budget_tokens: int) -> str:
        if not self._query or budget_tokens <= 0:
            return ""
        context = await self.engine.memory.context(
            self._query, user=self.user, agent=self.agent, budget_tokens=budget_tokens
        )
        return context.text

    async def _aget(
        self, messages: list[ChatMessage] | None = None, **block_kwargs: Any
    ) -> str:
        """What memory holds on the latest message of the user."""
        asked = [
            message.content
            for message in messages or []
            if message.role == MessageRole.USER and message.content
        ]
        self._query = asked[-1] if asked else ""
        return await self._context(self.budget_tokens)

    async def _aput(self, messages: list[ChatMessage]) -> None:
        """Remembers what user and assistant said."""
        turns = [
            NewTurn(
                message.content,
                role="user" if message.role == MessageRole.USER else "assistant",
            )
            for message in messages
            if message.content and message.role in (MessageRole.USER, MessageRole.ASSISTANT)
        ]
        if turns:
            await self.engine.memory.remember(
                turns, user=self.user, agent=self.agent, session=self.session
            )

    async def atruncate(self, content: str, tokens_to_truncate: int) -> str | None:
        """The same question asked with a smaller budget; None if nothing fits."""
        # Two bytes a token is what an engine without a model counts, and above what tokenizers give for prose.
        budget = min(self.budget_tokens, len(content.encode()) // 2) - tokens_to_truncate
        return await self._context(budget) or None
