"""Plain calls of the library, numbers and bytes in and out: what is called for every token and every recall.

Knows neither event nor hit; `_packed` makes and reads the bytes. Everything else goes through the generated module, whose
calls cost ten times as much.
"""

from __future__ import annotations

import ctypes
from typing import Any

from mka import _errors
from mka._native import mka_bindings as _native


class _Reply(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("len", ctypes.c_size_t), ("code", ctypes.c_uint32)]


_END, _ERROR = 1, 2

_LIBRARY: Any = getattr(_native, "_UniffiLib")  # noqa: B009, the generated module exports no library
_NUMBER = ctypes.c_uint64
_REPLY = ctypes.POINTER(_Reply)
_BYTES = (ctypes.c_char_p, ctypes.c_size_t)


def _function(name: str, *arguments: Any) -> Any:
    function = getattr(_LIBRARY, name)
    function.argtypes = arguments
    function.restype = None
    return function


_next = _function("mka_direct_next", _NUMBER, ctypes.c_uint32, _REPLY)
_poll = _function("mka_direct_poll", _NUMBER, _NUMBER, _REPLY)
_rung = _function("mka_direct_rung", _NUMBER, _REPLY)
_recall = _function("mka_direct_recall", _NUMBER, *_BYTES, _REPLY)
_begin_recall = _function("mka_direct_begin_recall", _NUMBER, *_BYTES, _NUMBER, _REPLY)
_recalled = _function("mka_direct_recalled", _NUMBER, _NUMBER, _REPLY)
_drop = _function("mka_direct_drop", _NUMBER)
_free = _function("mka_direct_free", ctypes.c_void_p, ctypes.c_size_t)
_byref, _string_at = ctypes.byref, ctypes.string_at


def _read(reply: _Reply) -> bytes | None:
    """The bytes of a reply, none while there is nothing yet; None at the end."""
    data, code = reply.data, reply.code
    if not data:
        return None if code == _END else b""
    answer = _string_at(data, reply.len)
    _free(data, reply.len)
    if code == _ERROR:
        kind, _, text = answer.partition(b"\0")
        raise _errors.of_kind(kind.decode(), text.decode())
    return answer


def next_events(stream: int, limit_ms: int) -> bytes | None:
    """The events of a stream that are ready within a time, perhaps none yet; None at the end. Blocks."""
    reply = _Reply()
    _next(stream, limit_ms, _byref(reply))
    return _read(reply)


def poll_events(stream: int, bell: int) -> bytes | None:
    """The events of a stream that are ready; if none are, or behind them, it rings `bell`. None at the end."""
    reply = _Reply()
    _poll(stream, bell, _byref(reply))
    return _read(reply)


def rung(bell: int) -> bytes:
    """The numbers that have rung, 8 bytes each."""
    reply = _Reply()
    _rung(bell, _byref(reply))
    return _read(reply) or b""


def recall(memory: int, request: bytes) -> bytes:
    """The hits of a request. Blocks."""
    reply = _Reply()
    _recall(memory, request, len(request), _byref(reply))
    return _read(reply) or b""


def begin_recall(memory: int, request: bytes, bell: int) -> int:
    """Begins a recall, which rings `bell` with the number that this returns."""
    reply = _Reply()
    _begin_recall(memory, request, len(request), bell, _byref(reply))
    return int.from_bytes(_read(reply) or b"", "little")


def recalled(recall: int, bell: int) -> bytes:
    """The hits of a recall that was begun, after which it is gone; no bytes while there are none, and it rings `bell`."""
    reply = _Reply()
    _recalled(recall, bell, _byref(reply))
    return _read(reply) or b""


def drop_recall(recall: int) -> None:
    """Lets go of a recall that nobody waits for any more."""
    _drop(recall)
