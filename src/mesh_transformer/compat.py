"""Differences between versions of JAX, and what is known of the installed ones. The only module that looks."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import mmap
import os
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mesh_transformer.config.errors import RunError

# Versions that this project's tests have run with.
TESTED_JAX = ("0.10.2",)


_REPORTED = ("mesh-transformer", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "grain", "tokenizers")
# Named where they are installed.
_ACCELERATORS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")


def version_report(*more: str) -> str:
    """One line a package, Python and its system, then those given, and whether the tests have run with this jax.

    Devices are not in it: to see them JAX would have to start (`mesh-transformer doctor` says which there are).
    """
    lines = []
    for name in _REPORTED:
        try:
            lines.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name} (not installed)")
    for name in _ACCELERATORS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            lines.append(f"{name} {importlib.metadata.version(name)}")
    jax_version = importlib.metadata.version("jax")
    tested = "tested" if jax_version in TESTED_JAX else f"not tested; tested: {', '.join(TESTED_JAX)}"
    system = f"python {platform.python_version()} on {platform.system()} {platform.release()} {platform.machine()}"
    asked = os.environ.get("JAX_PLATFORMS")
    platforms = f"JAX_PLATFORMS={asked}" if asked else "JAX_PLATFORMS is not set"
    return "\n".join([*lines, system, platforms, *more, f"this jax is {tested}"])


def prepare_process() -> None:
    """Settings that must be made before JAX is imported; called once by the command line, never by the library.

    On Linux the C allocator is told to keep big buffers instead of returning them to the system after every step,
    where fresh pages would be paid for again, and to take them from huge pages (what it is worth: docs/performance.md).
    The process then never shrinks. MESH_TRANSFORMER_ALLOCATOR=default leaves the allocator alone.
    MESH_TRANSFORMER_GPU=default leaves out what is set for NVIDIA GPUs (`prepare_gpu`). Several devices made of one CPU
    get threads enough (`give_fake_devices_threads`).
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's start-up chatter
    if platform.system() == "Linux" and os.environ.get("MESH_TRANSFORMER_ALLOCATOR") != "default":
        _keep_freed_memory()
    if os.environ.get("MESH_TRANSFORMER_GPU") != "default":
        prepare_gpu()
    give_fake_devices_threads()


_FAKE_DEVICES = re.compile(r"--xla_force_host_platform_device_count=(\d+)")
# With one thread a device the same steps came to a stop within a minute, with two not; those that wait cost nothing.
_THREADS_A_FAKE_DEVICE = 8


def give_fake_devices_threads() -> None:
    """Before JAX is imported: where XLA_FLAGS divides the CPU into several devices, XLA gets more threads than cores.

    A device that waits for the others in a collective keeps its thread. With as many threads as cores, which is what
    XLA takes, all of them can wait for devices that have none left, and XLA ends the process after 40 seconds. What
    PJRT_NPROC says already stays.
    """
    given = _FAKE_DEVICES.findall(os.environ.get("XLA_FLAGS", ""))
    if given and int(given[-1]) > 1:
        threads = max(_THREADS_A_FAKE_DEVICE * int(given[-1]), os.cpu_count() or 1)
        os.environ.setdefault("PJRT_NPROC", str(threads))


# What XLA is told about NVIDIA GPUs; why: docs/gpu.md.
GPU_FLAGS = ("xla_gpu_enable_latency_hiding_scheduler=true",)
GPU_MEMORY = "0.92"


def prepare_gpu() -> None:
    """The environment for NVIDIA GPUs, where JAX's plugin for them is installed; what is set already stays as it is.

    A flag that XLA does not know ends the process. Those that the installed libraries do not name are left out.
    """
    plugin = cuda_plugin()
    if plugin is None or not _asks_for_gpu():
        return
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", GPU_MEMORY)
    given = os.environ.get("XLA_FLAGS", "")
    for flag in GPU_FLAGS:
        name = flag.partition("=")[0]
        if name not in given and not unknown_xla_flags([name]):
            given = f"{given} --{flag}".strip()
    if given:
        os.environ["XLA_FLAGS"] = given


def cuda_plugin() -> Path | None:
    """Where JAX's plugin for NVIDIA GPUs is installed; the newer, of two."""
    return _directory_of("jax_plugins.xla_cuda13") or _directory_of("jax_plugins.xla_cuda12")


def _asks_for_gpu() -> bool:
    return bool({"cuda", "gpu"} & set(os.environ.get("JAX_PLATFORMS", "cuda").split(",")))


