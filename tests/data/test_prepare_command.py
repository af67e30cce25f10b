"""`mesh-transformer prepare` as a user meets it: its report, --inspect, and what is left when it is ended."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mesh_transformer.cli.main import app

DEADLINE = 120.0


@pytest.fixture(autouse=True)
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """--workers sets it for the process, which here goes on."""
    monkeypatch.setenv("RAYON_NUM_THREADS", "2")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["prepare", *map(str, arguments)])


def test_the_report(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt.gz").write_bytes(gzip.compress(b"<|endoftext|>".join([b"some \xffwords"] * 9) + b" x"))
    (tmp_path / "in" / "notes.md").write_text("no")
    result = call(
        tmp_path / "in", "--out", tmp_path / "out" / "set", "--tokenizer", "bytes", "--sequence-length", 16,
        "--invalid-utf8", "skip", "--keep-tail", "--preserve-data-order", "--workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert lines[0] == "9 documents, 101 tokens"
    assert lines[1] == f"6 sequences in {tmp_path}/out/set_6.tfrecords, listed in {tmp_path}/out/set.index"
    assert lines[2].startswith("dropped: 0 tokens that did not fill a last sequence, 0 sequences")
    assert lines[3] == "also dropped or mended: 9 bytes that are not UTF-8"
    assert lines[4] == f"not text, skipped: {tmp_path}/in/notes.md"
    assert lines[5].startswith("read 0.0 MB in ") and lines[5].endswith(" MB/s")
    assert lines[6] == "first sequence: 'some words<|endoftext|>some w'"
    assert len(lines) == 7


def test_dropped_sequences_are_printed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x" * 40 + "some words of text, of which no letter comes often")
    result = call(
        tmp_path / "a.txt", "--out", tmp_path / "set", "--tokenizer", "bytes", "--sequence-length", 16,
        "--min-unique-tokens", 5, "--verbose", "--workers", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == f"dropped: {'x' * 17}\n" * 2


def test_inspect(tmp_path: Path) -> None:
    lines = [{"prompt": "Q", "completion": "yes"}, {"prompt": "why", "completion": "so"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = call(
        tmp_path / "a.jsonl", "--template", "plain", "--out", tmp_path / "set", "--tokenizer", "bytes",
        "--sequence-length", 7, "--preserve-data-order",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    records = tmp_path / "set_2.tfrecords"
    for spec in (records, tmp_path / "set.index"):
        result = call("--inspect", spec, "--limit", 1)
        assert result.exit_code == 0, result.output
        assert result.output.splitlines() == [
            f"--- {records}, record 0: 8 ids, 5 distinct, 4 learned, 1 ends of text",
            "-- not learned, 1 ids:",
            "Q",
            "-- learned, 4 ids:",
            "yes<|endoftext|>",
            "-- not learned, 3 ids: filled up with end of text",
            "2 records, 16 ids, 7 of them learned, 2 ends of text; tokenizer bytes",
        ]
    assert "so<|endoftext|>" in call("--inspect", records, "--limit", 2).output.splitlines()
    records.write_bytes(records.read_bytes()[:-3])
    assert "set_2.tfrecords, record 1" in str(call("--inspect", records).exception)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "no input given"),
        (["a.txt"], "--out is missing; expected DIR/NAME"),
        (["a.txt", "--inspect", "x.index"], "--inspect only reads"),
        (["--inspect", "lost.index"], "lost.index"),
    ],
)
def test_what_goes_together(arguments: list[str], says: str) -> None:
    result = call(*arguments)
    assert result.exit_code != 0 and says in str(result.exception)


def children(pid: int) -> set[int]:
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found |= {int(word) for word in task.read_text().split()}
    return found


def wait_for(what: str, condition: object) -> None:
    end = time.monotonic() + DEADLINE
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_when_ended_it_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    # Text that never ends: the process is certain to be in the middle of it.
    os.mkfifo(tmp_path / "a.txt")
    arguments = ["prepare", "a.txt", "--out", "set", "--tokenizer", "bytes", "--workers", "2"]
    process = subprocess.Popen([sys.executable, "-m", "mesh_transformer", *arguments], cwd=tmp_path)
    try:
        with (tmp_path / "a.txt").open("wb", buffering=0) as pipe:
            line = b"some words and no end " * 1000
            for _ in range(4_000_000 // len(line)):
                pipe.write(line)
            # Two workers, and the tracker of the module multiprocessing.
            wait_for("the workers", lambda: len(children(process.pid)) >= 3)
            workers = children(process.pid)
            process.send_signal(number)
            assert process.wait(DEADLINE) == (-number if number == signal.SIGKILL else 128 + number)
        wait_for("the workers' end", lambda: not any(is_running(pid) for pid in workers))
    finally:
        process.kill()
        process.wait()
    assert os.listdir(tmp_path) == ["a.txt"]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
