"""The parameter table: names, shapes, counts, initial values and what weight decay touches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mesh_transformer.config.model import ModelConfig, Norm, Position
from mesh_transformer.config.presets import PRESETS
from mesh_transformer.model import params as table
from mesh_transformer.model.decoder import forward
from mesh_transformer.model.policy import ComputePolicy

SIX_B = PRESETS["gpt-j-6b"]
# Every axis has a size of its own; large enough that the widths of random values can be measured.
SMALL = ModelConfig(n_layers=4, d_model=128, n_heads=32, d_head=8, d_ff=384, n_vocab=1024, n_ctx=160, position="fixed")

# Standard deviation of a unit normal cut at two: sqrt(1 - 2 * 2 phi(2) / (2 Phi(2) - 1)).
CUT = math.sqrt(1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(2 / math.sqrt(2)))


def by_name(tree: Any) -> dict[str, Any]:
    return {table.path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def expected_shapes(norm: str, position: str) -> dict[str, tuple[int, ...]]:
    """SMALL's parameters, by hand."""
    shapes: dict[str, tuple[int, ...]] = {
        "embed/tokens": (1024, 128),
        "embed/bias": (128,),
        "layers/attn/q": (4, 128, 32, 8),
        "layers/attn/k": (4, 128, 32, 8),
        "layers/attn/v": (4, 128, 32, 8),
        "layers/attn/o": (4, 32, 8, 128),
        "layers/mlp/w_in": (4, 128, 384),
        "layers/mlp/b_in": (4, 384),
        "layers/mlp/w_out": (4, 384, 128),
        "layers/mlp/b_out": (4, 128),
        "head/w": (128, 1024),
        "head/b": (1024,),
    }
    width = () if norm in ("scalenorm", "scalenorm-bias") else (128,)
    shapes |= {"layers/ln_1/scale": (4, *width), "head/ln/scale": width}
    if norm in ("layernorm", "layernorm-desync", "rmsnorm-bias", "scalenorm-bias"):
        shapes |= {"layers/ln_1/bias": (4, *width), "head/ln/bias": width}
    return shapes | {"fixed": {"embed/positions": (160, 128)}, "t5": {"relative/bias": (32, 32)}}.get(position, {})


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("norm", get_args(Norm))
def test_every_parameter_of_every_variant(norm: str, position: str) -> None:
    cfg = dataclasses.replace(SMALL, norm=norm, position=position, d_rotary=0)
    shapes = expected_shapes(norm, position)
    assert {name: a.shape for name, a in by_name(table.abstract_params(cfg)).items()} == shapes
    assert table.count_params(cfg) == sum(math.prod(s) for s in shapes.values())
    made = by_name(table.init_params(cfg, jax.random.key(0)))
    assert {name: a.shape for name, a in made.items()} == shapes
    scale = 1.0 if norm.startswith("layernorm") or norm == "rms" else 128**0.5
    for name, value in made.items():
        if name.endswith("/scale"):
            np.testing.assert_array_equal(value, np.float32(scale))
        elif name in NO_DECAY:
            np.testing.assert_array_equal(value, 0)
        else:
            assert np.std(value) > 0


DECAY = {
    "embed/tokens",
    "embed/positions",
    "relative/bias",
    *(f"layers/attn/{name}" for name in "qkvo"),
    "layers/mlp/w_in",
    "layers/mlp/w_out",
    "head/w",
}
NO_DECAY = {
    "embed/bias",
    "layers/ln_1/scale",
    "layers/ln_1/bias",
    "layers/mlp/b_in",
    "layers/mlp/b_out",
    "head/ln/scale",
    "head/ln/bias",
    "head/b",
}


@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "scalenorm-bias"])
def test_weight_decay_is_for_matrices_and_tables(norm: str, position: str) -> None:
    cfg = dataclasses.replace(SMALL, norm=norm, position=position, d_rotary=0)
    mask = by_name(table.decay_mask(cfg))
    assert set(mask) <= DECAY | NO_DECAY
    assert {name for name, decays in mask.items() if decays} == DECAY & set(mask)


# ------------------------------------------------------------------------------------------ GPT-J 6B


def test_gpt_j_has_its_published_number_of_parameters() -> None:
    assert table.count_params(SIX_B) == 6_050_886_880
    assert table.count_params(SIX_B) - table.size(table.named_specs(SIX_B)["embed/bias"], SIX_B) == 6_050_882_784


def test_matrices_that_a_token_is_multiplied_with() -> None:
    per_layer = 4 * 4096 * 4096 + 2 * 4096 * 16384
    assert table.count_matmul_params(SIX_B) == 28 * per_layer + 4096 * 50400


