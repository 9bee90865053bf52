"""The package as installed: size, import, types, pickling, logging, documentation."""

from __future__ import annotations

import ast
import copy
import dataclasses
import inspect
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import mka
import pytest

EVERY_NAME = Path(__file__).parents[1] / "examples" / "every_name.py"


def test_the_package_is_the_installed_one_and_typed() -> None:
    folder = Path(mka.__file__).parent
    assert "site-packages" in folder.parts
    assert (folder / "py.typed").exists()
    assert mka.__version__.count(".") == 2


def test_every_public_name_and_method_is_documented() -> None:
    for name in mka.__all__:
        value = getattr(mka, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, name
        if inspect.isclass(value) and value.__module__.startswith("mka"):
            for method, function in vars(value).items():
                if inspect.isfunction(function) and not method.startswith("_"):
                    assert function.__doc__, f"{name}.{method}"


def test_the_typed_example_uses_every_public_name() -> None:
    tree = ast.parse(EVERY_NAME.read_text())
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "mka"
    }
    assert set(mka.__all__) - used == set()


@pytest.mark.parametrize("checker", ["mypy", "pyright"])
def test_the_typed_example_passes(checker: str, tmp_path: Path) -> None:
    strict = ["--strict", "--cache-dir", str(tmp_path)] if checker == "mypy" else []
    example = tmp_path / "every_name.py"
    example.write_text(EVERY_NAME.read_text())
    if checker == "pyright":
        (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
        strict = ["--pythonpath", sys.executable, "-p", str(tmp_path)]
    command = [sys.executable, "-m", checker, *strict]
    command += [str(example)] if checker == "mypy" else []
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_typed_example_runs(tmp_path: Path, tiny_model: Path) -> None:
    command = [sys.executable, str(EVERY_NAME), str(tmp_path / "store"), str(tiny_model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_brings_the_standard_library_alone() -> None:
    # What an import costs is printed and stands in docs/measured.md: a machine with other work on it has no say in a test.
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time(); import mka;"
        "alone = time.process_time() - start; late = 'asyncio' in sys.modules; from mka import *;"
        "whole = time.process_time() - start;"
        "print(f'import mka: {alone * 1000:.0f} ms of CPU time, with every name {whole * 1000:.0f}'); print(late);"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    cost, asyncio_is_in, roots = done.stdout.splitlines()
    print(cost)
    assert asyncio_is_in == "False"
    assert set(roots.split()) - sys.stdlib_module_names == {"mka"}


def test_names_that_are_imported_late_are_there() -> None:
    assert set(mka.__all__) <= set(dir(mka))
    for name in mka.__all__:
        assert getattr(mka, name) is getattr(mka, name)
    with pytest.raises(AttributeError, match="module 'mka' has no attribute 'opne'"):
        getattr(mka, "opne")


def test_results_are_equal_hashed_and_shown_by_their_fields() -> None:
    first, second = mka.Scope("ada", session="trip"), mka.Scope("ada", None, "trip")
    assert first == second and hash(first) == hash(second) and first is not second
    assert first != mka.Scope("ada") and first != ("ada", None, "trip")
    assert repr(first) == "Scope(user='ada', agent=None, session='trip')"
    # What cannot be hashed is compared alone.
    turn = mka.NewTurn("hello", metadata={"day": 1})
    assert hash(turn) == hash(mka.NewTurn("hello")) and turn != mka.NewTurn("hello")
    assert dataclasses.replace(first, agent="guide") == mka.Scope("ada", "guide", "trip")
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.user = "eve"  # type: ignore[misc]


def test_results_can_be_pickled_and_compared(store: Path) -> None:
    with mka.open_sync(store) as engine:
        engine.memory.remember("The hotel is in Kyoto.", user="ada", session="trip")
        values = [
            engine.memory.recall("hotel", user="ada"),
            engine.memory.chunks(user="ada"),
            engine.memory.turns(user="ada", session="trip"),
            engine.memory.sessions(user="ada"),
            engine.memory.stats(),
            engine.memory.forget(user="ada", everything=True),
        ]
    for value in values:
        assert pickle.loads(pickle.dumps(value)) == value
        assert hash(value if not isinstance(value, list) else tuple(value))
    error = pickle.loads(pickle.dumps(mka.LockedError("busy")))
    assert type(error) is mka.LockedError and str(error) == "busy"


def test_a_token_made_by_the_library_is_one_of_the_constructor(
    store: Path, tiny_model: Path
) -> None:
    with mka.open_sync(store, model=tiny_model, window_tokens=128, device="cpu") as engine:
        with engine.session(user="ada", session="trip") as chat:
            made = next(iter(chat.send("hello", max_new_tokens=4)))
    assert isinstance(made, mka.Token) and type(made) is mka.Token
    by_hand = mka.Token(made.text)
    assert made == by_hand and repr(made) == repr(by_hand) and hash(made) == hash(by_hand)
    assert dataclasses.asdict(made) == {"text": made.text}
    assert dataclasses.replace(made, text="x") == mka.Token("x")
    assert copy.copy(made) == made and pickle.loads(pickle.dumps(made)) == made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.text = "x"  # type: ignore[misc]


def test_a_hit_that_was_read_in_part_is_whole_in_every_way(store: Path) -> None:
    with mka.open_sync(store) as engine:
        turn = mka.NewTurn("The hôtel is in Kyoto.", source="märz")
        engine.memory.remember([turn], user="ädä", session="trip")

        def fresh() -> mka.Hit:
            return engine.memory.recall("Kyoto", user="ädä")[0]

        # Each field as the first that is asked for.
        for field in dataclasses.fields(mka.Hit):
            assert getattr(fresh(), field.name) == getattr(fresh(), field.name), field.name
        whole = fresh()
        assert len(whole.chunk) == 32 and int(whole.chunk, 16) and whole.trust == "user"
        assert whole.count == 1 and whole.stale is False and 0 < whole.relevance <= 1
        assert (whole.source.user, whole.source.agent, whole.source.name) == ("ädä", None, "märz")
        assert whole.source is whole.source and whole.why.bm25_rank == 1
        fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
        assert mka.Hit(**fields) == fresh()
        assert fresh() == whole and hash(fresh()) == hash(whole) and repr(fresh()) == repr(whole)
        assert dataclasses.asdict(fresh()) == dataclasses.asdict(whole)
        assert dataclasses.replace(fresh(), count=2).source == whole.source
        assert copy.copy(fresh()) == copy.deepcopy(fresh()) == whole
        assert pickle.loads(pickle.dumps(fresh())) == whole
        with pytest.raises(AttributeError, match="'Hit' object has no attribute 'nothing'"):
            fresh().nothing  # type: ignore[attr-defined]
        with pytest.raises(dataclasses.FrozenInstanceError):
            fresh().source = whole.source  # type: ignore[misc]


def test_messages_go_to_logging(
    store: Path, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mka.log_to_logging(logging.INFO)
    try:
        with caplog.at_level(logging.INFO, "mka"), mka.open_sync(
            store, model=tiny_model, window_tokens=128
        ):
            pass
    finally:
        mka.stop_logging()
    said = [record for record in caplog.records if record.name == "mka.engine"]
    assert said and said[0].getMessage().startswith("open model")


@pytest.mark.parametrize(
    ("target", "logger"),
    [
        ("mka", "mka"),
        ("mka::session", "mka.session"),
        ("mka_memory::store::open", "mka.memory.store.open"),
        ("mka_kernels", "mka.kernels"),
    ],
)
def test_messages_of_every_crate_come_under_one_logger(
    target: str, logger: str, caplog: pytest.LogCaptureFixture
) -> None:
    from mka._logging import _Sink
    from mka._native import mka_bindings as native

    with caplog.at_level(logging.WARNING, "mka"):
        _Sink().log(native.LogLevel.WARN, target, "50 % is said as it is")
    assert [(record.name, record.getMessage()) for record in caplog.records] == [
        (logger, "50 % is said as it is")
    ]
