"""What a token, a recall and a cancel cost from Python: `overhead.py MODEL [TOKENS]` prints microseconds; Rust and Swift have twins."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mka

TOKENS = 2000
FACTS = (8, 500, 10_000)
RUNS, RECALLS = 20, 50
"""A thousand recalls; the least of the runs is what other work on the machine disturbs least."""


def since(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


class Clock:
    """Wall time; CPU time of the process; and of the thread that reads: what Python itself costs, however slow the model is.

    Of a stream it starts with the first token: what a turn costs once is not a token's.
    """

    def __init__(self) -> None:
        self.wall, self.cpu, self.own = time.perf_counter(), time.process_time(), time.thread_time()

    def a_token(self, tokens: int) -> str:
        cpu = (time.process_time() - self.cpu) * 1e6 / tokens
        own = (time.thread_time() - self.own) * 1e6 / tokens
        wall = since(self.wall) / tokens
        return f"{wall:.1f} us a token, {cpu:.1f} of CPU time, {own:.1f} of it Python's, {tokens} tokens"


def blocking(engine: mka.Engine, max_new_tokens: int) -> None:
    with engine.session(user="ada", session="sync") as chat:
        for run in range(3):
            clock, tokens = None, 0
            for event in chat.send("go on", max_new_tokens=max_new_tokens, recall_k=0):
                if clock is None:
                    clock = Clock()
                else:
                    tokens += isinstance(event, mka.Token)
            assert clock is not None
            print(f"sync run {run}: {clock.a_token(tokens)}")
        before = chat.num_turns
        seen = 0
        events = chat.send("tell me a long story", max_new_tokens=max_new_tokens, recall_k=0)
        for event in events:
            seen += isinstance(event, mka.Token)
            if seen == 5:
                break
        start = time.perf_counter()
        events.cancel()
        chosen = chat.generated_tokens
        events.close()
        stopped, after = since(start), chat.generated_tokens
        kept = engine.memory.turns(user="ada", session="sync", start=before + 1)[0].num_tokens
        print(
            f"cancelled at token {seen}: {chosen} chosen then, {after} in all, {kept} kept,"
            f" {stopped:.0f} us to stop"
        )
    for facts in FACTS:
        owner = f"owner of {facts}"
        turns = [
            mka.NewTurn(f"Fact {i}: the number of thing {i % 37} is {i * 7}.") for i in range(facts)
        ]
        engine.memory.remember(turns, user=owner, session="facts")
        least, read = float("inf"), 0.0
        for _ in range(RUNS):
            start = time.perf_counter()
            for i in range(RECALLS):
                # An agent reads text and score of what it is given.
                for hit in engine.memory.recall(f"number of thing {i % 37}", user=owner):
                    read += len(hit.text) + hit.score
            least = min(least, since(start) / RECALLS)
        print(f"sync: {least:.1f} us a recall among {facts} facts, the least of {RUNS} runs of {RECALLS}")


async def asyncio_alone(tokens: int) -> None:
    """What the loop itself takes for a byte of a pipe that wakes a task: no stream can cost less."""
    write = f"import os, time\nfor _ in range({tokens}): time.sleep(0.0005); os.write(1, b'x')"
    with subprocess.Popen([sys.executable, "-c", write], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        descriptor, loop = writer.stdout.fileno(), asyncio.get_running_loop()
        seen, waiting = 0, loop.create_future()

        def readable() -> None:
            nonlocal seen
            seen += len(os.read(descriptor, 1))
            if not waiting.done():
                waiting.set_result(None)

        loop.add_reader(descriptor, readable)
        await waiting  # the interpreter that writes has started
        clock = Clock()
        while seen < tokens:
            waiting = loop.create_future()
            await waiting
        loop.remove_reader(descriptor)
    print(f"asyncio alone: {clock.a_token(tokens - 1)}")


async def waiting(engine: mka.AsyncEngine, max_new_tokens: int) -> None:
    async with engine.session(user="ada", session="async") as chat:
        for run in range(3):
            clock, tokens = None, 0
            async for event in chat.send("go on", max_new_tokens=max_new_tokens, recall_k=0):
                if clock is None:
                    clock = Clock()
                else:
                    tokens += isinstance(event, mka.Token)
            assert clock is not None
            print(f"async run {run}: {clock.a_token(tokens)}")
            await asyncio_alone(tokens)
    for facts in FACTS:
        least, read = float("inf"), 0.0
        for _ in range(RUNS):
            start = time.perf_counter()
            for i in range(RECALLS):
                query, user = f"number of thing {i % 37}", f"owner of {facts}"
                for hit in await engine.memory.recall(query, user=user):
                    read += len(hit.text) + hit.score
            least = min(least, since(start) / RECALLS)
        print(f"async: {least:.1f} us a recall among {facts} facts, the least of {RUNS} runs of {RECALLS}")


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
