"""Messages of a framework as turns of a log: what is said in one stands in a turn of its own, and nowhere else.

Knows no framework and no call; what is left of a message is its record, which its adapter keeps before that turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

MARK = "mka.said"
"""Metadata of a turn that holds what a message says, whose record stands before it: alone it is no message.

It begins as the library's own keys do, in which `forget(matching=..)` looks for no words.
"""

Lengths: TypeAlias = int | list[int | None]
"""Characters of a content that is a string, or of each part of a list whose text was taken out."""


def taken_out(
    content: Any, is_text: Callable[[dict[str, Any]], bool], between: str
) -> tuple[Any, Lengths, str]:
    """`content` without its texts, how long they are, and these as one, those that are empty left out.

    They are `content` itself, if it is a string; of a list the strings, and `text` of the parts that `is_text` accepts.
    """
    if isinstance(content, str):
        return None, len(content), content
    if not isinstance(content, list):
        return content, [], ""
    left: list[Any] = []
    texts: list[str | None] = []
    for part in content:
        text: str | None = None
        if isinstance(part, str):
            part, text = None, part
        elif isinstance(part, dict) and isinstance(part.get("text"), str) and is_text(part):
            part, text = {**part, "text": None}, part["text"]
        left.append(part)
        texts.append(text)
    lengths = [None if text is None else len(text) for text in texts]
    return left, lengths, between.join(text for text in texts if text)


def put_back(left: Any, lengths: Lengths, text: str, between: str) -> Any:
    """The content that `taken_out` was given."""
    if isinstance(lengths, int):
        return text
    content: list[Any] = []
    at = 0
    for part, length in zip(left, lengths, strict=True):
        if length is not None:
            piece = text[at : at + length]
            at += length + len(between) if length else 0
            part = piece if part is None else {**part, "text": piece}
        content.append(part)
    return content
