"""Adapters: each framework's agent remembers across processes and keeps users apart; each contract in its details."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mka
import pytest

if TYPE_CHECKING:
    from mka.openai_server import Server

AGENTS = Path(__file__).parent / "mock_agents.py"


def process(framework: str, store: Path, user: str, message: str) -> str:
    command = [sys.executable, str(AGENTS), framework, str(store), user, message]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("framework", "module"),
    [
        ("openai_agents", "agents"),
        ("pydantic_ai", "pydantic_ai"),
        ("llama_index", "llama_index.core"),
        ("langchain", "langchain_core"),
        ("langgraph", "langgraph"),
    ],
)
def test_an_agent_remembers_across_processes_and_keeps_users_apart(
    framework: str, module: str, store: Path
) -> None:
    pytest.importorskip(module)
    process(framework, store, "ada", "The hotel in Kyoto is the Sakura Inn.")
    assert "Sakura" in process(framework, store, "ada", "Which hotel in Kyoto?")
    assert "Sakura" not in process(framework, store, "bob", "Which hotel in Kyoto?")


def test_openai_sessions_keep_items_in_order_and_take_them_back(store: Path) -> None:
    pytest.importorskip("agents")
    from agents.memory import Session

    from mka.openai_agents import MkaSession

    items: list[Any] = [
        {"role": "user", "content": "hello there"},
        {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "done"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "hi, Ada ä🐑"}]},
    ]

    async def main() -> None:
        async with mka.open(store) as engine:
            session = MkaSession(engine, user="ada", session_id="s")
            other = MkaSession(engine, user="bob", session_id="s")
            assert isinstance(session, Session)
            assert await session.get_items() == [] and await session.pop_item() is None
            await session.add_items([])
            await session.add_items(items[:2])
            await session.add_items(items[2:])
            assert await session.get_items() == items
            assert await session.get_items(limit=2) == items[2:]
            assert await session.get_items(limit=0) == []
            assert await other.get_items() == []
            hits = await engine.memory.recall("hello", user="ada")
            assert [hit.text for hit in hits][0] == "hello there"
        async with mka.open(store) as engine:
            session = MkaSession(engine, user="ada", session_id="s")
            assert await session.pop_item() == items[3]
            assert await session.get_items() == items[:3]
            assert not [h for h in await engine.memory.recall("Ada", user="ada") if "Ada" in h.text]
            await session.add_items(items[3:])
            assert await session.get_items() == items
            await session.clear_session()
            assert await session.get_items() == []
            await session.add_items(items[:1])
            assert await session.get_items() == items[:1]

    asyncio.run(main())


def test_an_openai_item_has_its_words_in_one_place(store: Path) -> None:
    pytest.importorskip("agents")
    from mka.openai_agents import MkaSession

    parts = [
        {"type": "output_text", "text": 'the "Lotus\nInn"', "annotations": []},
        {"type": "refusal", "refusal": "no"},
        {"type": "output_text", "text": ""},
        {"type": "output_text", "text": "ä🐑"},
    ]
    items: list[Any] = [
        {"role": "user", "content": 'the "Sakura\nInn"'},
        {"role": "assistant", "content": parts, "status": "completed", "type": "message"},
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": "1", "name": "book", "arguments": "{}"},
    ]
    before = mka.NewTurn(
        json.dumps({"role": "user", "content": "from before"}),
        role="system",
        source="openai-agents:item",
        remember=False,
    )

    async def main() -> None:
        async with mka.open(store) as engine:
            memory = engine.memory
            session = MkaSession(engine, user="ada", session_id="s")
            await memory.remember([before, "from before"], user="ada", session="s")
            await session.add_items(items)
            assert await session.get_items() == [{"role": "user", "content": "from before"}, *items]
            left = [{"role": "user", "content": "from before"}, *items]
            for words, gone in (('"sakura\ninn"', items[0]), ('"lotus\ninn"', items[1]), ("hello", items[3])):
                receipt = await memory.forget(user="ada", matching=words)
                assert receipt.turns == 1
                left.remove(gone)
                assert await session.get_items() == left
            assert await session.pop_item() == items[4]
            # The record of the item that lost its text goes with the one before it.
            assert await session.pop_item() == items[2]
            assert len(await session.get_items()) == 1
            turns = await memory.turns(user="ada", session="s", start=6)
            assert turns and all(turn.forgotten for turn in turns)

    asyncio.run(main())


def test_an_openai_item_whose_content_is_null_is_kept(store: Path) -> None:
    pytest.importorskip("agents")
    from mka.openai_agents import MkaSession

    items: list[Any] = [
        {"type": "reasoning", "id": "1", "summary": [], "content": None},
        {"role": "assistant", "content": None},
        {"role": "user", "content": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": None}]},
    ]

    async def main() -> None:
        async with mka.open(store) as engine:
            session = MkaSession(engine, user="ada", session_id="s")
            await session.add_items(items)
            assert await session.get_items() == items
            # Nothing was said: there is nothing to recall.
            assert await engine.memory.chunks(user="ada") == []
            assert await session.pop_item() == items[-1]

    asyncio.run(main())


def test_a_history_processor_recalls_once_a_message_and_survives_a_closed_memory(
    store: Path,
) -> None:
    pytest.importorskip("pydantic_ai")
    from pydantic_ai.messages import ModelRequest, ModelResponse, TextPart, UserPromptPart

    from mka.pydantic_ai import MkaMemory

    async def main() -> None:
        async with mka.open(store) as engine:
            await engine.memory.remember("The hotel is the Sakura Inn.", user="ada", session="x")
            memory = MkaMemory(engine, user="ada", session="trip")
            messages: list[Any] = [ModelRequest(parts=[UserPromptPart(content="which hotel?")])]
            once = await memory.recall(messages)
            assert len(once[0].parts) == 2 and "Sakura" in once[0].parts[0].content
            assert len(messages[0].parts) == 1
            later = [*once, ModelResponse(parts=[TextPart("a tool call, say")])]
            twice = await memory.recall(later)
            assert [len(message.parts) for message in twice] == [2, 1]
            assert await memory.recall([]) == []
            # What is erased is in no request from then on, also of the same message, and of one that was given back.
            await engine.memory.forget(user="ada", matching="sakura")
            assert await memory.recall(messages) == messages
            assert await memory.recall(once) == messages
        assert await memory.recall(messages) == messages
        assert await memory.recall(once) == messages

    asyncio.run(main())


def test_a_history_processor_reads_every_text_of_a_prompt(store: Path) -> None:
    messages_of = pytest.importorskip("pydantic_ai.messages")
    from mka.pydantic_ai import MkaMemory

    if not hasattr(messages_of, "TextContent"):
        pytest.skip("texts are plain in this version of pydantic-ai")
    image = messages_of.ImageUrl(url="https://example.org/inn.png")
    tagged = messages_of.TextContent(content="which hotel?", metadata={"place": "Nara"})

    async def main() -> None:
        async with mka.open(store) as engine:
            memory = MkaMemory(engine, user="ada", session="trip")

            def asked(*content: Any) -> list[Any]:
                parts = [messages_of.UserPromptPart(content=list(content))]
                return [messages_of.ModelRequest(parts=parts)]

            inn = messages_of.TextContent(content="It is the Sakura Inn.")
            await memory.remember(asked("The hotel?", image, inn))
            turns = await engine.memory.turns(user="ada", session="trip")
            assert [turn.text for turn in turns] == ["The hotel?\nIt is the Sakura Inn."]
            assert "Sakura" in (await memory.recall(asked(image, tagged)))[0].parts[0].content

    asyncio.run(main())


def test_a_memory_block_shrinks_to_its_budget(store: Path) -> None:
    pytest.importorskip("llama_index.core")
    from llama_index.core.base.llms.types import ChatMessage

    from mka.llama_index import MkaMemoryBlock

    async def main() -> None:
        async with mka.open(store) as engine:
            block = MkaMemoryBlock(engine=engine, user="ada", session="trip")
            await block.aput(
                [
                    ChatMessage(role="user", content=f"Fact {i}: the hotel number {i} is in Kyoto.")
                    for i in range(20)
                ]
            )
            question = [ChatMessage(role="user", content="Which hotel in Kyoto?")]
            whole = await block.aget(question)
            assert "Kyoto" in whole and len(whole) > 200
            less = await block.atruncate(whole, len(whole) // 4)
            assert less is not None and 0 < len(less) < len(whole)
            assert await block.atruncate(whole, 10_000) is None
            assert await block.aget([]) == ""

    asyncio.run(main())


def test_a_retriever_gives_documents_with_what_memory_says_of_them(store: Path) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.runnables import ConfigurableField

    from mka.langchain import MkaRetriever

    said = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
    inn = mka.NewTurn(
        "The hotel is the Sakura Inn.",
        role="document",
        time=said,
        source="plan.txt",
        metadata={"kind": "place", "user": "eve"},
    )
    ritz = mka.NewTurn("The hotel was the Ritz.", metadata={"kind": "past"})
    with mka.open_sync(store) as engine:
        engine.memory.remember([inn, ritz], user="ada", session="trip")
        retriever = MkaRetriever(engine=engine, user="ada", search_kwargs={"filter": {"kind": "place"}})
        (document,) = retriever.invoke("which hotel")
        (hit,) = engine.memory.recall("which hotel", user="ada", filter={"kind": "place"})
        assert document.page_content == inn.text and document.id == hit.chunk
        assert document.metadata == {
            "kind": "place",
            "user": "ada",
            "agent": None,
            "session": "trip",
            "turn": 0,
            "role": "document",
            "time": said.isoformat(),
            "trust": "document",
            "score": hit.score,
            "relevance": hit.relevance,
            "source": "plan.txt",
        }
        # Either engine, both kinds of calls; an option of one call comes before the retriever's.
        for each in (retriever, MkaRetriever(engine=engine.asyncio, user="ada", k=1)):
            for options in ({"k": 2, "filter": None}, {"k": 0}):
                found = each.invoke("which hotel", **options)
                assert len(found) == options["k"]
                assert found == asyncio.run(each.ainvoke("which hotel", **options))
        anyones = retriever.configurable_fields(user=ConfigurableField(id="user"))
        assert anyones.invoke("which hotel", config={"configurable": {"user": "bob"}}) == []
        assert "engine" not in retriever.model_dump()
        with pytest.raises(ValueError, match="engine"):
            MkaRetriever(engine="agent.mka", user="ada")  # type: ignore[arg-type]


def test_a_chat_history_keeps_messages_whole_and_in_order(store: Path, tiny_model: Path) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    from mka.langchain import MkaChatMessageHistory

    call = {"name": "f", "args": {"place": "Kyoto"}, "id": "1", "type": "tool_call"}
    messages: list[Any] = [
        SystemMessage("Be brief."),
        HumanMessage('the hotel is the "Sakura\nInn"', id="first", name="ada"),
        AIMessage("", tool_calls=[call]),
        ToolMessage("done", tool_call_id="1"),
        AIMessage([{"type": "text", "text": "ä🐑"}, {"type": "image", "url": "https://example.org"}]),
        AIMessage("noted", response_metadata={"n": 1.5}),
    ]
    with mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
        history = MkaChatMessageHistory(engine, user="ada", session_id="s")
        other = MkaChatMessageHistory(engine.asyncio, user="bob", session_id="s")
        assert history.messages == []
        history.add_messages([])
        history.add_messages(messages[:2])
        asyncio.run(history.aadd_messages(messages[2:]))
        assert history.messages == messages and asyncio.run(history.aget_messages()) == messages
        other.add_user_message("hello")
        assert other.messages == [HumanMessage("hello")]
        assert asyncio.run(other.aget_messages()) == other.messages
    with mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
        history = MkaChatMessageHistory(engine, user="ada", session_id="s")
        assert history.messages == messages
        assert [hit.text for hit in engine.memory.recall("Sakura", user="ada", k=1)] == [messages[1].text]
        # What a session of the same name says is part of it, and what is taken back is not.
        with engine.session(user="ada", session="s") as chat:
            answer, _ = chat.send("and now?", max_new_tokens=4).text()
            said = [HumanMessage("and now?"), AIMessage(answer)]
            assert history.messages == messages + said
            chat.rewind(chat.num_turns - 2)
        assert history.messages == messages
        # The words of a message stand in one place, quotes and line breaks as they are.
        receipt = engine.memory.forget(user="ada", matching='"sakura\ninn"')
        assert receipt.turns == 1
        assert history.messages == messages[:1] + messages[2:]
        history.clear()
        assert history.messages == []
        history.add_messages(messages)
        assert history.messages == messages
        asyncio.run(history.aclear())
        assert asyncio.run(history.aget_messages()) == []


def test_a_chat_history_keeps_the_words_of_a_message_in_one_place(store: Path) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage

    from mka.langchain import MkaChatMessageHistory, MkaRetriever

    image = {"type": "image", "url": "https://example.org"}
    call = {"name": "book", "args": {"place": "Kyoto"}, "id": "1", "type": "tool_call"}
    messages: list[Any] = [
        SystemMessage('Say "please".\nAlways.'),
        HumanMessage(
            ["The inn is ", {"type": "text", "text": 'the "Sakura\nInn"'}, image, {"type": "text", "text": ""}]
        ),
        AIMessage([{"type": "text", "text": "noted: ä🐑", "index": 0}], tool_calls=[call]),
        ToolMessage('room "7"\nis free', tool_call_id="1"),
        HumanMessage([image]),
        AIMessage("It is booked."),
    ]
    with mka.open_sync(store) as engine:
        memory = engine.memory
        history = MkaChatMessageHistory(engine, user="ada", session_id="s")
        history.add_messages(messages)
        assert history.messages == messages
        # What the system and a tool say is not recalled, and a document says nothing of how a turn is kept.
        documents = MkaRetriever(engine=engine, user="ada", k=9).invoke("inn please room booked")
        assert {document.metadata["role"] for document in documents} == {"user", "assistant"}
        assert not any(key.startswith("mka.") for document in documents for key in document.metadata)
        left = list(messages)
        for words, gone in (
            ('"sakura\ninn"', messages[1]),
            ('"please".\nalways', messages[0]),
            ('"7"\nis', messages[3]),
            # Of this the record holds the words, and not the text.
            ("kyoto", messages[2]),
        ):
            receipt = memory.forget(user="ada", matching=words)
            assert receipt.turns == 1
            memory.verify(receipt)
            left.remove(gone)
            assert history.messages == left
        assert history.messages == messages[4:]


def test_a_chat_history_from_before_is_read(store: Path) -> None:
    pytest.importorskip("langchain_core")
    from langchain_core.messages import AIMessage, HumanMessage, message_to_dict

    from mka.langchain import MkaChatMessageHistory

    def record(message: Any, content: Any) -> mka.NewTurn:
        fields = message_to_dict(message)
        fields["data"]["content"] = content
        line = json.dumps({"message": fields, "said": True})
        return mka.NewTurn(line, role="system", source="langchain:message", remember=False)

    blocks: list[Any] = [{"type": "text", "text": "noted"}]
    messages: list[Any] = [HumanMessage("hello", id="1"), AIMessage(blocks, name="b")]
    with mka.open_sync(store) as engine:
        turns = [
            record(messages[0], None),
            mka.NewTurn("hello"),
            record(messages[1], blocks),
            mka.NewTurn("noted", role="assistant"),
        ]
        engine.memory.remember(turns, user="ada", session="s")
        assert MkaChatMessageHistory(engine, user="ada", session_id="s").messages == messages


def test_the_langgraph_store_does_what_langgraphs_own_does(store: Path) -> None:
    """Random operations on both; what each gives back, times and scores aside, is the same, also after reopening."""
    pytest.importorskip("langgraph")
    from langgraph.store.memory import InMemoryStore

    from mka.langgraph import MkaStore

    rng = random.Random(7)
    namespaces = [("a",), ("a", "b"), ("a", "c"), ("d", "b")]
    theirs = InMemoryStore()

    def plain(items: Any) -> list[Any]:
        return sorted((item.namespace, item.key, json.dumps(item.value)) for item in items)

    for _ in range(3):
        with mka.open_sync(store) as engine:
            ours = MkaStore(engine)
            for _ in range(40):
                namespace, key = rng.choice(namespaces), rng.choice("xyz")
                match rng.randrange(6):
                    case 0 | 1:
                        value = {"text": f"number {rng.randrange(100)}", "n": rng.randrange(5)}
                        ours.put(namespace, key, value)
                        theirs.put(namespace, key, value)
                    case 2:
                        ours.delete(namespace, key)
                        theirs.delete(namespace, key)
                    case 3:
                        mine, their = ours.get(namespace, key), theirs.get(namespace, key)
                        assert (mine and mine.value) == (their and their.value)
                    case 4:
                        wanted = rng.choice([None, {"n": 2}, {"n": {"$gte": 2, "$ne": 3}}])
                        prefix = namespace[: rng.randrange(3)]
                        assert plain(ours.search(prefix, filter=wanted, limit=99)) == plain(
                            theirs.search(prefix, filter=wanted, limit=99)
                        )
                    case _:
                        for options in ({}, {"prefix": ("a",)}, {"suffix": ("b",)}, {"max_depth": 1}):
                            # LangGraph's own lists namespaces that have become empty, too.
                            held = {item.namespace for item in theirs.search((), limit=99)}
                            depth = options.get("max_depth")
                            held = {namespace[:depth] for namespace in held}
                            assert set(ours.list_namespaces(**options)) == held & set(
                                theirs.list_namespaces(**options)
                            )


def test_the_langgraph_store_searches_by_words_within_a_namespace(store: Path) -> None:
    pytest.importorskip("langgraph")
    from langgraph.store.base import InvalidNamespaceError

    from mka.langgraph import MkaStore

    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        items.put(("ada",), "hotel", {"text": "The hotel is the Sakura Inn.", "kind": "place"})
        items.put(("ada",), "train", {"text": "The train leaves at nine.", "kind": "time"})
        items.put(("bob",), "hotel", {"text": "The hotel is the Ritz."})
        items.put(("ada",), "secret", {"text": "A hotel nobody finds."}, index=False)
        found = items.search(("ada",), query="which hotel", limit=1)
        assert [(item.namespace, item.key) for item in found] == [(("ada",), "hotel")]
        assert found[0].score is not None and found[0].score > 0
        assert [i.key for i in items.search(("ada",), query="hotel", filter={"kind": "time"})] == [
            "train"
        ]
        items.put(("ada",), "hotel", {"text": "The hotel is the Lotus."})
        assert "Lotus" in str(items.search((), query="Lotus", limit=1)[0].value)
        items.delete(("ada",), "hotel")
        hits = engine.memory.recall("Sakura Lotus", user="langgraph")
        assert not any("Sakura" in hit.text or "Lotus" in hit.text for hit in hits)
        assert asyncio.run(items.aget(("bob",), "hotel")) is not None
        with pytest.raises(InvalidNamespaceError):
            items.put(("x" * 300,), "k", {})
        with pytest.raises(NotImplementedError):
            items.put(("ada",), "k", {}, ttl=1)


def test_the_langgraph_store_ranks_items_whose_text_stands_elsewhere_too(store: Path) -> None:
    pytest.importorskip("langgraph")
    from mka.langgraph import MkaStore

    same = {"text": "The hotel is the Sakura Inn."}
    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        items.put(("ada",), "train", {"text": "The train leaves at nine."})
        items.put(("ada",), "first", same)
        items.put(("ada",), "second", same)
        items.put(("bob",), "hotel", same)
        items.put(("cleo",), "place", same | {"kind": "place"}, index=["text"])
        items.put(("cleo",), "note", same | {"kind": "note"}, index=["text"])
    # As it was written, and as it is read again.
    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        found = items.search(("ada",), query="which hotel", limit=9)
        assert [item.key for item in found] == ["first", "second", "train"]
        assert found[0].score is not None and found[0].score == found[1].score
        assert found[0].score > (found[2].score or 0)
        everywhere = items.search((), query="which hotel", limit=9)
        assert everywhere[-1].key == "train"
        assert all(item.score is not None for item in everywhere[:5])
        for kind in ("place", "note"):
            (item,) = items.search(("cleo",), query="which hotel", filter={"kind": kind})
            assert item.key == kind and item.score is not None
        items.put(("ada",), "third", same)
        found = items.search(("ada",), query="which hotel", limit=3)
        assert {item.key for item in found} == {"first", "second", "third"}
        assert len({item.score for item in found}) == 1
        # Said in nearly the same words, and within a longer text, which scores for itself.
        text = same["text"]
        items.put(("dora",), "plain", {"text": text}, index=["text"])
        items.put(("dora",), "loud", {"text": "the hotel is the SAKURA inn!"}, index=["text"])
        rest = " Behind it lies a garden with old stones and a pond where nobody goes in winter."
        items.put(("dora",), "long", {"text": text + rest}, index=["text"])
        by_key = {item.key: item.score for item in items.search(("dora",), query="which hotel")}
        assert by_key["plain"] is not None and by_key["plain"] == by_key["loud"]
        assert by_key["long"] is not None and by_key["long"] < by_key["plain"]


def test_the_langgraph_store_keeps_the_order_that_the_disk_has(store: Path) -> None:
    pytest.importorskip("langgraph")
    from mka.langgraph import MkaStore

    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        for key in ("first", "second", "third", "first"):
            items.put(("ada",), key, {"text": f"The {key} one."})
        written = [item.key for item in items.search(("ada",))]
        assert written == ["second", "third", "first"]
    with mka.open_sync(store) as engine:
        assert [item.key for item in MkaStore(engine).search(("ada",))] == written


def test_the_langgraph_store_stands_as_the_disk_does_where_a_write_fails(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langgraph")
    from mka.langgraph import MkaStore

    def fail(*_: Any, **__: Any) -> Any:
        raise mka.StorageError("the disk is full")

    def text(items: MkaStore) -> str:
        item = items.get(("ada",), "hotel")
        return item.value["text"] if item else "nothing"

    sakura = {"text": "The hotel is the Sakura Inn."}
    lotus = {"text": "The hotel is the Lotus."}
    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        items.put(("ada",), "hotel", sakura)
        with monkeypatch.context() as patch:
            patch.setattr(engine.memory, "remember", fail)
            with pytest.raises(mka.StorageError):
                items.put(("ada",), "hotel", lotus)
            assert text(items) == sakura["text"]
        with monkeypatch.context() as patch:
            patch.setattr(engine.memory, "forget", fail)
            with pytest.raises(mka.StorageError):
                items.delete(("ada",), "hotel")
            assert text(items) == sakura["text"]
            # Written, beside what cannot be erased: as after a crash.
            with pytest.raises(mka.StorageError):
                items.put(("ada",), "hotel", lotus)
            assert text(items) == lotus["text"]
    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        assert text(items) == lotus["text"]
        items.delete(("ada",), "hotel")
        assert text(items) == "nothing"
        assert engine.memory.chunks(user="langgraph") == []
        items.put(("ada",), "langgraph:item", sakura)
    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        assert text(items) == "nothing"
        item = items.get(("ada",), "langgraph:item")
        assert item is not None and item.value == sakura
        items.delete(("ada",), "langgraph:item")
        assert engine.memory.chunks(user="langgraph") == [] and items.list_namespaces() == []


def test_the_langgraph_store_agrees_with_what_is_erased_and_with_another_store(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("langgraph")
    from mka.langgraph import MkaStore

    with mka.open_sync(store) as engine:
        memory = engine.memory
        ours, theirs = MkaStore(engine), MkaStore(engine)

        def keys() -> set[str]:
            found = [{item.key for item in each.search(("ada",))} for each in (ours, theirs)]
            assert found[0] == found[1]
            return found[0]

        ours.put(("ada",), "hotel", {"text": "The hotel is the Sakura Inn."})
        ours.put(("ada",), "train", {"text": "The train leaves at nine."})
        assert keys() == {"hotel", "train"}
        memory.forget(user="langgraph", everything=True)
        assert keys() == set() and ours.get(("ada",), "hotel") is None
        assert ours.search((), query="hotel") == [] and ours.list_namespaces() == []
        # Numbers of turns begin anew: those of before are other items' now.
        theirs.put(("ada",), "train", {"text": "The train leaves at ten."})
        theirs.put(("ada",), "plane", {"text": "The plane leaves at noon."})
        ours.put(("ada",), "hotel", {"text": "The hotel is the Lotus."})
        assert keys() == {"train", "plane", "hotel"}
        theirs.put(("ada",), "hotel", {"text": "The hotel is the Ritz."})
        ours.delete(("ada",), "hotel")
        assert keys() == {"train", "plane"} and theirs.get(("ada",), "hotel") is None
        assert not any("hotel" in chunk.text for chunk in memory.chunks(user="langgraph"))
        memory.forget(user="langgraph", matching="leaves at ten")
        assert keys() == {"plane"} and ours.get(("ada",), "train") is None

        remember = memory.remember

        def erased_before(*turns: Any, **scope: Any) -> mka.Committed:
            memory.forget(user="langgraph", everything=True)
            return remember(*turns, **scope)

        with monkeypatch.context() as patch:
            patch.setattr(memory, "remember", erased_before)
            ours.put(("ada",), "plane", {"text": "The plane leaves at one."})
        item = theirs.get(("ada",), "plane")
        assert item is not None and item.value["text"] == "The plane leaves at one."


def test_a_value_of_the_langgraph_store_is_nobody_elses_object(store: Path) -> None:
    pytest.importorskip("langgraph")
    from langgraph.store.base import GetOp, SearchOp

    from mka.langgraph import MkaStore

    with mka.open_sync(store) as engine:
        items = MkaStore(engine)
        value: dict[str, Any] = {"names": ["Sakura"], "rooms": (1, 2)}
        items.put(("ada",), "hotel", value)
        value["names"].append("Lotus")
        # As JSON has it, before a restart as after it.
        expected = {"names": ["Sakura"], "rooms": [1, 2]}
        one, two, found = items.batch(
            [GetOp(("ada",), "hotel"), GetOp(("ada",), "hotel"), SearchOp(("ada",))]
        )
        for item in (one, two, *found):
            assert item.value == expected
            item.value["names"].clear()
        again = items.get(("ada",), "hotel")
        assert again is not None and again.value == expected


def test_the_mcp_server_remembers_across_processes_and_keeps_users_apart(store: Path) -> None:
    pytest.importorskip("mcp")
    from mcp.client.session import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    async def call(user: str, tool: str, **arguments: Any) -> str:
        command = ["-m", "mka.mcp", "--store", str(store), "--user", user]
        environment = dict(os.environ)
        parameters = StdioServerParameters(
            command=sys.executable, args=command, env=environment
        )
        async with stdio_client(parameters) as (read, write), ClientSession(read, write) as client:
            await client.initialize()
            names = {tool.name for tool in (await client.list_tools()).tools}
            assert names == {"recall", "remember", "forget", "context"}
            result = await client.call_tool(tool, arguments)
            assert not result.is_error, result
            return "\n".join(part.text for part in result.content if part.type == "text")

    async def main() -> None:
        await call("ada", "remember", text="The hotel in Kyoto is the Sakura Inn.")
        assert "Sakura" in await call("ada", "recall", query="hotel")
        assert "Sakura" in await call("ada", "context", query="hotel", budget_tokens=200)
        assert "Sakura" not in await call("bob", "recall", query="hotel")
        assert '"verified": true' in (await call("ada", "forget", matching="sakura")).lower()
        assert "Sakura" not in await call("ada", "recall", query="hotel")

    asyncio.run(main())


NOT_DONE: list[tuple[str, Any]] = [
    ("tools", {"name": "f"}),
    ("tools", ["f"]),
    ("tool_choice", "required"),
    ("parallel_tool_calls", False),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("functions", [{"name": "f"}]),
    ("function_call", {"name": "f"}),
    ("response_format", "json_object"),
    ("response_format", {"type": "xml"}),
    ("response_format", {"type": "json_schema"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": "{}"}}),
    ("logprobs", True),
    ("top_logprobs", 3),
    ("n", 2),
    ("n", 0),
    ("logit_bias", {"50256": -100}),
    ("presence_penalty", 0.5),
    ("frequency_penalty", "0"),
]
ASKS_NOTHING: dict[str, Any] = {
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "functions": None,
    "function_call": "none",
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": None,
    "n": 1,
    "logit_bias": {},
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
}


def test_the_openai_endpoint_draws_a_seed_where_a_request_has_none() -> None:
    from mka.openai_server import _options

    seeds = {_options({"temperature": 1}, None).get("seed") for _ in range(8)}
    assert len(seeds) == 8 and all(seed is not None and 0 <= seed < 1 << 63 for seed in seeds)
    assert _options({"temperature": 1, "seed": 0}, None).get("seed") == 0
    for greedy in ({}, {"temperature": 0}, {"temperature": None, "seed": None}):
        assert "seed" not in _options(greedy, None)


def test_the_openai_endpoint_reads_the_limit_that_is_set() -> None:
    from mka.openai_server import _options

    for limits, tokens in (
        ({"max_tokens": 6}, 6),
        ({"max_completion_tokens": None, "max_tokens": 6}, 6),
        ({"max_completion_tokens": 0, "max_tokens": 6}, 0),
        ({"max_completion_tokens": None, "max_tokens": None}, None),
    ):
        assert _options(limits, None).get("max_new_tokens") == tokens


def test_the_openai_endpoint_reads_texts_and_refuses_what_is_none() -> None:
    from mka.openai_server import _BadRequest, _message

    def read(content: Any) -> tuple[Any, str | None]:
        system = {"role": "system", "content": "Be brief."}
        # What the session has already is not read.
        before = {"role": "user", "content": [image]}
        return _message({"messages": [system, before, {"role": "user", "content": content}]})

    image = {"type": "image_url", "image_url": {"url": "https://example.org/inn.png"}}
    text = {"type": "text", "text": "Which inn?"}
    for content, message in (
        ("Which inn?", "Which inn?"),
        (None, ""),
        ([], ""),
        ([text, text | {"text": ""}, text], "Which inn?\n\nWhich inn?"),
    ):
        assert read(content) == (message, "Be brief.")
    for wrong in (
        {"text": "Which inn?"},
        0,
        7,
        False,
        [text, image],
        [{"type": "input_audio", "input_audio": {}}],
        [{"type": "file", "file": {}}],
        [text | {"text": None}],
        [text | {"text": 7}],
        [{"text": "Which inn?"}],
        ["Which inn?"],
        [None],
    ):
        with pytest.raises(_BadRequest, match="^messages: ") as error:
            read(wrong)
        assert error.value.status == 400
        with pytest.raises(_BadRequest):
            _message({"messages": [{"role": "system", "content": wrong}, {"role": "user", "content": ""}]})


@contextmanager
def serving(engine: Any) -> Iterator[Server]:
    """The endpoint over `engine`, which answers on a thread of its own meanwhile."""
    from mka.openai_server import Server

    with Server(engine) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def test_the_openai_endpoint_answers_whole_and_streamed_and_keeps_sessions_apart(
    store: Path, tiny_model: Path
) -> None:
    with (
        mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine,
        serving(engine) as server,
    ):
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6}
        post = lambda extra, **headers: urllib.request.urlopen(  # noqa: E731
            urllib.request.Request(
                f"{server.url}/chat/completions",
                json.dumps(body | extra).encode(),
                {"Content-Type": "application/json", **headers},
            ),
            timeout=60,
        )
        whole = json.load(post({"user": "ada"}))
        assert whole["choices"][0]["finish_reason"] in ("length", "stop")
        assert whole["usage"]["completion_tokens"] <= 6
        options = {"stream": True, "user": "bob", "stream_options": {"include_usage": True}}
        lines = post(options).read().decode().split("\n\n")
        assert lines[-2] == "data: [DONE]"
        frames = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
        text = "".join(f["choices"][0]["delta"].get("content", "") for f in frames[:-1])
        assert text == whole["choices"][0]["message"]["content"]
        assert frames[-1]["usage"]["completion_tokens"] <= 6
        post({"user": "ada", "max_tokens": 2}, **{"X-Mka-Session": "other"}).read()
        names = [i.scope.session for i in engine.memory.sessions(user="ada")]
        assert sorted(map(str, names)) == ["chat", "other"]
        models = json.load(urllib.request.urlopen(f"{server.url}/models", timeout=60))
        assert models["data"][0]["id"] == "model.gguf"
        bad_requests: list[dict[str, Any]] = [
            {"messages": []},
            {"messages": [{"role": "assistant"}]},
            {"messages": [{"role": "user", "content": "\ud800"}]},
            {"top_p": 7},
            {"max_tokens": -1},
            {"max_tokens": float("inf")},
            {"temperature": 1e300},
            {"stop": [1]},
            {"stream": True, "stream_options": 1},
            {"user": "\ud800"},
        ]
        for bad in bad_requests:
            with pytest.raises(urllib.error.HTTPError) as error:
                post(bad)
            assert error.value.code == 400
        for key, value in NOT_DONE:
            with pytest.raises(urllib.error.HTTPError) as error:
                post({key: value})
            assert error.value.code == 400
            assert json.load(error.value)["error"]["message"].startswith(f"{key}: ")
        # The tiny model's chat template has no place for tools.
        with pytest.raises(urllib.error.HTTPError) as error:
            post({"tools": OFFERED, "user": "eve"})
        assert error.value.code == 400
        assert "no place for them" in json.load(error.value)["error"]["message"]
        post({"user": "eve"}).read()
        post(ASKS_NOTHING).read()
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
        for method, path, sent, status in (
            ("POST", "/v1/nowhere", json.dumps(body), 404),
            # On the same connection: what was sent to nowhere is not taken for a request.
            ("GET", "/v1/models", None, 200),
            ("POST", "/v1/chat/completions", "[" * 100_000, 400),
            ("POST", "/v1/chat/completions", json.dumps(body), 200),
        ):
            connection.request(method, path, sent)
            answer = connection.getresponse()
            assert answer.status == status, (path, answer.read())
            answer.read()
        connection.close()


def test_the_openai_endpoint_answers_no_web_page_of_elsewhere() -> None:
    engine = Caller()
    with serving(engine) as server:

        def status(method: str, path: str, headers: dict[str, str]) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            body = json.dumps({"messages": [{"role": "user", "content": "hello"}]})
            connection.request(method, path, body if method == "POST" else None, headers)
            answer = connection.getresponse()
            answer.read()
            connection.close()
            return answer.status

        def both(**headers: str) -> set[int]:
            return {
                status("POST", "/v1/chat/completions", {"Content-Type": "text/plain", **headers}),
                status("GET", "/v1/models", headers),
            }

        port = server.server_port
        names = ("localhost", "LOCALHOST", "127.0.0.1", "[::1]")
        for host in (*names, *(f"{name}:{port}" for name in names), "localhost:1"):
            assert both(Host=host) == {200}, host
            assert both(Host=host, Origin=f"http://{host}") == {200}, host
        said = len(engine.given)
        for host in ("evil.example", f"evil.example:{port}", "127.0.0.1.evil.example", "", "[", "10.0.0.1"):
            assert both(Host=host) == {403}, host
            assert both(Origin=f"https://{host}") == {403}, host
        assert both(Origin="null") == {403}
        assert status("OPTIONS", "/v1/chat/completions", {"Origin": "https://evil.example"}) == 403
        assert len(engine.given) == said


def test_the_openai_endpoint_holds_an_answer_to_its_format(store: Path, tiny_model: Path) -> None:
    with (
        mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine,
        serving(engine) as server,
    ):

        def post(form: dict[str, Any], **extra: Any) -> str:
            body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 9}
            request = urllib.request.Request(
                f"{server.url}/chat/completions",
                json.dumps(body | {"response_format": form} | extra).encode(),
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())

        def schema(schema: dict[str, Any]) -> dict[str, Any]:
            named = {"name": "kind", "strict": True, "schema": schema}
            return {"type": "json_schema", "json_schema": named}

        kind = schema({"enum": ["cat", "dog"]})
        choice = json.loads(post(kind))["choices"][0]
        assert json.loads(choice["message"]["content"]) in ("cat", "dog")
        assert choice["finish_reason"] == "stop"
        lines = post(kind, stream=True).split("\n\n")
        frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        pieces = [frame["choices"][0]["delta"].get("content") or "" for frame in frames]
        assert json.loads("".join(pieces)) in ("cat", "dog")
        choice = json.loads(post({"type": "json_object"}, max_tokens=1))["choices"][0]
        assert choice["message"]["content"] == "{" and choice["finish_reason"] == "length"
        with pytest.raises(urllib.error.HTTPError) as error:
            post(schema({"not": {}}))
        assert error.value.code == 400
        assert "send: grammar: " in json.load(error.value)["error"]["message"]


OFFERED: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
]
CALLS = (
    'Let me see.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
)


class Said:
    """The events of a turn whose answer is known."""

    def __init__(self, answer: str, stop: Any) -> None:
        usage = mka.Usage(3, 1, 0, 2, 5, stop)
        # The pieces cut the marks of calls in two.
        pieces = [mka.Token(answer[at : at + 7]) for at in range(0, len(answer), 7)]
        self.events = iter([*pieces, mka.Done(usage)])

    def __iter__(self) -> Said:
        return self

    def __next__(self) -> mka.Event:
        return next(self.events)

    def close(self) -> None:
        pass


class Caller:
    """An engine and its session, whose model says `answer` whatever it is asked."""

    model_name = "caller"

    def __init__(self) -> None:
        self.answer, self.stop, self.num_turns = CALLS, "end_of_turn", 0
        self.given: list[tuple[Any, Any]] = []

    def session(self, *, user: str, session: str) -> Caller:
        return self

    def send(self, message: Any, **options: Any) -> Said:
        self.given.append((message, options.get("tools")))
        self.num_turns += 2
        return Said(self.answer, self.stop)

    send_tool = send


def test_the_openai_endpoint_offers_tools_and_takes_their_results() -> None:
    engine = Caller()
    with serving(engine) as server:
        messages: list[dict[str, Any]] = [{"role": "user", "content": "what time is it?"}]
        base = {"messages": messages, "tools": OFFERED, "tool_choice": "auto"}

        def post(extra: dict[str, Any]) -> str:
            request = urllib.request.Request(
                f"{server.url}/chat/completions", json.dumps(base | extra).encode()
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                return str(answer.read().decode())

        def refused(extra: dict[str, Any]) -> str:
            with pytest.raises(urllib.error.HTTPError) as error:
                post(extra)
            assert error.value.code == 400
            return str(json.load(error.value)["error"]["message"])

        choice = json.loads(post({}))["choices"][0]
        called = choice["message"]
        assert choice["finish_reason"] == "tool_calls" and called["content"] == "Let me see."
        calls = called["tool_calls"]
        assert [call["function"] for call in calls] == [
            {"name": "now", "arguments": "{}"},
            {"name": "add", "arguments": '{"a": 1}'},
        ]
        first, second = (call["id"] for call in calls)
        assert first != second and first.startswith("call_")
        assert {call["type"] for call in calls} == {"function"}
        assert [json.loads(tool) for tool in engine.given[-1][1]] == OFFERED

        # Results in another order than the calls stand in theirs, each with its name.
        results = [
            {"role": "tool", "tool_call_id": second, "content": [{"type": "text", "text": "3"}]},
            {"role": "tool", "tool_call_id": first, "content": "9:14"},
        ]
        engine.answer = "It is late."
        choice = json.loads(post({"messages": [*messages, called, *results]}))["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "It is late."}
        assert choice["finish_reason"] == "stop"
        assert engine.given[-1][0] == [mka.ToolResult("9:14", "now"), mka.ToolResult("3", "add")]

        for wrong in (
            results,
            [*messages, *results],
            [*messages, called, results[0]],
            [*messages, called, results[0], results[0]],
            [*messages, called, results[0], {**results[1], "tool_call_id": "call_x"}],
            [*messages, {**called, "tool_calls": [{"id": first}]}, *results],
            [*messages, called, *results, *messages],
            [*messages, called],
        ):
            assert refused({"messages": wrong}).startswith("messages: ")
        assert refused({"tool_choice": "none"}).startswith("tool_choice: ")
        # A session keeps the tools that it began with.
        for other in ([], None, OFFERED[:1]):
            assert refused({"tools": other}).startswith("tools: ")

        def streamed() -> tuple[list[dict[str, Any]], list[str | None]]:
            lines = post({"stream": True}).split("\n\n")
            frames = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
            choices = [frame["choices"][0] for frame in frames]
            return [c["delta"] for c in choices], [c["finish_reason"] for c in choices]

        engine.answer = CALLS
        deltas, reasons = streamed()
        assert deltas[:2] == [{"role": "assistant", "content": ""}, {"content": "Let me see."}]
        assert [(call["index"], call["function"]["name"]) for call in deltas[2]["tool_calls"]] == [
            (0, "now"),
            (1, "add"),
        ]
        assert deltas[3:] == [{}] and reasons == [None, None, None, "tool_calls"]
        engine.answer, engine.stop = "It is late.", "max_tokens"
        deltas, reasons = streamed()
        assert deltas[1:] == [{"content": "It is late."}, {}] and reasons[-1] == "length"

        # Where no tools are offered, the same text is an answer as any other.
        engine.num_turns, engine.answer, engine.stop = 0, CALLS, "end_of_turn"
        choice = json.loads(post({"tools": None}))["choices"][0]
        assert choice["message"]["content"] == CALLS and choice["finish_reason"] == "stop"
        assert engine.given[-1][1] is None


class Patient(Caller):
    """A caller whose model says its second word when `left` is set, and that knows when a turn was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.left, self.closed = (threading.Event() for _ in range(3))

    def send(self, message: Any, **options: Any) -> Said:
        said = super().send(message, **options)
        self.asked.set()
        events = said.events

        def slowly() -> Iterator[mka.Event]:
            yield next(events)
            assert self.left.wait(60)
            yield from events

        said.events = slowly()
        said.close = self.closed.set  # type: ignore[method-assign]
        return said


