"""What an answer is held to, and the native record that it becomes.

Knows no call.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from mka._native import mka_bindings as _native
from mka._values import _Value


class _Modelled(Protocol):
    """A class that says its own schema, as pydantic's models do."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class JsonObject(_Value):
    """Any JSON object."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class JsonSchema(_Value):
    """JSON that fits a schema, its properties in the schema's order.

    A schema is a dict, the same written as JSON, or a pydantic model: the class.
    """

    schema: Mapping[str, Any] | str | type[_Modelled] = field(hash=False)


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Regex(_Value):
    """Text that a regular expression matches as a whole; the syntax is that of Rust's crate `regex`."""

    pattern: str


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class Lark(_Value):
    """Text of a context-free grammar in Lark's notation, as llguidance reads it."""

    text: str


Grammar: TypeAlias = JsonObject | JsonSchema | Regex | Lark
"""What an answer is held to, from its first token to its last."""


def native(grammar: Grammar) -> Any:
    """The native record of `grammar`."""
    kinds: Any = _native.Grammar
    if isinstance(grammar, JsonObject):
        return kinds.JSON_OBJECT()
    if isinstance(grammar, JsonSchema):
        return kinds.JSON_SCHEMA(schema=_schema(grammar.schema))
    if isinstance(grammar, Regex):
        return kinds.REGEX(pattern=grammar.pattern)
    if isinstance(grammar, Lark):
        return kinds.LARK(text=grammar.text)
    kind = type(grammar).__name__
    raise TypeError(f"grammar: {kind}, expected JsonObject, JsonSchema, Regex or Lark")


def _schema(schema: object) -> str:
    """The JSON of a schema."""
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    if isinstance(schema, Mapping):
        schema = json.dumps(dict(schema), ensure_ascii=False)
    if not isinstance(schema, str):
        kind = type(schema).__name__
        raise TypeError(f"grammar: a schema that is a {kind}, expected a dict, JSON or a pydantic model")
    return schema
