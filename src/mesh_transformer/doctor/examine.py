"""All checks in their order, and the cheap ones that `train` makes by itself."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mesh_transformer.doctor import devices as of_devices
from mesh_transformer.doctor import environment as of_environment
from mesh_transformer.doctor import ports, storage, versions
from mesh_transformer.doctor.devices import Devices
from mesh_transformer.doctor.finding import Check, Finding, carry_out, ok

if TYPE_CHECKING:
    from mesh_transformer.config.run import RunConfig
    from mesh_transformer.sharding.mesh import Sizes
    from mesh_transformer.train.init_from import InitFrom

_NO_CONFIGURATION = "write a configuration that docs/configuration.md describes, or start from an example there"
_ENVIRONMENT = "see docs/doctor.md"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to look at beside the environment.

    config: a run's configuration, with `overrides` as `--set` has them. init_from: the model that it begins from.
    port: one that `serve` is to listen at, on `host`. storage: further directories or fsspec URLs to try.
    """

    config: str | None = None
    overrides: Sequence[str] = ()
    init_from: InitFrom | None = None
    port: int | None = None
    host: str = "127.0.0.1"
    storage: Sequence[str] = ()


def examine(
    options: Options,
    environment: Mapping[str, str] | None = None,
    look_for_devices: Callable[[], Devices] | None = None,
) -> Iterator[Finding]:
    """Every finding, as it comes. Nothing is changed: what is written to try a place is deleted again.

    Args:
        environment: variables; by default those of this process.
        look_for_devices: finds the devices; raises RunError where that fails. By default `devices.look_for_devices`.
    """
    variables = os.environ if environment is None else environment
    found = _Found(look_for_devices=look_for_devices or of_devices.look_for_devices)
    yield from carry_out([*_before_start(variables), *_machine(variables, found)])
    yield from carry_out(_places(options, variables))
    if options.config is None:
        return
    yield from carry_out([Check(name="configuration", look=lambda: found.load(options), mend=_NO_CONFIGURATION)])
    if found.run is not None:
        yield from carry_out(_of_run(found.run, found, options, variables))


def faults_before_start(environment: Mapping[str, str] | None = None) -> list[Finding]:
    """What is wrong with the versions and variables of this process; cheap, and to be asked before JAX starts."""
    checks = _before_start(os.environ if environment is None else environment)
    return [finding for finding in carry_out(checks) if finding.status != "ok"]


def faults_of_run(run: RunConfig, n_processes: int = 1) -> list[Finding]:
    """What is wrong with disk and memory for this run; cheap. Starts JAX's platform.

    Where the mesh or the run directory cannot be used nothing is said here: `train` refuses that by itself.
    """
    from mesh_transformer.config.errors import ConfigError
    from mesh_transformer.doctor.storage import PlaceError, nearest_directory

    def look() -> Iterator[Finding]:
        import jax

        from mesh_transformer.doctor.space import check_memory
        from mesh_transformer.sharding.mesh import check_run, mesh_sizes

        local = jax.local_devices()
        try:
            sizes = mesh_sizes(run.mesh, jax.device_count(), all_devices=n_processes > 1)
            check_run(sizes, run)
        except ConfigError:
            return
        limits = [statistics["bytes_limit"] for each in local if (statistics := each.memory_stats())]
        memory = min(limits) if limits else None
        yield from check_memory(run, sizes, platform=local[0].platform, n_local=len(local), device_memory=memory)

    try:
        nearest_directory(run.run_directory)
    except PlaceError:
        return []
    checks = [_disk(run), Check(name="memory", look=look, mend=_ENVIRONMENT)]
    return [finding for finding in carry_out(checks) if finding.status != "ok"]


