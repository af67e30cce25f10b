"""The first state of a run from another model: to fine-tune it, or to go on with its interrupted run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh_transformer.checkpoint.lora import LoraWeights
from mesh_transformer.checkpoint.models import open_weights
from mesh_transformer.checkpoint.quantized_weights import QuantizedWeights
from mesh_transformer.checkpoint.run_directory import RunDirectory
from mesh_transformer.checkpoint.weights import MOMENTS, Kind, Weights, assemble, stored_bytes
from mesh_transformer.config.errors import CheckpointError, ConfigError
from mesh_transformer.config.model import differing_fields
from mesh_transformer.config.run import RunConfig
from mesh_transformer.model.params import ParamSpec, map_table, shape
from mesh_transformer.shapes import Params
from mesh_transformer.sharding.layout import ONE_DEVICE_LAYOUT, Layout, place_array
from mesh_transformer.train.optimizer import moments_of, with_optimizer_state
from mesh_transformer.train.state import TrainState, abstract_state, random_key

_MAX_COUNT = 2**31 - 1  # counters are int32
_SECONDS_BETWEEN_NOTES = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """What a run begins from in place of random parameters.

    model, step, config: as `checkpoint.models.open_weights` has them. fresh_optimizer: parameters alone are taken.
    keep_schedule: step and schedule go on from where the model's own run stopped; else both begin at 0, as the
    original's fine-tuning did (docs/formats.md, section 13.2).

    Raises:
        ConfigError: both were asked for.
    """

    model: str
    step: int | None = None
    config: str | None = None
    fresh_optimizer: bool = False
    keep_schedule: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("--init-from names no model; expected the path of one, for example --init-from runs/base")
        if self.fresh_optimizer and self.keep_schedule:
            raise ConfigError(
                "--fresh-optimizer and --keep-schedule contradict each other: the first forgets the optimizer's "
                "counts, the second goes on with them\n"
                "give --keep-schedule to go on with an interrupted run, --fresh-optimizer to train the parameters anew"
            )


def open_model(run: RunConfig, init_from: InitFrom, note: Callable[[str], None], *, new: bool = False) -> Weights:
    """The model, opened and found to suit the run; its values are not read yet.

    Args:
        note: told what was assumed in opening it.
        new: an earlier run in the run directory is going to be deleted.

    Raises:
        CheckpointError: it cannot be opened, is quantised, is of another architecture, lacks what is asked for, or
            would be deleted.
        ConfigError: `train.steps` is not above the step to go on from.
    """
    weights = open_weights(init_from.model, step=init_from.step, config=init_from.config, report=note)
    if isinstance(weights, QuantizedWeights):
        raise CheckpointError(
            f"{weights.where}: its matrices are rounded to {weights.quantize}, for computing and not for training\n"
            "give --init-from the model that it was made of, or convert it with --dtype float32 to train from the "
            "rounded weights"
        )
    _check_architecture(run, weights)
    _check_counts(weights)
    if init_from.keep_schedule:
        _check_can_go_on(run, weights)
    places = weights.places() if isinstance(weights, LoraWeights) else [weights.where]
    doomed = RunDirectory(run.run_directory).checkpoints.resolve()
    for place in (place for place in places if new and place.resolve().is_relative_to(doomed)):
        raise CheckpointError(
            f"{place}: this model belongs to the earlier run, which --new deletes\n"
            "give this run another name, or copy the model to another place"
        )
    return weights


def first_state(
    run: RunConfig,
    init_from: InitFrom,
    weights: Weights,
    note: Callable[[str], None],
    layout: Layout = ONE_DEVICE_LAYOUT,
) -> TrainState:
    """The state that the run begins with, laid out, in memory that a training step may overwrite.

    Parameters are in `train.param_dtype`, moments in `train.moment_dtype`; what the model does not hold is zero.

    Args:
        weights: from `open_model`.
        note: told what is taken over, and how far reading has come.

    Raises:
        CheckpointError: a file of the model is damaged.
    """
    moments = bool(weights.counters) and not init_from.fresh_optimizer
    for line in _what_is_taken(init_from, weights):
        note(line)
    progress = reading(weights, "reading", note, weights.kinds() if moments else ("params",))
    abstract = abstract_state(run, layout)

    def read(kind: Any, like: Params) -> Params:
        dtype = jax.tree.leaves(like)[0].dtype
        return _move(assemble(weights, dtype, kind, progress), like)

    def count(n: int) -> jax.Array:
        return _owned(np.asarray(n, np.int32), layout.sharding())

    params, opt_state = read("params", abstract.params), abstract.opt_state
    if moments and weights.counters:
        places = moments_of(opt_state)
        mu, nu = (read(kind, like) for kind, like in zip(MOMENTS, places, strict=True))
        schedule = weights.counters.schedule if init_from.keep_schedule else 0
        opt_state = with_optimizer_state(opt_state, mu, nu, count(weights.counters.adam), count(schedule))

    def zeros_if_abstract(leaf: Any) -> Any:
        if not isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        return jax.jit(lambda: jnp.zeros(leaf.shape, leaf.dtype), out_shardings=leaf.sharding)()

    return TrainState(
        step=count(weights.step or 0 if init_from.keep_schedule else 0),
        params=params,
        opt_state=jax.tree.map(zeros_if_abstract, opt_state),
        key=_owned(np.asarray(random_key(run.seed)), layout.sharding()),
    )


def place_stored(weights: Weights, layout: Layout, note: Callable[[str], None]) -> Params:
    """The parameters in their stored dtypes, laid out, in memory that a training step may overwrite.

    Raises:
        CheckpointError: a file of the model is damaged.
    """

    def resting(spec: ParamSpec) -> jax.ShapeDtypeStruct:
        sharding = layout.sharding(layout.rules.param(spec.axes))
        return jax.ShapeDtypeStruct(shape(spec, weights.cfg), np.float32, sharding=sharding)

    read = assemble(weights, progress=reading(weights, "reading", note))
    return _move(read, map_table(resting, weights.cfg))


def origin(weights: Weights) -> dict[str, Any]:
    """What checkpoints record of the model that their run began from; JSON values."""
    return {"path": str(weights.where.absolute()), "format": weights.format, "step": weights.step}


def left_aside(init_from: InitFrom, began_from: Mapping[str, Any] | None) -> str:
    """What to say when a run goes on and `init_from` has no effect; `began_from`: the run's own `origin`."""
    began = "random parameters"
    if began_from is not None:
        step = began_from.get("step")
        began = str(began_from.get("path")) + ("" if step is None else f", step {step}")
    return f"--init-from {init_from.model} acts only while a run has no checkpoint, and this one began from {began}"


