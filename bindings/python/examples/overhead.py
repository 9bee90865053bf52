"""What a token and a recall cost from Python: `overhead.py MODEL` prints microseconds; Rust has a twin."""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path

import mka

TOKENS = 2000
FACTS = 500
RECALLS = 1000


def since(start: float) -> float:
    return (time.perf_counter() - start) * 1e6


def blocking(engine: mka.Engine) -> None:
    with engine.session(user="ada", session="sync") as chat:
        for run in range(3):
            start = time.perf_counter()
            tokens = sum(
                isinstance(event, mka.Token)
                for event in chat.send("go on", max_new_tokens=TOKENS, recall_k=0)
            )
            print(f"sync run {run}: {since(start) / tokens:.1f} us a token, {tokens} tokens")
    engine.memory.remember(
        [mka.NewTurn(f"Fact {i}: the number of thing {i % 37} is {i * 7}.") for i in range(FACTS)],
        user="bob",
        session="facts",
    )
    for run in range(3):
        start = time.perf_counter()
        for i in range(RECALLS):
            engine.memory.recall(f"number of thing {i % 37}", user="bob")
        print(f"sync run {run}: {since(start) / RECALLS:.1f} us a recall")


async def waiting(engine: mka.AsyncEngine) -> None:
    async with engine.session(user="ada", session="async") as chat:
        for run in range(3):
            start = time.perf_counter()
            tokens = 0
            async for event in chat.send("go on", max_new_tokens=TOKENS, recall_k=0):
                tokens += isinstance(event, mka.Token)
            print(f"async run {run}: {since(start) / tokens:.1f} us a token, {tokens} tokens")
    for run in range(3):
        start = time.perf_counter()
        for i in range(RECALLS):
            await engine.memory.recall(f"number of thing {i % 37}", user="bob")
        print(f"async run {run}: {since(start) / RECALLS:.1f} us a recall")


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, model = Path(folder) / "store.mka", Path(sys.argv[1])
        with mka.open_sync(store, model=model, window_tokens=128, device="cpu") as engine:
            blocking(engine)
        async with mka.open(store, model=model, window_tokens=128, device="cpu") as opened:
            await waiting(opened)


if __name__ == "__main__":
    asyncio.run(main())
