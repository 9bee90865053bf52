"""A chat endpoint with OpenAI's interface on loopback, so that any client can talk to a session that remembers.

Needs nothing but mka; run it as `python -m mka.openai_server --store chat.mka`. The session keeps the history: of a
request, the last user message is answered, or the results of tools at its end; what stands before is the client's own
copy. Of the sessions that no request has, those used last stay open (`--sessions`); another one is opened again as its
next request comes. A session keeps the tools of its first request. Where it has any, an answer is sent when it is
whole, streamed or not: its calls stand in its text. By `response_format` an answer is held to JSON or to a schema,
whether the request asks to be strict or not, and calls nothing. What a request asks for and this endpoint does not do
(log probabilities, several answers, a choice among tools) is refused.

Whoever reaches the port may ask: there are no keys. Web pages do not: a request is answered 403 whose `Host` is not
`localhost` or an address of loopback, as that of a page whose name was pointed here, or whose `Origin`, which browsers
send and other clients do not, is not.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

import mka
from mka._streams import Answer, Events
from mka._sync import Engine, Session
from mka._values import Done, Token, ToolResult, Usage

_MAX_REQUEST_BYTES = 8 << 20
# What would change an answer and is not done here, with the values besides null that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n": (1,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
_STATUS: dict[type[mka.Error], int] = {
    mka.InvalidArgumentError: 400,
    mka.NotFoundError: 404,
    mka.LockedError: 409,
}


class _BadRequest(Exception):
    def __init__(self, text: str, status: int = 400) -> None:
        super().__init__(text)
        self.status = status


def _is_loopback(url: str) -> bool:
    """Whether a URL names this machine, whatever the port."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _text(message: dict[str, Any]) -> str:
    """The content of a message, the texts of its parts."""
    match message.get("content"):
        case None:
            return ""
        case str(text):
            return text
        case list(parts):
            return "\n".join(_part(part) for part in parts)
    raise _BadRequest("messages: content of another kind, expected a text, a list of texts or null")


def _part(part: object) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": str(kind)} if kind != "text":
            raise _BadRequest(f"messages: a part of type {kind}, expected parts of type text alone")
    raise _BadRequest("messages: a part without type and text, expected both")


def _message(request: dict[str, Any]) -> tuple[str | list[ToolResult], str | None]:
    """The last user message or the results of tools at the end, and the system message if there is one."""
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadRequest("messages: expected a list with a user message at its end")
    if not all(isinstance(message, dict) for message in messages):
        raise _BadRequest("messages: expected objects with role and content")
    roles = [str(message.get("role")) for message in messages]
    instructions = (m for m in messages if m.get("role") in ("system", "developer"))
    system = next((_text(message) for message in instructions), None)
    if roles[-1] == "tool":
        return _results(messages, roles), system
    if roles[-1] != "user":
        raise _BadRequest(f"messages: the last is by {roles[-1]}, expected user or tool")
    if roles[-2:-1] == ["tool"]:
        # The session has not seen them, and takes in one of the two.
        raise _BadRequest(
            "messages: a user message behind results of tools, expected an answer between"
        )
    return _text(messages[-1]), system


def _results(messages: list[dict[str, Any]], roles: list[str]) -> list[ToolResult]:
    """The results at the end, in the order of the calls: a model's own template does not number them."""
    start = len(roles)
    while start and roles[start - 1] == "tool":
        start -= 1
    calls = (
        messages[start - 1].get("tool_calls") if start and roles[start - 1] == "assistant" else None
    )
    try:
        names = {str(call["id"]): str(call["function"]["name"]) for call in calls or ()}
    except (KeyError, TypeError):
        raise _BadRequest("messages: tool_calls without id and function, expected both") from None
    results = {str(message.get("tool_call_id")): _text(message) for message in messages[start:]}
    if results.keys() != names.keys() or len(results) != len(messages) - start:
        raise _BadRequest(
            f"messages: results of the calls {sorted(results)}, expected one of each call in the assistant's message"
            f" before them: {sorted(names)}"
        )
    return [ToolResult(results[call], name) for call, name in names.items()]


def _tools(request: dict[str, Any]) -> list[str]:
    """The JSON of each function that the model may call."""
    tools = request.get("tools")
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _BadRequest("tools: expected a list of functions")
    if tools and request.get("tool_choice") == "none":
        raise _BadRequest(
            'tool_choice: none beside tools is not supported, expected null or "auto"'
        )
    return [json.dumps(tool, ensure_ascii=False) for tool in tools]


