"""The exceptions of mka, one class a kind, and how a native error becomes one.

Knows no operation.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from mka._native import mka_bindings as _native


class Error(Exception):
    """Something went wrong; the class says what a caller can do, the text says operation, expected and got."""


class InvalidArgumentError(Error, ValueError):
    """An argument is outside its range: correct the call."""


class NotFoundError(Error, LookupError):
    """The thing asked for does not exist: a file, a model, a turn."""


class LockedError(Error):
    """Somebody else has it: another process the store, another handle or stream the session."""


class CorruptedError(Error):
    """Bytes on disk are damaged; the text says which file and what is lost."""


class IncompatibleError(Error):
    """Intact, but made by another model, embedder or format version."""


class ModelError(Error):
    """The model's files or its forward pass are at fault."""


class DeviceError(Error):
    """The device is missing or failed."""


class OutOfMemoryError(Error, MemoryError):
    """Memory ran out."""


class StorageError(Error):
    """Reading or writing failed: disk full, permission, path."""


class CancelledError(Error):
    """The work was cancelled by its caller, or words that it may have read were forgotten meanwhile."""


class InternalError(Error):
    """A fault of the library itself: please report it."""


_NATIVE: Any = _native.MkaError
_KINDS: dict[type, type[Error]] = {
    _NATIVE.InvalidArgument: InvalidArgumentError,
    _NATIVE.NotFound: NotFoundError,
    _NATIVE.Locked: LockedError,
    _NATIVE.Corrupted: CorruptedError,
    _NATIVE.Incompatible: IncompatibleError,
    _NATIVE.Model: ModelError,
    _NATIVE.Device: DeviceError,
    _NATIVE.OutOfMemory: OutOfMemoryError,
    _NATIVE.Storage: StorageError,
    _NATIVE.Cancelled: CancelledError,
}


def of_kind(kind: str, text: str) -> Error:
    """The exception of a native error that is known by its kind's name."""
    return _KINDS.get(getattr(_NATIVE, kind, object), InternalError)(text)


class _Translated:
    """`with translated:` turns what the library, or the code that hands it values, raises inside into an `Error`."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Error):
            return
        if isinstance(error, _native.MkaError):
            raise _KINDS.get(type(error), InternalError)(str(error)) from None
        if isinstance(error, _native.InternalError):
            raise InternalError(str(error)) from error
        # An integer or a float out of range, text with a lone surrogate. What has the wrong type stays a TypeError.
        if isinstance(error, (ValueError, OverflowError)):
            raise InvalidArgumentError(str(error)) from error


translated = _Translated()
