"""The asyncio API: the same calls, awaited; cancelling by leaving, by closing and by cancelling the task."""

from __future__ import annotations

import asyncio
from pathlib import Path

import mka
import pytest


def opened(store: Path, model: Path | None) -> mka.Opening[mka.AsyncEngine]:
    return mka.open(store, model=model, window_tokens=128, block_tokens=64, device="cpu")


def test_a_turn_streams_and_memory_answers(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:
            assert engine.model_name == "model.gguf" and engine.count_tokens("abc") == 3
            assert engine.trained_tokens == 256 and engine.device == "cpu"
            async with engine.session(user="ada", session="trip") as chat:
                events = [event async for event in chat.send("hello there", max_new_tokens=6)]
                assert isinstance(events[-1], mka.Done)
                again, _ = await chat.regenerate(max_new_tokens=6).text()
                assert again == "".join(e.text for e in events if isinstance(e, mka.Token))
                fed = await chat.feed("The sheep went up the hill. " * 50).finish()
                assert fed.bytes == 28 * 50
                context = await chat.context("sheep", budget_tokens=120)
                assert context.tokens <= 120
                assert (await chat.peek_logits("x")).ndim == 1
                assert chat.num_turns > 3 and chat.scope.session == "trip"
            memory = engine.memory
            await memory.remember("The hotel is in Kyoto.", user="ada", session="other")
            hits = await memory.recall("hotel", user="ada", k=1)
            assert hits[0].text == "The hotel is in Kyoto."
            receipt = await memory.forget(user="ada", matching="hotel")
            await memory.verify(receipt)
            assert len(await memory.sessions(user="ada")) == 2
            assert await memory.chunks(user="ada", session="trip")
            assert (await memory.turns(user="ada", session="other"))[0].forgotten
            assert (await memory.embed(["x"])).shape[0] == 1
            assert memory.stats().sessions == 2
            assert (await memory.doctor()).problems == ()
            exported = await memory.export(store.parent / "log.jsonl", user="ada", session="trip")
            assert (await memory.import_(store.parent / "log.jsonl")).skipped == exported.turns
            assert (await memory.backup(store.parent / "copy.mka")).records
            await memory.compact()
            assert (await memory.disk_usage()).segment_bytes > 0
        # Closed: the folder is free at once.
        engine = await opened(store, None)
        await engine.close()

    asyncio.run(main())


def test_leaving_and_closing_cancel_the_turn(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:
            chat = await engine.session(user="ada", session="trip")
            async for event in chat.send("tell me", max_new_tokens=100_000):
                assert isinstance(event, mka.Token)
                break
            async with chat.send("and again", max_new_tokens=100_000) as events:
                await anext(events)
                with pytest.raises(mka.LockedError):
                    chat.send("more")
            assert [event async for event in events] == []
            assert chat.num_turns == 4
            await chat.send("go on", max_new_tokens=2).text()

    asyncio.run(main())


def test_cancelling_the_task_stops_the_model_and_keeps_the_store_consistent(
    store: Path, tiny_model: Path
) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:
            chat = await engine.session(user="ada", session="trip")

            async def talk() -> None:
                while True:  # the model may end its turn before it is cancelled
                    async for _ in chat.send("tell me", max_new_tokens=10_000_000):
                        pass

            task = asyncio.create_task(talk())
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(talk(), 0.2)
            await chat.send("go on", max_new_tokens=2).text()
            turns = await engine.memory.turns(user="ada", session="trip")
            assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
            assert len(turns) >= 6

    asyncio.run(main())


def test_the_loop_ticks_while_the_model_works(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:
            chat = await engine.session(user="ada", session="trip")
            feed = asyncio.ensure_future(chat.feed("one two three " * 500, mode="model").finish())
            ticks = 0
            while not feed.done():
                await asyncio.sleep(0.005)
                ticks += 1
            await feed
            assert ticks > 10

    asyncio.run(main())


def test_eight_tasks_on_one_engine_lose_no_turn(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:

            async def work(number: int) -> None:
                async with engine.session(user="ada", session=f"s{number}") as chat:
                    for turn in range(3):
                        await chat.send(f"turn {turn}", max_new_tokens=4).text()
                        await engine.memory.recall("turn", user="ada")

            await asyncio.wait_for(asyncio.gather(*map(work, range(8))), 120)
            sessions = await engine.memory.sessions(user="ada")
            assert len(sessions) == 8 and all(info.num_turns >= 6 for info in sessions)

    asyncio.run(main())


def test_errors_are_raised_where_they_are_awaited(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        with pytest.raises(mka.NotFoundError, match="nowhere"):
            await mka.open(store, model="nowhere")
        async with opened(store, None) as engine:
            chat = await engine.session(user="ada", session="trip")
            with pytest.raises(mka.InvalidArgumentError, match="no model"):
                await chat.send("hello").text()
            with pytest.raises(mka.LockedError):
                await engine.session(user="ada", session="trip")

    asyncio.run(main())