def _grammar(request: dict[str, Any]) -> mka.Grammar | None:
    """What the answer is held to."""
    form = request.get("response_format")
    match form:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return mka.JsonObject()
        case {"type": "json_schema", "json_schema": {"schema": dict(schema)}}:
            return mka.JsonSchema(schema)
    raise _BadRequest(
        "response_format: expected text, json_object, or json_schema with a schema that is an object"
    )


def _refuse_what_is_not_done(request: dict[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        value = request.get(key)
        if value is not None and value not in neutral:
            asks_nothing = " or ".join(json.dumps(each) for each in neutral)
            raise _BadRequest(f"{key}: not supported, expected null or {asks_nothing}")


def _options(request: dict[str, Any], system: str | None) -> mka.SendOptions:
    _refuse_what_is_not_done(request)
    options: mka.SendOptions = {"system": system}
    if tools := _tools(request):
        options["tools"] = tools
    grammar = _grammar(request)
    if grammar is not None:
        options["grammar"] = grammar
    limit = request.get("max_completion_tokens")
    if limit is None:
        limit = request.get("max_tokens")
    if limit is not None:
        options["max_new_tokens"] = int(limit)
    # OpenAI's default temperature is 1; a small local model answers better greedily.
    options["temperature"] = float(request.get("temperature") or 0.0)
    options["top_p"] = float(request.get("top_p") or 1.0)
    if request.get("seed") is not None:
        options["seed"] = int(request["seed"])
    elif options["temperature"] > 0:
        # The engine's own default is one seed, and one answer to a message that is sent again.
        options["seed"] = secrets.randbits(63)
    if stop := request.get("stop"):
        stops = [stop] if isinstance(stop, str) else list(stop)
        if not all(isinstance(each, str) for each in stops):
            raise _BadRequest("stop: expected a text or a list of texts")
        options["stop"] = stops
    if not isinstance(request.get("stream_options") or {}, dict):
        raise _BadRequest("stream_options: expected an object")
    return options


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.generated_tokens,
        "total_tokens": usage.prompt_tokens + usage.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.reused_tokens},
    }


def _is_json(text: str) -> bool:
    try:
        json.loads(text.strip().removeprefix("<|python_tag|>"))
    except (ValueError, RecursionError):
        return False
    return True


_MARKS = ("<tool_call>", "[TOOL_CALLS]")


def _said_from(answer: str) -> int:
    """Where what is said behind the thoughts begins, as the engine finds it."""
    # The template may have written the tag that opens the thoughts.
    opens, start = answer.lstrip().startswith("<think>"), 0
    while (at := answer.find("</think>", start)) >= 0:
        found = [(answer.find(mark, start, at), len(mark)) for mark in _MARKS]
        behind = [place + length for place, length in found if place >= 0]
        if not opens and behind:
            start = min(behind)
            # A call may hold the tag in a text: what follows begins behind it.
            value = start + len(answer[start:]) - len(answer[start:].lstrip())
            if answer[value : value + 1] in ("{", "["):
                try:
                    start = json.JSONDecoder().raw_decode(answer, value)[1]
                except (ValueError, RecursionError):
                    pass
            continue
        if not opens and "<think>" in answer[:at]:
            return 0
        return at + len("</think>")
    return 0


def _before_calls(answer: str) -> str | None:
    """What an answer that calls tools says before it does."""
    # A call that is all of an answer may hold any mark in a text.
    if _is_json(answer):
        return None
    at = _said_from(answer)
    thoughts, said = answer[:at], answer[at:]
    starts = [said.find(mark) for mark in _MARKS if mark in said]
    # Without a mark the call is all that is said.
    before = "" if _is_json(said) else said[: min(starts, default=0)]
    return (thoughts + before).strip() or None


