"""Tools: what a session is offered, what a model calls, what comes back."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path

import mka
import pytest

NOW = {"name": "now", "description": "The time, à la minute"}
TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{{ tools | tojson }}{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def tool_model(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a chat template that lists tools."""
    whole = tiny_model.read_bytes()
    key = b"tokenizer.chat_template"
    # Behind the key stand the type of its value in 4 bytes, its length in 8, and its text.
    at = whole.index(key) + len(key) + 4
    old = int.from_bytes(whole[at : at + 8], "little")
    # Tensors lie at multiples of 32 bytes: a comment has them move by one.
    fill = (old - len(TEMPLATE) - len("{##}")) % 32
    template = f"{TEMPLATE}{{#{' ' * fill}#}}".encode()
    copy = whole[:at] + len(template).to_bytes(8, "little") + template + whole[at + 8 + old :]
    path = tmp_path / "tools.gguf"
    path.write_bytes(copy)
    return path


def opened(store: Path, model: Path) -> mka.Engine:
    return mka.open_sync(store, model=model, window_tokens=128, block_tokens=64, device="cpu")


def test_tools_are_listed_in_json_as_they_are(store: Path, tool_model: Path) -> None:
    whole = {"type": "function", "function": NOW}
    with opened(store, tool_model) as engine:
        tokens = []
        for number, tools in enumerate(([NOW], [whole], [json.dumps(whole)], NOW)):
            with engine.session(user="ada", session=str(number)) as chat:
                chat.send("hello", tools=tools, max_new_tokens=1).text()  # type: ignore[arg-type]
            turn = engine.memory.turns(user="ada", session=str(number))[0]
            tokens.append(turn.num_tokens)
        assert len(set(tokens)) == 1
        # The list in JSON, its letters as they are, behind what a session without tools begins with.
        listed = f"system\n[{json.dumps(whole, ensure_ascii=False)}]"
        with engine.session(user="ada", session="plain") as chat:
            chat.send("hello", max_new_tokens=1).text()
        plain = engine.memory.turns(user="ada", session="plain")[0].num_tokens
        assert tokens[0] == plain + engine.count_tokens(listed) + 3


def test_results_are_turns_of_their_own_and_are_recalled(store: Path, tool_model: Path) -> None:
    with opened(store, tool_model) as engine, engine.session(user="ada", session="trip") as chat:
        options: mka.SendOptions = {"max_new_tokens": 2, "recall_k": 0}
        chat.send("what time is it?", tools=[NOW], **options).text()
        results = [mka.ToolResult("The clock says 9:14.", name="now"), "It rains."]
        _, usage = chat.send_tool(results, **options).text()
        assert usage.reused_tokens > 0
        chat.send_tool("And it snows.", **options).text()
        chat.regenerate(**options).text()
        turns = engine.memory.turns(user="ada", session="trip")
        roles = [turn.role for turn in turns if not turn.retracted]
        assert roles == ["user", "assistant", "tool", "tool", "assistant", "tool", "assistant"]
        assert (turns[2].source, turns[3].source, turns[3].text) == ("now", None, "It rains.")
        hit = engine.memory.recall("clock", user="ada", roles=["tool"])[0]
        assert (hit.source.role, hit.source.name, hit.trust) == ("tool", "now", "document")


def test_what_is_no_tool_or_no_result_is_refused(store: Path, tiny_model: Path) -> None:
    with opened(store, tiny_model) as engine, engine.session(user="ada", session="trip") as chat:
        with pytest.raises(mka.InvalidArgumentError, match="no place for them"):
            chat.send("hello", tools=[NOW]).text()
        with pytest.raises(mka.InvalidArgumentError, match=r"tools\[1\]: a function without a name"):
            chat.send("hello", tools=[NOW, "{}"]).text()
        with pytest.raises(TypeError, match=r"tools\[0\]: int, expected a dict or JSON"):
            chat.send("hello", tools=[7])  # type: ignore[list-item]
        with pytest.raises(mka.InvalidArgumentError, match="nothing was said yet"):
            chat.send_tool("9:14").text()
        with pytest.raises(mka.InvalidArgumentError, match="no result"):
            chat.send_tool([]).text()
        with pytest.raises(TypeError, match=r"results\[1\]: int, expected str or ToolResult"):
            chat.send_tool(["9:14", 7])  # type: ignore[list-item]
        for none in ({"content": "9:14"}, {"9:14"}, b"9:14", bytearray(b"9:14"), 7, None):
            kind = type(none).__name__
            expected = f"results: {kind}, expected str, ToolResult or a sequence of them"
            with pytest.raises(TypeError, match=expected):
                chat.send_tool(none)  # type: ignore[arg-type]
        assert chat.num_turns == 0


def test_calls_are_read_from_an_answer() -> None:
    answer = 'Let me see.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
    calls = mka.tool_calls(answer)
    assert calls == [mka.ToolCall("add", '{"a": 1}')]
    assert json.loads(calls[0].arguments) == {"a": 1}
    assert pickle.loads(pickle.dumps(calls)) == calls
    assert mka.tool_calls("It is late.") == mka.tool_calls("<tool_call>{</tool_call>") == []


def test_results_are_awaited(store: Path, tool_model: Path) -> None:
    async def main() -> None:
        async with mka.open(store, model=tool_model, window_tokens=128, device="cpu") as engine:
            async with engine.session(user="ada", session="trip") as chat:
                await chat.send("what time is it?", tools=[NOW], max_new_tokens=2).text()
                result = mka.ToolResult("It is 9:14.", name="now")
                _, usage = await chat.send_tool(result, max_new_tokens=2).text()
                assert usage.generated_tokens <= 2 and chat.num_turns == 4

    asyncio.run(main())
