"""The blocking API: turns, restarts, cancelling, errors, memory."""

from __future__ import annotations

import _thread
import dataclasses
import gc
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Unpack

import mka
import pytest


def opened(store: Path, model: Path | None, **options: object) -> mka.Engine:
    return mka.open_sync(
        store, model=model, window_tokens=128, block_tokens=64, device="cpu", **options
    )


def test_a_session_is_taken_back_to_an_earlier_turn(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        for message in ("the cat is red", "the dog is blue"):
            chat.send(message, max_new_tokens=4).text()
        chat.rewind(2)
        turns = engine.memory.turns(user="ada", session="trip")
        assert [turn.retracted for turn in turns] == [False, False, True, True]
        with pytest.raises(mka.NotFoundError, match="turn 5, expected at most 4"):
            chat.rewind(5)
        chat.regenerate(max_new_tokens=4).text()
        assert chat.num_turns == 5


def test_an_answer_begins_with_its_prefix_and_is_answered_again_with_it(
    store: Path, tiny_model: Path
) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        options: mka.SendOptions = {"temperature": 1.0, "max_new_tokens": 6, "seed": None}
        text, _ = chat.send("the cat is red", answer_prefix="Well, ", **options).text()
        # Of these none has an effect, and the seed is the same where there is none.
        options |= {"system": "Be brief.", "recall_k": 0, "across_sessions": True}
        options |= {"answer_prefix": "No, ", "completion": True, "joined": True}
        assert chat.regenerate(**options).text()[0] == text
        *_, before, again = engine.memory.turns(user="ada", session="trip")
        assert before.retracted and again.text == before.text == f"Well, {text}"
        others = {chat.regenerate(**options | {"seed": seed}).text()[0] for seed in range(1, 5)}
        assert others - {text}


def test_a_fork_goes_on_as_its_original_and_then_its_own_way(
    store: Path, tiny_model: Path
) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        with pytest.raises(mka.NotFoundError, match="holds nothing yet"):
            chat.fork("other")
        chat.send("the cat is red", max_new_tokens=4).text()
        with chat.fork("other") as fork:
            assert fork.scope == mka.Scope("ada", None, "other")
            assert (fork.peek_logits("the next") == chat.peek_logits("the next")).all()
            said = [each.send("the dog is blue", max_new_tokens=4).text() for each in (chat, fork)]
            assert said[0][0] == said[1][0]
            fork.send("the plums are green", max_new_tokens=4).text()
            assert (chat.num_turns, fork.num_turns) == (4, 6)
            with pytest.raises(mka.LockedError):
                chat.fork("other")
            events = chat.send("tell me", max_new_tokens=100_000)
            next(events)
            with pytest.raises(mka.LockedError, match="a stream of the session is open"):
                chat.fork("third")
            events.close()
        with pytest.raises(mka.InvalidArgumentError, match="other is there already"):
            chat.fork("other")
        hits = engine.memory.recall("plums", user="ada", session="other")
        assert "plums" in hits[0].text
        hits = engine.memory.recall("plums", user="ada", session="trip")
        assert not any("plums" in hit.text for hit in hits)
        fork = chat.fork("third")
    with pytest.raises(mka.Error, match="closed"):
        fork.fork("fourth")


def test_a_turn_streams_its_answer_and_says_what_it_cost(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        events = list(chat.send("hello there", max_new_tokens=6))
        assert isinstance(events[-1], mka.Done)
        assert all(isinstance(event, mka.Token) for event in events[:-1])
        usage = events[-1].usage
        assert usage.generated_tokens <= 6 and usage.reused_tokens == 0 and usage.answer_turn == 1
        assert usage.stop in ("max_tokens", "end_of_turn")
        again, usage = chat.regenerate(max_new_tokens=6).text()
        assert again == "".join(e.text for e in events if isinstance(e, mka.Token))
        assert usage.reused_tokens > 0 and usage.answer_turn == 2
        assert chat.num_turns == 3
        assert chat.scope == mka.Scope("ada", None, "trip")
        assert engine.count_tokens("hello") == 5
        assert engine.model_name == "model.gguf"
        assert engine.device == "cpu" and engine.device in mka.available_devices()
        assert engine.trained_tokens == 256


def test_a_reopened_session_continues_bit_for_bit(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        chat.send("the one", max_new_tokens=4).text()
        chat.feed("the end and the beginning. " * 40, mode="model").finish()
        chat.send("the two", max_new_tokens=4).text()
        before = chat.peek_logits("the next")
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        after = chat.peek_logits("the next")
    assert (before == after).all()
    assert not before.flags.writeable and before.dtype == "float32" and before.ndim == 1


def test_leaving_the_loop_cancels_and_the_session_goes_on(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        for event in chat.send("tell me", max_new_tokens=100_000):
            assert isinstance(event, mka.Token)
            break
        gc.collect()
        chat.send("go on", max_new_tokens=2).text()
        # The answer that was cut short stands in the log, with the turn that it answers.
        turns = engine.memory.turns(user="ada", session="trip")
        assert [turn.role for turn in turns] == ["user", "assistant"] * 2
        assert turns[1].text and turns[1].num_tokens < 1000


def test_closing_a_stream_waits_until_its_turn_is_on_disk(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        with chat.send("tell me", max_new_tokens=100_000) as events:
            next(events)
            with pytest.raises(mka.LockedError, match="stream"):
                chat.send("another")
        assert chat.num_turns == 2
        assert list(events) == []
        with pytest.raises(mka.CancelledError):
            events.text()


def test_an_error_reaches_who_cancelled_and_who_closes(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        cancelled = chat.regenerate()
        cancelled.cancel()
        with pytest.raises(mka.NotFoundError, match="no answer"):
            list(cancelled)
        cancelled.close()
        with pytest.raises(mka.NotFoundError, match="no answer"):
            chat.regenerate().close()
        with pytest.raises(mka.NotFoundError, match="no answer"), chat.regenerate():
            pass
        chat.send("go on", max_new_tokens=2).text()


def test_after_a_cancel_the_model_chooses_at_most_one_more_token(
    store: Path, cancelled_model: Path
) -> None:
    with opened(store, cancelled_model) as engine:
        chat = engine.session(user="ada", session="trip")
        for stop in ("cancel", "close", "leave"):
            before = chat.num_turns
            seen = 0
            events = chat.send("Tell me a very long story.", max_new_tokens=100_000)
            for event in events:
                seen += isinstance(event, mka.Token)
                if seen == 5:
                    break
            if stop == "cancel":
                events.cancel()
            elif stop == "leave":
                del events
            # `close` comes back when the model has stopped: what it had chosen is counted just before.
            chosen = chat.generated_tokens
            if stop == "leave":
                chat.peek_logits("x")  # waits for the stream that was left
            else:
                events.close()
            after = chat.generated_tokens
            assert 5 <= chosen and (after <= chosen + 1 or stop == "close"), (stop, chosen, after)
            turns = engine.memory.turns(user="ada", session="trip", start=before)
            assert [turn.role for turn in turns] == ["user", "assistant"]
            assert turns[1].num_tokens == after
        assert engine.memory.doctor().problems == ()
        chat.send("Go on.", max_new_tokens=2).text()


def test_cancelling_from_another_thread_ends_a_reader_that_waits(
    store: Path, tiny_model: Path
) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        events = chat.send("tell me", max_new_tokens=1_000_000)
        chosen: list[int] = []

        def cancel() -> None:
            events.cancel()
            chosen.append(chat.generated_tokens)

        timer = threading.Timer(0.02, cancel)
        timer.start()
        seen = sum(1 for _ in events)
        timer.join()
        events.close()
        answer = engine.memory.turns(user="ada", session="trip")[1]
        assert answer.num_tokens == chat.generated_tokens <= chosen[0] + 1
        # What had been chosen and not yet read is dropped: who cancelled wants no more.
        assert seen <= answer.num_tokens


def test_an_engine_closes_under_streams_that_nobody_reads(store: Path, tiny_model: Path) -> None:
    start = time.monotonic()
    engine = opened(store, tiny_model)
    chat = engine.session(user="ada", session="trip")
    # More events than may wait to be read: the worker stands until somebody reads or cancels.
    feed = chat.feed("one two three " * 20_000, mode="model")
    next(feed)
    time.sleep(0.5)
    engine.close()
    assert time.monotonic() - start < 60
    del feed


def test_an_engine_closes_under_streams_whose_sessions_nobody_holds(
    store: Path, tiny_model: Path
) -> None:
    start = time.monotonic()
    with opened(store, tiny_model) as engine:
        story = engine.session(user="ada", session="trip").send(
            "Tell me a very long story.", max_new_tokens=1_000_000
        )
        feed = engine.session(user="ada", session="book").feed(
            "one two three " * 20_000, mode="model"
        )
        gc.collect()
        next(story)
        next(feed)
        time.sleep(0.5)
    assert time.monotonic() - start < 60
    # What was on its way can be read; then they end.
    assert sum(1 for _ in story) < 1_000
    assert not any(isinstance(event, mka.Fed) for event in feed)
    opened(store, tiny_model).close()


def test_a_slow_reader_misses_nothing(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        text = "one two three " * 1000
        fed = [0]
        for event in chat.feed(text, mode="model"):
            if len(fed) == 2:
                time.sleep(1)  # far more events than may wait
            if isinstance(event, mka.Progress):
                fed.append(event.fed_bytes)
            else:
                assert event.bytes == len(text)
        assert fed == sorted(fed) and fed[-1] == len(text) and len(fed) > 100


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C: a process that was started in the background has none."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_turn_and_is_raised(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        threading.Timer(0.2, _thread.interrupt_main).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            while time.monotonic() < start + 60:  # the model may end its turn before the signal comes
                for _ in chat.send("tell me", max_new_tokens=10_000_000):
                    pass
        assert time.monotonic() - start < 50
        gc.collect()
        chat.send("go on", max_new_tokens=2).text()


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_seen_while_a_document_is_read(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        threading.Timer(0.2, _thread.interrupt_main).start()
        with pytest.raises(KeyboardInterrupt):
            chat.feed("one two three " * 500_000, mode="model").finish()
        gc.collect()
        chat.send("go on", max_new_tokens=2).text()


def test_a_document_is_fed_with_progress(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="book") as chat:
        text = "The sheep and the goats went up the hill in the rain. " * 2000
        seen: list[mka.Progress] = []
        fed = chat.feed(text, name="hill.txt").finish(seen.append)
        assert fed.bytes == len(text) == seen[-1].total_bytes
        assert [p.fed_bytes for p in seen] == sorted(p.fed_bytes for p in seen)
        hits = engine.memory.recall("sheep on the hill", user="ada", session="book", k=2)
        assert hits[0].source.name == "hill.txt" and hits[0].trust == "document"


def test_what_was_said_elsewhere_is_taken_in(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        turns = [
            mka.NewTurn("Be brief.", role="system"),
            mka.NewTurn("where is the key", metadata={"kind": "chat"}),
            mka.NewTurn("the key is under the stone", role="assistant"),
        ]
        summary = chat.append(turns).finish()
        assert summary.model_tokens > 20 and summary.chunks_added > 0
        chat.append("and the hat").finish()
        again = ["the hat is red", mka.NewTurn("the hat is blue", role="assistant")]
        chat.append(again).finish()
        assert [turn.role for turn in engine.memory.turns(user="ada", session="trip")] == [
            "user",
            "assistant",
            "user",
            "user",
            "assistant",
        ]
        _, usage = chat.send("go on", max_new_tokens=4).text()
        assert usage.reused_tokens > summary.model_tokens
        with pytest.raises(mka.InvalidArgumentError, match="turn 0 has role Document"):
            chat.append(mka.NewTurn("a page", role="document")).finish()


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda c, e: c.send("").text(), mka.InvalidArgumentError, "empty"),
        (lambda c, e: c.send("x", top_p=1.5).text(), mka.InvalidArgumentError, "top_p"),
        (lambda c, e: c.send("x", nonsense=1), TypeError, "nonsense"),
        (lambda c, e: e.session(user="ada", session="trip"), mka.LockedError, "open already"),
        (lambda c, e: e.session(user="", session="x"), mka.InvalidArgumentError, "user"),
        (lambda c, e: c.regenerate().text(), mka.NotFoundError, "no answer"),
        (lambda c, e: e.memory.forget(user="ada"), mka.InvalidArgumentError, "exactly one"),
        (lambda c, e: e.memory.forget(user="ada", turn=0), mka.InvalidArgumentError, "session"),
        (lambda c, e: e.memory.recall("x", user="ada", since=datetime(2026, 1, 1)),
         mka.InvalidArgumentError, "zone"),
        (lambda c, e: e.memory.recall("x", user="ada", roles=["nobody"]),
         mka.InvalidArgumentError, "nobody"),
        (lambda c, e: c.send(42), TypeError, "str"),
        (lambda c, e: c.send("x", max_new_tokens=-1), mka.InvalidArgumentError, "requires 0"),
        (lambda c, e: c.send("x", temperature=1e300), mka.InvalidArgumentError, "temperature 1e"),
        (lambda c, e: c.send("x", stop=["\ud800"]), mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: c.feed("\ud800"), mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: c.rewind(-1), mka.InvalidArgumentError, "requires 0"),
        (lambda c, e: e.count_tokens("\ud800"), mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: e.memory.recall("\ud800", user="ada"), mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: e.memory.recall("x", user="\ud800"), mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: e.memory.turns(user="ada", session="trip", end=1 << 64),
         mka.InvalidArgumentError, "requires 0"),
        (lambda c, e: e.memory.remember(
            mka.NewTurn("x", metadata={"year": 10**400}), user="ada", session="s"),
         mka.InvalidArgumentError, "metadata 'year'"),
        (lambda c, e: e.memory.remember(
            mka.NewTurn("x", metadata={"kind": "\ud800"}), user="ada", session="s"),
         mka.InvalidArgumentError, "surrogates"),
        (lambda c, e: e.memory.remember(42, user="ada", session="s"),
         TypeError, "turns: int, expected str, NewTurn or a sequence of them"),
        (lambda c, e: e.memory.remember({"role": "user"}, user="ada", session="s"),
         TypeError, "turns: dict, expected str"),
        (lambda c, e: e.memory.remember(["x", None], user="ada", session="s"),
         TypeError, r"turns\[1\]: NoneType, expected str or NewTurn"),
        (lambda c, e: c.append([{"content": "x"}]),
         TypeError, r"turns\[0\]: dict, expected str or NewTurn"),
        (lambda c, e: c.append(mka.NewTurn(b"x")), TypeError, r"turns\[0\].text: bytes, expected str"),
        (lambda c, e: e.memory.replace(0, ["x"], user="ada", session="s"),
         TypeError, "new: list, expected str or NewTurn"),
        (lambda c, e: e.memory.replace(0, [], user="ada", session="s"),
         TypeError, "new: list, expected str or NewTurn"),
        (lambda c, e: e.memory.forget(user="ada", session="s", turn=b"\0\1"),
         TypeError, "turn: bytes, expected int or a sequence of them"),
        (lambda c, e: e.memory.forget(user="ada", session="s", turn="01"),
         TypeError, "turn: str, expected int or a sequence of them"),
    ],
)  # fmt: skip
def test_errors_have_their_kind_and_name_what_they_saw(
    store: Path, tiny_model: Path, call: object, error: type[Exception], words: str
) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        with pytest.raises(error, match=words):
            call(chat, engine)  # type: ignore[operator]
        chat.send("hello", max_new_tokens=2).text()


def test_a_call_that_is_refused_on_its_way_in_holds_nothing(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine:
        chat = engine.session(user="ada", session="trip")
        for refused in (
            lambda: chat.send("\ud800"),
            lambda: chat.send("x", temperature=1e300),
            lambda: chat.append(mka.NewTurn("x", source="\ud800")),
            lambda: chat.context("\ud800", budget_tokens=9),
        ):
            with pytest.raises(mka.InvalidArgumentError):
                refused()
        del chat
        gc.collect()
        engine.session(user="ada", session="trip").close()


def test_opening_fails_with_kinds(store: Path, tmp_path: Path) -> None:
    with mka.open_sync(store):
        with pytest.raises(mka.LockedError, match=str(os.getpid())):
            mka.open_sync(store)
    with pytest.raises(mka.NotFoundError, match="none.gguf"):
        mka.open_sync(store, model=tmp_path / "none.gguf")
    with pytest.raises(mka.InvalidArgumentError, match="device"):
        mka.open_sync(store, device="abacus")
    with pytest.raises(mka.InvalidArgumentError, match="embedder"):
        mka.open_sync(store, embedder="word2vec")  # type: ignore[typeddict-item]
    with pytest.raises(mka.InvalidArgumentError, match="embedder_precision"):
        mka.open_sync(store, embedder_precision="int3")  # type: ignore[typeddict-item]
    with pytest.raises(mka.InvalidArgumentError, match="window_tokens"):
        mka.open_sync(store, window_tokens=1)
    assert issubclass(mka.NotFoundError, LookupError) and issubclass(mka.LockedError, mka.Error)


def test_a_closed_engine_says_so_and_its_folder_is_free(store: Path, tiny_model: Path) -> None:
    for _ in range(5):
        engine = opened(store, tiny_model)
        chat = engine.session(user="ada", session="trip")
        events = chat.send("tell me", max_new_tokens=100_000)
        next(events)
        engine.close()
        engine.close()
        with pytest.raises(mka.InvalidArgumentError, match="closed"):
            engine.memory.recall("x", user="ada")
        with pytest.raises(mka.InvalidArgumentError, match="closed"):
            chat.send("x")


def test_memory_remembers_recalls_forgets_and_verifies(store: Path) -> None:
    now = datetime.now(timezone.utc)
    with mka.open_sync(store) as engine:
        memory = engine.memory
        memory.remember("The hotel is the Sakura Inn.", user="ada", session="trip")
        committed = memory.remember(
            [
                mka.NewTurn("The passport number is X1234567.", time=now - timedelta(days=400)),
                mka.NewTurn("The train leaves at 9:14.", role="document", source="plan.txt"),
            ],
            user="ada",
            session="trip",
            agent="planner",
        )
        assert committed.turns == (0, 1) and committed.chunks_added == 2
        texts = ["The plums are ripe.", mka.NewTurn("The goats are in the field.")]
        assert memory.remember(texts, user="cleo", session="farm").turns == (0, 1)
        assert [turn.role for turn in memory.turns(user="cleo", session="farm")] == ["user", "user"]
        memory.forget(user="cleo", everything=True)
        hits = memory.recall("which hotel", user="ada", k=1)
        assert hits[0].text == "The hotel is the Sakura Inn." and hits[0].score > 0
        assert abs(hits[0].source.time - now) < timedelta(minutes=5)
        recent = memory.recall("passport", user="ada", since=now - timedelta(days=1))
        assert recent and not any("passport" in hit.text for hit in recent)
        assert memory.recall("hotel", user="bob") == []
        assert [hit.source.name for hit in memory.recall("train", user="ada", roles=["document"])] == [
            "plan.txt"
        ]
        receipt = memory.forget(user="ada", matching="passport")
        assert receipt.turns == 1
        memory.verify(pickle.loads(pickle.dumps(receipt)))
        memory.verify(receipt.record)
        with pytest.raises(mka.InvalidArgumentError, match="record is no receipt"):
            memory.verify("nothing")
        with pytest.raises(TypeError, match="verify: bytes, expected a Receipt or its record"):
            memory.verify(receipt.record.encode())  # type: ignore[arg-type]
        assert not any("X1234567" in chunk.text for chunk in memory.chunks(user="ada"))
        names = [(info.scope.agent, info.scope.session) for info in memory.sessions(user="ada")]
        assert sorted(names, key=str) == sorted([("planner", "trip"), (None, "trip")], key=str)
        with engine.session(user="ada", session="trip") as chat:
            context = chat.context("hotel", budget_tokens=100)
            assert "Sakura" in context.text and context.tokens <= 100 and context.hits
        memory.forget(user="ada", everything=True)
        assert memory.sessions(user="ada") == []
        assert memory.stats().chunks == 0


def test_vectors_are_unit_rows_over_the_librarys_bytes(store: Path) -> None:
    import numpy

    with mka.open_sync(store) as engine:
        rows = engine.memory.embed(["a cat", "a dog", "a cat"])
        assert rows.shape[0] == 3 and rows.dtype == numpy.float32
        assert numpy.allclose(numpy.linalg.norm(rows, axis=1), 1, atol=1e-4)
        assert (rows[0] == rows[2]).all() and rows[0] @ rows[1] < 0.99
        assert not rows.flags.owndata and not rows.flags.writeable
        assert engine.memory.embed([]).size == 0


def test_vectors_without_numpy_name_the_extra(
    store: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        with pytest.raises(ImportError, match=r"embed: .*pip install 'mka\[numpy\]'") as error:
            engine.memory.embed(["a cat"])
        assert error.value.name == "numpy"
        with pytest.raises(ImportError, match=r"peek_logits: .*pip install 'mka\[numpy\]'"):
            chat.peek_logits("a cat")


def test_a_finding_names_its_turn_by_its_place_in_the_call(store: Path) -> None:
    with mka.open_sync(store) as engine:
        for first in (0, 2):
            turns = ["The plums are ripe.", "Write to ada@example.org."]
            committed = engine.memory.remember(turns, user="ada", session="farm")
            (finding,) = committed.findings
            assert finding.turn == 1 and committed.turns[finding.turn] == first + 1
            assert turns[1][finding.start : finding.end] == "ada@example.org"


def test_times_are_moments_with_a_zone(store: Path) -> None:
    said = datetime(2026, 3, 1, 12, tzinfo=timezone.utc)
    until = said + timedelta(days=36_500)
    with mka.open_sync(store) as engine:
        memory = engine.memory
        began = datetime.now(timezone.utc) - timedelta(milliseconds=1)
        turns = [
            mka.NewTurn("The plums are ripe.", time=said, expires=until),
            # A time of 0 is no time: it was said now.
            mka.NewTurn("The goats are out.", time=0),
        ]
        memory.remember(turns, user="ada", session="farm")
        first, second = memory.turns(user="ada", session="farm")
        assert (first.time, first.expires) == (said, until)
        assert second.expires is None and began <= second.time <= datetime.now(timezone.utc)
        source = memory.recall("plums", user="ada", k=1)[0].source
        assert (source.time, source.expires) == (said, until)
        (info,) = memory.sessions(user="ada")
        assert info.last_time == second.time
        assert dataclasses.replace(info, last_time_ms=None).last_time is None


def test_times_that_no_datetime_reaches_are_its_first_and_its_last(store: Path) -> None:
    first, last = (end.replace(tzinfo=timezone.utc) for end in (datetime.min, datetime.max))
    far = 1 << 60
    with mka.open_sync(store) as engine:
        turns = [mka.NewTurn("The plums are ripe.", time=-far, expires=far)]
        engine.memory.remember(turns, user="ada", session="farm")
        (turn,) = engine.memory.turns(user="ada", session="farm")
        assert (turn.time_ms, turn.time, turn.expires_ms, turn.expires) == (-far, first, far, last)
        source = engine.memory.recall("plums", user="ada", k=1)[0].source
        assert (source.time, source.expires) == (first, last)


def test_eight_threads_on_one_engine_lose_no_turn(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine:
        failures: list[BaseException] = []

        def work(number: int) -> None:
            try:
                with engine.session(user="ada", session=f"s{number}") as chat:
                    for turn in range(3):
                        chat.send(f"turn {turn}", max_new_tokens=4, recall_k=2).text()
                        engine.memory.recall("turn", user="ada")
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert not failures and not any(thread.is_alive() for thread in threads)
        said = [
            turn.text
            for info in engine.memory.sessions(user="ada")
            for turn in engine.memory.turns(user="ada", session=str(info.scope.session))
            if turn.role == "user"
        ]
        assert sorted(said) == sorted(f"turn {turn}" for turn in range(3) for _ in range(8))


def test_hits_come_in_one_piece_and_are_those_of_the_plain_call(store: Path) -> None:
    from mka import _convert
    from mka._native import mka_bindings as native

    words = ["hotel", "Kyoto", "märz", "宿は", "🐑", "train", "nine", "𝄞"]
    with mka.open_sync(store) as engine:
        for i in range(60):
            text = " ".join(words[(i * k) % len(words)] for k in range(1, 2 + i % 6))
            engine.memory.remember(
                mka.NewTurn(f"{text} {i}", source=f"Dokument é {i}" if i % 3 else None, time=i),
                user="ada",
                session=f"s{i % 4}",
                agent="planer" if i % 5 == 0 else None,
            )
        plain = engine.memory._native
        for query in ("hotel in Kyoto", "märz 🐑", "nothing of it", "宿は"):
            for k in (0, 1, 8, 50):
                hits = engine.memory.recall(query, user="ada", k=k, since=5)
                options = native.RecallOptions(k=k, since_ms=5)
                scope = native.Scope(user="ada", agent=None, session=None)
                expected = _convert.hits(plain.recall_blocking(scope, query, options))
                assert hits == expected and len(hits) <= k
                assert [repr(hit) for hit in hits] == [repr(hit) for hit in expected]
                assert pickle.loads(pickle.dumps(hits)) == hits
                for hit in hits:
                    assert type(hit) is mka.Hit and type(hit.source) is mka.Source
                    with pytest.raises(dataclasses.FrozenInstanceError):
                        hit.text = "other"  # type: ignore[misc]


def test_every_option_means_what_it_does_in_the_plain_call(store: Path) -> None:
    from mka import _convert
    from mka._native import mka_bindings as native

    chance = random.Random(7)
    words = ["hotel", "Kyoto", "märz", "宿は", "🐑", "train", "nine"]
    roles: list[mka.Role] = ["user", "assistant", "document"]
    with mka.open_sync(store) as engine:
        for i in range(40):
            turn = mka.NewTurn(
                " ".join(chance.choices(words, k=6)),
                role=chance.choice(roles),
                time=i,
                expires=i + 30 if i % 5 == 0 else None,
                subject="where" if i % 7 == 0 else None,
                metadata={"kind": i % 3},
            )
            engine.memory.remember(turn, user="ada", session=f"s{i % 2}")
        plain = engine.memory._native
        # Each option of Python's, with what the plain call has for it; all of them are drawn in the end.
        is_one: Any = native.Filter.ONE_OF(key="kind", values=[native.MetadataValue.NUMBER(number=1)])
        choices: list[tuple[mka.RecallOptions, dict[str, object]]] = [
            ({"k": 3}, {"k": 3}),
            ({"before_turn": 9}, {"before_turn": 9}),
            ({"except_turns": (3, 5, 8)}, {"except_turns": [3, 5, 8]}),
            ({"across_sessions": True}, {"across_sessions": True}),
            ({"roles": ["user", "document"]}, {"roles": [native.Role.USER, native.Role.DOCUMENT]}),
            ({"since": 7}, {"since_ms": 7}),
            ({"until": 33}, {"until_ms": 33}),
            ({"as_of": datetime.fromtimestamp(0.031, timezone.utc)}, {"as_of_ms": 31}),
            ({"now": 20}, {"now_ms": 20}),
            ({"stale": True}, {"stale": True}),
            ({"half_life": timedelta(milliseconds=9)}, {"half_life_ms": 9}),
            ({"min_score": 0.3}, {"min_score": 0.3}),
            ({"min_relevance": 0.2}, {"min_relevance": 0.2}),
            ({"filter": {"kind": 1}}, {"filter": is_one}),
            ({"follow_up": False}, {"follow_up": False}),
        ]
        names = {name for given, _ in choices for name in given}
        assert names == set(mka.RecallOptions.__annotations__)
        drawn = [[each] for each in choices] + [chance.sample(choices, 4) for _ in range(60)]
        found = set()
        for each in drawn:
            # An option that is None is left out.
            given: dict[str, Any] = dict.fromkeys(names) if chance.random() < 0.5 else {}
            expected: dict[str, Any] = {}
            for ours, theirs in each:
                given.update(ours)
                expected.update(theirs)
            query = " ".join(chance.choices(words, k=2))
            session = chance.choice([None, "s0"])
            hits = engine.memory.recall(query, user="ada", session=session, **given)
            scope = native.Scope(user="ada", agent=None, session=session)
            answer = plain.recall_blocking(scope, query, native.RecallOptions(**expected))
            assert [repr(hit) for hit in hits] == [repr(hit) for hit in _convert.hits(answer)], given
            found.add(len(hits))
        assert len(found) > 4


def test_other_threads_run_while_the_library_recalls(store: Path) -> None:
    with mka.open_sync(store) as engine:
        turns = [mka.NewTurn(f"Fact {i}: thing {i % 37} is {i * 7}.") for i in range(3000)]
        engine.memory.remember(turns, user="ada", session="facts")
        done, rounds = threading.Event(), 0

        def recall() -> None:
            for i in range(300):
                assert engine.memory.recall(f"thing {i % 37}", user="ada")
            done.set()

        # With so long an interval the interpreter changes hands only where it is let go of.
        interval = sys.getswitchinterval()
        sys.setswitchinterval(10)
        thread = threading.Thread(target=recall)
        try:
            thread.start()
            while not done.is_set():
                rounds += 1
                time.sleep(0)
        finally:
            thread.join()
            sys.setswitchinterval(interval)
        assert rounds > 50


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": -1}, mka.InvalidArgumentError, "k -1"),
        ({"k": 2.5}, TypeError, "k is float"),
        ({"half_life": timedelta(days=-1)}, mka.InvalidArgumentError, "half_life"),
        ({"min_score": "high"}, TypeError, "min_score is str"),
        ({"except_turns": [-1]}, mka.InvalidArgumentError, "except_turns -1"),
        ({"except_turns": ["1"]}, TypeError, "except_turns is str"),
        ({"except_turns": 1}, TypeError, "not iterable"),
        ({"since": 1 << 70}, mka.InvalidArgumentError, "since"),
        ({"nonsense": 1}, TypeError, "unexpected option nonsense"),
        ({"roles": ["nobody"]}, mka.InvalidArgumentError, "role 'nobody'"),
        ({"roles": [1]}, mka.InvalidArgumentError, "role 1"),
        ({"half_life": 1.5}, TypeError, "half_life is float"),
        ({"filter": {"year": {"$above": 1}}}, mka.InvalidArgumentError, r"\$above"),
        ({"filter": {"$nor": []}}, mka.InvalidArgumentError, r"\$nor"),
        ({"filter": {"year": float("nan")}}, mka.InvalidArgumentError, "finite"),
        ({"filter": {"year": None}}, TypeError, "NoneType"),
        ({"filter": {"$or": {}}}, TypeError, "expected a list"),
        ({"filter": ["year"]}, TypeError, "expected a dict"),
    ],
)
def test_a_recall_says_what_is_wrong_with_its_options(
    store: Path, options: dict[str, object], error: type[Exception], words: str
) -> None:
    with mka.open_sync(store) as engine:
        with pytest.raises(error, match=words):
            engine.memory.recall("x", user="ada", **options)  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.memory.recall(42, user="ada")  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            engine.memory.recall("x", user=None)  # type: ignore[arg-type]


def test_metadata_is_kept_and_asked_for(store: Path) -> None:
    with mka.open_sync(store) as engine:
        memory = engine.memory
        marked: list[tuple[str, dict[str, mka.MetadataValue] | None]] = [
            ("The hotel is the Sakura Inn.", {"kind": "place", "year": 2025, "final": True}),
            ("The hotel was the Ritz.", {"kind": "place", "year": 2019, "stars": 4.5}),
            ("The hotel of nobody.", None),
        ]
        turns = [mka.NewTurn(text, metadata=metadata) for text, metadata in marked]
        memory.remember(turns, user="ada", session="trip")
        kept = memory.turns(user="ada", session="trip")
        assert [turn.metadata for turn in kept] == [metadata or {} for _, metadata in marked]
        assert pickle.loads(pickle.dumps(kept)) == kept

        def found(**filter: object) -> str:
            asked: dict[str, object] = {key.replace("S", "$"): value for key, value in filter.items()}
            texts = [hit.text for hit in memory.recall("hotel", user="ada", filter=asked)]
            return "".join("SRN"[n] for n, (text, _) in enumerate(marked) if text in texts)

        assert found() == "SRN"
        assert found(kind="place") == "SR"
        assert found(year={"$gte": 2020}) == found(final=True) == found(year={"$gt": 2019}) == "S"
        assert found(year={"$lt": 2025}) == found(stars={"$lte": 4.5, "$gte": 4}) == "R"
        assert found(year={"$in": [2019, 2025]}) == "SR" and found(year={"$nin": [2025]}) == "RN"
        assert found(kind={"$exists": False}) == found(Snot={"kind": {"$eq": "place"}}) == "N"
        assert found(kind={"$ne": "place"}) == "N"
        assert found(Sor=[{"final": True}, {"stars": {"$exists": True}}]) == "SR"
        assert found(Sand=[{"kind": "place"}, {"year": 2025}]) == "S"
        assert found(kind="place", year=2019) == "R" and found(kind="other") == ""
        best = memory.recall("which hotel is it", user="ada")[0]
        assert 0 < best.relevance <= 1 and 0 < best.why.coverage <= 1
        assert memory.recall("which hotel is it", user="ada", min_relevance=1.1) == []
        beside = {hit.source.turn: hit.source.metadata for hit in memory.recall("hotel", user="ada")}
        assert beside == {n: metadata or {} for n, (_, metadata) in enumerate(marked)}
        assert {type(value) for value in beside[0].values()} == {str, int, bool}
        assert memory.chunks(user="ada")[1].first.metadata == marked[1][1]

        def forgets(filter: mka.Filter) -> int:
            return memory.forget(user="ada", filter=filter).turns

        for which, bare in (
            ("every", {}),
            ("every", {"$and": []}),
            ("every", {"$not": {"$or": []}}),
            ("every", {"kind": {"$nin": []}}),
            ("every", {"$not": {"kind": {"$in": []}}}),
            ("every", {"$or": [{}, {"kind": "place"}]}),
            ("no", {"kind": {"$in": []}}),
        ):
            with pytest.raises(mka.InvalidArgumentError, match=f"got one that accepts {which} turn"):
                forgets(bare)
        assert forgets({"$or": [{"kind": "other"}, {"year": {"$lt": 2019}}]}) == 0
        assert forgets({"year": {"$gt": 2019, "$exists": True}, "kind": {"$in": ["place", True]}}) == 1
        assert forgets({"stars": {"$gte": 4.5}}) == 1
        assert forgets({"$not": {"kind": "place"}}) == 1
        assert found() == ""


def test_turns_are_left_out_of_a_recall_and_say_whether_they_may_be_recalled(store: Path) -> None:
    with mka.open_sync(store) as engine:
        memory = engine.memory
        texts = ["The hotel is the Sakura Inn.", "The hotel is dear.", "The hotel has a pool."]
        turns = [mka.NewTurn(text) for text in texts]
        turns.append(mka.NewTurn("The hotel has mice.", remember=False))
        memory.remember(turns, user="ada", session="trip")
        kept = memory.turns(user="ada", session="trip")
        assert [turn.remember for turn in kept] == [True, True, True, False]

        def found(*turns: int) -> set[int]:
            hits = memory.recall("the hotel", user="ada", session="trip", except_turns=turns)
            return {hit.source.turn for hit in hits}

        assert found() == {0, 1, 2} and found(1) == {0, 2} and found(2, 0) == {1}


def test_two_users_share_nothing(store: Path) -> None:
    with mka.open_sync(store) as engine:
        for user in ("ada", "bob"):
            engine.memory.remember(f"The secret of {user} is {user}-42.", user=user, session="s")
        for user, other in (("ada", "bob"), ("bob", "ada")):
            hits = engine.memory.recall("the secret", user=user)
            assert hits and not any(other in hit.text for hit in hits)


def test_a_store_is_looked_after(store: Path, tmp_path: Path) -> None:
    options: mka.EngineOptions = {
        "backend": "redb",
        "encryption_key": bytes(range(32)),
        "hygiene": {"secrets": "withhold", "near_duplicates": True},
    }
    with mka.open_sync(store, **options) as engine:
        memory = engine.memory
        day = timedelta(days=1)
        monday = datetime(2026, 3, 2, tzinfo=timezone.utc)
        committed = memory.remember(
            [
                mka.NewTurn("I live in Osaka.", time=monday, subject="home"),
                mka.NewTurn("I live in Kyoto.", time=monday + day, subject="home"),
                mka.NewTurn("The market is closed today.", time=monday, expires=monday + day),
                mka.NewTurn("My password: hunter2hunter2", time=monday),
            ],
            user="ada",
            session="trip",
        )
        assert [(each.turn, each.kind) for each in committed.findings] == [(3, "password")]

        def recall(query: str, **options: Unpack[mka.RecallOptions]) -> list[str]:
            return [hit.text for hit in memory.recall(query, user="ada", **options)]

        assert "I live in Osaka." not in recall("where do I live")
        assert "I live in Osaka." in recall("where do I live", as_of=monday)
        both = memory.recall("where do I live", user="ada", stale=True, half_life=day)
        assert {hit.text: hit.stale for hit in both}["I live in Osaka."]
        assert not any("market" in text for text in recall("is the market closed"))
        assert any("market" in text for text in recall("is the market closed", now=monday))
        assert not any("hunter2" in text for text in recall("password"))
        assert memory.forget(user="ada", expired=monday + 2 * day).turns == 1
        assert memory.turns(user="ada", session="trip")[0].subject == "home"
        assert memory.doctor().problems == () and memory.doctor(repair=True).problems == ()
        memory.compact()
        usage = memory.disk_usage()
        # An encrypted store has neither graphs nor images on the disk.
        assert usage.live_bytes > 0 and usage.graph_bytes == usage.image_bytes == 0
        assert memory.export(tmp_path / "log.jsonl").turns == 4
        assert memory.backup(tmp_path / "copy.mka").records > 0
        stats = memory.stats()
        assert stats.encrypted and stats.subjects == 1 and stats.superseded == 1
        assert stats.vectors_unread == stats.vectors_in_graphs == 0 < stats.vectors
        assert memory.sessions(user="ada")[0].num_pages == 0
        with pytest.raises(mka.InvalidArgumentError, match="selectors"):
            memory.forget(user="ada", matching="x", expired=monday)
        with pytest.raises(mka.InvalidArgumentError, match="no user"):
            memory.export(tmp_path / "log2.jsonl", session="trip")
    with mka.open_sync(tmp_path / "copy.mka", **options) as engine:
        assert engine.memory.stats().turns == 4
    with pytest.raises(mka.InvalidArgumentError, match="5 bytes"):
        mka.open_sync(tmp_path / "x.mka", encryption_key=b"short")
    with mka.open_sync(tmp_path / "other.mka") as engine:
        assert engine.memory.import_(tmp_path / "log.jsonl").turns == 4
        assert engine.memory.import_(tmp_path / "log.jsonl").skipped == 4


def test_recall_inside_attention_is_chosen_and_reported(store: Path, tiny_model: Path) -> None:
    options: mka.EngineOptions = {
        "model": tiny_model,
        "window_tokens": 64,
        "block_tokens": 64,
        "device": "cpu",
        "recall": "pages",
        "pages": {
            "tokens": 64,
            "precision": "int8",
            "rule": "mka",
            "first_layer": 0,
            "vote_reach": 8,
            "keep_votes": False,
            "reuse_steps": 2,
            "compact": False,
        },
    }
    with mka.open_sync(store, **options) as engine:
        assert engine.kv_bytes_per_token
        with engine.session(user="ada", session="trip") as chat:
            chat.feed("The sheep went up the hill. " * 20, mode="model").finish()
            _, usage = chat.send("and then?", max_new_tokens=4).text()
            assert usage.pages is not None and usage.pages.stored_tokens > 0
            assert all(0 <= share <= 1 for share in usage.pages.share)
            _, usage = chat.send("and then?", max_new_tokens=2, recall="off").text()
            assert usage.pages is None
            # Read with the window alone, recalled all the same.
            chat.feed("The sheep came down again. " * 20, mode="model", recall="off").finish()
            _, usage = chat.send("and then?", max_new_tokens=4).text()
            assert usage.pages is not None and usage.pages.stored_tokens > 128
            assert engine.memory.sessions(user="ada")[0].num_pages > 0
        with pytest.raises(mka.InvalidArgumentError, match="rule 'best'"):
            mka.open_sync(store, pages={"rule": "best"})  # type: ignore[typeddict-item]


SHARED = """
import sys, mka
with mka.open_sync(sys.argv[1], model=sys.argv[2], tensor_parallel=True, window_tokens=64, quiet=True) as engine:
    chat = engine.session(user="ada", session="trip")
    list(chat.feed("The hotel in Kyoto is near the river. " * 8, mode="model"))
    for message in ["where is the hotel", "and the river"]:
        print(repr("".join(e.text for e in chat.send(message, max_new_tokens=4) if isinstance(e, mka.Token))))
"""


def test_processes_that_share_a_model_have_one_answer(tiny_model: Path, store: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", SHARED, str(store), str(tiny_model)]
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(command, env={**os.environ, **group, "RANK": rank}, stdout=subprocess.PIPE, text=True)
        for rank in ("0", "1")
    ]
    said = [child.communicate(timeout=120)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert said[0] == said[1] and said[0].count("\n") == 2
    assert store.exists() and store.with_name(f"{store.name}.1").exists()
