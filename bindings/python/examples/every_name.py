"""Every public name of mka at work, as type checkers see it: `every_name.py STORE MODEL`.

mypy --strict and pyright read this file in the tests, which also run it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path


import mka


def describe(source: mka.Source, why: mka.Why, trust: mka.Trust) -> str:
    who: mka.Role = source.role
    return f"{source.name or who} at {source.time:%H:%M}, {trust}, cosine {why.cosine:.2f}"


def kind(error: mka.Error) -> str:
    match error:
        case mka.InvalidArgumentError() | mka.NotFoundError() | mka.LockedError():
            return "mend the call"
        case mka.CorruptedError() | mka.IncompatibleError() | mka.StorageError():
            return "look at the disk"
        case mka.ModelError() | mka.DeviceError() | mka.OutOfMemoryError():
            return "look at the machine"
        case mka.CancelledError():
            return "nothing"
        case mka.InternalError():
            return "report it"
        case _:
            return "read the text"


def show(event: mka.Event) -> str:
    match event:
        case mka.Recalled(hits=hits):
            return f"[{len(hits)} memories]"
        case mka.Token(text=text):
            return text
        case mka.Done(usage=usage):
            return f"[{total(usage)} tokens, {reason(usage.stop)}]"


def attention(usage: mka.Usage) -> str:
    pages: mka.PageUsage | None = usage.pages
    return "no pages" if pages is None else f"{pages.recalled_tokens} tokens recalled"


def total(usage: mka.Usage) -> int:
    return usage.prompt_tokens + usage.generated_tokens


def reason(stop: mka.StopReason) -> str:
    return {"end_of_turn": "ended", "max_tokens": "full", "stop_string": "stopped"}[stop]


def fed(events: Sequence[mka.FeedEvent]) -> int:
    last = events[-1]
    assert isinstance(last, mka.Fed) and isinstance(events[0], mka.Progress)
    return last.bytes


def found(finding: mka.Finding) -> str:
    kind: mka.Sensitive = finding.kind
    return f"{kind} at {finding.start}"


def look_after(memory: mka.Memory, folder: Path) -> None:
    checkup: mka.Checkup = memory.doctor()
    for problem in checkup.problems:
        wrong: mka.Problem = problem
        repair: mka.Repair = wrong.repair
        print(wrong.what, repair)
    exported: mka.Exported = memory.export(folder / "log.jsonl", user="ada")
    imported: mka.Imported = memory.import_(folder / "log.jsonl")
    backup: mka.Backup = memory.backup(folder / "copy.mka")
    memory.compact()
    usage: mka.DiskUsage = memory.disk_usage()
    print(exported.turns, imported.skipped, backup.records, usage.live_bytes > 0)


def blocking(store: mka.Path, options: mka.EngineOptions, when: mka.Time) -> None:
    engine: mka.Engine
    with mka.open_sync(store, **options) as engine:
        memory: mka.Memory = engine.memory
        year: mka.MetadataValue = 2025
        turn = mka.NewTurn("The hotel is in Kyoto.", time=when, metadata={"year": year})
        committed: mka.Committed = memory.remember(turn, user="ada", session="plans")
        print(committed.turns, engine.device, mka.available_devices())
        print([found(each) for each in committed.findings])
        chat: mka.Session
        with engine.session(user="ada", session="trip") as chat:
            sending: mka.SendOptions = {
                "max_new_tokens": 4,
                "across_sessions": True,
                "metadata": {"kind": "chat", "year": year},
                "recall_filter": {"kind": {"$ne": "draft"}},
            }
            events: mka.Events = chat.send("Where is the hotel?", **sending)
            for event in events:
                print(show(event), end="")
            result: mka.ToolResult = mka.ToolResult("It is 9:14.", name="now")
            said, _ = chat.send_tool([result, "It rains."], max_new_tokens=4).text()
            calls: list[mka.ToolCall] = mka.tool_calls(said)
            print([(call.name, call.arguments) for call in calls])
            schema = {"type": "object", "properties": {"city": {"type": "string"}}}
            grammars: list[mka.Grammar] = [
                mka.JsonObject(),
                mka.JsonSchema(schema),
                mka.Regex("[a-z]+"),
                mka.Lark('start: "yes" | "no"'),
            ]
            for grammar in grammars:
                print(chat.send("And then?", grammar=grammar, max_new_tokens=4).text()[0])
            feeding: mka.FeedOptions = {
                "name": "hill.txt",
                "metadata": {"kind": "page"},
                "system": "Be brief.",
            }
            feed: mka.Feed = chat.feed("The sheep went up the hill. " * 200, **feeding)
            print(fed(list(feed)))
            context: mka.Context = chat.context("hotel", budget_tokens=200)
            fork: mka.Session
            with chat.fork("another trip") as fork:
                fork.rewind(1)
            chat.rewind(chat.num_turns)
            scope: mka.Scope = chat.scope
            print(context.tokens, scope.session)
        since_2024: mka.Filter = {"year": {"$gte": 2024}}
        recalling: mka.RecallOptions = {"k": 2, "since": when, "filter": since_2024}
        hits: list[mka.Hit] = memory.recall("hotel", user="ada", **recalling)
        print(describe(hits[0].source, hits[0].why, hits[0].trust))
        assembled: mka.Context = memory.context("hotel", user="ada", budget_tokens=200, **recalling)
        print(assembled.tokens, memory.embed(["hotel"]).shape)
        memory.replace(committed.turns[0], "The hotel is in Nara.", user="ada", session="plans")
        chunks: list[mka.Chunk] = memory.chunks(user="ada")
        marked: list[mka.Chunk] = memory.chunks(user="ada", filter=since_2024)
        users: list[str] = memory.users()
        turns: list[mka.Turn] = memory.turns(user="ada", session="plans")
        sessions: list[mka.SessionInfo] = memory.sessions(user="ada")
        stats: mka.Stats = memory.stats()
        look_after(memory, Path(store).parent)
        print(len(chunks), len(marked), users, len(turns), len(sessions), stats.chunks)
        receipt: mka.Receipt = memory.forget(user="ada", matching="hotel")
        memory.verify(receipt)
        memory.forget(user="ada", session="plans", turn=[*committed.turns])


async def waiting(store: mka.Path, options: mka.EngineOptions) -> None:
    opening: mka.Opening[mka.AsyncEngine] = mka.open(store, **options)
    async with opening as engine:
        memory: mka.AsyncMemory = engine.memory
        await memory.remember("The train leaves at 9:14.", user="ada", session="plans")
        chat: mka.AsyncSession
        async with engine.session(user="ada", session="trip") as chat:
            events: mka.AsyncEvents = chat.send("When?", max_new_tokens=4)
            answer, usage = await events.text()
            answer_turn: int | None = usage.answer_turn
            print(answer, answer_turn, usage.stream_tokens, attention(usage))
            await chat.send_tool("The train is late.", max_new_tokens=4).text()
            feed: mka.AsyncFeed = chat.feed("The goats too. " * 20)
            print((await feed.finish()).bytes)
            async with chat.fork("a third trip") as fork:
                print(fork.num_turns)
        twin: mka.Engine = engine.blocking
        same: mka.AsyncEngine = twin.asyncio
        print(twin.device, same.model_name)


def main() -> None:
    store, model = Path(sys.argv[1]), Path(sys.argv[2])
    logging.basicConfig(level=logging.INFO)
    mka.log_to_logging(logging.INFO)
    recall: mka.RecallPolicy = "both"
    pages: mka.PageOptions = {"tokens": 64, "precision": "bf16"}
    secrets: mka.Policy = "withhold"
    hygiene: mka.HygieneOptions = {"secrets": secrets}
    options: mka.EngineOptions = {
        "model": model,
        "window_tokens": 64,
        "device": "cpu",
        "recall": recall,
        "pages": pages,
        "hygiene": hygiene,
    }
    try:
        blocking(store, options, when=1_700_000_000_000)
        asyncio.run(waiting(store, options))
    except mka.Error as error:
        print(kind(error))
        raise
    finally:
        mka.stop_logging()


if __name__ == "__main__":
    main()
