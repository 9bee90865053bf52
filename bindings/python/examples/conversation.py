"""One scripted conversation from Python; its twin in Rust prints the same bytes.

`conversation.py STORE MODEL SCRIPT FROM TO` runs steps FROM to before TO of SCRIPT and prints a line an event.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mka

START_MS = 1_700_000_000_000
"""The first step's time; each is a second later. Milliseconds since 1970."""


def show(event: mka.Event) -> None:
    match event:
        case mka.Recalled(hits=hits):
            for hit in hits:
                print("hit", hit.chunk, hit.source.session, hit.source.turn)
        case mka.Token(text=text):
            print("token", text.encode().hex())
        case mka.Done(usage=usage):
            print(
                "done",
                usage.prompt_tokens,
                usage.reused_tokens,
                usage.recalled_tokens,
                usage.generated_tokens,
                usage.stream_tokens,
                usage.stop,
            )


def main() -> None:
    store, model, script, start, end = sys.argv[1:]
    steps = json.loads(Path(script).read_text())
    with (
        mka.open_sync(
            store, model=model, window_tokens=128, block_tokens=64, device="cpu"
        ) as engine,
        engine.session(user="ada", session="trip") as chat,
    ):
        for i in range(int(start), min(int(end), len(steps))):
            print("step", i)
            step = steps[i]
            time = START_MS + 1000 * i
            if "remember" in step:
                turn = mka.NewTurn(step["remember"], time=time)
                done = engine.memory.remember(turn, user="ada", session="facts")
                print("remembered", done.chunks_added)
            elif "feed" in step:
                text = step["feed"] * step["times"]
                fed = chat.feed(text, mode=step["mode"], time=time).finish()
                print("fed", fed.bytes, fed.model_tokens, fed.chunks_added, fed.chunks_deduplicated)
            else:
                options: mka.SendOptions = {
                    "max_new_tokens": step["max_new_tokens"],
                    "across_sessions": step.get("across_sessions", False),
                    "temperature": step.get("temperature", 0.0),
                    "seed": step.get("seed", 0),
                    "time": time,
                }
                if "send" in step:
                    events = chat.send(step["send"], **options)
                else:
                    events = chat.regenerate(**options)
                for event in events:
                    show(event)


if __name__ == "__main__":
    main()
