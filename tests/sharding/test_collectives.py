"""What the devices send one another in a training step, as counted in the compiled programs of eight CPU devices.

The number of messages and what they hold are counted here, not how a platform carries them out.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

import pytest
from hlo import Collective, Shape, collectives
from mesh_cases import BATCH, MODEL, SEQUENCE, program_of

from mesh_transformer.model.params import is_multiplied, named_specs, shape, size

N_LAYERS = MODEL.n_layers
LAYERS = {name: spec for name, spec in named_specs(MODEL).items() if name.startswith("layers/")}
OTHERS = {name: spec for name, spec in named_specs(MODEL).items() if name not in LAYERS}
ZERO_3 = [pytest.param("fsdp, zero 3", marks=pytest.mark.long), "fsdp, zero 3, remat full"]


@functools.cache
def sent(name: str) -> tuple[Collective, ...]:
    return tuple(collectives(program_of(name).step))


def some(messages: Iterable[Collective], kind: str, phase: str, *, loops: int) -> list[Collective]:
    return [m for m in messages if (m.kind, m.phase, m.loops) == (kind, phase, loops)]


def shapes(messages: Iterable[Collective]) -> Counter[Shape]:
    """Every buffer's shape, its axes sorted: XLA may transpose what it sends."""
    return Counter(tuple(sorted(shape)) for m in messages for shape in m.shapes)


def layer_shapes(*, gathered: bool) -> Counter[Shape]:
    """One layer's parameters: all, or those that have the axis that fsdp divides."""
    specs = (spec for spec in LAYERS.values() if "embed" in spec.axes or not gathered)
    return Counter(tuple(sorted(shape(spec, MODEL)[1:])) for spec in specs)


def other_shapes(*, gathered: bool) -> Counter[Shape]:
    specs = (spec for spec in OTHERS.values() if "embed" in spec.axes or not gathered)
    return Counter(tuple(sorted(shape(spec, MODEL))) for spec in specs)


def without_scalars(counts: Counter[Shape]) -> Counter[Shape]:
    return Counter({shape: n for shape, n in counts.items() if shape})


def test_tensor_sums_the_stream_once_a_block_and_pass() -> None:
    """Backward too: the gradients of q, k, v and w_in are added before they are summed over the mesh."""
    stream = (BATCH, SEQUENCE, MODEL.d_model)
    (forward,) = some(sent("tensor"), "all-reduce", "forward", loops=1)
    assert (forward.shapes, forward.times) == ((stream,), N_LAYERS)
    (backward,) = some(sent("tensor"), "all-reduce", "backward", loops=1)
    assert (backward.shapes, backward.times) == ((stream,), N_LAYERS)


def test_tensor_never_sends_logits() -> None:
    batch_seq, stream = (BATCH, SEQUENCE), (BATCH, SEQUENCE, MODEL.d_model)
    assert {m.kind for m in sent("tensor")} == {"all-reduce"}
    outside = [shape for m in sent("tensor") if m.loops == 0 for shape in m.shapes if shape]
    # The embedding's rows and the gradient of what the head reads; maximum, sum and target's logit of every position.
    assert Counter(outside) == {stream: 2, batch_seq: 3}
    assert all(m.n_bytes <= 4 * BATCH * SEQUENCE * MODEL.d_model for m in sent("tensor"))


@pytest.mark.parametrize("name", [pytest.param("data", marks=pytest.mark.long), "data, accumulation"])
def test_data_sums_the_gradients_of_matrices_once_a_step(name: str) -> None:
    """However many layers and microbatches there are; those of norms, biases and tables in each."""
    assert {m.kind for m in sent(name)} == {"all-reduce"}
    within = [m for m in sent(name) if m.loops > 0]
    matrices = {n: s for n, s in named_specs(MODEL).items() if is_multiplied(s)}
    small = Counter(tuple(sorted(shape(s, MODEL)[1:])) for n, s in LAYERS.items() if n not in matrices)
    tables = Counter(tuple(sorted(shape(s, MODEL))) for n, s in OTHERS.items() if n not in matrices)
    assert without_scalars(shapes(within)) <= small + tables
    outside = [m for m in sent(name) if m.loops == 0]
    assert shapes(outside) >= Counter(tuple(sorted(shape(s, MODEL))) for s in matrices.values())


