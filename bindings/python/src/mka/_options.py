"""What a caller passes in, and the native records that it becomes.

Holds no default value: what is left out is the engine's, which the documentation of each option names.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime, timedelta
from math import inf
from typing import Any, Literal, TypeAlias, TypedDict

from mka import _filter, _grammar
from mka._errors import InvalidArgumentError
from mka._filter import Filter
from mka._grammar import Grammar
from mka._native import mka_bindings as _native
from mka._values import MetadataValue, NewTurn, Role, ToolResult

Time: TypeAlias = datetime | int
"""A moment: a datetime that knows its zone, or milliseconds since 1970."""

Path: TypeAlias = str | os.PathLike[str]
"""A path."""


RecallPolicy: TypeAlias = Literal["off", "text", "pages", "both"]
"""How older tokens come back: not at all, as quoted text, as keys and values inside attention, or both."""

Policy: TypeAlias = Literal["ignore", "flag", "withhold", "refuse"]
"""What to do with a turn that holds something sensitive."""


class PageOptions(TypedDict, total=False):
    """Recall inside attention; what is left out is the engine's default."""

    tokens: int
    """Tokens that each key/value head recalls, 2048 by default."""
    bytes: int
    """Bytes of host memory for the stored pages of one session and their index, 2 GiB by default."""
    device_bytes: int
    """Bytes of device memory for them, where the model runs on a device, 4 GiB by default."""
    precision: Literal["f32", "bf16", "int8", "int4"]
    """How stored keys and values are held; `bf16` by default."""
    rule: Literal["mka", "streaming", "inf_llm", "quest", "token_select"]
    """How tokens are chosen; `mka` by default."""
    scan: Literal["auto", "flat", "two_level", "sign_hash", "key_codes"]
    """What is scored on the processor for a choice before keys are; `auto` by default."""
    prefill: Literal["selected", "dense"]
    """What a block of a prompt attends to while the stream fits the model's trained length; `selected` by default."""
    reuse_steps: int
    """Decoded tokens that one choice serves; left out, 4 on a card and for other systems' rules, 16 to 64 on the processor."""
    first_layer: int
    """Layers below this one choose nothing; 3 by default."""
    vote_reach: int
    """Tokens to either side of a stored one whose votes count for it, 16 by default."""
    keep_votes: bool
    """Whether what a message's queries asked for stays asked for while it is answered (the default)."""
    lexical: bool
    """Whether the rare words of a message pin the places where they stand (the default)."""
    estimate: bool
    """Whether tokens that are not recalled enter the softmax too, each page as its means; False by default."""
    compact: bool
    """Whether positions are counted over what is attended as soon as not every stored token is recalled (the default)."""


class HygieneOptions(TypedDict, total=False):
    """What memory does not store twice, and what not at all; what is left out is the engine's default."""

    near_duplicates: bool
    """Counts text with the words of text that the session holds instead of storing it (the default)."""
    secrets: Policy
    """What to do with passwords, keys and tokens; `flag` by default."""
    personal: Policy
    """What to do with addresses of mail, phone, card, account and social security numbers; `flag` by default."""


class EngineOptions(TypedDict, total=False):
    """How an engine is opened; what is left out is the engine's default."""

    model: Path | None
    """A folder, a GGUF file, or the id of a repository; without one, the default, memory alone works."""
    device: str
    """`auto`, the default, `cpu`, `cuda` or `cuda:N`."""
    embedder: Literal["hashed", "minilm"] | os.PathLike[str]
    """What turns sentences into vectors: built in (`hashed`, the default), fetched, or a folder."""
    embedder_precision: Literal["f32", "int8"]
    """How a sentence encoder multiplies, `f32` by default; a store takes the two for different embedders."""
    window_tokens: int
    """Recent tokens attended exactly, 2048 by default."""
    block_tokens: int
    """Most tokens of one forward pass while a prompt is read, 512 by default."""
    recall_k: int
    """Memories looked up for each message, 8 by default; 0 looks up none."""
    recall_tokens: int
    """Most tokens of recalled text put before a message, 768 by default."""
    quote: Literal["sentences", "passage"]
    """How much of each recalled passage is quoted; `sentences` by default."""
    evicted_page_bytes: int
    """Bytes of evicted key/value pages kept on disk for each session, 2 GiB by default.

    With 0 a session that is opened again recalls none of them inside attention.
    """
    recall: RecallPolicy
    """How older tokens come back; `text` by default."""
    pages: PageOptions
    """Recall inside attention."""
    backend: Literal["sled", "redb"]
    """Which database keeps the small records of a new store; `sled` by default."""
    encryption_key: bytes | None
    """32 bytes that encrypt everything that memory writes, from the store's creation on; none by default."""
    hygiene: HygieneOptions
    """What memory does not store twice, and what not at all."""
    reembed: float
    """Takes another embedder over than the store's, working this share of the time, above 0 and at most 1.

    Left out, a store of another embedder is refused.
    """
    tensor_parallel: bool
    """Shares the model with the processes that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name; False by default.

    All of them make the same calls in the same order, each on its own device (`LOCAL_RANK`'s card, if `device` is left
    out) and with a memory folder of its own: process `n` puts `.n` behind the path.
    """
    quiet: bool
    """Shows no progress bar while files are fetched; False by default."""


