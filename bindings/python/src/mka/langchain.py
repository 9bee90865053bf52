"""A LangChain retriever over an mka memory, and a chat's history that lives in it.

Needs the wheel's extra `langchain`. Knows no model: the chain brings its own.

```python
retriever = mka.langchain.MkaRetriever(engine=engine, user="ada", k=4)
history = mka.langchain.MkaChatMessageHistory(engine, user="ada", session_id="trip")
history.add_user_message("The hotel in Kyoto is the Sakura Inn.")
retriever.invoke("Which hotel?")
```
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from langchain_core.callbacks import (
    AsyncCallbackManagerForRetrieverRun,
    CallbackManagerForRetrieverRun,
)
from langchain_core.chat_history import BaseChatMessageHistory
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    BaseMessage,
    HumanMessage,
    message_to_dict,
    messages_from_dict,
)
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

from mka import _said
from mka._aio import AsyncEngine, AsyncMemory
from mka._sync import Engine, Memory
from mka._values import Hit, NewTurn, Role, Turn

_MESSAGE = "langchain:message"
_TYPES = {"user": "human", "assistant": "ai"}


# Either engine has both kinds of calls; a twin holds nothing of its own, and is made where it is needed.
def _blocking(engine: Engine | AsyncEngine) -> Memory:
    return engine.memory if isinstance(engine, Engine) else engine.blocking.memory


def _awaited(engine: Engine | AsyncEngine) -> AsyncMemory:
    return engine.asyncio.memory if isinstance(engine, Engine) else engine.memory


def _document(hit: Hit) -> Document:
    source = hit.source
    # A turn's own metadata cannot pose as what memory says of the turn.
    own = {key: value for key, value in source.metadata.items() if key != _said.MARK}
    about: dict[str, Any] = {
        **own,
        "user": source.user,
        "agent": source.agent,
        "session": source.session,
        "turn": source.turn,
        "role": source.role,
        "time": source.time.isoformat(),
        "trust": hit.trust,
        "score": hit.score,
        "relevance": hit.relevance,
    }
    if source.name is not None:
        about["source"] = source.name
    return Document(id=hit.chunk, page_content=hit.text, metadata=about)


class MkaRetriever(BaseRetriever):
    """What memory recalls on a query, as documents, best first.

    A document's metadata is that of the turn it was said in, and `user`, `agent`, `session`, `turn`, `role`, `time` in
    ISO 8601, `trust`, `score`, `relevance` and, where the turn names one, `source`, which stand before keys of the same
    name. Its id is the same for the same text.
    """

    engine: Engine | AsyncEngine = Field(
        description="An open engine, for `invoke` and `ainvoke` alike.", exclude=True, repr=False
    )
    user: str = Field(description="Whose memory.")
    agent: str | None = Field(default=None, description="Which agent's, if any.")
    session: str | None = Field(default=None, description="One session; all of the user's if left out.")
    k: int = Field(default=8, description="The most documents to return.")
    search_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="More options of a recall, as `filter`, `since` or `min_relevance`.",
    )

    def _call(self, options: dict[str, Any]) -> dict[str, Any]:
        whose = {"user": self.user, "agent": self.agent, "session": self.session}
        return {**whose, "k": self.k, **self.search_kwargs, **options}

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        """Recalls, blocking the thread; `options` are those of one `invoke`, and come before the retriever's."""
        hits = _blocking(self.engine).recall(query, **self._call(options))
        return [_document(hit) for hit in hits]

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **options: Any
    ) -> list[Document]:
        """Recalls; `options` are those of one `ainvoke`, and come before the retriever's."""
        hits = await _awaited(self.engine).recall(query, **self._call(options))
        return [_document(hit) for hit in hits]


def _is_text(part: dict[str, Any]) -> bool:
    # As the text of a message is.
    return part.get("type") == "text"


