"""Examples: the README's are the files', and each program runs over the tiny model."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"
MODEL = '"HuggingFaceTB/SmolLM2-135M-Instruct"'


def block(readme: str, language: str) -> str:
    return readme.split(f"```{language}\n", 1)[1].split("```", 1)[0].strip()


def marked(source: str, mark: str) -> str:
    return textwrap.dedent(source.split(f"{mark}\n")[1].rpartition("\n")[0]).strip()


def run(folder: Path, *command: object, feed: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=folder, input=feed
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_readme_shows_the_example_that_is_run(root: Path) -> None:
    source = (EXAMPLES / "readme.py").read_text()
    readme = (root / "README.md").read_text()
    assert block(readme, "python") == marked(source, "# README")
    swift = (root / "bindings/swift/Tests/MKATests/ReadmeTests.swift").read_text()
    assert block(readme, "swift") == marked(swift, "// README")


def test_the_readmes_example_runs(tmp_path: Path, tiny_model: Path) -> None:
    source = (EXAMPLES / "readme.py").read_text()
    assert source.count(MODEL) == 1
    tiny = tmp_path / "readme.py"
    tiny.write_text(source.replace(MODEL, f"{str(tiny_model)!r}, window_tokens=128"))
    assert "reused 0 of" in run(tmp_path, tiny)
    assert "reused 0 of" not in run(tmp_path, tiny)


def test_the_chat_answers_one_message_and_many(tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--window", 128, "--max-new-tokens", 4]
    run(tmp_path, EXAMPLES / "chat.py", *options, "--prompt", "hello")
    run(tmp_path, EXAMPLES / "chat.py", *options, feed="hello\nand again\n")


def test_the_chat_ends_by_ctrl_c_while_it_waits_for_a_line(tmp_path: Path, tiny_model: Path) -> None:
    options = ["--model", tiny_model, "--window", 128, "--max-new-tokens", 4]
    command = [sys.executable, *map(str, [EXAMPLES / "chat.py", *options])]
    pipe = subprocess.PIPE

    def heard() -> None:
        # What a shell runs in the background ignores Ctrl-C, and so would what this starts.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=tmp_path, text=True, stdin=pipe, stdout=pipe, stderr=pipe, preexec_fn=heard
    ) as chat:
        try:
            assert chat.stdin and chat.stdout and chat.stderr
            # A blank line is no message.
            chat.stdin.write("\nhello\n")
            chat.stdin.flush()
            assert chat.stdout.readline().endswith("\n")
            chat.send_signal(signal.SIGINT)
            assert chat.wait(timeout=60) == 0
            assert "error" not in chat.stderr.read()
        finally:
            chat.kill()


def test_a_long_document_is_fed_and_asked_about(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "book.txt").write_text("The sheep went up the hill. " * 500)
    options = ["--model", tiny_model, "--window", 128, "--max-new-tokens", 4]
    said = run(
        tmp_path, EXAMPLES / "long_document.py", *options, "--text", "book.txt", "--ask", "Who?"
    )
    assert "chunks" in said and "? Who?" in said


def test_the_conversation_gives_the_same_events_as_in_rust(
    tmp_path: Path, root: Path, tiny_model: Path
) -> None:
    data = root / "bindings/tests/data"
    script, expected = data / "conversation.json", (data / "conversation.txt").read_text()
    program = EXAMPLES / "conversation.py"
    assert run(tmp_path, program, "whole.mka", tiny_model, script, 0, 99) == expected
    # Cut in three: each part opens the store that the part before it closed.
    parts = [(0, 3), (3, 6), (6, 99)]
    said = [run(tmp_path, program, "parts.mka", tiny_model, script, *part) for part in parts]
    assert "".join(said) == expected


def test_the_agent_remembers_and_forgets(tmp_path: Path) -> None:
    said = run(tmp_path, EXAMPLES / "agent_loop.py")
    assert "Sakura Inn" in said and "9:14" in said and "passport gone: True" in said