class SendOptions(TypedDict, total=False):
    """How one message is answered; what is left out is the engine's default."""

    temperature: float
    """0, the default, takes the most likely token; above it, one is drawn by `seed`."""
    top_k: int
    """Keep the k most likely tokens; 0, the default, keeps all."""
    top_p: float
    """Keep the smallest set of tokens whose probability reaches this; 1, the default, keeps all."""
    min_p: float
    """Drop tokens less likely than this share of the most likely one; 0, the default, drops none."""
    repetition_penalty: float
    """Positive logits of recent tokens are divided by this, negative ones multiplied; 1, the default, changes none."""
    seed: int | None
    """What tokens are drawn by: two runs with one seed draw the same.

    It is 0 by default, whatever the temperature: a message that is answered again with `regenerate` gets the same answer.
    Give a number of your own, as `random.getrandbits(63)`, for other words.
    """
    max_new_tokens: int | None
    """Most tokens to generate, 512 by default."""
    stop: Sequence[str]
    """The answer ends before the first of these."""
    answer_prefix: str
    """Words that the answer begins with; they are in the turn, and neither streamed nor in what `text()` returns."""
    completion: bool
    """Whether the message is the prompt as it stands, without the chat template; False by default."""
    joined: bool
    """Whether the message goes on in the message of the document fed before it; False by default."""
    system: str | None
    """Instructions before a session's first message; they stay in sight, as far as the trained length has room."""
    recall: RecallPolicy
    """How older tokens come back; as the engine was opened if left out."""
    recall_k: int
    """Memories to look up; as the engine was opened if left out."""
    across_sessions: bool
    """Whether other sessions of the same user, or of the agent if the session has one, are searched too; False by default."""
    time: Time
    """When the message was said; now if left out."""
    metadata: Mapping[str, MetadataValue]
    """What message and answer are marked with, for a `filter` to ask for: at most 254 keys, none begins with `mka.`."""
    recall_filter: Filter | None
    """The memories that are looked up are of turns whose metadata this accepts."""
    tools: Sequence[Mapping[str, Any] | str]
    """Tools that the model may call, each a function as OpenAI writes it, as a dict or in JSON.

    The model's chat template lists them before a session's first message, or refuses them; they stay in sight as `system`.
    `tool_calls` reads the calls from an answer, `send_tool` gives the results.
    """
    grammar: Grammar | None
    """What the answer is held to, from its first token to its last; by default nothing.

    It ends where nothing may follow. One that `max_new_tokens` or a stop string ends may be a part of what the grammar
    allows: `Usage.stop` tells.
    """


class FeedOptions(TypedDict, total=False):
    """How a document is taken in; what is left out is the engine's default."""

    mode: Literal["auto", "model", "text"]
    """What the model reads: `auto`, the default, by length (all of it with recall by pages alone), all of it, or its end."""
    name: str | None
    """Name of the document, shown beside what is recalled from it."""
    completion: bool
    """Whether the text stands outside the chat template; False by default."""
    time: Time
    """When the document was given; now if left out."""
    recall: RecallPolicy
    """By what the tokens that the model reads recall older ones; as the engine was opened if left out."""
    metadata: Mapping[str, MetadataValue]
    """What the document's turns are marked with, for a `filter` to ask for: at most 256 keys, none begins with `mka.`."""
    system: str | None
    """Instructions before a session's first message, if the document begins it and the model reads of it.

    Where the model's chat template takes none, the document is refused before anything of it is stored.
    """


