"""Plans pods without one: does the training step of a model fit the devices of a mesh, and what does it send?

    python scripts/plan_pods.py --output plan.json                  # everything, or what is still missing
    python scripts/plan_pods.py --output plan.json --only v3-8      # the cases whose name begins so
    python scripts/plan_pods.py --output plan.json --tables docs/parallelism.md --no-compile    # only the tables anew

Of every case in scripts/pod_cases.py:

* parameters, gradients and moments on a device, exactly, from the parameter table and the sharding rules
  (`mesh_transformer.sharding.memory`);
* if these alone leave room: the real training step, compiled ahead of time for that many devices from shapes alone, in
  a process of its own. Target "tpu" is the TPU's own compiler, which needs no TPU: it comes with the package libtpu
  (`pip install 'mesh-transformer[tpu]'`) and refuses a program that does not fit. Target "cpu" is XLA's CPU backend
  with fake devices, whose temporaries are an estimate for another device: it widens 16-bit values, and fuses otherwise;
* the collectives that the compiled step executes, loops counted as often as they run, with the bytes that a ring
  sends; and from these, on paper, the time that they take at the makers' bandwidths (scripts/pod_links.py).

The steps are those of `mesh-transformer train`: bfloat16 products, float32 parameters, gradients and Adam moments,
remat "full", layers looped over, sequences of the model's whole context. Needs this package alone, and libtpu for TPUs.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pod_cases import CASES, DEVICES, LAYERS_FEW, LAYERS_MORE, SLICES, STRATEGIES, Case, run_config
from pod_hlo import collectives
from pod_tables import write_tables

# What libtpu asks its environment where there is no TPU.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}
TIMEOUT_S = 900
COUNT = "collectives of every strategy"


def exact_bytes(case: Case) -> dict[str, int]:
    """Parameters, gradients and moments on each device."""
    from mesh_transformer.model.params import named_specs, shape
    from mesh_transformer.sharding.memory import state_bytes
    from mesh_transformer.sharding.mesh import check_run, mesh_sizes
    from mesh_transformer.sharding.rules import rules_for

    run = run_config(case)
    sizes = mesh_sizes(run.mesh, case.n_devices, all_devices=True)
    check_run(sizes, run)
    table = [(spec.axes, shape(spec, run.model)) for spec in named_specs(run.model).values()]
    held = state_bytes(table, rules_for(sizes, zero=run.mesh.zero), sizes)
    return {"params": held.params, "gradients": held.gradients, "moments": held.moments}


def compile_step(case: Case) -> dict[str, Any]:
    """Compiles the training step for the case's devices; bytes on a device, or what the compiler says against it."""
    import jax
    import numpy as np

    from mesh_transformer.model.policy import ComputePolicy
    from mesh_transformer.sharding.layout import layout_for
    from mesh_transformer.train.state import abstract_state
    from mesh_transformer.train.step import make_train_step

    run = run_config(case)
    layout = layout_for(run, devices=_devices(case))
    state = abstract_state(run, layout)
    shape = (case.accumulation, case.batch_size // case.accumulation, run.data.sequence_length + 1)
    rows = jax.ShapeDtypeStruct(shape, np.int32, sharding=layout.rows(1))
    policy = ComputePolicy(dtype="bfloat16", remat="full", unroll=False)
    begun = time.perf_counter()
    with layout.using():
        step = jax.jit(make_train_step(run.model, run.train, policy, layout.rules), donate_argnums=0)
        lowered = step.lower(state, rows)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        told = str(error).removeprefix("RESOURCE_EXHAUSTED: ").splitlines()[0]
        return {"refused": told, "seconds": round(time.perf_counter() - begun)}
    memory = compiled.memory_analysis()
    return {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "peak": memory.peak_memory_in_bytes,
        "code": memory.generated_code_size_in_bytes,
        "seconds": round(time.perf_counter() - begun),
        "collectives": collectives(compiled.as_text()),
    }


def _devices(case: Case) -> Any:
    import jax

    if case.target == "cpu":
        return jax.devices()
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=SLICES[case.device][case.n_devices]).devices