def test_the_openai_endpoint_stops_a_turn_whose_client_is_gone() -> None:
    engine = Patient()
    with serving(engine) as server:

        def ask(message: str) -> http.client.HTTPConnection:
            connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
            body = {"messages": [{"role": "user", "content": message}]}
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            return connection

        first = ask("first")
        assert engine.asked.wait(60)
        # It waits for the first one's turn, and leaves before it has one of its own.
        ask("second").close()
        first.close()
        engine.left.set()
        assert engine.closed.wait(60)
        third = ask("third")
        assert third.getresponse().status == 200
        third.close()
    assert [message for message, _ in engine.given] == ["first", "third"]


class Opening:
    """An engine that knows which sessions are open; opening `slow` waits, and `bad` cannot be opened."""

    model_name = "opening"

    def __init__(self) -> None:
        self.open: list[str] = []
        self.began, self.goes_on = threading.Event(), threading.Event()

    def session(self, *, user: str, session: str) -> Opened:
        if session == "bad":
            raise mka.InvalidArgumentError("a bad name")
        if session == "slow":
            self.began.set()
            assert self.goes_on.wait(60)
        assert session not in self.open
        self.open.append(session)
        return Opened(self, session)


class Opened:
    num_turns = 2

    def __init__(self, engine: Opening, name: str) -> None:
        self.engine, self.name = engine, name

    def close(self) -> None:
        self.engine.open.remove(self.name)