def test_shapes_of_gpt_j_without_an_array() -> None:
    made = jax.eval_shape(lambda: table.init_params(SIX_B, jax.random.key(0)))
    assert {name: a.shape for name, a in by_name(made).items()} == {
        "embed/tokens": (50400, 4096),
        "embed/bias": (4096,),
        "layers/ln_1/scale": (28, 4096),
        "layers/ln_1/bias": (28, 4096),
        "layers/attn/q": (28, 4096, 16, 256),
        "layers/attn/k": (28, 4096, 16, 256),
        "layers/attn/v": (28, 4096, 16, 256),
        "layers/attn/o": (28, 16, 256, 4096),
        "layers/mlp/w_in": (28, 4096, 16384),
        "layers/mlp/b_in": (28, 16384),
        "layers/mlp/w_out": (28, 16384, 4096),
        "layers/mlp/b_out": (28, 4096),
        "head/ln/scale": (4096,),
        "head/ln/bias": (4096,),
        "head/w": (4096, 50400),
        "head/b": (50400,),
    }
    assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(made))
    assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
        lambda a: (a.shape, a.dtype), table.abstract_params(SIX_B)
    )
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    logits = jax.eval_shape(lambda p, t: forward(p, t, SIX_B, ComputePolicy(dtype="bfloat16")), made, ids)
    assert (logits.shape, logits.dtype) == ((1, 2048, 50400), jnp.float32)


def test_the_other_shapes_of_the_original_are_as_large_as_their_names() -> None:
    for name, billions in {"2.7b": 3.0, "4.8b": 5.3, "10b": 10.6, "13b": 13.3, "23b": 23.4}.items():
        assert table.count_params(PRESETS[f"gpt-j-{name}"]) / 1e9 == pytest.approx(billions, rel=0.02)


# ------------------------------------------------------------------------------------------ first values


def initial(cfg: ModelConfig, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    return by_name(table.init_params(cfg, jax.random.key(seed), dtype))


@pytest.mark.parametrize("position", ["fixed", "t5"])
def test_widths_of_the_first_values(position: Any) -> None:
    made = initial(dataclasses.replace(SMALL, position=position))
    per_input = 1 / math.sqrt(128)
    expected = {
        "embed/tokens": 1 / math.sqrt(1024),
        "embed/positions": 0.02,
        "relative/bias": 0.02,
        "layers/attn/q": per_input,
        "layers/attn/k": per_input,
        "layers/attn/v": per_input,
        "layers/mlp/w_in": per_input,
        "layers/attn/o": 2 / 4 / math.sqrt(128),
        "layers/mlp/w_out": 2 / 4 / math.sqrt(128),  # by the square root of d_model, not of d_ff
        "head/w": per_input,
    }
    random = {name: value for name, value in made.items() if name not in NO_DECAY}
    assert set(random) == set(expected) - {"relative/bias" if position == "fixed" else "embed/positions"}
    for name, value in random.items():
        units = np.asarray(value, np.float64) / expected[name]
        assert units.std() == pytest.approx(CUT, rel=4 / math.sqrt(2 * units.size)), name
        assert abs(units.mean()) < 4 * CUT / math.sqrt(units.size), name
        assert 1.9 < np.abs(units).max() <= 2.0 + 1e-6, name  # cut at two, and not scaled up again
    assert pytest.approx(0.8796, abs=1e-4) == CUT


def test_first_values_depend_on_the_seed_and_the_name() -> None:
    a, again, b = initial(SMALL, 0), initial(SMALL, 0), initial(SMALL, 1)
    for name in a:
        np.testing.assert_array_equal(a[name], again[name])
        assert np.array_equal(a[name], b[name]) == (name in NO_DECAY)
    assert not np.array_equal(a["layers/attn/q"], a["layers/attn/k"])
    assert not np.array_equal(a["layers/attn/q"][0], a["layers/attn/q"][1])


def test_first_values_in_bfloat16_are_the_rounded_ones() -> None:
    wide, narrow = initial(SMALL), initial(SMALL, dtype=jnp.bfloat16)
    for name in wide:
        assert narrow[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(narrow[name], wide[name].astype(jnp.bfloat16))


def test_first_values_do_not_depend_on_the_mesh() -> None:
    cfg = ModelConfig(n_layers=2, d_model=32, n_heads=8, n_vocab=64, n_ctx=16, d_rotary=4)
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    where = {"vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor", "embed": "data"}
    shardings = table.map_table(
        lambda spec: NamedSharding(mesh, PartitionSpec(*(where.get(axis) for axis in spec.axes))), cfg
    )

    def some(tree: Any) -> Any:  # of every kind one: compiling the random numbers of all takes long
        return tree["embed"]["tokens"], tree["layers"]["attn"]["o"], tree["layers"]["mlp"]["w_in"], tree["head"]["b"]

    make = lambda key: some(table.init_params(cfg, key))  # noqa: E731
    sharded = jax.jit(make, out_shardings=some(shardings))(jax.random.key(5))
    assert sharded[2].addressable_shards[0].data.shape == (2, 16, 32)
    for ours, alone in zip(sharded, jax.jit(make)(jax.random.key(5)), strict=True):
        np.testing.assert_array_equal(ours, alone)
