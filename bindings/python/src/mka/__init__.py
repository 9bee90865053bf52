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

from mka._aio import AsyncEngine, AsyncMemory, AsyncSession, Opening, open
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
from mka._logging import log_to_logging, stop_logging
from mka._native import mka_bindings as _native
from mka._options import EngineOptions, FeedOptions, Path, RecallOptions, SendOptions, Time
from mka._streams import AsyncEvents, AsyncFeed, Events, Feed
from mka._sync import Engine, Memory, Session, open_sync
from mka._values import (
    Chunk,
    Committed,
    Context,
    Done,
    Event,
    Fed,
    FeedEvent,
    Hit,
    NewTurn,
    Progress,
    Recalled,
    Receipt,
    Role,
    Scope,
    SessionInfo,
    Source,
    Stats,
    StopReason,
    Token,
    Trust,
    Turn,
    Usage,
    Why,
)

__version__: str = _native.version()


def available_devices() -> list[str]:
    """Names of the devices that this build can use here, the fastest last."""
    return list(_native.available_devices())


__all__ = [
    "AsyncEngine",
    "AsyncEvents",
    "AsyncFeed",
    "AsyncMemory",
    "AsyncSession",
    "CancelledError",
    "Chunk",
    "Committed",
    "Context",
    "CorruptedError",
    "DeviceError",
    "Done",
    "Engine",
    "EngineOptions",
    "Error",
    "Event",
    "Events",
    "Fed",
    "Feed",
    "FeedEvent",
    "FeedOptions",
    "Hit",
    "IncompatibleError",
    "InternalError",
    "InvalidArgumentError",
    "LockedError",
    "Memory",
    "ModelError",
    "NewTurn",
    "NotFoundError",
    "Opening",
    "OutOfMemoryError",
    "Path",
    "Progress",
    "RecallOptions",
    "Recalled",
    "Receipt",
    "Role",
    "Scope",
    "SendOptions",
    "Session",
    "SessionInfo",
    "Source",
    "Stats",
    "StopReason",
    "StorageError",
    "Time",
    "Token",
    "Trust",
    "Turn",
    "Usage",
    "Why",
    "available_devices",
    "log_to_logging",
    "open",
    "open_sync",
    "stop_logging",
]