def _answered(text: str, usage: Usage, has_tools: bool) -> tuple[dict[str, Any], str]:
    """The message that an answer is, and why it ended."""
    calls = mka.tool_calls(text) if has_tools else []
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["content"] = _before_calls(text)
        message["tool_calls"] = [
            {
                "id": f"call_{uuid.uuid4().hex}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in calls
        ]
    # What was cut off may lack a call.
    if usage.stop == "max_tokens":
        return message, "length"
    return message, "tool_calls" if calls else "stop"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they hold what users say."""

    def parse_request(self) -> bool:
        """Refuses what a web page of elsewhere sends, before anything is done for it."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if _is_loopback(f"//{host}") and (origin is None or _is_loopback(origin)):
            return True
        try:
            # A connection that is closed before what was sent is read may break before the answer is.
            self._body()
        except _BadRequest:
            pass
        self.close_connection = True
        self._fail(403, f"Host {host!r}, Origin {origin!r}: expected localhost or an address of loopback")
        return False

    def do_GET(self) -> None:
        """The one model there is."""
        if self.path != "/v1/models":
            return self._fail(404, f"path {self.path}: expected /v1/models")
        model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "mka"}
        self._answer(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answers a chat completion, whole or as a stream."""
        try:
            self._post()
        except OSError:
            # The client went while it was read or answered.
            self.close_connection = True

    def _post(self) -> None:
        try:
            # Also where nobody answers it: the connection's next request stands behind it.
            body = self._body()
            if self.path != "/v1/chat/completions":
                raise _BadRequest(f"path {self.path}: expected /v1/chat/completions", 404)
            request = json.loads(body)
            if not isinstance(request, dict):
                raise _BadRequest("body: expected an object")
            message, system = _message(request)
            options = _options(request, system)
        except _BadRequest as error:
            return self._fail(error.status, str(error))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            return self._fail(400, str(error))
        user = str(request.get("user") or "me")
        session = self.headers.get("X-Mka-Session") or "chat"
        try:
            with self.server.session(user, session) as chat:
                # It may have waited for another request; one that nobody waits for would be said beside its repetition.
                if self._is_gone():
                    self.close_connection = True
                    return
                opened = chat.offer(options.get("tools", ()))
                self._complete(request, opened, message, options)
        except _BadRequest as error:
            self._fail(error.status, str(error))
        except mka.Error as error:
            self._fail(_STATUS.get(type(error), 500), str(error))

    def _body(self) -> bytes:
        """The request's body; a connection is closed behind one whose end is not known."""
        try:
            length = int(self.headers.get("Content-Length") or 0)
            if length < 0 or "Transfer-Encoding" in self.headers:
                raise ValueError
        except ValueError:
            self.close_connection = True
            raise _BadRequest("Content-Length: expected the number of bytes of the body") from None
        if length > _MAX_REQUEST_BYTES:
            self.close_connection = True
            text = f"request of {length} bytes: expected at most {_MAX_REQUEST_BYTES}"
            raise _BadRequest(text, 413)
        return self.rfile.read(length)

    def _complete(
        self,
        request: dict[str, Any],
        chat: Session,
        message: str | list[ToolResult],
        options: mka.SendOptions,
    ) -> None:
        if isinstance(message, str):
            events = chat.send(message, **options)
        else:
            events = chat.send_tool(message, **options)
        # An answer that is held to a form is what the client asked for, though it looks like a call.
        has_tools = "tools" in options and "grammar" not in options
        frame: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.server.model,
        }
        if not request.get("stream"):
            whole_answer = Answer()
            for event in events:
                if self._is_gone():
                    return self._give_up(events)
                whole_answer.see(event)
            text, usage = whole_answer.whole()
            answer, finish = _answered(text, usage, has_tools)
            choice = {"index": 0, "message": answer, "finish_reason": finish}
            whole = {"object": "chat.completion", "choices": [choice], "usage": _usage(usage)}
            return self._answer(200, frame | whole)
        frame["object"] = "chat.completion.chunk"
        # The first event before the status line: what fails at once is still an error of its own.
        event = next(events)
        self.close_connection = True
        parts: list[str] = []
        try:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Cache-Control", "no-cache")
            self.send_header("Connection", "close")
            self.end_headers()
            self._chunk(frame, {"role": "assistant", "content": ""}, None)
            while True:
                if isinstance(event, Token):
                    parts.append(event.text)
                    if has_tools:
                        # A comment, which clients skip: one that is gone is noticed.
                        self._write(":\n\n")
                    else:
                        self._chunk(frame, {"content": event.text}, None)
                elif isinstance(event, Done):
                    answer, finish = _answered("".join(parts), event.usage, has_tools)
                    if has_tools and answer["content"]:
                        self._chunk(frame, {"content": answer["content"]}, None)
                    if calls := answer.get("tool_calls"):
                        numbered = [{"index": i, **call} for i, call in enumerate(calls)]
                        self._chunk(frame, {"tool_calls": numbered}, None)
                    self._chunk(frame, {}, finish)
                    if (request.get("stream_options") or {}).get("include_usage"):
                        last = {"choices": [], "usage": _usage(event.usage)}
                        self._event(json.dumps(frame | last))
                    break
                event = next(events)
            self._event("[DONE]")
        except mka.Error as error:
            self._event(json.dumps({"error": {"message": str(error)}}))
        except OSError:
            self._give_up(events)

    def _is_gone(self) -> bool:
        """Whether the client has closed its connection, or will at least send no more."""
        self.connection.setblocking(False)
        try:
            return not self.connection.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            self.connection.setblocking(True)

    def _give_up(self, events: Events) -> None:
        """Answers nothing, as the client is gone: the model stops, and what it said is kept."""
        self.close_connection = True
        try:
            events.close()
        except mka.Error as error:
            logging.getLogger(__name__).warning("a turn whose client is gone failed: %s", error)

    def _chunk(self, frame: dict[str, Any], delta: dict[str, Any], finish: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self._event(json.dumps(frame | {"choices": [choice]}))

    def _event(self, data: str) -> None:
        self._write(f"data: {data}\n\n")

    def _write(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def _answer(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(data)

    def _fail(self, status: int, message: str) -> None:
        self._answer(status, {"error": {"message": message, "type": "invalid_request_error"}})


@dataclass(slots=True)
class _Chat:
    """A session, open or closed; `lock` lets one request at a time into it."""

    session: Session | None = None
    lock: Lock = field(default_factory=Lock)
    requests: int = 0
    """Those that have it or wait for it."""
    tools: int | None = None
    """The hash of those that it began with; None before its first request. For a session that is older than this
    server those of the first request seen here count.
    """

    def offer(self, tools: Sequence[Any]) -> Session:
        """The session, for a request with its tools, which cannot change: they stand at its beginning."""
        assert self.session is not None, "a request opens it before"
        offered = hash(tuple(tools))
        if self.tools is None or self.session.num_turns == 0:
            self.tools = offered
        elif offered != self.tools:
            raise _BadRequest(
                f"tools: {len(tools)} that are not those that the session began with, expected the same, or another session"
                " by the header X-Mka-Session"
            )
        return self.session


class Server(ThreadingHTTPServer):
    """The endpoint: a request names its user by `user` and its session by the header `X-Mka-Session`."""

    daemon_threads = True

    def __init__(self, engine: Engine, *, port: int = 0, sessions: int = 8) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = engine.model_name or "none"
        self._engine = engine
        self._most_open = sessions
        self._lock = Lock()
        # A closed session has no more here than the hash of its tools.
        self._chats: dict[tuple[str, str], _Chat] = {}
        # Those of them that are open or that a request has, the one used last at the end.
        self._open: dict[tuple[str, str], _Chat] = {}

    @property
    def url(self) -> str:
        """What a client takes as its base URL."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    @contextmanager
    def session(self, user: str, session: str) -> Iterator[_Chat]:
        """The session, opened, for one request that has it alone."""
        name = (user, session)
        with self._lock:
            chat = self._chats.setdefault(name, _Chat())
            self._open.pop(name, None)
            self._open[name] = chat
            chat.requests += 1
        try:
            # First, so that what is opened has its room.
            self._close_surplus()
            with chat.lock:
                if chat.session is None:
                    chat.session = self._engine.session(user=user, session=session)
                yield chat
        finally:
            with self._lock:
                chat.requests -= 1
                if chat.session is None and not chat.requests:
                    # It could not be opened.
                    del self._open[name]
                    if chat.tools is None:
                        del self._chats[name]
            self._close_surplus()

    def _close_surplus(self) -> None:
        """Closes what was used least recently of the open sessions beyond the most, but none that a request has."""
        while (chat := self._surplus()) is not None:
            opened, chat.session = chat.session, None
            try:
                if opened is not None:
                    opened.close()
            finally:
                chat.lock.release()

    def _surplus(self) -> _Chat | None:
        """A session to be closed, with its lock taken: a request that comes waits until it can open it again."""
        with self._lock:
            if len(self._open) > self._most_open:
                for name, chat in self._open.items():
                    # Then no request has the lock.
                    if not chat.requests:
                        chat.lock.acquire()
                        return self._open.pop(name)
        return None


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m mka.openai_server", description=__doc__)
    parser.add_argument("--store", default="chat.mka", help="memory folder, created if missing")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--window", type=int, default=2048, help="tokens attended exactly")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--sessions", type=int, default=8, help="most sessions that stay open")
    args = parser.parse_args()
    with mka.open_sync(args.store, model=args.model, window_tokens=args.window) as engine:
        with Server(engine, port=args.port, sessions=args.sessions) as endpoint:
            print(f"serving {endpoint.model} at {endpoint.url}", flush=True)
            try:
                endpoint.serve_forever()
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    main()
