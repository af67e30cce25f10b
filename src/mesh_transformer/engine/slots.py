"""What every row under way was asked for, kept on the device."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.engine.request import Request
from mesh_transformer.sample.methods import RowOptions
from mesh_transformer.sample.options import MOST_BIASES
from mesh_transformer.shapes import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Options of every slot, one row each.

    options: of sampling. presence, frequency: penalties, float32 [slots]. bias_ids, bias_values: [slots, MOST_BIASES],
    ids outside the vocabulary stand for none. counts: how often the completion holds each token, int32 [slots, vocab].
    scored: whether likelihoods are wanted, bool [slots].
    """

    options: RowOptions
    presence: Array
    frequency: Array
    bias_ids: Array
    bias_values: Array
    counts: Array
    scored: Array


def empty_slots(n: int, n_vocab: int, device: jax.Device) -> Slots:
    """Slots that take the likeliest token."""

    def of(shape: tuple[int, ...], dtype: Any, value: Any = 0) -> Array:
        return jax.device_put(np.full(shape, value, dtype), device)

    options = RowOptions(
        temperature=of((n,), np.float32),
        top_k=of((n,), np.int32),
        top_p=of((n,), np.float32, 1),
        min_p=of((n,), np.float32),
        keys=of((n, 2), np.uint32),
        legacy=of((n,), bool),
    )
    return Slots(
        options=options,
        presence=of((n,), np.float32),
        frequency=of((n,), np.float32),
        bias_ids=of((n, MOST_BIASES), np.int32, n_vocab),
        bias_values=of((n, MOST_BIASES), np.float32),
        counts=of((n, n_vocab), np.int32),
        scored=of((n,), bool),
    )


def slot_values(request: Request, n_vocab: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A request as `fill_slot` takes it: five numbers, four whole numbers, and its biases."""
    o = request.options
    largest = np.finfo(np.float32).max
    numbers = np.asarray(
        [min(o.temperature, largest), o.top_p, o.min_p, o.presence_penalty, o.frequency_penalty], np.float32
    )
    whole = np.asarray(
        [min(o.top_k, 2**31 - 1), o.sampler == "legacy", request.logprobs is not None, o.sample], np.int32
    )
    ids, values = np.full(MOST_BIASES, n_vocab, np.int32), np.zeros(MOST_BIASES, np.float32)
    for i, (token, bias) in enumerate(o.logit_bias):
        ids[i], values[i] = token, bias
    return numbers, whole, ids, values


def fill_slot(
    slot: Int[Array, ""],
    seed: Array,
    numbers: Array,
    whole: Array,
    bias_ids: Array,
    bias_values: Array,
    *,
    slots: Slots,
) -> Slots:
    """The slots with one of them given to a request; values as `slot_values` makes them, seed: uint32."""
    temperature, top_p, min_p, presence, frequency = numbers
    top_k, legacy, scored, sample = whole
    stream = jax.random.fold_in(jax.random.key(seed), sample)
    options = RowOptions(temperature, top_k, top_p, min_p, jax.random.key_data(stream), legacy > 0)
    row = Slots(
        options, presence, frequency, bias_ids, bias_values,
        counts=jnp.zeros_like(slots.counts[0]), scored=scored > 0,
    )  # fmt: skip
    return jax.tree.map(lambda held, new: held.at[slot].set(new), slots, row)
