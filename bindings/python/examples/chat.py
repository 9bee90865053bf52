"""A chat that remembers: interactive, or one message with `--prompt`."""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from contextlib import suppress

import mka


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", help="one message; without it, messages come from the terminal")
    parser.add_argument("--store", default="chat.mka", help="memory folder, created if missing")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--window", type=int, default=2048, help="tokens attended exactly")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    return parser.parse_args()


async def answer(chat: mka.AsyncSession, message: str, max_new_tokens: int) -> None:
    async for event in chat.send(message, max_new_tokens=max_new_tokens):
        match event:
            case mka.Recalled(hits=hits):
                print(f"({len(hits)} memories)", file=sys.stderr)
            case mka.Token(text=text):
                print(text, end="", flush=True)
            case mka.Done():
                print()


def lines() -> asyncio.Queue[str]:
    """What the terminal says, line by line, and an empty text at its end; Ctrl-C does not wait for the thread."""
    loop = asyncio.get_running_loop()
    said: asyncio.Queue[str] = asyncio.Queue()

    def read() -> None:
        for line in iter(sys.stdin.readline, ""):
            loop.call_soon_threadsafe(said.put_nowait, line)
        loop.call_soon_threadsafe(said.put_nowait, "")

    threading.Thread(target=read, daemon=True).start()
    return said


async def main() -> None:
    args = arguments()
    async with (
        mka.open(args.store, model=args.model, window_tokens=args.window) as engine,
        engine.session(user="me", session="chat") as chat,
    ):
        if args.prompt is not None:
            await answer(chat, args.prompt, args.max_new_tokens)
            return
        said = lines()
        while line := await said.get():
            if not line.strip():
                continue
            try:
                await answer(chat, line.strip(), args.max_new_tokens)
            except mka.Error as error:
                print(f"error: {error}", file=sys.stderr)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
