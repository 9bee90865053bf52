"""The asyncio API: the same calls, awaited; cancelling by leaving, by closing and by cancelling the task."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from pathlib import Path

import mka
import pytest
from mka import _bell, _direct


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
                async with chat.fork("branch") as fork:
                    assert fork.num_turns == chat.num_turns
                    await fork.send("the plums are green", max_new_tokens=2).text()
                    assert fork.num_turns > chat.num_turns
                await engine.memory.forget(user="ada", session="branch", everything=True)
                assert len(await engine.memory.turns(user="ada", session="trip")) == chat.num_turns
                await chat.rewind(3)
                turns = await engine.memory.turns(user="ada", session="trip")
                assert turns[3].retracted and not turns[2].retracted
            memory = engine.memory
            await memory.remember("The hotel is in Kyoto.", user="ada", session="other")
            hits = await memory.recall("hotel", user="ada", k=1)
            assert hits[0].text == "The hotel is in Kyoto."
            receipt = await memory.forget(user="ada", matching="hotel")
            await memory.verify(receipt)
            await memory.verify(receipt.record)
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


def test_blocking_and_awaiting_code_share_one_open_folder(store: Path, tiny_model: Path) -> None:
    async def awaiting() -> None:
        async with opened(store, tiny_model) as engine:
            blocking = engine.blocking
            assert isinstance(blocking, mka.Engine) and blocking.device == "cpu"
            await asyncio.to_thread(
                blocking.memory.remember, "The hotel is in Kyoto.", user="ada", session="trip"
            )
            hits = await engine.memory.recall("hotel", user="ada")
            assert hits == await asyncio.to_thread(blocking.memory.recall, "hotel", user="ada")
            async with engine.session(user="ada", session="trip") as chat:
                with pytest.raises(mka.LockedError):
                    await asyncio.to_thread(blocking.session, user="ada", session="trip")
                events = chat.send("tell me", max_new_tokens=100_000)
                await anext(events)
                await asyncio.to_thread(blocking.close)
                with pytest.raises(mka.InvalidArgumentError, match="closed"):
                    await engine.memory.recall("hotel", user="ada")

    asyncio.run(awaiting())
    # Closed by its twin: the folder is free.
    with mka.open_sync(store) as engine:
        twin = engine.asyncio
        assert isinstance(twin, mka.AsyncEngine)
        for _ in range(2):
            hits = asyncio.run(twin.memory.recall("hotel", user="ada"))
            assert hits == engine.memory.recall("hotel", user="ada") and hits
        asyncio.run(twin.close())
        with pytest.raises(mka.InvalidArgumentError, match="closed"):
            engine.memory.recall("hotel", user="ada")
    # A twin keeps the folder open as the engine does, and both let go of it.
    twin = mka.open_sync(store).asyncio
    assert asyncio.run(twin.memory.recall("hotel", user="ada"))
    with pytest.raises(mka.LockedError):
        mka.open_sync(store)
    asyncio.run(twin.close())


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


def test_after_a_cancel_the_model_chooses_at_most_one_more_token(
    store: Path, cancelled_model: Path
) -> None:
    async def main() -> None:
        async with opened(store, cancelled_model) as engine:
            chat = await engine.session(user="ada", session="trip")
            for stop in ("task", "cancel", "leave"):
                before = chat.num_turns
                fifth = asyncio.Event()
                streams: list[mka.AsyncEvents] = []

                async def talk() -> None:
                    seen = 0
                    events = chat.send("Tell me a very long story.", max_new_tokens=100_000)
                    if stop == "cancel":
                        streams.append(events)
                    async for event in events:
                        seen += isinstance(event, mka.Token)
                        if seen == 5:
                            fifth.set()
                            if stop == "leave":
                                break

                task = asyncio.create_task(talk())
                await fifth.wait()
                if stop == "task":
                    task.cancel()
                    # The task is told in the loop's next round.
                    await asyncio.sleep(0)
                elif stop == "cancel":
                    streams[0].cancel()
                else:
                    await task
                chosen = chat.generated_tokens
                await asyncio.wait([task])
                await chat.peek_logits("x")  # waits for a stream that was left
                after = chat.generated_tokens
                assert 5 <= chosen and after <= chosen + 1, (stop, chosen, after)
                turns = await engine.memory.turns(user="ada", session="trip", start=before)
                assert [turn.role for turn in turns] == ["user", "assistant"]
                assert turns[1].num_tokens == after
            assert (await engine.memory.doctor()).problems == ()
            await chat.send("Go on.", max_new_tokens=2).text()

    asyncio.run(main())


class NoReader(asyncio.SelectorEventLoop):
    """A loop that can watch no descriptor, as Windows' proactor."""

    def add_reader(self, fd: object, callback: object, *args: object) -> None:
        if getattr(callback, "__module__", "").startswith("mka"):
            raise NotImplementedError
        super().add_reader(fd, callback, *args)  # type: ignore[arg-type]


