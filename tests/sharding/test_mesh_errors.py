"""Every refusal of a mesh names the numbers that do not fit and a value that does."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mesh_transformer.config.errors import ConfigError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
from mesh_transformer.sharding.mesh import Sizes, bubble_fraction, check_model, check_run, mesh_sizes

WAYS = st.integers(1, 12)
MODEL = ModelConfig(n_layers=12, d_model=48, n_heads=12, n_vocab=96, n_ctx=23, d_ff=96)


def a_run(sizes: Sizes, *, sequence: int = 12, shard_sequence: bool = False, **train: Any) -> RunConfig:
    return RunConfig(
        name="mesh",
        model=MODEL,
        data=DataConfig(train="unread", sequence_length=sequence),
        train=TrainConfig(steps=1, learning_rate=1.0, **train),
        mesh=MeshConfig(**dataclasses.asdict(sizes), shard_sequence=shard_sequence),
    )


def refused(error: ConfigError, *numbers: int) -> dict[str, int]:
    """What the message suggests, key -> value; it must be short and name all of `numbers`."""
    message = str(error)
    assert len(message.splitlines()) <= 2
    named = set(map(int, re.findall(r"-?\d+", message)))
    assert named >= set(numbers), message
    what = re.search(r"; (?P<mend>[^;]*) would do$", message)
    assert what, message
    pairs = re.findall(r"((?:\w+\.\w+ = )+)(-?\d+)", what["mend"])
    found = {key: int(value) for keys, value in pairs for key in keys.split(" = ") if key}
    if not found:  # a bare number is a value of the key that the message is about
        (key,) = re.findall(r"(train\.pipeline_microbatches|data\.sequence_length) =", message)
        found = {key: int(what["mend"])}
    return found


def as_fields(found: dict[str, int], room: str) -> dict[str, int]:
    assert all(key.startswith(f"{room}.") for key in found), found
    return {key.partition(".")[2]: value for key, value in found.items()}


@given(fsdp=WAYS, tensor=WAYS, pipeline=WAYS, n_devices=st.integers(1, 64))
def test_axes_that_do_not_divide_the_devices(fsdp: int, tensor: int, pipeline: int, n_devices: int) -> None:
    mesh = MeshConfig(fsdp=fsdp, tensor=tensor, pipeline=pipeline)
    if n_devices % (fsdp * tensor * pipeline) == 0:
        assert mesh_sizes(mesh, n_devices).n_devices == n_devices
        return
    with pytest.raises(ConfigError) as error:
        mesh_sizes(mesh, n_devices)
    better = as_fields(refused(error.value, fsdp * tensor * pipeline, n_devices), "mesh")
    assert mesh_sizes(dataclasses.replace(mesh, **better), n_devices).n_devices == n_devices


@given(sizes=st.tuples(WAYS, WAYS, WAYS, WAYS), n_devices=st.integers(1, 64), all_devices=st.booleans())
def test_a_whole_mesh_that_is_too_large_or_too_small(sizes: tuple[int, ...], n_devices: int, all_devices: bool) -> None:
    data, fsdp, tensor, pipeline = sizes
    mesh, product = MeshConfig(data=data, fsdp=fsdp, tensor=tensor, pipeline=pipeline), data * fsdp * tensor * pipeline
    if product == n_devices or (product < n_devices and not all_devices):
        assert mesh_sizes(mesh, n_devices, all_devices=all_devices).n_devices == product
        return
    with pytest.raises(ConfigError) as error:
        mesh_sizes(mesh, n_devices, all_devices=all_devices)
    better = as_fields(refused(error.value, product, n_devices), "mesh")
    assert mesh_sizes(dataclasses.replace(mesh, **better), n_devices, all_devices=True).n_devices == n_devices


@pytest.mark.parametrize(
    ("axis", "field"),
    [
        ("tensor", "n_heads"),
        ("tensor", "d_ff"),
        ("tensor", "n_vocab"),
        ("pipeline", "n_layers"),
        ("fsdp", "d_model"),
    ],
)
@given(ways=st.integers(2, 40), size=st.integers(1, 200))
def test_widths_of_the_model(axis: str, field: str, ways: int, size: int) -> None:
    assume(size % ways)
    # Everything else is a multiple of `ways`, so that `field` alone does not fit; a head has one fixed width.
    fields = dict.fromkeys(("n_heads", "d_ff", "n_vocab", "n_layers", "d_model"), 2 * ways) | {field: size}
    cfg = ModelConfig(**fields, n_ctx=8, d_head=2)
    with pytest.raises(ConfigError, match=rf"model\.{field}") as error:
        check_model(Sizes(**{axis: ways}), cfg)
    check_model(Sizes(**as_fields(refused(error.value, ways, size), "mesh")), cfg)


def test_heads_of_v2_are_its_shards() -> None:
    cfg = ModelConfig(
        architecture="v2", n_layers=2, d_model=32, n_heads=8, n_shards=4, n_vocab=48, n_ctx=16, d_rotary=2
    )
    with pytest.raises(ConfigError, match=r"model\.n_shards") as error:
        check_model(Sizes(tensor=8), cfg)
    check_model(Sizes(**as_fields(refused(error.value, 8, 4), "mesh")), cfg)


def test_a_norm_of_its_own_in_every_shard_has_one_shard() -> None:
    cfg = dataclasses.replace(MODEL, norm="layernorm-desync")
    check_model(Sizes(fsdp=4, pipeline=2), cfg)
    with pytest.raises(ConfigError, match=r"mesh\.tensor = 2: .* expected mesh\.tensor = 1$"):
        check_model(Sizes(tensor=2), cfg)


@given(data=WAYS, fsdp=st.sampled_from([1, 2, 3, 4, 6]), parts=WAYS, per_part=st.integers(1, 60))
def test_a_batch_that_the_devices_cannot_share(data: int, fsdp: int, parts: int, per_part: int) -> None:
    sizes, batch = Sizes(data=data, fsdp=fsdp), parts * per_part
    run = a_run(sizes, batch_size=batch, gradient_accumulation=parts)
    if per_part % (data * fsdp) == 0:
        check_run(sizes, run)
        return
    with pytest.raises(ConfigError) as error:
        check_run(sizes, run)
    better = as_fields(refused(error.value, batch, data * fsdp * parts), "train")
    check_run(sizes, dataclasses.replace(run, train=dataclasses.replace(run.train, **better)))


@given(pipeline=st.sampled_from([2, 3, 4, 6, 12]), data=WAYS, rows=st.integers(1, 60))
def test_a_batch_that_the_stages_cannot_cut(pipeline: int, data: int, rows: int) -> None:
    assume(rows % pipeline)
    sizes = Sizes(pipeline=pipeline, data=data)
    run = a_run(sizes, batch_size=rows * data)
    with pytest.raises(ConfigError) as error:
        check_run(sizes, run)
    better = as_fields(refused(error.value, pipeline, rows), "train")
    check_run(sizes, dataclasses.replace(run, train=dataclasses.replace(run.train, **better)))


@given(pipeline=st.sampled_from([2, 3, 4, 6, 12]), data=WAYS, several=st.integers(1, 8), given_=st.integers(1, 60))
def test_microbatches(pipeline: int, data: int, several: int, given_: int) -> None:
    rows = several * pipeline
    sizes = Sizes(pipeline=pipeline, data=data)
    run = a_run(sizes, batch_size=rows * data, pipeline_microbatches=given_)
    if given_ % pipeline == 0 and rows % given_ == 0:
        check_run(sizes, run)
        return
    with pytest.raises(ConfigError) as error:
        check_run(sizes, run)
    better = as_fields(refused(error.value, given_), "train")
    check_run(sizes, dataclasses.replace(run, train=dataclasses.replace(run.train, **better)))


@given(tensor=st.sampled_from([2, 3, 4, 6, 12]), sequence=st.integers(1, MODEL.n_ctx))
def test_a_sequence_that_tensor_cannot_split(tensor: int, sequence: int) -> None:
    assume(sequence > tensor and sequence % tensor)
    sizes = Sizes(tensor=tensor)
    run = a_run(sizes, sequence=sequence, shard_sequence=True)
    with pytest.raises(ConfigError) as error:
        check_run(sizes, run)
    better = as_fields(refused(error.value, tensor, sequence), "data")
    check_run(sizes, dataclasses.replace(run, data=dataclasses.replace(run.data, **better)))


@given(pipeline=st.sampled_from([1, 2, 3, 4]), held=st.integers(1, 12), rounds=st.integers(1, 15))
def test_rounds_of_a_pipeline(pipeline: int, held: int, rounds: int) -> None:
    sizes = Sizes(pipeline=pipeline)
    run = a_run(sizes, batch_size=pipeline, pipeline_interleave=rounds)
    run = dataclasses.replace(run, model=dataclasses.replace(MODEL, n_layers=held * pipeline))
    if (pipeline > 1 and held % rounds == 0) or (pipeline == 1 and rounds == 1):
        check_run(sizes, run)
        return
    with pytest.raises(ConfigError) as error:
        check_run(sizes, run)
    if pipeline == 1:
        assert str(error.value).startswith(f"train.pipeline_interleave = {rounds} needs stages, and mesh.pipeline is 1")
        return
    assert str(error.value).startswith(f"train.pipeline_interleave = {rounds} must divide the {held} layers of a stage")
    fits = int(re.search(r"; (\d+) would do$", str(error.value))[1])  # type: ignore[index]
    check_run(sizes, dataclasses.replace(run, train=dataclasses.replace(run.train, pipeline_interleave=fits)))


def test_what_a_pipeline_leaves_idle() -> None:
    """Counted in the ticks of the schedule: a stage works in rounds x microbatches of them."""
    for stages, microbatches, rounds in ((4, 8, 1), (4, 8, 2), (2, 2, 4)):
        ticks = rounds * microbatches + stages - 1
        assert bubble_fraction(stages, microbatches, rounds) == pytest.approx(1 - rounds * microbatches / ticks)
    assert bubble_fraction(4, 16) == pytest.approx(3 / 19)
