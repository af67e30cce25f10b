"""Prints how far training on every mesh is from training on one device: python tests/sharding/mesh_table.py."""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

from typing import Any

import jax
import numpy as np
from mesh_cases import CASES, program_of
from test_mesh_losses import assert_writes_alike, trained

from mesh_transformer import compat

compat.give_fake_devices_threads()


def furthest(tree: Any, expected: Any) -> float:
    """The largest difference of a value, in units of the largest in its array."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(expected), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def main() -> None:
    """One row a mesh: losses of 20 steps, gradients of step 1, greedy tokens after the last step."""
    alone = trained("one device")
    print("| mesh | zero | losses, relative | gradients of step 1 | tokens alike | texts that go apart |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in CASES:
        if name == "one device":
            continue
        here, written = trained(name), assert_writes_alike(name)
        losses = float(np.abs(here.losses / alone.losses - 1).max())
        zero = program_of(name).run.mesh.zero
        gradients = furthest(here.mu, alone.mu)
        row = (name, zero, f"{losses:.1e}", f"{gradients:.1e}", written.tokens, written.differing)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
