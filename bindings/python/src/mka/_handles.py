"""What the blocking and the asyncio classes have in common: calls that answer at once.

Knows nothing that works or waits.
"""

from __future__ import annotations

from typing import Any

from mka import _calls, _convert
from mka._values import Scope, Stats


class EngineHandle:
    """An open memory folder with its model."""

    def __init__(self, native: Any) -> None:
        self._native = native

    def count_tokens(self, text: str) -> int:
        """Tokens of `text` as the model counts them; without a model one for every two bytes, as `context` counts."""
        count: int = _calls.now(self._native, "count_tokens", text)
        return count

    @property
    def device(self) -> str:
        """Where the model runs."""
        device: str = _calls.now(self._native, "device")
        return device

    @property
    def model_name(self) -> str | None:
        """Name of the model's folder or file; None without a model."""
        name: str | None = _calls.now(self._native, "model_name")
        return name

    @property
    def trained_tokens(self) -> int | None:
        """Tokens that the model was trained on at once; None without a model."""
        tokens: int | None = _calls.now(self._native, "trained_tokens")
        return tokens

    @property
    def kv_bytes_per_token(self) -> int | None:
        """Bytes of keys and values that one token takes; None without a model."""
        bytes_per_token: int | None = _calls.now(self._native, "kv_bytes_per_token")
        return bytes_per_token


class SessionHandle:
    """One conversation; one stream of it at a time."""

    def __init__(self, native: Any) -> None:
        self._native = native

    @property
    def scope(self) -> Scope:
        """User, agent and session."""
        return _convert.scope(_calls.now(self._native, "scope"))

    @property
    def num_turns(self) -> int:
        """Number of turns in the session's log."""
        turns: int = _calls.now(self._native, "num_turns")
        return turns

    @property
    def generated_tokens(self) -> int:
        """Tokens that the model has chosen for the answer begun last, those that wait to be read included."""
        tokens: int = _calls.now(self._native, "generated_tokens")
        return tokens


class MemoryHandle:
    """Remember, recall and forget, over every session of the engine."""

    def __init__(self, native: Any) -> None:
        self._native = native
        self._number: int = native.number()

    def users(self) -> list[str]:
        """The users of whom there is a session, in the order of their names."""
        return list(_calls.now(self._native, "users"))

    def stats(self) -> Stats:
        """Counts and bytes of the store."""
        return _convert.stats(_calls.now(self._native, "stats"))
