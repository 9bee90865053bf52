"""A chat endpoint with OpenAI's interface on loopback, so that any client can talk to a session that remembers.

Needs nothing but mka; run it as `python -m mka.openai_server --store chat.mka`. The session keeps the history: of a
request, the last user message is answered, and what stands before it is the client's own copy. What a request asks for
and this endpoint does not do (tools, formats, log probabilities, several answers) is refused.
"""

from __future__ import annotations

import argparse
import json
import logging
import secrets
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

import mka
from mka._sync import Engine, Session
from mka._values import Done, Token, Usage

_MAX_REQUEST_BYTES = 8 << 20
# What would change an answer and is not done here, with the values besides null that ask for nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
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


def _message(request: dict[str, Any]) -> tuple[str, str | None]:
    """The last user message, and the system message if there is one."""
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _BadRequest("messages: expected a list with a user message at its end")
    texts: list[tuple[str, str]] = []
    for message in messages:
        if not isinstance(message, dict):
            raise _BadRequest("messages: expected objects with role and content")
        content = message.get("content") or ""
        if isinstance(content, list):
            content = "\n".join(
                str(part.get("text", "")) for part in content if isinstance(part, dict)
            )
        texts.append((str(message.get("role")), str(content)))
    role, text = texts[-1]
    if role != "user":
        raise _BadRequest(f"messages: the last is by {role}, expected user")
    system = next((text for role, text in texts if role in ("system", "developer")), None)
    return text, system


def _refuse_what_is_not_done(request: dict[str, Any]) -> None:
    for key, neutral in _NEUTRAL.items():
        value = request.get(key)
        if value is not None and value not in neutral:
            asks_nothing = " or ".join(json.dumps(each) for each in neutral)
            raise _BadRequest(f"{key}: not supported, expected null or {asks_nothing}")


def _options(request: dict[str, Any], system: str | None) -> mka.SendOptions:
    _refuse_what_is_not_done(request)
    options: mka.SendOptions = {"system": system}
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


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged: they hold what users say."""

    def do_GET(self) -> None:
        """The one model there is."""
        if self.path != "/v1/models":
            return self._fail(404, f"path {self.path}: expected /v1/models")
        model = {"id": self.server.model, "object": "model", "created": 0, "owned_by": "mka"}
        self._answer(200, {"object": "list", "data": [model]})

    def do_POST(self) -> None:
        """Answers a chat completion, whole or as a stream."""
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
            chat, lock = self.server.session(user, session)
            with lock:
                self._complete(request, chat, message, options)
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
        self, request: dict[str, Any], chat: Session, message: str, options: mka.SendOptions
    ) -> None:
        events = chat.send(message, **options)
        frame: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self.server.model,
        }
        if not request.get("stream"):
            text, usage = events.text()
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "length" if usage.stop == "max_tokens" else "stop",
            }
            whole = {"object": "chat.completion", "choices": [choice], "usage": _usage(usage)}
            return self._answer(200, frame | whole)
        frame["object"] = "chat.completion.chunk"
        # The first event before the status line: what fails at once is still an error of its own.
        event = next(events)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        try:
            self._chunk(frame, {"role": "assistant", "content": ""}, None)
            while True:
                if isinstance(event, Token):
                    self._chunk(frame, {"content": event.text}, None)
                elif isinstance(event, Done):
                    stop = "length" if event.usage.stop == "max_tokens" else "stop"
                    self._chunk(frame, {}, stop)
                    if (request.get("stream_options") or {}).get("include_usage"):
                        last = {"choices": [], "usage": _usage(event.usage)}
                        self._event(json.dumps(frame | last))
                    break
                event = next(events)
            self._event("[DONE]")
        except mka.Error as error:
            self._event(json.dumps({"error": {"message": str(error)}}))
        except OSError:
            # The client is gone: the model stops, and what it said is kept.
            try:
                events.close()
            except mka.Error as error:
                logging.getLogger(__name__).warning("a turn whose client is gone failed: %s", error)

    def _chunk(self, frame: dict[str, Any], delta: dict[str, str], finish: str | None) -> None:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        self._event(json.dumps(frame | {"choices": [choice]}))

    def _event(self, data: str) -> None:
        self.wfile.write(f"data: {data}\n\n".encode())
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


class Server(ThreadingHTTPServer):
    """The endpoint: a request names its user by `user` and its session by the header `X-Mka-Session`."""

    daemon_threads = True

    def __init__(self, engine: Engine, *, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.model = engine.model_name or "none"
        self._engine = engine
        self._sessions: dict[tuple[str, str], tuple[Session, Lock]] = {}
        self._opening = Lock()

    @property
    def url(self) -> str:
        """What a client takes as its base URL."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def session(self, user: str, session: str) -> tuple[Session, Lock]:
        """The session, kept open, and the lock that lets one request at a time into it."""
        with self._opening:
            if (user, session) not in self._sessions:
                opened = self._engine.session(user=user, session=session)
                self._sessions[user, session] = (opened, Lock())
            return self._sessions[user, session]


def main() -> None:
    """Serves until interrupted."""
    parser = argparse.ArgumentParser(prog="python -m mka.openai_server", description=__doc__)
    parser.add_argument("--store", default="chat.mka", help="memory folder, created if missing")
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--window", type=int, default=2048, help="tokens attended exactly")
    parser.add_argument("--port", type=int, default=8080)
    args = parser.parse_args()
    with mka.open_sync(args.store, model=args.model, window_tokens=args.window) as engine:
        with Server(engine, port=args.port) as endpoint:
            print(f"serving {endpoint.model} at {endpoint.url}", flush=True)
            try:
                endpoint.serve_forever()
            except KeyboardInterrupt:
                pass


if __name__ == "__main__":
    main()
