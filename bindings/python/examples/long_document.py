"""Feeds a text of any length, closes, and asks about it in the same or another process."""

from __future__ import annotations

import argparse
from pathlib import Path

import mka


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="text file to feed")
    parser.add_argument("--ask", action="append", default=[], help="question; may be given often")
    parser.add_argument("--store", default="document.mka", help="memory folder, created if missing")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--window", type=int, default=2048, help="tokens attended exactly")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    return parser.parse_args()


def bar(progress: mka.Progress) -> None:
    share = progress.fed_bytes / progress.total_bytes
    print(f"\r{share:4.0%}", end="", flush=True)


def main() -> None:
    args = arguments()
    with mka.open_sync(args.store, model=args.model, window_tokens=args.window) as engine:
        if args.text is not None:
            # Bytes that are no UTF-8 are replaced: a document is data from outside.
            text = args.text.read_text(encoding="utf-8", errors="replace")
            with engine.session(user="reader", session="document") as chat:
                fed = chat.feed(text, name=args.text.name).finish(bar)
            print(
                f"\rfed {fed.bytes} bytes: {fed.model_tokens} tokens read, {fed.chunks_added} chunks"
            )
        # A new handle: everything below comes from disk.
        with engine.session(user="reader", session="document") as chat:
            for question in args.ask:
                print("?", question)
                answer, _ = chat.send(question, max_new_tokens=args.max_new_tokens).text()
                print(answer)


if __name__ == "__main__":
    main()
