"""Checkpoints written and read by several processes at once, on any number of devices, and what goes wrong in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from checkpoint import many_cases
from mesh_transformer.checkpoint.native import CheckpointStore
from processes_cases import run_processes

BEGIN = """
import json, os, sys
from pathlib import Path
from mesh_transformer.processes import join
processes = join(lambda line: None)
import jax, jax.numpy as jnp
from checkpoint import many_cases
from mesh_transformer.checkpoint import arrays, native
from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.config.errors import MeshTransformerError
def store_at(directory, keep_last=9):
    return CheckpointStore(directory, keep_last, 0, processes=processes)
def save(store, step, wait=True):
    state = many_cases.place(step, many_cases.mesh(8, across=step % 2 == 0))
    store.save(step, state, metadata=many_cases.META, files={"tokenizer.json": b"{}"}, wait=wait)
    return state
"""

WRITE_AND_READ = """
store = store_at(sys.argv[1], keep_last=2)
for step in (1, 2, 3):
    state = save(store, step, wait=False)
    # The devices are busy with programs of all processes while the other threads agree on the checkpoint.
    work = jax.jit(lambda x: x + x.sum(), donate_argnums=0)
    x = state.pop("moments")["bias"]
    for _ in range(200):
        x = work(x).block_until_ready()  # Gloo hangs on programs that are queued
store.close()
bad = []
for step, across in ((2, False), (2, True), (3, False), (3, True)):
    found = store.restore(step, many_cases.abstract(many_cases.mesh(8, across=across)))
    bad += many_cases.differing(found, step)
single = CheckpointStore(sys.argv[2], 1, 0) if processes.is_first else None  # another process's, as it were
for across in (False, True):
    from mesh_transformer.checkpoint import opening
    found = opening.restore_state(Path(sys.argv[2], "7"), many_cases.abstract(many_cases.mesh(8, across=across)))
    bad += many_cases.differing(found, 7)
print(json.dumps([bad, store.steps(), store.newest_intact(print)]))
"""


def test_two_processes_write_and_any_number_of_devices_reads(tmp_path: Path) -> None:
    """Two processes of four devices, and one of eight, four, two and one, there and back."""
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    with CheckpointStore(alone, 1, 0) as store:
        store.save(7, many_cases.place(7, many_cases.mesh(8)), metadata=many_cases.META, files={})
    # Programs as users have them: what compiles quickly changes bits of bfloat16 numbers that are none.
    as_for_users = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    variables = dict.fromkeys(range(2), as_for_users)
    for ended in run_processes(BEGIN + WRITE_AND_READ, devices=4, arguments=[shared, alone], variables=variables):
        assert ended.status == 0, ended.stderr
        assert json.loads(ended.stdout.splitlines()[-1]) == [[], [2, 3], 3]
    assert sorted(entry.name for entry in shared.iterdir()) == ["2", "3"]
    parts = sorted(entry.name for entry in (shared / "3" / "state").glob("ocdbt.process_*"))
    assert parts == ["ocdbt.process_0", "ocdbt.process_1"]
    sizes = [sum(f.stat().st_size for f in (shared / "3" / "state" / part).rglob("*")) for part in parts]
    assert max(sizes) < 1.2 * min(sizes)  # each wrote its half, and no value twice
    store = CheckpointStore(shared, 2, 0)
    assert store.newest_intact(pytest.fail) == 3
    for n_devices in (8, 4, 2, 1):
        for across in (False, True):
            found = store.restore(2, many_cases.abstract(many_cases.mesh(n_devices, across=across)))
            assert many_cases.differing(found, 2) == []


FAULTS = """
store = store_at(sys.argv[1])
native._SHOWING = 0.3
save(store, 1)
start_write, finish_state, publish = arrays.start_write, [], native._publish
told = []

def attempt(step, what):
    try:
        what()
        told.append("no error")
    except Exception as error:
        told.append(f"{type(error).__name__}: {error}")
    processes.barrier("fault over")
    told.append(sorted(entry.name for entry in Path(sys.argv[1]).iterdir()))
    processes.barrier("next fault")

def full(*_):
    raise OSError(28, "No space left on device")

def full_at_the_end(directory, tree):
    finish = start_write(directory, tree)
    def fails():
        finish()
        full()
    return fails

if processes.index == 1:
    arrays.start_write = full_at_the_end
attempt(2, lambda: save(store, 2))
if processes.index == 1:
    arrays.start_write = full
attempt(2, lambda: save(store, 2))
arrays.start_write = start_write
if processes.index == 0:
    native._publish = full
attempt(2, lambda: save(store, 2))
native._publish = publish
mistake = {"params": {"w": 3.0}}
good = many_cases.place(2, many_cases.mesh(8))
attempt(2, lambda: store.save(2, mistake if processes.index else good, metadata=many_cases.META, files={}, wait=True))
attempt(2, lambda: save(store, 2))
attempt(2, lambda: store.close())

# A disk of its own in process 1.
own = store_at(Path(sys.argv[2], str(processes.index)))
attempt(3, lambda: save(own, 3))
lonely = Path(sys.argv[2], str(processes.index), "3")
os.makedirs(lonely.parent, exist_ok=True)
if processes.index == 0:
    os.symlink(Path(sys.argv[1], "2"), lonely)
attempt(3, lambda: own.newest_intact(print))

# A newest checkpoint that is damaged.
if processes.index == 0:
    Path(sys.argv[1], "2", "tokenizer.json").write_bytes(b"")
processes.barrier("damaged")
lines = []
told.append([store.newest_intact(lines.append), len(lines)])
print(json.dumps(told))
"""


def test_what_goes_wrong_in_one_process_is_raised_in_all_and_harms_nothing(tmp_path: Path) -> None:
    shared, own = tmp_path / "shared", tmp_path / "own"
    own.mkdir()
    ended = run_processes(BEGIN + FAULTS, devices=4, arguments=[shared, own])
    for index, each in enumerate(ended):
        assert each.status == 0, each.stderr
        told = json.loads(each.stdout.splitlines()[-1])
        errors, left, newest = told[:-1:2], told[1:-1:2], told[-1]
        full = f"{shared}: no space left on the disk for checkpoint 2; checkpoint 1 is intact\nFree space there"
        for error, failed in zip(errors[:3], (1, 1, 0), strict=True):
            assert error.startswith("CheckpointError: ")
            assert full in error and error.count("\n") == 1
            assert error.startswith(f"CheckpointError: process {failed} (host ") == (index != failed)
        assert ("TypeError: params/w is float" in errors[3]) and (errors[3].startswith("RunError: ") == (index == 0))
        assert errors[4:6] == ["no error", "no error"]
        assert left[:6] == [["1"]] * 4 + [["1", "2"]] * 2
        for error in errors[6:8]:
            assert error.startswith("CheckpointError: ") and "process 0 sees this directory, process 1 (host " in error
            assert "file system that all processes share" in error
        assert newest == [1, 1 if index == 0 else 0]
    assert [entry.name for entry in (own / "0").iterdir()] == ["3"] and not list((own / "1").iterdir())