class RecallOptions(TypedDict, total=False):
    """How to recall; what is left out is the engine's default."""

    k: int
    """The most hits to return, 8 by default."""
    before_turn: int | None
    """In the scope's own session, only chunks of turns before this one."""
    except_turns: Iterable[int]
    """In the scope's own session, no chunks of these turns."""
    across_sessions: bool
    """Also look into the other sessions of the user, or of the agent if there is one; False by default."""
    roles: Sequence[Role]
    """Only turns in these roles; all if left out."""
    since: Time | None
    """Only turns at this time or later."""
    until: Time | None
    """Only turns before this time."""
    as_of: Time | None
    """Memory as it was at this time: what was superseded or had expired by then is left out, what came later too."""
    now: Time | None
    """What expired by this time is left out; the system's clock if left out."""
    stale: bool
    """Also return what a newer turn of the same subject superseded; False by default."""
    half_life: timedelta | int | None
    """Halves a score for every so much age, in milliseconds if it is a number; none by default: age breaks ties alone."""
    min_score: float
    """Hits that score less are left out; 0 by default."""
    min_relevance: float
    """Hits less relevant are left out, so that what nothing answers gives no hits; 0 by default.

    A threshold is chosen by trial.
    """
    filter: Filter | None
    """Only turns whose metadata this accepts."""
    follow_up: bool
    """Let a short question lean on what its session was about just now (the default)."""


def to_ms(when: Time) -> int:
    """Milliseconds since 1970."""
    if isinstance(when, datetime):
        if when.tzinfo is None:
            raise InvalidArgumentError(f"time {when}: it has no zone, expected one with tzinfo")
        return round(when.timestamp() * 1000)
    return when


def now_ms() -> int:
    """Milliseconds since 1970, now."""
    return time.time_ns() // 1_000_000


