"""How the same arithmetic is carried out: precision, recomputation, loop forms. No fact about an architecture."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mesh_transformer.kernels import native
from mesh_transformer.kernels.accelerators import Attention, attention_for
from mesh_transformer.shapes import Params

Remat = Literal["none", "dots", "full"]
FewRows = Literal["plain", "blocked", "native"]
Form = Literal["products", "biases", "attention", "head"]
# Positions whose logits exist at one time in the loss.
LOSS_CHUNK, LOSS_CHUNK_ON_CPU = 4096, 1024
# Of training on one CPU device; on others the plain forms are used wherever these are allowed.
CPU_FORMS: frozenset[Form] = frozenset(("products", "biases", "attention", "head"))
# With 16-bit factors the plain products of [batch seq] rows reach XLA's fast kernels by themselves, and sooner.
NARROW_CPU_FORMS = CPU_FORMS - {"products"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputePolicy:
    """What a compiled program does beyond the formulas.

    Attributes:
        dtype: what the factors of every large product are rounded to ("float32", "bfloat16", "float16"). Sums,
            norms, softmax, the residual stream, logits and losses are float32 whatever it is.
        remat: what the backward pass computes again instead of keeping: nothing, all but what products and attention
            gave (kept in `dtype`), everything.
        unroll: layers written out in the program instead of looped over. CPU: all (a loop copies each layer's slice
            of the stacked weights); accelerators: one, for short compile times.
        widen_by_layer: 16-bit and 8-bit weights are widened one layer at a time, and not at all where only rows are
            looked up. For inference on CPU, where XLA would otherwise make float32 copies of all of them at once.
            Such a program has no gradient.
        few_rows: how a few rows are multiplied with weights as they are stored (model/narrow.py); "plain" widens
            whole matrices. Other than "plain" is for inference on one CPU device: such a program has no gradient.
        loss_chunk: positions whose logits exist at one time in the loss.
        product_rows: rows of a batch in one product, 0 for all. XLA chooses a product's kernel, and with it the order
            in which it sums, by the number of rows too; where that must not show, there are always as many.
        attention: by which kernel attention without a cache is computed, where it serves (kernels/accelerators.py).
        forms: which parts may be computed, on one device, in forms that XLA on CPU runs fast forwards and backwards:
            products with weights (kernels/products.py), biases and what follows them (kernels/biased.py), causal
            attention (kernels/attention.py), head and loss (kernels/cross_entropy.py).
            The same formulas; sums may be taken in another order.
    """

    dtype: str = "float32"
    remat: Remat = "none"
    unroll: bool = False
    widen_by_layer: bool = False
    few_rows: FewRows = "plain"
    loss_chunk: int = LOSS_CHUNK_ON_CPU
    product_rows: int = 0
    attention: Attention = "plain"
    forms: frozenset[Form] = frozenset()

    @property
    def cuts_layers(self) -> bool:
        """Whether a loop over layers takes the slices of the stacked weights as they are, before anything else."""
        return not self.widen_by_layer and self.few_rows == "plain"

    @property
    def jax_dtype(self) -> Any:
        """`dtype` as JAX spells it."""
        return jnp.dtype(self.dtype)


def default_policy(dtype: str | None = None, remat: Remat = "none") -> ComputePolicy:
    """The policy for the platform that JAX runs on: float32 on CPU, bfloat16 on accelerators, unless told."""
    platform = jax.default_backend()
    on_cpu = platform == "cpu"
    return ComputePolicy(
        dtype=dtype or ("float32" if on_cpu else "bfloat16"),
        remat=remat,
        unroll=on_cpu,
        loss_chunk=LOSS_CHUNK_ON_CPU if on_cpu else LOSS_CHUNK,
        attention=attention_for(platform),
        forms=(CPU_FORMS if dtype in (None, "float32") else NARROW_CPU_FORMS) if on_cpu else frozenset(),
    )


def for_inference(policy: ComputePolicy, params: Params, *, one_device: bool) -> ComputePolicy:
    """The policy for programs without gradients: on CPU, weights are multiplied with as they are stored where rows are
    few, and narrow ones are widened one layer at a time where they are many; on a GPU, layers are written out unless
    weights are in 8 bits or fewer.
    """
    if jax.default_backend() == "gpu":
        # In a loop XLA copies every layer's slice of the stacked weights before it multiplies with it; written out, it
        # widens 8-bit ones for all layers at once (docs/gpu.md).
        return dataclasses.replace(policy, unroll=all(leaf.dtype.itemsize > 1 for leaf in jax.tree.leaves(params)))
    if jax.default_backend() != "cpu":
        return policy
    policy = dataclasses.replace(policy, forms=frozenset())
    if one_device:
        policy = dataclasses.replace(policy, few_rows="native" if native.available() else "blocked")
    if not any(leaf.dtype.itemsize < 4 for leaf in jax.tree.leaves(params)):
        return policy
    # A loop: in a program of all layers written out XLA widens them in any order, and so all at once.
    return dataclasses.replace(policy, widen_by_layer=True, unroll=False)
