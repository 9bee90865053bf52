"""What a token, a recall and a cancel cost from Python: `overhead.py MODEL [TOKENS]` prints microseconds; Rust and Swift have twins."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import mka

TOKENS = 2000
FACTS = 500
RUNS, RECALLS = 20, 50
"""A thousand recalls; the least of the runs is what other work on the machine disturbs least."""


def since(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


def a_token(start: float, own_start: float, tokens: int) -> str:
    """Wall time, and the time of the thread that reads: what Python itself costs, however slow the model is."""
    own = (time.thread_time() - own_start) * 1e6 / tokens
    return f"{since(start) / tokens:.1f} us a token, {own:.1f} of them Python's, {tokens} tokens"


def blocking(engine: mka.Engine, max_new_tokens: int) -> None:
    with engine.session(user="ada", session="sync") as chat:
        for run in range(3):
            start, own = time.perf_counter(), time.thread_time()
            tokens = sum(
                isinstance(event, mka.Token)
                for event in chat.send("go on", max_new_tokens=max_new_tokens, recall_k=0)
            )
            print(f"sync run {run}: {a_token(start, own, tokens)}")
        before = chat.num_turns
        seen = 0
        start = time.perf_counter()
        with chat.send("tell me a long story", max_new_tokens=max_new_tokens, recall_k=0) as events:
            for event in events:
                seen += isinstance(event, mka.Token)
                if seen == 5:
                    start = time.perf_counter()
                    break
        stopped = since(start)
        answer = engine.memory.turns(user="ada", session="sync", start=before + 1)[0]
        print(f"cancelled at token {seen}: {answer.num_tokens} tokens kept, {stopped:.0f} us to stop")
    engine.memory.remember(
        [mka.NewTurn(f"Fact {i}: the number of thing {i % 37} is {i * 7}.") for i in range(FACTS)],
        user="bob",
        session="facts",
    )
    least = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for i in range(RECALLS):
            engine.memory.recall(f"number of thing {i % 37}", user="bob")
        least = min(least, since(start) / RECALLS)
    print(f"sync: {least:.1f} us a recall, the least of {RUNS} runs of {RECALLS}")


async def waiting(engine: mka.AsyncEngine, max_new_tokens: int) -> None:
    async with engine.session(user="ada", session="async") as chat:
        for run in range(3):
            start, own = time.perf_counter(), time.thread_time()
            tokens = 0
            async for event in chat.send("go on", max_new_tokens=max_new_tokens, recall_k=0):
                tokens += isinstance(event, mka.Token)
            print(f"async run {run}: {a_token(start, own, tokens)}")
    least = float("inf")
    for _ in range(RUNS):
        start = time.perf_counter()
        for i in range(RECALLS):
            await engine.memory.recall(f"number of thing {i % 37}", user="bob")
        least = min(least, since(start) / RECALLS)
    print(f"async: {least:.1f} us a recall, the least of {RUNS} runs of {RECALLS}")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, model = Path(folder) / "store.mka", Path(sys.argv[1])
        tokens = int(sys.argv[2]) if len(sys.argv) > 2 else TOKENS
        with mka.open_sync(store, model=model, window_tokens=128, device="cpu") as engine:
            blocking(engine, tokens)
        async with mka.open(store, model=model, window_tokens=128, device="cpu") as opened:
            await waiting(opened, tokens)


if __name__ == "__main__":
    asyncio.run(main())
