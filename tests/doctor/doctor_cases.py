"""A tiny run with data and checkpoints, which tests spoil in one respect each, and what the doctor says of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mesh_transformer.checkpoint.native import CheckpointStore
from mesh_transformer.config.load import load_run_config
from mesh_transformer.data.tfrecord import write_records
from mesh_transformer.doctor import Finding, Options, examine
from mesh_transformer.doctor.devices import Devices
from mesh_transformer.train.data import open_data
from mesh_transformer.train.state import abstract_state, saved_state

T = 16
CONFIG = """
name = "tiny"
[model]
n_layers = 1
d_model = 16
n_heads = 2
d_ff = 32
n_vocab = 300
n_ctx = 16
d_rotary = 4
[data]
train = "data/train.index"
validation = { held = "data/held.tfrecords" }
tokenizer = "bytes"
sequence_length = 16
[train]
steps = 8
batch_size = 4
learning_rate = 1e-3
checkpoint_every = 2
[mesh]
data = 1
[log]
directory = "runs"
"""
ONE_CPU = Devices(platform="cpu", kinds=("cpu",))


@dataclasses.dataclass(frozen=True)
class Case:
    """A directory with a configuration, its data and, in `runs/tiny`, maybe a run with checkpoints 2 and 4."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "tiny.toml"

    @property
    def run(self) -> Path:
        return self.path / "runs" / "tiny"

    def write_data(self, name: str, n: int, length: int = T, *, largest: int = 256) -> Path:
        """n records of length + 1 ids in one file under data/."""
        rows = np.random.default_rng(len(name)).integers(0, largest + 1, (n, length + 1))
        rows[0, 0] = largest
        path = self.path / "data" / name
        path.parent.mkdir(exist_ok=True)
        write_records(path, rows)
        return path

    def findings(
        self, *overrides: str, environment: Mapping[str, str] | None = None, devices: Devices = ONE_CPU, **options: Any
    ) -> list[Finding]:
        """The whole report, of devices that are given."""
        asked = Options(config=str(self.config), overrides=overrides, **options)
        variables = {"JAX_PLATFORMS": "cpu"} if environment is None else environment
        return list(examine(asked, variables, lambda: devices))

    def one(self, name: str, *overrides: str, **how: Any) -> Finding:
        """The one finding of that name."""
        return named(self.findings(*overrides, **how), name)


def named(findings: list[Finding], name: str) -> Finding:
    """The one of that name that says most: failed before warning before ok."""
    found = [finding for finding in findings if finding.name == name]
    assert found, [finding.name for finding in findings]
    return min(found, key=lambda finding: ["failed", "warning", "ok"].index(finding.status))


def check(finding: Finding, status: str, *message: str, mend: str) -> None:
    """Status, and what message and mend must hold."""
    assert finding.status == status, finding
    for part in message:
        assert part in finding.message, f"{part!r} is not in {finding.message!r}"
    assert mend in finding.mend, f"{mend!r} is not in {finding.mend!r}"


def make_case(path: Path) -> Case:
    """Configuration and data."""
    case = Case(path)
    case.config.write_text(CONFIG)
    case.write_data("a.tfrecords", 20)
    case.write_data("b.tfrecords", 12)
    case.write_data("held.tfrecords", 5)
    (path / "data" / "train.index").write_text("a.tfrecords\nb.tfrecords\n")
    return case


def add_checkpoints(case: Case) -> None:
    """What a run of four steps leaves that matters here, without its training."""
    import jax

    run, _ = load_run_config(case.config)
    state = jax.tree.map(lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype)), abstract_state(run))
    data = open_data(run)
    facts = {"model": run.model.to_dict(), "position": 0, "seed": run.seed, "data": data.record, "name": run.name}
    with CheckpointStore(case.run / "checkpoints", keep_last=3, keep_every=0) as store:
        for step in (2, 4):
            store.save(step, saved_state(state), metadata=facts, files={}, wait=True)


def everything(*places: Path) -> dict[str, tuple[int, bytes | None]]:
    """All files and directories below the places, with times of change and contents."""
    found = [path for place in places for path in [place, *place.rglob("*")] if path.exists()]
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in found}