def test_the_openai_endpoint_keeps_the_sessions_open_that_were_used_last() -> None:
    from mka.openai_server import Server, _BadRequest

    engine = Opening()
    with Server(engine, sessions=2) as server:  # type: ignore[arg-type]

        def ask(session: str, *tools: str) -> None:
            with server.session("ada", session) as chat:
                chat.offer(tools)
                assert session in engine.open

        for session in "abac":
            ask(session)
        assert engine.open == ["a", "c"]
        # What a request has is not closed, and what is more than may stay open is closed behind its request.
        with server.session("ada", "a"), server.session("ada", "c"):
            ask("b")
            assert engine.open == ["a", "c"]
        # A closed session is held to its tools as an open one is.
        ask("tools", "now", "add")
        ask("a")
        ask("c")
        assert engine.open == ["a", "c"]
        with pytest.raises(_BadRequest, match="^tools: 1 that"):
            ask("tools", "now")
        ask("tools", "now", "add")
        for _ in range(3):
            with pytest.raises(mka.InvalidArgumentError):
                ask("bad")
        ask("tools", "now", "add")
        assert engine.open[-1] == "tools" and len(engine.open) <= 2
        # A session that is being opened keeps nobody waiting who asks for another one.
        slow = threading.Thread(target=ask, args=("slow",))
        slow.start()
        try:
            assert engine.began.wait(60)
            ask("tools", "now", "add")
            assert "slow" not in engine.open
        finally:
            engine.goes_on.set()
            slow.join()
        assert engine.open == ["tools", "slow"]


