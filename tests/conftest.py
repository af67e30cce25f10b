"""Eight CPU devices stand in for a pod; jaxtyping and beartype check every annotated call of the numeric rooms."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import pytest
from jaxtyping import install_import_hook

from mesh_transformer import compat
from quickly import compile_quickly

compat.give_fake_devices_threads()

# train.state is left out: JAX rebuilds its dataclass with descriptions in place of arrays when it lowers a program.
install_import_hook(
    ["mesh_transformer.model", "mesh_transformer.train.step", "mesh_transformer.train.optimizer"]
    + ["mesh_transformer.sample", "mesh_transformer.engine"],
    "beartype.beartype",
)


# Files that take longest begin first, so that none is left to one process at the end; before them those whose programs
# are compiled otherwise, so that each process changes over once.
_LONGEST = (
    "test_run_of_many.py", "test_executed_documents.py", "test_kill_and_resume.py", "test_generate.py",
    "test_commands.py", "test_invariance.py", "test_sampling_in_engine.py", "test_real_server.py",
    "test_bad_input.py", "test_demo.py", "test_launch.py",
    "test_collectives.py", "test_mesh_losses.py", "test_mesh_inference.py", "test_optimizer.py", "test_run.py",
)  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Peers and long counts run only when asked for with -m."""
    items.sort(key=lambda item: (item.path.name not in _COMPILED_AS_FOR_USERS, item.path.name not in _LONGEST))
    if config.getoption("-m"):
        return
    for item in items:
        for tier in ("peers", "long"):
            if item.get_closest_marker(tier):
                item.add_marker(pytest.mark.skip(reason=f"run with: make test-{tier}"))


# Files that ask something of the compiled programs themselves, or are the last word on numbers: their programs are
# compiled as users have them. All others, within `make test`, are compiled in a third of the time: `quickly`.
_COMPILED_AS_FOR_USERS = (
    "test_golden.py", "test_golden_layouts.py", "test_collectives.py", "test_memory.py", "test_narrow_weights.py",
    "test_invariance.py", "test_native_programs.py",
    "test_fast_kernels.py", "test_many_processes.py", "test_plan_compiled.py",
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def compiled_quickly(request: pytest.FixtureRequest) -> None:
    """Chooses; the full counts and the comparisons with peers are always computed by programs as users have them."""
    tiers = request.config.getoption("-m").split(" and ")
    compile_quickly(request.path.name not in _COMPILED_AS_FOR_USERS and not {"peers", "long"} & set(tiers))
