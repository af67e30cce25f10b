"""Where every parameter and activation of GPT-J-6B lies under each strategy, as text to be reviewed.

    .venv/bin/python tests/sharding/golden_layouts.py

writes tests/golden/layouts.txt anew; the difference is then read and committed with the change that made it.
"""

from __future__ import annotations

from pathlib import Path

from jax.sharding import PartitionSpec

from mesh_transformer.config.presets import preset
from mesh_transformer.model.params import named_specs, shape
from mesh_transformer.sharding.mesh import Sizes, check_model
from mesh_transformer.sharding.rules import STREAM, Axes, Rules, rules_for

FILE = Path(__file__).parents[1] / "golden" / "layouts.txt"
MODEL = "gpt-j-6b"
STRATEGIES: dict[str, tuple[Sizes, int]] = {  # name -> sizes, zero
    "data": (Sizes(data=8), 1),
    "fsdp, zero 1": (Sizes(fsdp=8), 1),
    "fsdp, zero 3": (Sizes(fsdp=8), 3),
    "tensor": (Sizes(tensor=8), 1),
    "fsdp x tensor, zero 3": (Sizes(fsdp=4, tensor=8), 3),
    "pipeline x tensor": (Sizes(pipeline=4, tensor=8), 1),
    "pipeline x data x fsdp x tensor, zero 3": (Sizes(pipeline=4, data=2, fsdp=4, tensor=8), 3),
}
ACTIVATIONS: dict[str, Axes] = {
    "rows of a batch": ("batch", None),
    "stream": STREAM,
    "input of a block's products": ("batch", "seq", "embed"),
    "split heads": ("batch", "seq", "heads", None),
    "feed-forward": ("batch", "seq", "mlp"),
    "logits": ("batch", "seq", "vocab"),
}


def layouts() -> str:
    """The whole file."""
    head = (
        f"{MODEL}: mesh axes that divide each logical axis, in order; - divides nothing, + joins two. A parameter\n"
        "rests as in the second column; its gradient and moments as in the third; it is computed with as in the\n"
        "fourth. Written by tests/sharding/golden_layouts.py.\n"
    )
    parts = [head, *(_strategy(name, *how, sequence=False) for name, how in STRATEGIES.items())]
    parts.append(_strategy("data x tensor, sequence", Sizes(data=2, tensor=4), 1, sequence=True, params=False))
    return "\n".join(parts)


def _strategy(name: str, sizes: Sizes, zero: int, *, sequence: bool, params: bool = True) -> str:
    cfg = preset(MODEL)
    check_model(sizes, cfg)
    rules = rules_for(sizes, zero=zero, shard_sequence=sequence, n_microbatches=4 * sizes.pipeline)
    lines = [f"== {name}: {sizes}"]
    for path, spec in named_specs(cfg).items() if params else ():
        what = f"{path} {list(shape(spec, cfg))} {' '.join(spec.axes)}"
        lines.append(_line(what, rules.param(spec.axes), rules.moment(spec.axes), rules.use(spec.axes)))
    return "\n".join(lines + _activations(rules)) + "\n"


def _activations(rules: Rules) -> list[str]:
    lines = [
        _line(f"({name}) {' '.join(axis or 'any' for axis in axes)}", rules.use(axes))
        for name, axes in ACTIVATIONS.items()
    ]
    if rules.n_stages > 1:  # within a stage as above; the head then works on rows spread over the stages
        after = rules.after_stages.use(ACTIVATIONS["logits"])
        lines.append(_line("(logits, after the stages) batch seq vocab", after))
    return lines


def _line(what: str, *specs: PartitionSpec | None) -> str:
    return " | ".join([f"{what:76}", *(f"{_shown(spec):28}" for spec in specs)]).rstrip()


def _shown(spec: PartitionSpec | None) -> str:
    assert spec is not None
    return " ".join(entry if isinstance(entry, str) else "+".join(entry or ("-",)) for entry in spec)


if __name__ == "__main__":
    FILE.write_text(layouts(), encoding="utf-8")
