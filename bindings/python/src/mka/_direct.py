"""What is called for every token and every recall: calls of the library that give the package's own values.

The library that uniffi's module has loaded is a module of its own, too, whose source is in `native/`. Everything else goes
through the generated module, whose calls cost ten times as much. A call lets other threads run while the library works.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_loader
from typing import Any, Protocol, TypeAlias

from mka._native import mka_bindings as _native
from mka._values import Hit


def _load() -> Any:
    library: Any = getattr(_native, "_UniffiLib")  # noqa: B009, the generated module exports no library
    loader = ExtensionFileLoader("mka._native.direct", library._name)
    spec = spec_from_loader(loader.name, loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class Recalling(Protocol):
    """A recall that was begun; dropping it lets go of the work."""

    @property
    def number(self) -> int:
        """What it rings with when it is to be asked for its hits."""

    def hits(self) -> list[Hit] | None:
        """The hits, once; None yet, and then it rings again."""


Whose: TypeAlias = tuple[str, str | None, str | None]
"""User, agent and session."""

_module = _load()

next_events: Callable[[int, int], list[Any] | None] = _module.next_events
"""The events of a stream that are ready within so many milliseconds, perhaps none yet; None at the end. Blocks."""

poll_events: Callable[[int, int], list[Any] | None] = _module.poll_events
"""The events of a stream that are ready; if none are, or behind them, it rings the bell. None at the end."""

rung: Callable[[int], list[int]] = _module.rung
"""The numbers that have rung a bell since the last call."""

recall: Callable[[int, str, Whose, dict[str, Any]], list[Hit]] = _module.recall
"""The hits of a query in a memory, by options that `_options.recall_options` gave. Blocks."""

begin_recall: Callable[[int, str, Whose, dict[str, Any], int], Recalling] = _module.begin_recall
"""`recall`, which rings the bell instead of blocking."""