def test_a_loop_that_watches_no_descriptor_gets_the_same(store: Path, tiny_model: Path) -> None:
    said: list[object] = []
    for loop in (asyncio.SelectorEventLoop(), NoReader()):

        async def main() -> None:
            async with opened(store.with_name(type(loop).__name__), tiny_model) as engine:
                chat = await engine.session(user="ada", session="trip")
                answer, usage = await chat.send("hello there", max_new_tokens=8).text()
                fed = await chat.feed("The sheep went up the hill. " * 50).finish()
                hits = await engine.memory.recall("sheep", user="ada", k=3)
                said.append((answer, usage, fed, [hit.text for hit in hits]))
                assert (_bell.of(asyncio.get_running_loop()) is None) == isinstance(loop, NoReader)
                task = asyncio.ensure_future(chat.feed("one two " * 9000, mode="model").finish())
                await asyncio.sleep(0.1)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                await chat.send("go on", max_new_tokens=2).text()

        loop.run_until_complete(main())
        loop.close()
    assert said[0] == said[1]


def test_a_loop_may_end_while_streams_are_open_and_another_goes_on(
    store: Path, tiny_model: Path
) -> None:
    engine = asyncio.run(_opened(store, tiny_model))
    sessions: list[mka.AsyncSession] = []
    streams: list[mka.AsyncEvents] = []

    async def begin(number: int) -> None:
        chat = await engine.session(user="ada", session=f"s{number}")
        streams.append(chat.send("tell me", max_new_tokens=30))
        sessions.append(chat)
        await anext(streams[-1])

    async def read_on() -> None:
        for stream in streams:
            await stream.text()
        assert await engine.memory.recall("tell me", user="ada")

    for number in range(3):
        asyncio.run(begin(number))
    asyncio.run(read_on())
    assert [chat.num_turns for chat in sessions] == [2, 2, 2]
    asyncio.run(engine.close())


async def _opened(store: Path, model: Path) -> mka.AsyncEngine:
    return await opened(store, model)


def test_recalls_that_nobody_waits_for_leave_nothing_behind(store: Path) -> None:
    async def main() -> None:
        async with mka.open(store) as engine:
            await engine.memory.remember("The hotel is in Kyoto.", user="ada", session="s")
            wait = engine.memory.recall("hotel", user="ada")
            assert [hit.text for hit in await wait] == ["The hotel is in Kyoto."]
            tasks = [
                asyncio.ensure_future(engine.memory.recall(f"hotel {i}", user="ada"))
                for i in range(60)
            ]
            await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(each, (list, asyncio.CancelledError)) for each in done)
            assert all(isinstance(each, list) and each for each in done[1::2])
            bell = _bell.of(asyncio.get_running_loop())
            assert bell is not None and not bell._waiting
            with pytest.raises(mka.InvalidArgumentError, match="user"):
                await engine.memory.recall("hotel", user="")
            with pytest.raises(mka.InvalidArgumentError, match="surrogates"):
                await engine.memory.recall("\ud800", user="ada")
            with pytest.raises(mka.InvalidArgumentError, match="surrogates"):
                await engine.memory.remember("\ud800", user="ada", session="s")
            with pytest.raises(mka.InvalidArgumentError, match="requires 0"):
                await engine.memory.turns(user="ada", session="s", start=-1)
        with pytest.raises(mka.InvalidArgumentError, match="closed"):
            await engine.memory.recall("hotel", user="ada")

    asyncio.run(main())


def test_a_task_that_waits_for_a_ring_is_told_or_cancelled_in_its_own_context() -> None:
    name: ContextVar[str] = ContextVar("name", default="nobody")

    async def wait(waiting: _bell.Waiting, mine: str) -> str:
        name.set(mine)
        await waiting
        current = asyncio.current_task()
        assert current is not None and current.get_name() == mine
        return name.get()

    async def main() -> None:
        loop = asyncio.get_running_loop()
        rung = asyncio.create_task(wait(_bell.Waiting(loop, rung=True), "rung"), name="rung")
        assert await rung == "rung"
        first, second = _bell.Waiting(loop, rung=False), _bell.Waiting(loop, rung=False)
        told = asyncio.create_task(wait(first, "told"), name="told")
        cancelled = asyncio.create_task(wait(second, "cancelled"), name="cancelled")
        await asyncio.sleep(0)
        # As the loop does it: from a callback, while no task runs.
        loop.call_soon(first.ring)
        cancelled.cancel("enough")
        # Too late: it was cancelled before.
        loop.call_soon(second.ring)
        assert await told == "told" and name.get() == "nobody"
        with pytest.raises(asyncio.CancelledError, match="enough"):
            await cancelled
        assert not second.cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(wait(_bell.Waiting(loop, rung=False), "late"), 0.01)

    asyncio.run(main(), debug=True)


def test_a_second_task_at_one_stream_is_refused_and_the_first_reads_on(
    store: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with opened(store, tiny_model) as engine:
            async with engine.session(user="ada", session="trip") as chat:
                events = chat.send("hello there", max_new_tokens=20)
                with monkeypatch.context() as patch:
                    # However fast the model is: nothing is ready yet.
                    patch.setattr(_direct, "poll_events", lambda *_: [])
                    first = asyncio.ensure_future(anext(events))
                    await asyncio.sleep(0)
                    with pytest.raises(mka.LockedError, match="one task at a time"):
                        await anext(events)
                assert events._waiting is not None
                asyncio.get_running_loop().call_soon(events._waiting.ring)
                assert isinstance(await first, mka.Token)
                assert isinstance([event async for event in events][-1], mka.Done)

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
            with pytest.raises(mka.InvalidArgumentError, match="no model"):
                await chat.send("hello").aclose()
            with pytest.raises(mka.LockedError):
                await engine.session(user="ada", session="trip")

    asyncio.run(main())
