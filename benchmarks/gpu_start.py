"""What a process does before it computes: import, compile, and compile again from the cache."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu_rows import Rows

SOURCE = Path(__file__).resolve().parent.parent / "src"
# A process of its own: the times of what it does, as JSON on the last line.
_CHILD = """
import json, sys, time
began = time.perf_counter()
import dataclasses, functools, jax, numpy as np
from mesh_transformer import compat
compat.use_compile_cache()
from mesh_transformer.config.presets import preset
from mesh_transformer.engine.programs import Programs
from mesh_transformer.engine.pages import page_size, table_width
from mesh_transformer.model.cache import empty_cache
from mesh_transformer.model.params import init_params
from mesh_transformer.model.policy import default_policy, for_inference
cfg, imported = preset(sys.argv[1]), time.perf_counter()
jax.block_until_ready(jax.numpy.zeros(1))
device = time.perf_counter()
params = jax.block_until_ready(jax.jit(lambda: init_params(cfg, jax.random.key(0), jax.numpy.bfloat16))())
made = time.perf_counter()
policy = for_inference(default_policy(), params, one_device=True)
programs, size = Programs(cfg, policy), page_size(cfg.n_ctx)
cache = empty_cache(cfg, 9, size, cfg.n_ctx, policy.jax_dtype)
rows = np.zeros((programs.fewest_rows, 2 + table_width(cfg.n_ctx)), np.int32)
rows[:, 2] = 1
jax.block_until_ready(programs.decode(params, cache, rows)[0])
print(json.dumps({"import_s": imported - began, "device_s": device - imported, "weights_s": made - device,
                  "first_token_s": time.perf_counter() - made}))
"""


def startup(rows: Rows) -> None:
    """The first process of a machine, and the second, which finds its programs in the cache."""
    name = "gpt-j-tiny" if rows.rehearse else "gpt-j-0.6b"
    with tempfile.TemporaryDirectory() as directory:
        environment = {**os.environ, "MESH_TRANSFORMER_CACHE": directory, "PYTHONPATH": str(SOURCE)}
        if not rows.rehearse:  # this process holds the GPU's memory; the child needs little
            environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
        for turn in ("cold", "warm"):
            rows.row(f"{name}, decoding, {turn}", functools.partial(_child, name, environment))


def _child(name: str, environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, name], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-1500:])
    return json.loads(done.stdout.splitlines()[-1])
