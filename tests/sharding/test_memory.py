"""What a device holds falls as the fsdp axis grows, by the shardings of the state and by XLA's own account."""

from __future__ import annotations

import math
from typing import Any

import jax
import optax
import pytest
from mesh_cases import Case, compile_step, run_of

from mesh_transformer.config.model import ModelConfig
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import MeshConfig
from mesh_transformer.sharding.layout import layout_for
from mesh_transformer.train.state import abstract_state

WAYS = (2, 4, 8)


def fsdp(ways: int, zero: int) -> Case:
    return Case(mesh=MeshConfig(data=1, fsdp=ways, zero=zero), train={"remat": "full"})


def held(tree: Any) -> int:
    """Bytes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def held_of_6b(ways: int, zero: int) -> tuple[int, int]:
    """Parameters and moments of GPT-J-6B, in bytes on one device."""
    run = run_of(fsdp(ways, zero), preset("gpt-j-6b"))
    state = abstract_state(run, layout_for(run))
    (adam,) = (part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState))
    return held(state.params), held((adam.mu, adam.nu))


@pytest.mark.parametrize("zero", [1, 3])
def test_the_state_on_a_device_falls_as_one_over_n(zero: int) -> None:
    params, moments = held_of_6b(1, zero)
    assert moments == 2 * params
    for ways in WAYS:
        some_params, some_moments = held_of_6b(ways, zero)
        # A few biases have no axis that fsdp divides, and rest whole.
        assert some_moments == pytest.approx(moments / ways, rel=0.01)
        assert some_params == (params if zero == 1 else some_moments // 2)


@pytest.mark.long
def test_temporaries_do_not_grow_with_the_devices() -> None:
    """At the same number of sequences a device: what is gathered is one layer, however many hold it."""
    model = ModelConfig(n_layers=8, d_model=128, n_heads=4, n_vocab=512, n_ctx=32, d_rotary=8)
    temporaries = []
    for ways in WAYS:
        program = compile_step(run_of(fsdp(ways, 3), model, batch=2 * ways, sequence=32))
        temporaries.append(program.step.memory_analysis().temp_size_in_bytes)
    assert max(temporaries) <= 1.01 * temporaries[0]