def _check_architecture(run: RunConfig, weights: Weights) -> None:
    # Only a table of positions has n_ctx in its shape; otherwise it says no more than how far training went.
    ignored = () if weights.cfg.position == "fixed" else ("n_ctx",)
    differing = differing_fields(weights.cfg, run.model, ignored)
    if differing:
        fields = "; ".join(f"{name} is {there!r} there, {here!r} here" for name, (there, here) in differing.items())
        raise CheckpointError(
            f"{weights.where}: this model is of another architecture than [model] of the configuration: {fields}\n"
            "put the model's values under [model] (or --set model.KEY=VALUE), or give --init-from another model"
        )


def _check_counts(weights: Weights) -> None:
    counts = {"step": weights.step}
    if weights.counters:
        counts |= {"count of Adam": weights.counters.adam, "count of the schedule": weights.counters.schedule}
    for name, n in counts.items():
        if n is not None and not 0 <= n <= _MAX_COUNT:
            raise CheckpointError(
                f"{weights.where}: damaged, its {name} is {n}; expected 0 to {_MAX_COUNT}\n"
                "restore it from a copy, or give --init-from another model"
            )


def _check_can_go_on(run: RunConfig, weights: Weights) -> None:
    if weights.counters is None or weights.step is None:
        lacks = "optimizer state" if weights.counters is None else "step"
        raise CheckpointError(
            f"{weights.where}: holds no {lacks}, so --keep-schedule has nothing to go on with\n"
            "leave --keep-schedule out: the step and the schedule then begin at 0"
        )
    if weights.step >= run.train.steps:
        raise ConfigError(
            f"train.steps = {run.train.steps} is not above {weights.step}, the step of {weights.where} from which "
            "--keep-schedule goes on\nset train.steps above it, or leave --keep-schedule out to begin at step 0"
        )


def _what_is_taken(init_from: InitFrom, weights: Weights) -> list[str]:
    """Lines for the user."""
    which = weights.format if weights.step is None else f"{weights.format}, step {weights.step}"
    beginning = f"beginning from {weights.where} ({which})"
    if init_from.fresh_optimizer:
        return [f"{beginning} with its parameters alone: Adam, schedule and step begin at 0"]
    if weights.counters is None:
        return [
            f"{beginning}: schedule and step begin at 0",
            f"{weights.where} holds no optimizer state: Adam starts afresh",
        ]
    adam = f"Adam goes on after {weights.counters.adam} updates"
    if not init_from.keep_schedule:
        return [f"{beginning} with its optimizer state: {adam}; schedule and step begin at 0"]
    return [f"going on from {weights.where} ({which}): {adam}, the schedule after {weights.counters.schedule}"]


def reading(
    weights: Weights, doing: str, note: Callable[[str], None], kinds: Iterable[Kind] = ("params",)
) -> Callable[[int], None]:
    """To be called with bytes as they are read; says now and then what share of the whole that is."""
    total = stored_bytes(weights, kinds)
    done, said = 0, time.monotonic()

    def read(n_bytes: int) -> None:
        nonlocal done, said
        done += n_bytes
        if time.monotonic() - said >= _SECONDS_BETWEEN_NOTES:
            said = time.monotonic()
            note(f"{doing} {weights.where}: {done / total:.0%} of {total / 2**30:.1f} GiB")

    return read


def _move(tree: dict[str, Any], like: Params) -> Params:
    """The tree placed as `like` says; `tree` itself is emptied, so that no more than one leaf is ever held twice."""
    placed: Params = {}
    for key in list(tree):
        if isinstance(tree[key], dict):
            placed[key] = _move(tree.pop(key), like[key])
        else:
            placed[key] = _owned(tree.pop(key), like[key].sharding)
    return placed


def _owned(leaf: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    placed = place_array(leaf, sharding)
    # On CPU this is NumPy's own memory still. A step cannot overwrite that in place, though the state is donated to
    # it: it would make a second copy of the whole state.
    if jax.default_backend() == "cpu":
        placed = placed.copy()
    return placed.block_until_ready()
