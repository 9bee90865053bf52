"""Memory without a model: an agent, whose language model lives elsewhere, remembers, recalls and forgets."""

from __future__ import annotations

import argparse

import mka

FACTS = [
    "The hotel in Kyoto is the Sakura Inn, booked from the 3rd of May.",
    "Ada is allergic to peanuts.",
    "The train from Osaka leaves at 9:14 from platform 11.",
    "The passport number is X1234567.",
]


def language_model(context: mka.Context, question: str) -> str:
    """Stands where a call to a language model would, which reads `context.text`: it quotes the best memory."""
    if not context.hits:
        return f'I know nothing about "{question}".'
    return f'About "{question}" I remember: {context.hits[0].text}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", default="agent.mka", help="memory folder, created if missing")
    args = parser.parse_args()
    with mka.open_sync(args.store) as engine:
        memory = engine.memory
        turns = [mka.NewTurn(fact) for fact in FACTS]
        committed = memory.remember(turns, user="ada", agent="planner", session="trip")
        print("remembered", committed.chunks_added, "chunks")
        with engine.session(user="ada", agent="planner", session="trip") as chat:
            for question in ("Where do we stay in Kyoto?", "When does the train leave?"):
                print(language_model(chat.context(question, budget_tokens=200), question))
        receipt = memory.forget(user="ada", agent="planner", session="trip", matching="passport")
        memory.verify(receipt)
        left = memory.recall("passport number", user="ada")
        gone = not any("X1234567" in hit.text for hit in left)
        print(f"erased {receipt.turns} turns, passport gone: {gone}")


if __name__ == "__main__":
    main()