@pytest.mark.parametrize("name", ZERO_3)
def test_per_layer_gathers_a_layer_within_the_loop(name: str) -> None:
    inside = some(sent(name), "all-gather", "forward", loops=1)
    assert {m.times for m in inside} == {N_LAYERS}
    assert shapes(inside) == layer_shapes(gathered=True)
    assert shapes(some(sent(name), "all-gather", "forward", loops=0)) == other_shapes(gathered=True)
    assert not [m for m in sent(name) if m.kind == "all-gather" and m.phase == "update"]


@pytest.mark.parametrize("name", ZERO_3)
def test_the_backward_pass_gathers_each_matrix_again(name: str) -> None:
    again = shapes(some(sent(name), "all-gather", "backward", loops=1))
    matrices = Counter(tuple(sorted(shape(spec, MODEL)[1:])) for spec in LAYERS.values() if spec.inputs)
    assert again >= matrices


def test_per_step_gathers_everything_before_the_loop() -> None:
    gathered = [m for m in sent("fsdp, zero 3, gathered once") if m.kind == "all-gather"]
    assert {m.loops for m in gathered} == {0}
    stacked = Counter(tuple(sorted(shape(spec, MODEL))) for spec in LAYERS.values() if "embed" in spec.axes)
    assert shapes(gathered) == stacked + other_shapes(gathered=True)


def test_a_pipeline_hands_on_once_a_tick_and_sums_once_a_block() -> None:
    messages, rules = sent("pipeline x tensor"), program_of("pipeline x tensor").layout.rules
    ticks = rules.n_microbatches + rules.n_stages - 1
    for phase in ("forward", "backward"):
        (handed,) = some(messages, "collective-permute", phase, loops=1)
        assert (handed.shapes, handed.times) == (((1, 1, SEQUENCE, MODEL.d_model),), ticks)
        # What the last stage has finished goes to every stage, a share each; gradients come back the same way.
        assert len(some(messages, "collective-permute", phase, loops=0)) == rules.n_stages
    (forward,) = some(messages, "all-reduce", "forward", loops=2)
    assert (forward.shapes, forward.times) == (handed.shapes, ticks * N_LAYERS // rules.n_stages)
    (backward,) = some(messages, "all-reduce", "backward", loops=2)
    assert (backward.shapes, backward.times) == (handed.shapes, forward.times)
    assert not [m for m in messages if m.kind == "all-gather"]


def test_a_split_sequence_is_brought_together_once_and_summed_in_parts_once_a_block() -> None:
    messages = sent("data x tensor, sequence")
    whole = (BATCH // 2, SEQUENCE, MODEL.d_model)
    part = (BATCH // 2, SEQUENCE // 4, MODEL.d_model)
    for phase in ("forward", "backward"):
        (together,) = some(messages, "all-gather", phase, loops=1)
        assert (together.shapes, together.times) == ((whole,), N_LAYERS)
        (summed,) = some(messages, "reduce-scatter", phase, loops=1)
        assert (summed.shapes, summed.times) == ((part,), N_LAYERS)


def test_zero_3_sums_a_layer_s_gradients_in_parts() -> None:
    """Over fsdp in each layer; over data once a step, a device's part of all layers."""
    messages, ways = sent("data x fsdp x tensor, zero 3"), 2
    matrices = [s for s in LAYERS.values() if is_multiplied(s)]
    within = some(messages, "reduce-scatter", "backward", loops=1)
    assert {m.times for m in within} == {N_LAYERS}
    assert sum(m.n_bytes for m in within) == sum(4 * size(s, MODEL) // N_LAYERS // ways // ways for s in matrices)
    parts = {m.shapes for m in within}
    assert not [m for m in messages if m.kind == "all-reduce" and m.loops and m.shapes in parts]
    held = sum(4 * size(s, MODEL) // ways // ways for s in matrices)
    assert [m for m in messages if m.kind == "all-reduce" and m.loops == 0 and m.n_bytes >= held]