def unknown_xla_flags(names: Sequence[str]) -> list[str]:
    """Of these names of flags those that an installed reader of XLA_FLAGS does not have in it: XLA ends the process at
    one. To find a name takes about 10 ms, to miss it 0.3 s.
    """
    # Both read XLA_FLAGS: the plugin, and jaxlib for the CPU.
    directories = [_directory_of("jaxlib"), cuda_plugin() if _asks_for_gpu() else None]
    readers = [list(directory.glob("*.so")) for directory in directories if directory]
    return [name for name in names if not all(any(_names(file, name) for file in files) for files in readers)]


def known_xla_flags() -> list[str]:
    """Names that look like flags in the installed jaxlib, to find the one that was meant. Takes 0.3 s."""
    found: set[bytes] = set()
    for file in (_directory_of("jaxlib") or Path()).glob("*.so"):
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found.update(re.findall(rb"\x00(xla_[a-z0-9_]{4,})\x00", content))
    return sorted(name.decode() for name in found)


def _directory_of(package: str) -> Path | None:
    """Where an installed package lies; does not import it."""
    try:
        found = importlib.util.find_spec(package)
    except ImportError:
        return None
    return None if found is None or found.origin is None else Path(found.origin).parent


def _names(library: Path, name: str) -> bool:
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(name.encode()) >= 0


def _keep_freed_memory() -> None:
    import ctypes

    # Constants of glibc's malloc.h; another C library has no mallopt and is left as it is.
    m_mmap_max, m_trim_threshold, m_arena_max = -4, -1, -8
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, -1)  # as an unsigned number of bytes: never
    mallopt(m_arena_max, 1)
    global _in_huge_pages
    _in_huge_pages = _ask_for_huge_pages()


# Whether this process' heap was advised to lie in huge pages.
_in_huge_pages = False
_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14


