"""How the same arithmetic is carried out: precision, recomputation, loop forms. No fact about an architecture."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mesh_transformer.shapes import Params

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputePolicy:
    """What a compiled program does beyond the formulas.

    Attributes:
        dtype: what the factors of every large product are rounded to ("float32", "bfloat16", "float16"). Sums,
            norms, softmax, the residual stream, logits and losses are float32 whatever it is.
        remat: what the backward pass computes again instead of keeping: nothing, all but matrix products, everything.
        unroll: layers written out in the program instead of looped over. CPU: all (a loop copies each layer's slice
            of the stacked weights); accelerators: one, for short compile times.
        widen_by_layer: 16-bit and 8-bit weights are widened one layer at a time, and not at all where only rows are
            looked up. For inference on CPU, where XLA would otherwise make float32 copies of all of them at once.
            Such a program has no gradient.
        loss_chunk: positions whose logits exist at one time in the loss.
        product_rows: rows of a batch in one product, 0 for all. XLA chooses a product's kernel, and with it the order
            in which it sums, by the number of rows too; where that must not show, there are always as many.
    """

    dtype: str = "float32"
    remat: Remat = "none"
    unroll: bool = False
    widen_by_layer: bool = False
    loss_chunk: int = 1024
    product_rows: int = 0

    @property
    def jax_dtype(self) -> Any:
        """`dtype` as JAX spells it."""
        return jnp.dtype(self.dtype)


def default_policy(dtype: str | None = None, remat: Remat = "none") -> ComputePolicy:
    """The policy for the platform that JAX runs on: float32 on CPU, bfloat16 on accelerators, unless told."""
    on_cpu = jax.default_backend() == "cpu"
    return ComputePolicy(dtype=dtype or ("float32" if on_cpu else "bfloat16"), remat=remat, unroll=on_cpu)


def for_inference(policy: ComputePolicy, params: Params) -> ComputePolicy:
    """The policy for programs without gradients: on CPU, narrow weights are widened one layer at a time."""
    narrow = any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(params))
    if not narrow or jax.default_backend() != "cpu":
        return policy
    # A loop: in a program of all layers written out XLA widens them in any order, and so all at once.
    return dataclasses.replace(policy, widen_by_layer=True, unroll=False)
