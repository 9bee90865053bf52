"""Memory beside the basics of `test_sync`: what is erased, replaced, listed and marked, blocking and awaited."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Any

import mka
import pytest


def test_several_turns_are_erased_at_once(store: Path) -> None:
    texts = ["The otter is 1.", "The heron is 2.", "The badger is 3.", "The wolf is 4."]

    async def main() -> None:
        async with mka.open(store) as engine:
            memory = engine.memory
            receipt = await memory.forget(user="ada", session="trip", turn=range(2, 3))
            assert receipt.turns == 1
            await memory.verify(receipt)
            left = await memory.turns(user="ada", session="trip")
            assert [turn.text for turn in left] == ["", texts[1], "", ""]

    with mka.open_sync(store) as engine:
        memory = engine.memory
        memory.remember([mka.NewTurn(text) for text in texts], user="ada", session="trip")
        with pytest.raises(mka.NotFoundError, match="below 4, got 4"):
            memory.forget(user="ada", session="trip", turn=[0, 4])
        with pytest.raises(mka.InvalidArgumentError, match="one turn at least"):
            memory.forget(user="ada", session="trip", turn=[])
        with pytest.raises(mka.InvalidArgumentError, match="a scope with a session"):
            memory.forget(user="ada", turn=[0])
        receipt = memory.forget(user="ada", session="trip", turn=(3, 0))
        assert receipt.turns == 2
        memory.verify(receipt)
        left = memory.turns(user="ada", session="trip")
        assert [turn.forgotten for turn in left] == [True, False, False, True]
    asyncio.run(main())


def test_a_turn_is_replaced_by_one_that_is_remembered_first(store: Path) -> None:
    async def main() -> None:
        async with mka.open(store) as engine:
            memory = engine.memory
            turn = mka.NewTurn("The hotel is in Kobe.", metadata={"kind": "place"})
            done = await memory.replace(1, turn, user="ada", session="trip")
            assert done.turns == (2,) and done.chunks_added == 1
            hits = await memory.recall("hotel", user="ada")
            assert [hit.text for hit in hits] == ["The hotel is in Kobe."]
            assert hits[0].source.metadata == {"kind": "place"}

    with mka.open_sync(store) as engine:
        memory = engine.memory
        memory.remember("The hotel is in Kyoto.", user="ada", session="trip")
        done = memory.replace(0, "The hotel is in Nara.", user="ada", session="trip")
        assert done.turns == (1,)
        assert [hit.text for hit in memory.recall("hotel", user="ada")] == ["The hotel is in Nara."]
        with pytest.raises(mka.NotFoundError, match="turn 2 of ada/\\*/trip, expected one below 2"):
            memory.replace(2, "The hotel is in Osaka.", user="ada", session="trip")
        turns = memory.turns(user="ada", session="trip")
        assert [turn.forgotten for turn in turns] == [True, False]
    asyncio.run(main())


def test_what_is_sent_and_fed_is_marked(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with mka.open(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
            async with engine.session(user="ada", session="trip") as chat:
                await chat.send("and now?", max_new_tokens=2, metadata={"kind": "late"}).text()
                await chat.feed("The wolf is 4.", metadata={"kind": "late"}).finish()
            late = await engine.memory.forget(user="ada", filter={"kind": "late"})
            assert late.turns == 3

    with mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
        with engine.session(user="ada", session="trip") as chat:
            chat.send("hello there", max_new_tokens=2, metadata={"kind": "chat", "year": 2025}).text()
            chat.feed("The otter is 1.", mode="model", metadata={"kind": "page"}).finish()
            with engine.session(user="ada", session="told") as told:
                fed = told.feed("The otter is 1.", mode="model", system="Say red.").finish()
            with engine.session(user="ada", session="bare") as bare:
                assert bare.feed("The otter is 1.", mode="model").finish().model_tokens < fed.model_tokens
            engine.memory.forget(user="ada", session="told", everything=True)
            engine.memory.forget(user="ada", session="bare", everything=True)
            for refused in ({"mka.kind": 1}, {"": 1}):
                with pytest.raises(mka.InvalidArgumentError, match="^send: "):
                    chat.send("hello", metadata=refused).text()
                with pytest.raises(mka.InvalidArgumentError, match="^feed: "):
                    chat.feed("hello", metadata=refused).finish()
            with pytest.raises(TypeError, match="metadata 'kind': list"):
                chat.send("hello", metadata={"kind": []})  # type: ignore[dict-item]
        turns = engine.memory.turns(user="ada", session="trip")
        assert [turn.metadata for turn in turns] == [{"kind": "chat", "year": 2025}] * 2 + [{"kind": "page"}]
        hits = engine.memory.recall("otter", user="ada", filter={"kind": "page"})
        assert [hit.text for hit in hits] == ["The otter is 1."]
    asyncio.run(main())


def test_chunks_are_listed_by_their_marks_and_users_by_name(store: Path) -> None:
    async def main() -> None:
        async with mka.open(store) as engine:
            assert engine.memory.users() == ["ada", "bob"]
            drafts = await engine.memory.chunks(user="ada", filter={"kind": "draft"})
            assert [chunk.text for chunk in drafts] == ["The wolf is 4."]
            await engine.memory.forget(user="bob", everything=True)
            assert engine.memory.users() == ["ada"]

    with mka.open_sync(store) as engine:
        memory = engine.memory
        assert memory.users() == []
        turns = [
            mka.NewTurn("The otter is 1.", metadata={"kind": "note"}),
            mka.NewTurn("The wolf is 4.", metadata={"kind": "draft"}),
            mka.NewTurn("The heron is 2."),
        ]
        memory.remember(turns, user="ada", session="trip")
        memory.remember("The lynx is 5.", user="bob", session="trip")
        notes = memory.chunks(user="ada", filter={"kind": "note"})
        assert [chunk.text for chunk in notes] == ["The otter is 1."]
        assert len(memory.chunks(user="ada", filter={"kind": {"$ne": "note"}}, end=1)) == 1
        assert len(memory.chunks(user="ada", filter={})) == len(memory.chunks(user="ada")) == 3
        with pytest.raises(mka.InvalidArgumentError, match=r"\$above"):
            memory.chunks(user="ada", filter={"year": {"$above": 1}})
    asyncio.run(main())


def test_a_message_and_a_context_look_up_what_a_filter_accepts(store: Path, tiny_model: Path) -> None:
    turns = [
        mka.NewTurn("heron: 7654321", metadata={"kind": "note"}, time=1000),
        mka.NewTurn("heron: 1234567", metadata={"kind": "draft"}, time=2000),
    ]

    async def main() -> None:
        async with mka.open(store) as engine:
            context = await engine.memory.context(
                "heron", user="ada", budget_tokens=400, filter={"kind": "note"}
            )
            assert [hit.text for hit in context.hits] == ["heron: 7654321"]

    with mka.open_sync(store, model=tiny_model, window_tokens=256, device="cpu") as engine:
        memory = engine.memory
        memory.remember(turns, user="ada", session="other")
        with engine.session(user="ada", session="trip") as chat:
            found: list[list[str]] = []
            for kind in ("note", "draft"):
                asked: mka.SendOptions = {"across_sessions": True, "recall_filter": {"kind": kind}}
                for event in chat.send("heron?", max_new_tokens=2, **asked):
                    if isinstance(event, mka.Recalled):
                        found.append([hit.text for hit in event.hits])
            assert found == [["heron: 7654321"], ["heron: 1234567"]]
            with pytest.raises(mka.InvalidArgumentError, match=r"\$above"):
                chat.send("heron?", recall_filter={"year": {"$above": 1}})

        def texts(**options: Any) -> list[str]:
            context = memory.context("heron", user="ada", session="other", budget_tokens=400, **options)
            assert all(hit.text in context.text for hit in context.hits)
            return sorted(hit.text for hit in context.hits)

        both = ["heron: 1234567", "heron: 7654321"]
        assert texts() == both and len(texts(k=1)) == 1
        assert texts(since=1500) == both[:1] and texts(until=1500) == both[1:]
        assert texts(except_turns=[0]) == both[:1] and texts(before_turn=1) == both[1:]
        assert texts(roles=["user"], as_of=2500, now=3000, half_life=timedelta(days=1)) == both
        assert texts(roles=("document",)) == texts(min_relevance=1.1) == texts(min_score=2.0) == []
        assert texts(across_sessions=True, stale=True, follow_up=False, filter={"kind": "note"}) == both[1:]
        assert set(mka.RecallOptions.__annotations__) == {
            "k", "before_turn", "except_turns", "across_sessions", "roles", "since", "until", "as_of",
            "now", "stale", "half_life", "min_score", "min_relevance", "filter", "follow_up",
        }  # fmt: skip
        with pytest.raises(TypeError, match="context: unexpected option nonsense"):
            texts(nonsense=1)
        with pytest.raises(mka.InvalidArgumentError, match="role 'nobody'"):
            texts(roles=["nobody"])
        with pytest.raises(mka.InvalidArgumentError, match="requires 0"):
            texts(k=-1)
    asyncio.run(main())