def _ask_for_huge_pages() -> bool:
    """Grows the heap, by address only, as far as there is memory, and advises the system to back it with huge pages.

    glibc does so by itself under GLIBC_TUNABLES=glibc.malloc.hugetlb=1, which it reads before the process' first line.
    Nothing is touched: an address takes memory when it is first written to. What lies past the heap's new end, should
    it ever grow further, is in pages of the usual size.

    Returns:
        Whether the advice was given. Not where addresses are counted: vm.overcommit_memory 2, `ulimit -v` or `-d`.
    """
    import ctypes
    import resource

    try:
        with open("/proc/sys/vm/overcommit_memory", encoding="ascii") as file:
            counted = file.read().strip() == "2"
        libc = ctypes.CDLL(None)
        malloc, free, madvise = libc.malloc, libc.free, libc.madvise
    except (AttributeError, OSError):
        return False
    malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    free.restype, free.argtypes = None, [ctypes.c_void_p]
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if counted or any(limit != resource.RLIM_INFINITY for limit in limits):
        return False
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8 * 7
    begin = malloc(size)
    if not begin:
        return False
    first = -(-begin // _HUGE_PAGE) * _HUGE_PAGE
    advised: bool = madvise(first, begin + size - first, _MADV_HUGEPAGE) == 0
    free(begin)
    return advised


def allocator_fault() -> tuple[str, str] | None:
    """(what is not as `prepare_process` wants it in this process, how to mend that); None if nothing."""
    if platform.system() != "Linux" or _in_huge_pages:
        never = "[never]" in _system_setting("kernel/mm/transparent_hugepage/enabled")
        mend = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root"
        return ("the system gives no huge pages: training on a CPU is slower", mend) if never else None
    if os.environ.get("MESH_TRANSFORMER_ALLOCATOR") == "default":
        fault = "left alone, as MESH_TRANSFORMER_ALLOCATOR says: memory is paid for anew in every step"
        return fault, "unset MESH_TRANSFORMER_ALLOCATOR"
    return (
        "not in huge pages: addresses are counted here, or the C library is not glibc; training on a CPU is slower",
        "vm.overcommit_memory must not be 2, and neither `ulimit -v` nor `ulimit -d` set",
    )


def _system_setting(name: str) -> str:
    try:
        return Path("/sys", name).read_text(encoding="ascii")
    except OSError:
        return ""


def give_memory_back() -> None:
    """Returns freed memory to the system once, where the C library can: after a phase that needed much for a moment."""
    import ctypes

    global _in_huge_pages
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
        if _in_huge_pages:  # the end of the heap, with the advice on it, has been given back too
            _in_huge_pages = _ask_for_huge_pages()


def use_compile_cache() -> None:
    """Keeps compiled programs between processes, under the user's cache directory.

    JAX_COMPILATION_CACHE_DIR, if set, is left to JAX.
    """
    import jax

    from mesh_transformer.config.paths import cache_directory

    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def detect_cluster(timeout_s: int) -> tuple[str, int, int, tuple[int, ...] | None] | None:
    """What JAX itself recognises around this process (Open MPI, SLURM, Cloud TPU); None where it recognises nothing.

    Private to JAX, whose public `jax.distributed.initialize` looks and connects in one step and cannot say what it
    found when nobody is there to connect to.

    Returns:
        ("host:port" of process 0, number of processes, index of this one, its local devices or None for all).
    """
    from jax._src.clusters import ClusterEnv

    address, count, index, device_ids = ClusterEnv.auto_detect_unset_distributed_params(
        None, None, None, None, None, timeout_s
    )
    if address is None or count is None or index is None:
        return None
    return address, count, index, None if device_ids is None else tuple(device_ids)


def is_distributed() -> bool:
    """Whether `jax.distributed` is initialised; does not import JAX to find out."""
    jax = sys.modules.get("jax")
    return jax is not None and bool(jax.distributed.is_initialized())


class KeyValueStore:
    """The key-value store of JAX's coordination service, which process 0 serves. Values are text, at most about 4 MB.

    JAX has no public access to it; `jax.distributed` must be initialised.

    Raises:
        RunError: from every method, when the service cannot be reached.
    """

    def __init__(self) -> None:
        from jax._src import distributed

        self._client: Any = distributed.global_state.client

    def set(self, key: str, value: str) -> None:
        """Puts the value there, in place of an earlier one."""
        self._call("key_value_set", key, value, True)

    def get(self, key: str, timeout_s: float) -> str | None:
        """The value, waited for at most so many seconds; None if it did not come."""
        return self._call("blocking_key_value_get", key, max(1, round(timeout_s * 1000)))

    def try_get(self, key: str) -> str | None:
        """The value if it is there now."""
        return self._call("key_value_try_get", key)

    def entries(self, directory: str) -> dict[str, str]:
        """Every key under "directory/", without that prefix, and its value."""
        found = self._call("key_value_dir_get", f"{directory}/") or []
        return {key.removeprefix(f"{directory}/"): value for key, value in found}

    def delete(self, directory: str) -> None:
        """Removes every key under "directory/"."""
        self._call("key_value_delete", f"{directory}/")

    def _call(self, method: str, *arguments: Any) -> Any:
        import jax

        try:
            return getattr(self._client, method)(*arguments)
        except jax.errors.JaxRuntimeError as error:
            if str(error).startswith(("DEADLINE_EXCEEDED", "NOT_FOUND")):
                return None
            reason = str(error).partition("\n")[0]
            raise RunError(
                f"the coordinator, process 0, cannot be reached any more ({reason})\n"
                "It has ended or its machine is cut off: see what it printed last, then repeat the command."
            ) from error


def cudnn_version() -> int | None:
    """The version of the cuDNN that JAX has loaded, as 92800 for 9.28.0; None where there is none. Private to JAX."""
    try:
        from jax._src.lib import cuda_versions
    except ImportError:
        return None
    return None if cuda_versions is None else int(cuda_versions.cudnn_get_version())


def n_compiled(*jitted: Any) -> int:
    """Programs that these functions, made by `jax.jit`, hold compiled. Private to JAX, which counts them for itself."""
    return sum(function._cache_size() for function in jitted)


def alike_rows(dtype: str) -> tuple[dict[str, str] | None, int, int]:
    """How to compile programs whose rows are rounded alike however many there are: options for `jax.jit`, the fewest
    rows that a product of factors of `dtype` may have, and how many it must have (0: any).

    On CPU, XLA chooses between loops of its own, Eigen and the YNNPACK library by how large an operation is, and they
    sum in different orders. Reductions go to YNNPACK from about 4,096 elements on; here they stay where they are.
    Products in float32 change their order with the number of rows at places that differ from shape to shape; narrower
    ones only between one row and two. Measured with jaxlib 0.10.2 (benchmarks/alike_rows.py);
    tests/engine/test_invariance.py sees whether it holds. A jaxlib without the option is left as it is. Of
    accelerators nothing is known.
    """
    import jax

    if jax.default_backend() != "cpu":
        return None, 2, 0
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
    rows = (8, 8) if dtype == "float32" else (2, 0)
    try:
        jax.jit(lambda x: x, compiler_options=options).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return None, *rows
    return options, *rows
