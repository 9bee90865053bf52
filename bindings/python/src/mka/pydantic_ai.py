"""A history processor for Pydantic AI that puts what is remembered before the latest message.

Needs the wheel's extra `pydantic-ai`. Knows no model: the agent brings its own.

```python
memory = mka.pydantic_ai.MkaMemory(engine, user="ada", session="trip")
agent = Agent(model, capabilities=[ProcessHistory(memory.recall)])
result = await agent.run("Where do we stay in Kyoto?")
await memory.remember(result.new_messages())
```
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from pydantic_ai.messages import (
    ModelMessage,
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    UserPromptPart,
)

from mka._aio import AsyncEngine
from mka._errors import Error
from mka._values import NewTurn

_log = logging.getLogger("mka.pydantic_ai")
_MARK = "mka"


def _said(message: ModelRequest) -> str:
    """What the user said in a request, as far as it is text."""
    texts: list[object] = []
    for part in message.parts:
        if isinstance(part, UserPromptPart):
            content = [part.content] if isinstance(part.content, str) else part.content
            # A text with something beside it has it as `content`; the class of that is younger than 2.0.
            texts.extend(getattr(each, "content", each) for each in content)
    return "\n".join(text for text in texts if isinstance(text, str))


class MkaMemory:
    """Recalls before a request, and remembers after a run; a memory that fails costs the run nothing but the memory."""

    def __init__(
        self,
        engine: AsyncEngine,
        *,
        user: str,
        session: str,
        agent: str | None = None,
        budget_tokens: int = 800,
    ) -> None:
        self._memory = engine.memory
        self._user, self._session, self._agent = user, session, agent
        self._budget_tokens = budget_tokens

    async def recall(self, messages: list[ModelMessage]) -> list[ModelMessage]:
        """The history processor: what the user's sessions hold on the latest message stands before it, once.

        Each request looks it up anew, those behind calls of tools too: memory may have changed between.
        """
        messages = [self._without(message) for message in messages]
        at = next(
            (
                i
                for i in range(len(messages) - 1, -1, -1)
                if isinstance(message := messages[i], ModelRequest) and _said(message)
            ),
            None,
        )
        if at is None:
            return messages
        request = messages[at]
        assert isinstance(request, ModelRequest)
        try:
            context = await self._memory.context(
                _said(request),
                user=self._user,
                agent=self._agent,
                budget_tokens=self._budget_tokens,
            )
        except Error as error:
            _log.warning("recall failed, the run goes on without memory: %s", error)
            return messages
        if context.text:
            recalled = SystemPromptPart(content=context.text, dynamic_ref=_MARK)
            messages[at] = replace(request, parts=[recalled, *request.parts])
        return messages

    @staticmethod
    def _without(message: ModelMessage) -> ModelMessage:
        """The message without what an earlier look-up put there."""
        if not isinstance(message, ModelRequest):
            return message
        parts = [
            part
            for part in message.parts
            if not (isinstance(part, SystemPromptPart) and part.dynamic_ref == _MARK)
        ]
        return message if len(parts) == len(message.parts) else replace(message, parts=parts)

    async def remember(self, messages: Sequence[ModelMessage]) -> None:
        """Remembers what user and model said in `messages`: give it `result.new_messages()` after a run."""
        turns: list[NewTurn] = []
        for message in messages:
            if isinstance(message, ModelRequest):
                if text := _said(message):
                    turns.append(NewTurn(text))
            elif isinstance(message, ModelResponse):
                spoken = [part.content for part in message.parts if isinstance(part, TextPart)]
                if text := "\n".join(spoken):
                    turns.append(NewTurn(text, role="assistant"))
        if turns:
            await self._memory.remember(
                turns, user=self._user, agent=self._agent, session=self._session
            )