def test_what_an_answer_says_before_its_calls_is_its_content() -> None:
    from mka.openai_server import _before_calls

    call = '{"name": "now", "arguments": {}}'
    for answer, before in (
        (CALLS, "Let me see."),
        (f"<tool_call>{call}", None),
        (f"I look. [TOOL_CALLS] [{call}]", "I look."),
        (f"[{call}]", None),
        (call, None),
        (f"<think>\n<tool_call>?\n</think>\n{call}", "<think>\n<tool_call>?\n</think>"),
        (f"<think>Hm.</think>So: <tool_call>{call}</tool_call>", "<think>Hm.</think>So:"),
        ('{"name": "say", "parameters": {"a": "<tool_call>"}}', None),
        (f"Or <tool_call>?\n</think>\nSo: <tool_call>{call}", "Or <tool_call>?\n</think>\nSo:"),
        (f"<|python_tag|>{call}", None),
        ('So: <tool_call>{"name": "say", "arguments": {"a": "</think>"}}</tool_call>', "So:"),
        ('[TOOL_CALLS][{"name": "say", "arguments": {"a": "</think>"}}]', None),
        ('<think>a</think>{"name": "say", "parameters": {"a": "<tool_call>"}}', "<think>a</think>"),
    ):
        assert _before_calls(answer) == before


def test_an_openai_client_talks_to_the_endpoint(store: Path, tiny_model: Path) -> None:
    openai = pytest.importorskip("openai")
    with (
        mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine,
        serving(engine) as server,
    ):
        client = openai.OpenAI(base_url=server.url, api_key="none")
        stream = client.chat.completions.create(
            model="any", messages=[{"role": "user", "content": "hello"}], stream=True, max_tokens=5
        )
        assert any(chunk.choices[0].finish_reason for chunk in stream)
