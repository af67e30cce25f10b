"""The token table as a head in inference: turned where weights are narrow, with the same logits."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from mesh_transformer.api import Model, load
from mesh_transformer.checkpoint.quantized import assemble_as
from mesh_transformer.checkpoint.weights import InMemory
from mesh_transformer.config.errors import CheckpointError
from mesh_transformer.config.model import ModelConfig
from mesh_transformer.model.params import init_params, named_specs, path_name
from mesh_transformer.model.policy import ComputePolicy, FewRows
from mesh_transformer.model.quantize import Quantized, quantize
from mesh_transformer.model.tied import SPEC, TURNED, quantization, turned_bytes, with_turned
from mesh_transformer.shapes import Params

TIED = ModelConfig(
    n_layers=2, d_model=64, n_heads=4, n_kv_heads=2, n_vocab=300, n_ctx=32, d_ff=96, norm="rms", residual="serial",
    rotary_layout="half", feed_forward="glu_silu", biases=(), tied_head=True,
)  # fmt: skip
TOKENS = np.arange(20).reshape(2, 10) * 13 % 300


def stored(dtype: str = "float32", quantize: str | None = None, cfg: ModelConfig = TIED) -> Params:
    whole = InMemory(cfg, init_params(cfg, jax.random.key(0)))
    return jax.tree.map(jax.numpy.asarray, assemble_as(whole, quantize, np.dtype(dtype)))


@pytest.mark.parametrize(
    ("dtype", "quantize", "few_rows", "turned"),
    [
        ("float32", None, "native", False),
        ("bfloat16", None, "native", True),
        ("bfloat16", None, "blocked", True),
        ("bfloat16", None, "plain", False),
        ("float32", "int8", "plain", True),
        ("bfloat16", "int4", "blocked", True),
    ],
)
def test_it_is_turned_where_that_is_faster(dtype: str, quantize: str | None, few_rows: FewRows, turned: bool) -> None:
    policy = ComputePolicy(few_rows=few_rows)
    params = stored(dtype, quantize)
    found = with_turned(params, TIED, policy, one_device=True)
    assert (TURNED in found) == turned
    assert found is with_turned(found, TIED, policy, one_device=True) or not turned
    assert with_turned(params, TIED, policy, one_device=False) is params
    if turned and quantize is None:
        np.testing.assert_array_equal(found[TURNED], params["embed"]["tokens"].T)
    if turned and quantize:
        assert turned_bytes(TIED, quantize) == sum(leaf.nbytes for leaf in jax.tree.leaves(found[TURNED]))


@pytest.mark.parametrize("name", ["int8", "int4", "int4-128"])
def test_a_turned_table_is_quantised_as_the_matrices_are(name: str) -> None:
    wide = dataclasses.replace(TIED, d_model=256, n_vocab=9000)  # more tokens than are quantised at one time
    params = stored(quantize=name, cfg=wide)
    assert quantization(params) == name
    turned = with_turned(params, wide, ComputePolicy(), one_device=True)[TURNED]
    assert isinstance(turned, Quantized) and type(turned) is type(params["layers"]["attn"]["q"])
    at_once = quantize(np.asarray(params["embed"]["tokens"]).T, SPEC, name)
    jax.tree.map(np.testing.assert_array_equal, turned, at_once)
    assert quantization(stored(cfg=wide)) is None


@pytest.mark.parametrize(("dtype", "quantize"), [("bfloat16", None), ("float32", "int8"), ("bfloat16", "int4")])
def test_logits_are_those_of_the_table_that_is_meant(dtype: str, quantize: str | None) -> None:
    model = Model(TIED, stored(dtype, quantize), None)
    assert TURNED in model.params
    turned = model.params[TURNED]
    head = turned.widen(np.float32) if isinstance(turned, Quantized) else np.asarray(turned, np.float32)
    untied = dataclasses.replace(TIED, tied_head=False)
    plain = {name: leaf for name, leaf in model.params.items() if name != TURNED}
    meant = Model(untied, plain | {"head": plain["head"] | {"w": jax.numpy.asarray(head)}}, None)
    np.testing.assert_allclose(model.logits(TOKENS), meant.logits(TOKENS), atol=2e-5)


def test_what_is_saved_has_no_turned_table(tmp_path: Path) -> None:
    model = Model(TIED, stored("bfloat16"), None)
    assert TURNED in model.params
    model.save(tmp_path / "saved", format="huggingface")
    again = load(tmp_path / "saved")
    paths = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(again.params)[0]]
    assert sorted(paths) == sorted([*named_specs(TIED), TURNED])
    np.testing.assert_array_equal(model.logits(TOKENS), again.logits(TOKENS))
    # Written token by token, and all at once.
    written = again.generate([[1, 2, 3]], max_tokens=6, temperature=0.0, ignore_eos=True)[0].tokens
    whole = again.logits([[1, 2, 3, *written]])[0]
    assert written == whole.argmax(-1)[2:-1].tolist()


def test_a_damaged_table_is_named() -> None:
    params = stored(quantize="int8")
    params["embed"]["tokens"] = params["embed"]["tokens"].at[7, 3].set(np.nan)
    with pytest.raises(CheckpointError, match=r"embed/tokens, which is also the head, .*not finite"):
        with_turned(params, TIED, ComputePolicy(), one_device=True)
