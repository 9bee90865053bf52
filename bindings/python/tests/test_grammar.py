"""Answers that are held to a grammar."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import mka
import pytest

KIND = {"type": "string", "enum": ["cat", "dog", "été"]}


class Kind:
    """What pydantic's models have of a schema."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return KIND


def opened(store: Path, model: Path) -> mka.Engine:
    return mka.open_sync(store, model=model, window_tokens=128, block_tokens=64, device="cpu")


def test_an_answer_fits_what_it_is_held_to(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        said, usage = chat.send("hello", grammar=mka.Regex("yes|no"), max_new_tokens=9).text()
        assert said in ("yes", "no") and usage.stop == "end_of_turn"
        for schema in (KIND, json.dumps(KIND), Kind):
            options: mka.SendOptions = {"grammar": mka.JsonSchema(schema), "max_new_tokens": 20}
            said, usage = chat.regenerate(**options, temperature=1.0).text()
            assert json.loads(said) in KIND["enum"] and usage.stop == "end_of_turn"
        maybe = mka.Lark('start: "may" "be"')
        assert chat.send_tool("9:14", grammar=maybe, max_new_tokens=9).text()[0] == "maybe"
        said, usage = chat.send("and now?", grammar=mka.JsonObject(), max_new_tokens=1).text()
        assert said == "{" and usage.stop == "max_tokens"
        # None is no grammar.
        chat.send("and now?", grammar=None, max_new_tokens=1).text()


def test_what_is_no_grammar_is_refused(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        for grammar, expected in (
            (mka.JsonSchema("{"), "grammar: no JSON"),
            (mka.JsonSchema({"not": {"type": "string"}}), "expected a JSON schema"),
            (mka.Regex("("), "expected a regular expression"),
            (mka.Lark("start: other"), "expected a Lark grammar"),
        ):
            with pytest.raises(mka.InvalidArgumentError, match=expected):
                chat.send("hello", grammar=grammar).text()
        with pytest.raises(TypeError, match="grammar: str, expected JsonObject, JsonSchema, Regex"):
            chat.send("hello", grammar="[ab]")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="a schema that is a int, expected a dict"):
            chat.send("hello", grammar=mka.JsonSchema(7))  # type: ignore[arg-type]
        assert chat.num_turns == 0


def test_grammars_are_values() -> None:
    grammars: list[mka.Grammar] = [mka.JsonObject(), mka.JsonSchema(KIND), mka.Regex("a"), mka.Lark("a")]
    assert pickle.loads(pickle.dumps(grammars)) == grammars
    assert len({*grammars, mka.JsonObject(), mka.Regex("a"), mka.Lark("a")}) == 4
    assert repr(mka.Regex("a")) == "Regex(pattern='a')"


def test_a_held_answer_is_awaited(store: Path, tiny_model: Path) -> None:
    async def main() -> None:
        async with mka.open(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
            async with engine.session(user="ada", session="trip") as chat:
                said, usage = await chat.send("hello", grammar=mka.Regex("yes|no")).text()
                assert said in ("yes", "no") and usage.stop == "end_of_turn"

    asyncio.run(main())
