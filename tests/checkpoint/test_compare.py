"""Two models side by side: every tensor that differs, and by how much, whatever the formats."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from v1_cases import TINY

from legacy.generator import Truth, write_config, write_v1
from mesh_transformer.checkpoint import compare as compare_module
from mesh_transformer.checkpoint.compare import Difference, differences
from mesh_transformer.checkpoint.convert import TARGETS, Conversion, convert
from mesh_transformer.checkpoint.logical import logical_tensors
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.weights import InMemory, Weights, nested
from mesh_transformer.model.params import count_params

Made = tuple[Weights, Truth]


def open_step(path: Path, shards: int = 4, **options: Any) -> Made:
    arch = options.pop("arch", TINY)
    truth = write_v1(path, arch, shards, **options)
    write_config(path / "config.json", arch.config(shards))
    return open_weights(path), truth


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return open_step(tmp_path_factory.mktemp("compare") / "step_1201")


def changed(made: Made, path: str, change: Any) -> Weights:
    """The truth in memory with one parameter changed in place."""
    flat = {name: values.copy() for name, values in made[1].params.items()}
    change(flat[path])
    return InMemory(made[0].cfg, nested(flat))


def test_equal_in_every_format(made: Made, tmp_path: Path) -> None:
    assert differences(made[0], made[0]) == []
    for to in TARGETS[:3]:
        convert(made[0], tmp_path / to, Conversion(to=to))
        assert differences(made[0], open_weights(tmp_path / to)) == []


def test_one_value(made: Made) -> None:
    def change(values: np.ndarray) -> None:
        values[1, 2, 3, 1] += 0.25
        values[1, 31, 7, 3] -= 0.75

    (found,) = differences(made[0], changed(made, "layers/attn/k", change))
    before, after = made[1].params["layers/attn/k"], made[1].params["layers/attn/k"].copy()
    change(after)
    largest = float(np.abs(before.astype(np.float64) - after).max())
    name = "transformer.h.1.attn.k_proj.weight"
    assert found == Difference(name, (32, 32), (32, 32), 32 * 32, 2, largest)
    assert found.largest == pytest.approx(0.75)
    only = changed(made, "layers/attn/k", change)
    assert differences(made[0], only, names=["lm_head.bias"]) == []
    assert differences(made[0], only, names=[name]) == [found]


def test_a_change_of_the_embedding_bias_is_one_of_the_embedding(made: Made) -> None:
    def change(values: np.ndarray) -> None:
        values[5] += 1.0

    (found,) = differences(made[0], changed(made, "embed/bias", change))
    assert (found.name, found.n_values, found.n_different) == ("transformer.wte.weight", 48 * 32, 48)
    assert found.largest == pytest.approx(1.0)


@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_every_chunk_counts(made: Made, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_module, "_CHUNK", chunk)

    def change(values: np.ndarray) -> None:
        values[[0, 20, 47]] += [0.5, 2.0, 1.0]

    told: list[int] = []
    (found,) = differences(made[0], changed(made, "head/b", change), ["lm_head.bias"], progress=told.append)
    assert (found.n_different, found.n_values, sum(told)) == (3, 48, 48)
    assert found.largest == pytest.approx(2.0)


def test_the_whole_is_told_of(made: Made) -> None:
    told: list[int] = []
    differences(made[0], made[0], progress=told.append)
    assert sum(told) == count_params(made[0].cfg) - 32  # the embedding bias is in the embedding


def test_zeros_infinities_and_what_is_no_number(made: Made) -> None:
    hard = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.0]
    other = [-0.0, 0.0, np.nan, np.inf, -np.inf, 1.0]

    def put(values: list[float]) -> Weights:
        return changed(made, "head/b", lambda of: of.__setitem__(slice(0, 6), values))

    assert differences(put(hard), put(other)) == []
    for place, value in ((2, 0.0), (3, -np.inf), (5, np.nan)):
        changed_one = [*hard]
        changed_one[place] = value
        (found,) = differences(put(hard), put(changed_one))
        assert (found.n_different, found.largest) == (1, np.inf)


def test_a_rounded_copy(made: Made, tmp_path: Path) -> None:
    slim, truth = open_step(tmp_path / "step_1201", variant="slim")
    found = {difference.name: difference for difference in differences(made[0], slim)}
    assert found.keys() == {tensor.name for tensor in logical_tensors(slim.cfg)}
    error = np.abs(truth.params["head/w"].astype(np.float64) - made[1].params["head/w"])
    assert found["lm_head.weight"].largest == error.max()
    assert found["lm_head.weight"].n_different == np.count_nonzero(error)
    assert differences(slim, made[0]) == [
        dataclasses.replace(d, shape_a=d.shape_b, shape_b=d.shape_a) for d in differences(made[0], slim)
    ]


def test_other_shapes_and_other_tensors(made: Made, tmp_path: Path) -> None:
    deeper, _ = open_step(tmp_path / "deeper", arch=dataclasses.replace(TINY, layers=3, n_vocab=56))
    found = {difference.name: difference for difference in differences(made[0], deeper)}
    assert found["lm_head.weight"] == Difference("lm_head.weight", (32, 48), (32, 56))
    name = "transformer.h.2.ln_1.bias"
    assert found[name] == Difference(name, None, (32,))
    back = {difference.name: difference for difference in differences(deeper, made[0])}
    assert back[name] == Difference(name, (32,), None)
    # Another norm has no names in common with it.
    other, _ = open_step(tmp_path / "other", arch=dataclasses.replace(TINY, norm="rmsnorm"))
    names = [difference.name for difference in differences(made[0], other)]
    assert names == sorted(names, key=str.encode)
    assert {"layers/attn/q", "transformer.h.0.attn.q_proj.weight"} <= set(names)
