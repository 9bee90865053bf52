"""Memory beside the basics of `test_sync`: what is erased, replaced, listed and marked, blocking and awaited."""

from __future__ import annotations

import asyncio
from pathlib import Path

import mka
import pytest


def test_several_turns_are_erased_at_once(store: Path) -> None:
    texts = ["The otter is 1.", "The heron is 2.", "The badger is 3.", "The wolf is 4."]

    async def main() -> None:
        async with mka.open(store) as engine:
            memory = engine.memory
            receipt = await memory.forget(user="ada", session="trip", turn=range(2, 3))
            assert receipt.turns == 1
            await memory.verify(receipt)
            left = await memory.turns(user="ada", session="trip")
            assert [turn.text for turn in left] == ["", texts[1], "", ""]

    with mka.open_sync(store) as engine:
        memory = engine.memory
        memory.remember([mka.NewTurn(text) for text in texts], user="ada", session="trip")
        with pytest.raises(mka.NotFoundError, match="below 4, got 4"):
            memory.forget(user="ada", session="trip", turn=[0, 4])
        with pytest.raises(mka.InvalidArgumentError, match="one turn at least"):
            memory.forget(user="ada", session="trip", turn=[])
        with pytest.raises(mka.InvalidArgumentError, match="a scope with a session"):
            memory.forget(user="ada", turn=[0])
        receipt = memory.forget(user="ada", session="trip", turn=(3, 0))
        assert receipt.turns == 2
        memory.verify(receipt)
        left = memory.turns(user="ada", session="trip")
        assert [turn.forgotten for turn in left] == [True, False, False, True]
    asyncio.run(main())
