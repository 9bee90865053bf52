"""Long-context memory for local language models: sessions that never run out of context.

`open` (asyncio) and `open_sync` (blocking) open a memory folder; an engine gives sessions, which stream answers, and
memory, which remembers, recalls and forgets. Results are plain frozen values; errors are exceptions of one hierarchy,
under `Error`.

```python
async with mka.open("agent.mka", model="HuggingFaceTB/SmolLM2-135M-Instruct") as engine:
    async with engine.session(user="ada", session="trip") as chat:
        async for event in chat.send("What did we decide about Kyoto?"):
            if isinstance(event, mka.Token):
                print(event.text, end="", flush=True)
    hits = await engine.memory.recall("hotel in Kyoto", user="ada", k=8)
```
"""

from typing import TYPE_CHECKING

from mka import _calls
from mka._errors import (
    CancelledError,
    CorruptedError,
    DeviceError,
    Error,
    IncompatibleError,
    InternalError,
    InvalidArgumentError,
    LockedError,
    ModelError,
    NotFoundError,
    OutOfMemoryError,
    StorageError,
)
from mka._filter import Filter
from mka._grammar import Grammar, JsonObject, JsonSchema, Lark, Regex
from mka._native import mka_bindings as _native
from mka._options import (
    EngineOptions,
    FeedOptions,
    HygieneOptions,
    PageOptions,
    Path,
    Policy,
    RecallOptions,
    RecallPolicy,
    SendOptions,
    Time,
)
from mka._streams import Events, Feed
from mka._sync import Engine, Memory, Session, open_sync
from mka._values import (
    Backup,
    Checkup,
    Chunk,
    Committed,
    Context,
    DiskUsage,
    Done,
    Event,
    Exported,
    Fed,
    FeedEvent,
    Finding,
    Hit,
    Imported,
    MetadataValue,
    NewTurn,
    PageUsage,
    Problem,
    Progress,
    Recalled,
    Receipt,
    Repair,
    Role,
    Scope,
    Sensitive,
    SessionInfo,
    Source,
    Stats,
    StopReason,
    Token,
    ToolCall,
    ToolResult,
    Trust,
    Turn,
    Usage,
    Why,
)

if TYPE_CHECKING:
    from mka._aio import AsyncEngine, AsyncMemory, AsyncSession, Opening, open
    from mka._aio_streams import AsyncEvents, AsyncFeed
    from mka._logging import log_to_logging, stop_logging
else:
    # What needs asyncio or logging is imported when it is asked for: asyncio takes half as long as all else here.
    _LATER = dict.fromkeys(("AsyncEngine", "AsyncMemory", "AsyncSession", "Opening", "open"), "_aio")
    _LATER |= dict.fromkeys(("AsyncEvents", "AsyncFeed"), "_aio_streams")
    _LATER |= dict.fromkeys(("log_to_logging", "stop_logging"), "_logging")

    def __getattr__(name: str) -> object:
        home = _LATER.get(name)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        value = getattr(import_module(f"{__name__}.{home}"), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LATER})


__version__: str = _native.version()


def available_devices() -> list[str]:
    """Names of the devices that this build can use here, the fastest last."""
    return list(_native.available_devices())


def tool_calls(answer: str) -> list[ToolCall]:
    """The calls of tools in the text of an answer, in the order in which they stand there.

    Read is what models write: JSON between `<tool_call>` tags (Hermes, Qwen), a list behind `[TOOL_CALLS]` or alone
    (Mistral), an object as the whole answer (Llama 3). What is malformed is no call.
    """
    return [ToolCall(call.name, call.arguments) for call in _calls.now(_native, "tool_calls", answer)]


__all__ = [
    "AsyncEngine",
    "AsyncEvents",
    "AsyncFeed",
    "AsyncMemory",
    "AsyncSession",
    "Backup",
    "CancelledError",
    "Checkup",
    "Chunk",
    "Committed",
    "Context",
    "CorruptedError",
    "DeviceError",
    "DiskUsage",
    "Done",
    "Engine",
    "EngineOptions",
    "Error",
    "Event",
    "Events",
    "Exported",
    "Fed",
    "Feed",
    "FeedEvent",
    "FeedOptions",
    "Filter",
    "Finding",
    "Grammar",
    "Hit",
    "HygieneOptions",
    "Imported",
    "IncompatibleError",
    "InternalError",
    "InvalidArgumentError",
    "JsonObject",
    "JsonSchema",
    "Lark",
    "LockedError",
    "Memory",
    "MetadataValue",
    "ModelError",
    "NewTurn",
    "NotFoundError",
    "Opening",
    "OutOfMemoryError",
    "PageOptions",
    "PageUsage",
    "Path",
    "Policy",
    "Problem",
    "Progress",
    "RecallOptions",
    "RecallPolicy",
    "Recalled",
    "Receipt",
    "Regex",
    "Repair",
    "Role",
    "Scope",
    "SendOptions",
    "Sensitive",
    "Session",
    "SessionInfo",
    "Source",
    "Stats",
    "StopReason",
    "StorageError",
    "Time",
    "Token",
    "ToolCall",
    "ToolResult",
    "Trust",
    "Turn",
    "Usage",
    "Why",
    "available_devices",
    "log_to_logging",
    "open",
    "open_sync",
    "stop_logging",
    "tool_calls",
]
