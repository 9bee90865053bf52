"""Metadata of turns, and the filters that ask for it: from Python's dicts to what the library reads.

Knows no call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from mka._errors import InvalidArgumentError
from mka._native import mka_bindings as _native
from mka._values import MetadataValue

Filter: TypeAlias = Mapping[str, object]
"""Which turns a recall may see, or `forget` erases, by their metadata: `{"kind": "decision", "year": {"$gte": 2024}}`.

Keys hold together. A key is compared with a value, or by `$eq`, `$ne`, `$in`, `$nin`, `$gt`, `$gte`, `$lt`, `$lte` and
`$exists`; `$and` and `$or` take a list of filters, `$not` one. A turn without a key is seen by no comparison of it, and
by `$ne`, `$nin` and `$not`.
"""


def _value(where: str, value: object) -> MetadataValue:
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidArgumentError(f"{where} {value}: expected a finite number")
    if not isinstance(value, (bool, int, float, str)):
        raise TypeError(f"{where}: {type(value).__name__}, expected bool, int, float or str")
    return value


def metadata(given: Mapping[str, MetadataValue] | None) -> dict[str, Any]:
    """The native values of a turn's metadata."""
    kinds: Any = _native.MetadataValue
    native: dict[str, Any] = {}
    for key, value in (given or {}).items():
        value = _value(f"metadata {key!r}", value)
        if isinstance(value, bool):
            native[key] = kinds.FLAG(flag=value)
        elif isinstance(value, str):
            native[key] = kinds.TEXT(text=value)
        else:
            try:
                native[key] = kinds.NUMBER(number=float(value))
            except OverflowError:
                raise InvalidArgumentError(f"metadata {key!r}: an integer beyond every float") from None
    return native


def plain(native: Mapping[str, Any]) -> dict[str, MetadataValue]:
    """Metadata as Python has it; a number without a fraction is an int."""
    kinds: Any = _native.MetadataValue
    values: dict[str, MetadataValue] = {}
    for key, value in native.items():
        if isinstance(value, kinds.FLAG):
            values[key] = value.flag
        elif isinstance(value, kinds.TEXT):
            values[key] = value.text
        else:
            number: float = value.number
            values[key] = int(number) if number.is_integer() else number
    return values


def _not(part: object) -> object:
    return {"Not": part}


def _list(where: str, given: object) -> list[object]:
    if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
        raise TypeError(f"filter {where}: {type(given).__name__}, expected a list")
    return list(given)


def _compared(key: str, operator: str, given: object) -> object:
    where = f"filter {key!r} {operator}"
    match operator:
        case "$eq" | "$ne":
            part: object = {"In": [key, [_value(where, given)]]}
            return part if operator == "$eq" else _not(part)
        case "$in" | "$nin":
            part = {"In": [key, [_value(where, each) for each in _list(f"{key!r} {operator}", given)]]}
            return part if operator == "$in" else _not(part)
        case "$gte" | "$gt":
            part = {"Range": [key, _value(where, given), None]}
        case "$lte" | "$lt":
            part = {"Range": [key, None, _value(where, given)]}
        case "$exists":
            part = {"Has": key}
            return part if given else _not(part)
        case _:
            raise InvalidArgumentError(
                f"filter {key!r}: {operator!r}, expected $eq, $ne, $in, $nin, $gt, $gte, $lt, $lte or $exists"
            )
    if operator in ("$gt", "$lt"):
        # Ranges include their ends.
        return {"And": [part, _not({"In": [key, [given]]})]}
    return part


def _tree(given: object) -> object:
    if not isinstance(given, Mapping):
        raise TypeError(f"filter: {type(given).__name__}, expected a dict")
    parts: list[object] = []
    for key, asked in given.items():
        match key:
            case "$and" | "$or":
                kind = "And" if key == "$and" else "Or"
                parts.append({kind: [_tree(part) for part in _list(key, asked)]})
            case "$not":
                parts.append(_not(_tree(asked)))
            case str() if key.startswith("$"):
                raise InvalidArgumentError(f"filter: {key!r}, expected a key, $and, $or or $not")
            case _ if isinstance(asked, Mapping):
                parts += [_compared(key, operator, value) for operator, value in asked.items()]
            case _:
                parts.append(_compared(key, "$eq", asked))
    return parts[0] if len(parts) == 1 else {"And": parts}


def _native_value(value: MetadataValue) -> Any:
    return metadata({"": value})[""]


def _native_tree(part: Any) -> Any:
    kinds: Any = _native.Filter
    ((kind, given),) = part.items()
    match kind:
        case "And":
            return kinds.AND(filters=[_native_tree(each) for each in given])
        case "Or":
            return kinds.OR(filters=[_native_tree(each) for each in given])
        case "Not":
            return kinds.NOT(filters=[_native_tree(given)])
        case "Has":
            return kinds.HAS(key=given)
        case "In":
            key, values = given
            return kinds.ONE_OF(key=key, values=[_native_value(each) for each in values])
        case _:
            key, least, most = given
            bounds = [None if each is None else _native_value(each) for each in (least, most)]
            return kinds.RANGE(key=key, _from=bounds[0], to=bounds[1])


def native(given: Filter) -> Any:
    """A filter as a native call takes it."""
    return _native_tree(_tree(given))


def to_json(given: Filter) -> str:
    """A filter as the library's own is written in JSON."""
    # Imported here: most programs never filter.
    import json

    return json.dumps(_tree(given))
