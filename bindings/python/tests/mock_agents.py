"""One agent a framework, with a model that says what it was given: `mock_agents.py FRAMEWORK STORE USER MESSAGE`.

The tests run it in processes of their own: what a later one answers is what an earlier one was told.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import mka

SESSION = "trip"


async def openai_agents(store: str, user: str, message: str) -> str:
    """The model asks the tool for what it was asked, and answers with what the tool and the session gave."""
    from agents import Agent, ModelResponse, Runner, Usage, set_tracing_disabled
    from agents.models.interface import Model
    from openai.types.responses import (
        ResponseFunctionToolCall,
        ResponseOutputMessage,
        ResponseOutputText,
    )

    from mka.openai_agents import MkaSession, recall_tool

    class Echo(Model):
        async def get_response(self, system_instructions: Any, input: Any, *rest: Any, **more: Any) -> Any:
            items = [input] if isinstance(input, str) else input
            last = items[-1]
            if isinstance(last, dict) and last.get("type") == "function_call_output":
                text = json.dumps(items)
                part = ResponseOutputText(text=text, type="output_text", annotations=[])
                said: Any = ResponseOutputMessage(
                    id="m", content=[part], role="assistant", status="completed", type="message"
                )
            else:
                said = ResponseFunctionToolCall(
                    arguments=json.dumps({"query": message}),
                    call_id=f"call-{len(items)}",
                    name="recall_memory",
                    type="function_call",
                )
            return ModelResponse(output=[said], usage=Usage(), response_id=None)

        def stream_response(self, *rest: Any, **more: Any) -> Any:
            raise RuntimeError("the test does not stream")

    set_tracing_disabled(True)
    async with mka.open(store) as engine:
        session = MkaSession(engine, user=user, session_id=SESSION)
        agent = Agent(name="a", model=Echo(), tools=[recall_tool(engine, user=user)])
        result = await Runner.run(agent, message, session=session)
        return str(result.final_output)


async def pydantic_ai(store: str, user: str, message: str) -> str:
    """The model answers with the system prompts that it was given."""
    from pydantic_ai import Agent
    from pydantic_ai.capabilities import ProcessHistory
    from pydantic_ai.messages import ModelResponse, SystemPromptPart, TextPart
    from pydantic_ai.models.function import FunctionModel

    from mka.pydantic_ai import MkaMemory

    def echo(messages: Any, info: Any) -> Any:
        parts = [part for each in messages for part in each.parts]
        recalled = [part.content for part in parts if isinstance(part, SystemPromptPart)]
        return ModelResponse(parts=[TextPart("recalled: " + "\n".join(recalled))])

    async with mka.open(store) as engine:
        memory = MkaMemory(engine, user=user, session=SESSION)
        agent = Agent(FunctionModel(echo), capabilities=[ProcessHistory(memory.recall)])
        result = await agent.run(message)
        await memory.remember(result.new_messages())
        return result.output


async def llama_index(store: str, user: str, message: str) -> str:
    """The model answers with everything that the agent's memory put into its chat."""
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.chat_engine import SimpleChatEngine
    from llama_index.core.llms import MockLLM
    from llama_index.core.memory import Memory

    from mka.llama_index import MkaMemoryBlock

    async with mka.open(store) as engine:
        block = MkaMemoryBlock(engine=engine, user=user, session=SESSION)
        memory = Memory.from_defaults(
            session_id=SESSION, memory_blocks=[block], tokenizer_fn=str.split, token_limit=2000
        )
        chat = SimpleChatEngine.from_defaults(llm=MockLLM(), memory=memory)
        reply = await chat.achat(message)
        # Short-term memory ends with the process: what it holds is handed to the block, as it is when it is full.
        await block.aput([ChatMessage(role="user", content=message)], from_short_term_memory=True)
        return str(reply)


async def langchain(store: str, user: str, message: str) -> str:
    """The model answers with the documents that were retrieved for it and with the history."""
    from langchain_core.messages import AIMessage, HumanMessage
    from langchain_core.runnables import RunnableLambda, RunnablePassthrough

    from mka.langchain import MkaChatMessageHistory, MkaRetriever

    async with mka.open(store) as engine:
        history = MkaChatMessageHistory(engine, user=user, session_id=SESSION)
        said = str(await history.aget_messages())

        def model(given: dict[str, Any]) -> AIMessage:
            found = [document.page_content for document in given["context"]]
            return AIMessage(json.dumps([found, said]))

        retrieved = {"context": MkaRetriever(engine=engine, user=user)}
        chain = retrieved | RunnablePassthrough() | RunnableLambda(model)
        reply = await chain.ainvoke(message)
        await history.aadd_messages([HumanMessage(message), reply])
        return str(reply.text)


async def langgraph(store: str, user: str, message: str) -> str:
    """A graph of one node that searches its store for the message, then puts the message there."""
    from langgraph.graph import START, MessagesState, StateGraph
    from langgraph.store.base import BaseStore

    from mka.langgraph import MkaStore

    def node(state: MessagesState, *, store: BaseStore) -> dict[str, Any]:
        text = str(state["messages"][-1].content)
        found = store.search(("memories", user), query=text)
        store.put(("memories", user), str(len(found)), {"text": text})
        return {"messages": [("ai", json.dumps([item.value for item in found]))]}

    with mka.open_sync(store) as engine:
        builder = StateGraph(MessagesState)
        builder.add_node("node", node)
        builder.add_edge(START, "node")
        graph = builder.compile(store=MkaStore(engine))
        result = await asyncio.to_thread(graph.invoke, {"messages": [("user", message)]})
        return str(result["messages"][-1].content)


if __name__ == "__main__":
    framework, store, user, message = sys.argv[1:]
    print(asyncio.run(globals()[framework](store, user, message)))