def _one_of(name: str, value: object, choices: dict[str, Any]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise InvalidArgumentError(f"{name} {value!r}: expected one of {', '.join(choices)}")
    return choices[value]


# Every option that is a fraction has 32 bits.
_LARGEST_FLOAT = (2 - 2.0**-23) * 2.0**127


def _take(kind: str, given: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(f"{kind}: unexpected option {', '.join(unknown)}")
    for name, value in given.items():
        if isinstance(value, float) and _LARGEST_FLOAT < abs(value) < inf:
            raise InvalidArgumentError(f"{kind}: {name} {value}, expected a number of 32 bits")
    return {name: value for name, value in given.items() if value is not None}


def _names(enum: Any) -> dict[str, Any]:
    return {member.name.lower(): member for member in enum}


_BACKENDS = _names(_native.Backend)
_EMBEDDER_PRECISIONS = _names(_native.EmbedderPrecision)
_MODES = _names(_native.FeedMode)
_POLICIES = _names(_native.Policy)
_PRECISIONS = _names(_native.PagePrecision)
_PREFILLS = _names(_native.Prefill)
_QUOTES = _names(_native.Quote)
_RECALLS = _names(_native.RecallPolicy)
ROLES = _names(_native.Role)
_RULES = _names(_native.PageRule)
_SCANS = _names(_native.LandmarkScan)


def _choose(given: dict[str, Any], name: str, choices: dict[str, Any]) -> None:
    if name in given:
        given[name] = _one_of(name, given[name], choices)


def engine_config(options: EngineOptions) -> Any:
    """The native record of `options`."""
    given = _take("open", dict(options), EngineOptions.__annotations__)
    model = given.get("model")
    if isinstance(model, str):
        given["model"] = _native.ModelSource.NAMED(name=model)
    elif model is not None:
        given["model"] = _native.ModelSource.PATH(path=os.fspath(model))
    embedder = given.get("embedder")
    if isinstance(embedder, os.PathLike):
        given["embedder"] = _native.EmbedderSource.FOLDER(path=os.fspath(embedder))
    elif embedder is not None:
        choices = {
            "hashed": _native.EmbedderSource.HASHED,
            "minilm": _native.EmbedderSource.MINI_LM,
        }
        given["embedder"] = _one_of("embedder", embedder, choices)()
    _choose(given, "embedder_precision", _EMBEDDER_PRECISIONS)
    _choose(given, "quote", _QUOTES)
    _choose(given, "recall", _RECALLS)
    _choose(given, "backend", _BACKENDS)
    if "pages" in given:
        pages = _take("pages", dict(given["pages"]), PageOptions.__annotations__)
        _choose(pages, "precision", _PRECISIONS)
        _choose(pages, "rule", _RULES)
        _choose(pages, "scan", _SCANS)
        _choose(pages, "prefill", _PREFILLS)
        given["pages"] = _native.PageConfig(**pages)
    if "hygiene" in given:
        hygiene = _take("hygiene", dict(given["hygiene"]), HygieneOptions.__annotations__)
        _choose(hygiene, "secrets", _POLICIES)
        _choose(hygiene, "personal", _POLICIES)
        given["hygiene"] = _native.Hygiene(**hygiene)
    return _native.EngineConfig(**given)


def send_options(options: SendOptions) -> Any:
    """The native record of `options`."""
    given = _take("send", dict(options), SendOptions.__annotations__)
    if "stop" in given:
        stop = given["stop"]
        given["stop"] = [stop] if isinstance(stop, str) else list(stop)
    if "time" in given:
        given["time_ms"] = to_ms(given.pop("time"))
    if "metadata" in given:
        given["metadata"] = _filter.metadata(given["metadata"])
    if "recall_filter" in given:
        given["recall_filter"] = _filter.native(given["recall_filter"])
    if "tools" in given:
        given["tools"] = _tools(given["tools"])
    if "grammar" in given:
        given["grammar"] = _grammar.native(given["grammar"])
    _choose(given, "recall", _RECALLS)
    return _native.SendOptions(**given)


def _tools(tools: Sequence[Mapping[str, Any] | str]) -> list[str]:
    """The JSON of each tool."""
    if isinstance(tools, (str, Mapping)):
        tools = [tools]
    written: list[str] = []
    for place, tool in enumerate(tools):
        if isinstance(tool, Mapping):
            tool = json.dumps(dict(tool), ensure_ascii=False)
        if not isinstance(tool, str):
            raise TypeError(f"tools[{place}]: {type(tool).__name__}, expected a dict or JSON")
        written.append(tool)
    return written


def tool_results(results: str | ToolResult | Sequence[str | ToolResult]) -> list[Any]:
    """The native records of `results`; a string is one without a name."""
    if isinstance(results, (str, ToolResult)):
        results = [results]
    # As with turns: a dict would give its keys for results, which the model would take for what its tools said.
    elif isinstance(results, (bytes, bytearray, Mapping, Set)) or not isinstance(results, Iterable):
        raise TypeError(
            f"results: {type(results).__name__}, expected str, ToolResult or a sequence of them"
        )
    given: list[Any] = []
    for place, result in enumerate(results):
        if isinstance(result, str):
            result = ToolResult(result)
        if not isinstance(result, ToolResult):
            kind = type(result).__name__
            raise TypeError(f"results[{place}]: {kind}, expected str or ToolResult")
        given.append(_native.ToolResult(content=result.content, name=result.name))
    return given


def feed_options(options: FeedOptions) -> Any:
    """The native record of `options`."""
    given = _take("feed", dict(options), FeedOptions.__annotations__)
    _choose(given, "mode", _MODES)
    _choose(given, "recall", _RECALLS)
    if "time" in given:
        given["time_ms"] = to_ms(given.pop("time"))
    if "metadata" in given:
        given["metadata"] = _filter.metadata(given["metadata"])
    return _native.FeedOptions(**given)


def _age_ms(age: timedelta | int) -> int:
    return round(age.total_seconds() * 1000) if isinstance(age, timedelta) else age


_CONVERTED: dict[str, Callable[[Any], object]] = {
    "since": to_ms,
    "until": to_ms,
    "as_of": to_ms,
    "now": to_ms,
    "half_life": _age_ms,
    "filter": _filter.to_json,
}


def recall_options(options: RecallOptions) -> dict[str, Any]:
    """`options` as a direct call takes them: times in milliseconds, a filter in JSON. It refuses what it does not know."""
    given: dict[str, Any] = dict(options)
    for name, value in options.items():
        convert = _CONVERTED.get(name)
        if convert is not None and value is not None:
            given[name] = convert(value)
    return given


def context_options(options: RecallOptions) -> Any:
    """The native record of `options`."""
    given = _take("context", dict(options), RecallOptions.__annotations__)
    for name in ("since", "until", "as_of", "now", "half_life"):
        if name in given:
            given[f"{name}_ms"] = _CONVERTED[name](given.pop(name))
    if "roles" in given:
        given["roles"] = [_one_of("role", role, ROLES) for role in given["roles"]]
    if "except_turns" in given:
        given["except_turns"] = list(given["except_turns"])
    if "filter" in given:
        given["filter"] = _filter.native(given["filter"])
    return _native.RecallOptions(**given)


def _each_turn(turns: str | NewTurn | Sequence[str | NewTurn]) -> list[NewTurn]:
    """`turns` one by one; what is neither text nor turn is refused before the library sees any."""
    if isinstance(turns, (str, NewTurn)):
        turns = [turns]
    # A mapping or a set can be walked through, and bytes too: what comes would be keys, no order, numbers.
    elif isinstance(turns, (bytes, bytearray, Mapping, Set)) or not isinstance(turns, Iterable):
        raise TypeError(
            f"turns: {type(turns).__name__}, expected str, NewTurn or a sequence of them"
        )
    each_turn: list[NewTurn] = []
    for place, turn in enumerate(turns):
        if isinstance(turn, str):
            turn = NewTurn(turn)
        if not isinstance(turn, NewTurn):
            raise TypeError(f"turns[{place}]: {type(turn).__name__}, expected str or NewTurn")
        if not isinstance(turn.text, str):
            raise TypeError(f"turns[{place}].text: {type(turn.text).__name__}, expected str")
        each_turn.append(turn)
    return each_turn


def new_turns(turns: str | NewTurn | Sequence[str | NewTurn]) -> list[Any]:
    """The native records of `turns`; a string is something that the user said now."""
    now = now_ms()
    return [
        _native.NewTurn(
            role=_one_of("role", turn.role, ROLES),
            text=turn.text,
            time_ms=now if turn.time is None else to_ms(turn.time),
            source=turn.source,
            remember=turn.remember,
            subject=turn.subject,
            expires_ms=None if turn.expires is None else to_ms(turn.expires),
            metadata=_filter.metadata(turn.metadata),
        )
        for turn in _each_turn(turns)
    ]


def scope(user: str, agent: str | None, session: str | None) -> Any:
    """The native scope."""
    return _native.Scope(user=user, agent=agent, session=session)


def export_scope(user: str | None, agent: str | None, session: str | None) -> Any:
    """The native scope; None without any of the three, which means every user."""
    if user is not None:
        return scope(user, agent, session)
    if agent is not None or session is not None:
        raise InvalidArgumentError("export: no user, expected one beside agent or session")
    return None


def forget(
    session: str | None,
    matching: str | None,
    filter: Filter | None,
    turn: int | Sequence[int] | None,
    before: Time | None,
    expired: Time | None,
    everything: bool,
) -> Any:
    """The native selector; exactly one of the six says what to erase."""
    kinds: Any = _native.Forget
    named: list[Any] = []
    if matching is not None:
        named.append(kinds.MATCHING(text=matching))
    if filter is not None:
        named.append(kinds.FILTER(filter=_filter.native(filter)))
    # Sequences too, of which each element would be taken for the number of a turn.
    if isinstance(turn, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"turn: {type(turn).__name__}, expected int or a sequence of them")
    if isinstance(turn, Sequence):
        named.append(kinds.TURNS(turns=list(turn)))
    elif turn is not None:
        named.append(kinds.TURN(turn=turn))
    if before is not None:
        named.append(kinds.BEFORE(time_ms=to_ms(before)))
    if expired is not None:
        named.append(kinds.EXPIRED(time_ms=to_ms(expired)))
    if everything:
        named.append(kinds.EVERYTHING() if session is None else kinds.SESSION())
    if len(named) != 1:
        raise InvalidArgumentError(
            f"forget: {len(named)} selectors,"
            " expected exactly one of matching, filter, turn, before, expired, everything"
        )
    return named[0]