def _turns(messages: Iterable[BaseMessage]) -> list[NewTurn]:
    """Each message's record and, if there is text in it, that: it can be recalled if a user or a model said it."""
    turns: list[NewTurn] = []
    for message in messages:
        fields = message_to_dict(message)
        role: Role = "system"
        if isinstance(message, HumanMessage):
            role = "user"
        elif isinstance(message, AIMessage):
            role = "assistant"
        data = fields["data"]
        left, lengths, text = _said.taken_out(data["content"], _is_text, "")
        record: dict[str, Any] = {"message": fields, "said": bool(text)}
        if text:
            # It stands in its turn alone: what is erased there is nowhere else.
            data["content"] = left
            record["lengths"] = lengths
        line = json.dumps(record, ensure_ascii=False)
        turns.append(NewTurn(line, role="system", source=_MESSAGE, remember=False))
        if text:
            remember = None if role != "system" else False
            turns.append(NewTurn(text, role=role, remember=remember, metadata={_said.MARK: True}))
    return turns


def _whole(record: dict[str, Any], text: str) -> dict[str, Any]:
    """The message of a record, with what was said in it."""
    message: dict[str, Any] = record["message"]
    data = message["data"]
    if "lengths" in record:
        data["content"] = _said.put_back(data["content"], record["lengths"], text, "")
    elif data["content"] is None:
        # Records of histories from before have no lengths, and their blocks have their text.
        data["content"] = text
    return message


def _messages(turns: Iterable[Turn]) -> list[BaseMessage]:
    """The messages of a session's log; what is erased or taken back of one takes it out."""
    found: list[dict[str, Any]] = []
    waiting: dict[str, Any] | None = None
    for turn in turns:
        if turn.forgotten or turn.retracted:
            waiting = None
        elif turn.role == "system" and turn.source == _MESSAGE:
            record = json.loads(turn.text)
            waiting = record if record["said"] else None
            if not record["said"]:
                found.append(record["message"])
        elif waiting is not None:
            found.append(_whole(waiting, turn.text))
            waiting = None
        elif turn.role in _TYPES and _said.MARK not in turn.metadata:
            # Said in the session itself, as by `Session.send`; what is left of a message whose record is erased is none.
            found.append({"type": _TYPES[turn.role], "data": {"content": turn.text}})
    return messages_from_dict(found)


class MkaChatMessageHistory(BaseChatMessageHistory):
    """The history of one session, message by message; what users and models said can be recalled later.

    Each message stands in the session's log as JSON, which is never recalled, and its text after it as a turn of its own,
    which is if a user or a model said it. The text stands in that turn alone, so that `forget` finds its words as they
    are; what else is in a message, as the arguments of a tool's call, stands in JSON, where `matching` finds it as JSON
    writes it. A message of which either turn is erased is gone from the history.
    What the session itself said, as by `Session.send`, is part of its history. LangChain's own class behind this one is
    deprecated from 1.6.4 on, and there until 2.0.
    """

    def __init__(
        self,
        engine: Engine | AsyncEngine,
        *,
        user: str,
        session_id: str,
        agent: str | None = None,
    ) -> None:
        self._engine = engine
        self._scope: dict[str, Any] = {"user": user, "agent": agent, "session": session_id}

    @property
    def messages(self) -> list[BaseMessage]:  # type: ignore[override]
        """The messages so far, in the order in which they were said; blocks the thread."""
        return _messages(_blocking(self._engine).turns(**self._scope))

    async def aget_messages(self) -> list[BaseMessage]:
        """The messages so far, in the order in which they were said."""
        return _messages(await _awaited(self._engine).turns(**self._scope))

    def add_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Appends messages, all of them or none; blocks the thread."""
        if turns := _turns(messages):
            _blocking(self._engine).remember(turns, **self._scope)

    async def aadd_messages(self, messages: Sequence[BaseMessage]) -> None:
        """Appends messages, all of them or none."""
        if turns := _turns(messages):
            await _awaited(self._engine).remember(turns, **self._scope)

    def clear(self) -> None:
        """Erases every message of this session; blocks the thread."""
        _blocking(self._engine).forget(**self._scope, everything=True)

    async def aclear(self) -> None:
        """Erases every message of this session."""
        await _awaited(self._engine).forget(**self._scope, everything=True)
