"""The README's example; the tests compare the two, and run this one over a tiny model."""

# README
import asyncio

import mka


async def main() -> None:
    async with mka.open("agent.mka", model="HuggingFaceTB/SmolLM2-135M-Instruct") as engine:
        async with engine.session(user="ada", session="trip") as chat:  # continues where it stopped
            async for event in chat.send("What did we decide about Kyoto?"):
                match event:
                    case mka.Recalled(hits=hits):
                        print(f"{len(hits)} memories")
                    case mka.Token(text=text):
                        print(text, end="", flush=True)
                    case mka.Done(usage=usage):
                        print(f"reused {usage.reused_tokens} of {usage.prompt_tokens} tokens")
        # leaving the loop cancels: nothing else holds the stream
        found = await engine.memory.recall("hotel in Kyoto", user="ada", k=8)
        receipt = await engine.memory.forget(user="ada", matching="passport")
        print(len(found), receipt.turns)


asyncio.run(main())