@dataclasses.dataclass
class _Found:
    """What earlier checks found and later ones use."""

    look_for_devices: Callable[[], Devices]
    devices: Devices | None = None
    run: RunConfig | None = None
    sizes: Sizes | None = None

    def start(self, environment: Mapping[str, str]) -> Iterator[Finding]:
        """Finds the devices."""
        self.devices = self.look_for_devices()
        yield from of_devices.check_devices(self.devices, environment)

    def load(self, options: Options) -> Iterator[Finding]:
        """Reads the configuration."""
        from mesh_transformer.config.load import load_run_config
        from mesh_transformer.train.lora import check_lora

        assert options.config is not None
        count = self.devices.count if self.devices else 1
        run, notes = load_run_config(options.config, options.overrides, n_devices=lambda: count)
        check_lora(run)
        self.run = run
        yield ok("configuration", "; ".join([f"{options.config}: run {run.name}", *notes]))

    def lay_out(self, run: RunConfig, n_processes: int) -> Iterator[Finding]:
        """Divides model and batch over the devices."""
        from mesh_transformer.doctor.inputs import not_looked_at
        from mesh_transformer.sharding.mesh import check_run, mesh_sizes

        if self.devices is None:
            yield not_looked_at("mesh", "devices")
            return
        count = self.devices.count * n_processes
        sizes = mesh_sizes(run.mesh, count, all_devices=n_processes > 1)
        check_run(sizes, run)
        self.sizes = sizes
        unused = count - sizes.n_devices
        yield ok("mesh", f"{sizes}" + (f"; {unused} of {count} devices are not used" if unused else ""))

    def weigh(self, run: RunConfig) -> Iterator[Finding]:
        """Memory for the run."""
        from mesh_transformer.doctor.inputs import not_looked_at
        from mesh_transformer.doctor.space import check_memory

        if self.devices is None or self.sizes is None:
            yield not_looked_at("memory", "mesh")
            return
        there = self.devices
        yield from check_memory(
            run, self.sizes, platform=there.platform, n_local=there.count, device_memory=there.memory
        )


def _before_start(environment: Mapping[str, str]) -> list[Check]:
    def check(name: str, look: Callable[[], Iterator[Finding]]) -> Check:
        return Check(name=name, look=look, mend=_ENVIRONMENT)

    return [
        check("versions", versions.check_versions),
        check("drivers", lambda: versions.check_drivers(environment)),
        check("XLA_FLAGS", lambda: of_environment.check_xla_flags(environment)),
        check("JAX_PLATFORMS", lambda: of_environment.check_platforms(environment)),
        check("LD_LIBRARY_PATH", lambda: of_environment.check_libraries(environment)),
        check("limits", lambda: of_environment.check_limits(environment)),
    ]


def _machine(environment: Mapping[str, str], found: _Found) -> list[Check]:
    mend = "JAX_PLATFORMS=cpu leaves accelerators aside; docs/gpu.md and docs/tpu.md say what they need"
    return [
        Check(name="allocator", look=of_environment.check_allocator, mend=_ENVIRONMENT),
        Check(name="native extension", look=of_environment.check_native, mend="unset MESH_TRANSFORMER_NATIVE"),
        Check(name="devices", look=lambda: found.start(environment), mend=mend),
        Check(name="compile cache", look=lambda: storage.check_compile_cache(environment), mend=_ENVIRONMENT),
    ]


def _places(options: Options, environment: Mapping[str, str]) -> list[Check]:
    checks = [
        Check(
            name=f"storage {where}", look=_trying(f"storage {where}", where), mend="write the address as fsspec has it"
        )
        for where in options.storage
    ]
    if options.port is not None:
        look = functools.partial(ports.check_port, options.port, options.host)
        checks.append(Check(name=f"port {options.port}", look=look, mend="give another --port"))
    coordinator = "set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or none of them"
    checks.append(Check(name="coordinator", look=lambda: ports.check_coordinator(environment), mend=coordinator))
    return checks


def _trying(name: str, where: str, mend: str = "") -> Callable[[], Iterator[Finding]]:
    return lambda: storage.check_place(name, where, mend)


def _of_run(run: RunConfig, found: _Found, options: Options, environment: Mapping[str, str]) -> list[Check]:
    from mesh_transformer.checkpoint.run_directory import RunDirectory
    from mesh_transformer.doctor.checkpoints import checks_of_checkpoints
    from mesh_transformer.doctor.inputs import Inputs, check_software

    place = ports.place_in_variables(environment)
    n_processes = place.count if place else 1
    inputs = Inputs(run)
    directory = RunDirectory(run.run_directory)
    elsewhere = "or set log.directory to another place"
    written = [directory.path, *([directory.checkpoints] if directory.checkpoints.exists() else [])]
    return [
        Check(name="mesh", look=lambda: found.lay_out(run, n_processes), mend="change [mesh] or train.batch_size"),
        Check(name="packages", look=lambda: check_software(run), mend="install the package"),
        *(Check(name="storage", look=_trying("storage", str(path), elsewhere), mend=elsewhere) for path in written),
        *inputs.checks(),
        *checks_of_checkpoints(inputs, options.init_from),
        _disk(run),
        Check(name="memory", look=lambda: found.weigh(run), mend=_ENVIRONMENT),
    ]


def _disk(run: RunConfig) -> Check:
    def look() -> Iterator[Finding]:
        from mesh_transformer.doctor.space import check_disk

        yield from check_disk(run)

    return Check(name="disk", look=look, mend="set log.directory to another disk")
