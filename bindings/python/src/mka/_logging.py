"""What the library logs, in Python's `logging`.

Knows no handler; loggers are named like the library's modules, `mka.session` for `mka::session` and
`mka.memory.store` for `mka_memory::store`.
"""

from __future__ import annotations

import logging
from typing import Any

from mka._errors import translated
from mka._native import mka_bindings as _native

_LEVELS: dict[Any, int] = {
    _native.LogLevel.ERROR: logging.ERROR,
    _native.LogLevel.WARN: logging.WARNING,
    _native.LogLevel.INFO: logging.INFO,
    _native.LogLevel.DEBUG: logging.DEBUG,
    _native.LogLevel.TRACE: logging.DEBUG - 5,
}


def _logger(target: str) -> logging.Logger:
    crate, *modules = target.split("::")
    # Every crate of the library comes under `mka`.
    return logging.getLogger(".".join([crate.replace("mka_", "mka.", 1), *modules]))


class _Sink(_native.LogSink):
    def log(self, level: Any, target: str, message: str) -> None:
        _logger(target).log(_LEVELS[level], "%s", message)


def log_to_logging(level: int = logging.INFO) -> None:
    """Sends what the library logs at `level` and above to the logger `mka` and those below it."""
    wanted = [native for native, number in _LEVELS.items() if number >= level]
    if not wanted:
        stop_logging()
        return
    with translated:
        _native.forward_logs(min(wanted, key=_LEVELS.__getitem__), _Sink())


def stop_logging() -> None:
    """Sends what the library logs to nobody."""
    with translated:
        _native.forward_logs(_native.LogLevel.ERROR, None)
