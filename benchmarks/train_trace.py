"""A picture of the training step on CPU: what each thread computes when, in the fast forms and in the plain ones.

    python benchmarks/train_trace.py [--dtype bfloat16] [--output docs/images/train-step-cpu.png]

One step of each is recorded by JAX's profiler, after two that are not. Every operation of the compiled program is a bar
over the time since its step began, coloured by the part of the model that it belongs to.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from mesh_transformer import compat
from mesh_transformer.bench.ours import batch
from mesh_transformer.config.presets import preset
from mesh_transformer.config.run import TrainConfig
from mesh_transformer.model.policy import default_policy
from mesh_transformer.train.state import initial_state
from mesh_transformer.train.step import make_train_step

PRESET, BATCH_SIZE = "gpt-j-77m", 8
# Part of the model -> colour, and what the shape of an operation's result has in it.
PARTS = {
    "head and loss": ("#b5495b", r"50400"),
    "feed-forward": ("#3d6b99", r"\b2048,2048\b|\b512,2048\b|\b2048,512\b|256,2048\b"),
    "attention": ("#5f9e6e", r"\[8,8,|8,64\]|\b512,512\b"),
    "other": ("#a3a3a3", r""),
}


@dataclasses.dataclass(frozen=True)
class Bar:
    """An operation on a thread; times in seconds since the step began."""

    thread: str
    begin: float
    seconds: float
    part: str


def record(dtype: str, forms: frozenset[Any]) -> list[Bar]:
    """The operations of one step."""
    model = preset(PRESET)
    train = TrainConfig(steps=10_000, learning_rate=1e-4, batch_size=BATCH_SIZE, compute_dtype=dtype)
    policy = dataclasses.replace(default_policy(dtype), forms=forms)
    rows = jnp.asarray(batch(model.n_vocab, BATCH_SIZE, model.n_ctx))[None]
    state = jax.jit(functools.partial(initial_state, model, train, 0))()
    step = jax.jit(make_train_step(model, train, policy), donate_argnums=0).lower(state, rows).compile()
    for _ in range(2):
        state = jax.block_until_ready(step(state, rows)[0])
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(step(state, rows))
        trace = next(Path(directory).rglob("*.xplane.pb"))
        return bars_of(jax.profiler.ProfileData.from_file(str(trace)), step.as_text())


def bars_of(data: Any, program: str) -> list[Bar]:
    """The events of a trace that are operations of the program, by their names."""
    results = dict(re.findall(r"%([\w.-]+) = (\S+) ", program))
    events = [
        (line.name or str(i), event)
        for plane in data.planes
        for i, line in enumerate(plane.lines)
        for event in line.events
        if event.name in results
    ]
    first = min(event.start_ns for _, event in events)
    return [
        Bar(thread, (event.start_ns - first) / 1e9, event.duration_ns / 1e9, part_of(results[event.name]))
        for thread, event in events
    ]


def part_of(result: str) -> str:
    """The first part whose mark is in the type of an operation's result."""
    return next(name for name, (_, mark) in PARTS.items() if re.search(mark, result))


def draw(traces: dict[str, list[Bar]], output: Path) -> None:
    """One panel a trace, one row a thread, the same time axis for all."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(len(traces), 1, figsize=(11, 2.1 * len(traces)), sharex=True, layout="constrained")
    for panel, (title, bars) in zip(panels, traces.items(), strict=True):
        threads = sorted(
            {bar.thread for bar in bars}, key=lambda name: -sum(b.seconds for b in bars if b.thread == name)
        )
        for part, (colour, _) in PARTS.items():
            for row, thread in enumerate(threads):
                spans = [(bar.begin, bar.seconds) for bar in bars if bar.part == part and bar.thread == thread]
                panel.broken_barh(spans, (row - 0.4, 0.8), color=colour, label=part if row == 0 else None)
        panel.set_title(f"{title}: {max(bar.begin + bar.seconds for bar in bars):.2f} s", loc="left", fontsize=10)
        panel.set_yticks(range(len(threads)), [f"thread {i + 1}" for i in range(len(threads))], fontsize=8)
        panel.invert_yaxis()
    panels[0].legend(ncols=len(PARTS), fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    panels[-1].set_xlabel("seconds since the step began")
    figure.savefig(output, dpi=110)


def main() -> None:
    """Records and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--output", type=Path, default=Path("docs/images/train-step-cpu.png"))
    options = parser.parse_args()
    compat.prepare_process()
    forms: dict[str, frozenset[Any]] = {"fast forms": default_policy(options.dtype).forms, "plain forms": frozenset()}
    draw(
        {f"{PRESET}, {options.dtype}, {name}": record(options.dtype, of) for name, of in forms.items()}, options.output
    )


if __name__ == "__main__":
    main()
