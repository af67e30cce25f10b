"""Kills, damaged files and full disks: the newest intact checkpoint is never lost and always found."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh_transformer.checkpoint import arrays, native, opening
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.presets import preset
from mesh_transformer.files import is_out_of_space

META = {"model": preset("gpt-j-tiny").to_dict()}
WANTED = {"w": jax.ShapeDtypeStruct((2000,), jnp.float32)}


def save(store: CheckpointStore, step: int, n: int = 2000, wait: bool = True) -> None:
    state = {"params": {"w": jnp.full((n,), step, jnp.float32)}, "m": jnp.zeros((3,), jnp.bfloat16)}
    store.save(step, state, metadata=META, files={"tokenizer.json": b"{}"}, wait=wait)


# One process imports once and then forks, before any thread or device exists, a child for each trial.
TRIALS = """
import itertools, os, random, signal, sys, time
import jax, jax.numpy as jnp, orbax.checkpoint
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.config.presets import preset

directory, n_trials, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
META = {"model": preset("gpt-j-tiny").to_dict()}
rng = random.Random(seed)

def child(path, out):
    with CheckpointStore(path, keep_last=1, keep_every=0) as store:
        for n in itertools.count():
            step = 1 + n - (n + 1) // 3  # every third save replaces a step that is there: 1 2 2 3 4 4 5
            state = {"params": {"w": jnp.full((2000,), step, jnp.float32)}, "m": jnp.zeros((3,), jnp.bfloat16)}
            store.save(step, state, metadata=META, files={"tokenizer.json": b"{}"}, wait=True)
            os.write(out, b"%d\\n" % step)

for trial in range(n_trials):
    path = f"{directory}/{trial}"
    r, w = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(r)
        child(path, w)
    os.close(w)
    told = os.read(r, 100)
    time.sleep(rng.uniform(0, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while more := os.read(r, 4096):
        told += more
    print(told.split()[-1].decode(), flush=True)
"""


def test_a_kill_at_any_moment_loses_no_finished_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", TRIALS, str(tmp_path), "8", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"XLA_FLAGS": ""})
    assert done.returncode == 0, done.stderr
    finished = [int(line) for line in done.stdout.split()]
    assert len(finished) == 8
    for trial, told in enumerate(finished):
        reported: list[str] = []
        newest = opening.newest_intact(tmp_path / str(trial), reported.append)  # nothing is cleared away yet
        assert newest is not None and newest >= told and not reported
        store = CheckpointStore(tmp_path / str(trial), 1, 0)
        assert store.newest_intact(pytest.fail) == newest
        assert not [entry.name for entry in store.directory.iterdir() if entry.name.startswith(".")]
        np.testing.assert_array_equal(store.restore_params(newest, WANTED)["w"], np.full(2000, newest, np.float32))
        save(store, newest + 1)
        assert store.steps() == [newest + 1]


def test_a_flipped_bit_in_any_file_is_found_and_the_one_before_used(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, 0)
    for step in (1, 2):
        save(store, step)
    rng = random.Random(0)
    files = sorted(path for path in store.path(2).rglob("*") if path.is_file() and path.stat().st_size)
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        for bit in {0, 8 * len(good) - 1, *(rng.randrange(8 * len(good)) for _ in range(10))}:
            bad = bytearray(good)
            bad[bit // 8] ^= 1 << bit % 8
            path.write_bytes(bad)
            reported: list[str] = []
            assert store.newest_intact(reported.append) == 1
            assert len(reported) == 1 and path.name in reported[0]
        path.write_bytes(good)
    assert store.newest_intact(pytest.fail) == 2


def test_a_half_written_step_is_reported_and_left_alone(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, 2, 0)
    save(store, 1)
    (tmp_path / "2" / "state").mkdir(parents=True)
    reported: list[str] = []
    assert store.newest_intact(reported.append) == 1
    assert len(reported) == 1 and str(tmp_path / "2" / "manifest.json") in reported[0]
    assert store.steps() == [1] and (tmp_path / "2" / "state").is_dir()


NO_SPACE = "RESOURCE_EXHAUSTED: Error writing: Failed to write 8 bytes: No space left on device [os_error_code='28']"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError(NO_SPACE)])
@pytest.mark.parametrize("where", ["arrays", "manifest", "rename"])
def test_a_full_disk_is_told_and_harms_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    store = CheckpointStore(tmp_path / "full", 1, 0)
    save(store, 1)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        if where == "arrays":
            patch.setattr(arrays, "start_write", lambda directory, tree: fail)
        else:
            patch.setattr(native, {"manifest": "write_manifest", "rename": "_publish"}[where], fail)
        save(store, 2, wait=False)
        with pytest.raises(CheckpointError) as caught:
            save(store, 3)
    message = str(caught.value)
    assert str(tmp_path / "full") in message and "no space left" in message
    assert "checkpoint 1 is intact" in message and "Free space" in message and message.count("\n") == 1
    assert [entry.name for entry in store.directory.iterdir()] == ["1"]
    store.close()  # told once
    save(store, 2)
    assert store.steps() == [2]


def test_a_fault_before_anything_is_under_way_is_raised_by_save_itself(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    store = CheckpointStore(tmp_path / "file" / "checkpoints", 1, 0)
    with pytest.raises(CheckpointError, match=r"checkpoint 1 could not be written.*no earlier checkpoint"):
        save(store, 1, wait=False)


def test_other_faults_are_not_dressed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("a mistake of ours")

    monkeypatch.setattr(native, "fsync_tree", fail)
    store = CheckpointStore(tmp_path, 1, 0)
    with pytest.raises(ZeroDivisionError):
        save(store, 1)
    assert list(tmp_path.iterdir()) == []
    memory = RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes")
    assert not is_out_of_space(memory)


def test_an_error_under_way_does_not_hide_what_ended_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(native, "write_manifest", fail)
    with pytest.raises(KeyError) as caught, CheckpointStore(tmp_path, 1, 0) as store:
        save(store, 1, wait=False)
        raise KeyError("the news")
    assert "Input/output error" in caught.value.__notes__[0]


@pytest.mark.parametrize("tiny_disk", ["2m"], indirect=True)
def test_a_disk_that_is_really_full(tiny_disk: Path, capfd: pytest.CaptureFixture[str]) -> None:
    store = CheckpointStore(tiny_disk / "checkpoints", 1, 0)
    save(store, 1)
    save(store, 2, n=1_000_000, wait=False)
    with pytest.raises(CheckpointError, match="no space left on the disk for checkpoint 2; checkpoint 1 is intact"):
        store.close()
    assert [entry.name for entry in store.directory.iterdir()] == ["1"]
    # Full to the last byte: the small files fail too, wherever.
    with (tiny_disk / "ballast").open("wb", buffering=0) as ballast:
        while True:
            try:
                ballast.write(b"\0" * 4096)
            except OSError:
                break
    with pytest.raises(CheckpointError, match="checkpoint 1 is intact"):
        save(store, 2)
    assert store.newest_intact(pytest.fail) == 1
    (tiny_disk / "ballast").unlink()
    save(store, 2)
    assert store.steps() == [2]
    assert capfd.readouterr() == ("", "")