def apart(task: str, n_cpu_devices: int, tpu: bool = False) -> dict[str, Any]:
    """What `--child TASK` prints, in a process of its own, which has so many CPU devices."""
    print(f"{task} ...", file=sys.stderr, flush=True)
    ours = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    ours["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_cpu_devices}"
    done = subprocess.run(
        [sys.executable, __file__, "--child", task],
        env={**os.environ, **ours, **(NO_TPU_HERE if tpu else {})},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{task}: {done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def planned(case: Case, compiling: bool) -> dict[str, Any]:
    """All that is found out about a case."""
    found: dict[str, Any] = {"name": case.name, **case.described(), "exact": exact_bytes(case)}
    room = DEVICES[case.device].memory - sum(found["exact"].values())
    found["room_beside_state"] = room
    if room > 0 and compiling and case.target:
        found["compiled"] = apart(case.name, case.n_devices if case.target == "cpu" else 1, case.target == "tpu")
    return found


def count_collectives() -> dict[str, Any]:
    """Of every strategy on eight CPU devices: collectives that a step of a small model executes, by kind.

    Two depths are compiled, so that what belongs to a layer is told from what belongs to a step.
    """
    import jax
    import numpy as np

    from mesh_transformer.config.model import ModelConfig
    from mesh_transformer.config.run import DataConfig, MeshConfig, RunConfig, TrainConfig
    from mesh_transformer.model.policy import ComputePolicy
    from mesh_transformer.sharding.layout import layout_for
    from mesh_transformer.train.state import abstract_state
    from mesh_transformer.train.step import make_train_step

    def counted(n_layers: int, mesh: dict[str, Any]) -> dict[str, Any]:
        how = {name: mesh[name] for name in ("gather", "pipeline_interleave") if name in mesh}
        mesh = {"data": 1} | {name: value for name, value in mesh.items() if name not in how}
        model = ModelConfig(n_layers=n_layers, d_model=512, n_heads=8, n_vocab=512, n_ctx=128)
        train = TrainConfig(steps=10, learning_rate=1e-4, batch_size=16, remat="full", **how)
        data = DataConfig(train="none", sequence_length=model.n_ctx)
        run = RunConfig(name="count", model=model, data=data, train=train, mesh=MeshConfig(**mesh))
        layout = layout_for(run)
        rows = jax.ShapeDtypeStruct((1, train.batch_size, model.n_ctx + 1), np.int32, sharding=layout.rows(1))
        with layout.using():
            policy = ComputePolicy(remat="full", loss_chunk=2**20)
            step = jax.jit(make_train_step(model, train, policy, layout.rules), donate_argnums=0)
            return collectives(step.lower(abstract_state(run, layout), rows).compile().as_text())

    found = {}
    for name, mesh in STRATEGIES:
        few, many = counted(LAYERS_FEW, mesh), counted(LAYERS_FEW + LAYERS_MORE, mesh)
        layer = {kind: (many[kind]["count"] - few[kind]["count"]) / LAYERS_MORE for kind in many if kind in few}
        step = {kind: few[kind]["count"] - LAYERS_FEW * layer.get(kind, 0) for kind in few}
        found[name] = {"a_layer": layer, "a_step": step, "few": few, "many": many}
    return found


def versions() -> dict[str, str]:
    names = ("mesh-transformer", "jax", "jaxlib", "libtpu")
    installed = {d.metadata["Name"] for d in importlib.metadata.distributions()}
    return {name: importlib.metadata.version(name) for name in names if name in installed}


def main() -> None:
    """Plans, writes after every case, prints where a case stands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON to write; cases that it has compiled already are kept")
    parser.add_argument("--only", default="", help="beginning of the names of the cases to do")
    parser.add_argument("--no-compile", action="store_true", help="the exact bytes alone, beside what is there")
    parser.add_argument("--tables", type=Path, help="a document, whose tables between markers are written anew")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child == COUNT:
        print(json.dumps(count_collectives()))
        return
    if options.child:
        print(json.dumps(compile_step(next(case for case in CASES if case.name == options.child))))
        return
    if options.output is None:
        parser.error("--output is missing")
    there = json.loads(options.output.read_text()) if options.output.exists() else {"cases": []}
    known = {case["name"]: case for case in there["cases"]}
    report = there | {"versions": there.get("versions", {}) | versions()}
    if not options.only and not options.no_compile and "strategies" not in there:
        report["strategies"] = apart(COUNT, 8)
    for case in CASES:
        if case.name.startswith(options.only) and "compiled" not in known.get(case.name, {}):
            known[case.name] = planned(case, not options.no_compile)
            report["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        report["cases"] = [known[case.name] for case in CASES if case.name in known]
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    if options.tables:
        write_tables(options.tables, report)


if __name__ == "__main__":
    main()
