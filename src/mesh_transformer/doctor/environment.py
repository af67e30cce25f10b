"""Variables and limits of the process that make a run fail, or slow, far from where they were set."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from mesh_transformer import compat
from mesh_transformer.doctor.finding import Finding, failed, ok, warning

_FEWEST_FILES = 1024  # of `ulimit -n`: what Linux gives by default
# Variable -> what it does to a run where it is set to true.
_SLOW = {
    "JAX_DISABLE_JIT": "nothing is compiled, and every operation runs by itself",
    "JAX_DEBUG_NANS": "every result is fetched and looked through",
    "JAX_CHECK_TRACER_LEAKS": "tracing is slow, and nothing is kept from one trace to the next",
    "JAX_ENABLE_X64": "numbers of 64 bits come into programs that are written for 32",
}
# What CUDA's own libraries are called that a directory of LD_LIBRARY_PATH may put before the packages'.
_CUDA_LIBRARIES = (
    "libcudart.so*",
    "libcudnn*.so*",
    "libcublas*.so*",
    "libcusolver.so*",
    "libnvrtc.so*",
    "libcupti.so*",
)
_PACKAGE_OF = {"cuda": "cuda13", "gpu": "cuda13", "tpu": "tpu"}


def check_xla_flags(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Flags that the installed XLA does not name: it ends the process at the first of them."""
    given = environment.get("XLA_FLAGS", "").strip()
    if not given:
        yield ok("XLA_FLAGS", "not set")
        return
    if not given.startswith("-"):
        if Path(given).is_file():
            given = Path(given).read_text(encoding="utf-8", errors="replace")
        else:
            yield failed("XLA_FLAGS", f"{given!r} is taken for a file's name, and there is none", _begins_with_dashes())
            return
    names = [word.lstrip("-").partition("=")[0] for word in given.split() if word.startswith("-")]
    unknown = compat.unknown_xla_flags(names)
    for name in unknown:
        near = difflib.get_close_matches(name, compat.known_xla_flags(), n=1)
        meant = f"; the nearest that there is: --{near[0]}" if near else ""
        yield failed(
            "XLA_FLAGS",
            f"--{name} is not known to the installed jaxlib, which ends the process at it{meant}",
            f"take --{name} out of XLA_FLAGS" + (", or spell it as that" if near else ""),
        )
    if not unknown:
        yield ok("XLA_FLAGS", " ".join(given.split()))


def _begins_with_dashes() -> str:
    return "write flags with two dashes, XLA_FLAGS=--name=value, or name a file of them"


def check_platforms(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Platforms that JAX_PLATFORMS names and nothing installed provides."""
    given = environment.get("JAX_PLATFORMS", "")
    names = [name.strip() for name in given.split(",") if name.strip()]
    absent = [name for name in names if not _is_provided(name, environment)]
    for name in absent:
        if name in _PACKAGE_OF:
            what = f"{name}, for which no plugin of JAX is installed"
            mend = f"pip install 'mesh-transformer[{_PACKAGE_OF[name]}]', or unset JAX_PLATFORMS to take what is there"
            yield failed("JAX_PLATFORMS", f"{given!r} names {what}", mend)
        else:
            message = f"{given!r} names {name}, which no installed plugin is called"
            yield warning("JAX_PLATFORMS", message, "expected some of cpu, cuda, tpu; unset it to take what is there")
    if not absent:
        yield ok("JAX_PLATFORMS", given or "not set: the best platform that is installed")


def _is_provided(name: str, environment: Mapping[str, str]) -> bool:
    if name == "cpu":
        return True
    if name in ("cuda", "gpu"):
        return compat.cuda_plugin() is not None
    if name == "tpu":
        return bool(environment.get("TPU_LIBRARY_PATH")) or importlib.util.find_spec("libtpu") is not None
    return any(name in entry.name for entry in importlib.metadata.entry_points(group="jax_plugins"))


def check_libraries(environment: Mapping[str, str], plugin: Path | None = None) -> Iterator[Finding]:
    """Directories in LD_LIBRARY_PATH whose CUDA is found before the one that the packages brought.

    Args:
        plugin: where JAX's plugin for CUDA lies; None: as installed.
    """
    if (plugin or compat.cuda_plugin()) is None:
        return
    directories = [each for each in environment.get("LD_LIBRARY_PATH", "").split(os.pathsep) if each]
    overriding = [each for each in directories if any(any(Path(each).glob(name)) for name in _CUDA_LIBRARIES)]
    for each in overriding:
        message = f"{each} holds CUDA libraries, which are loaded in place of those that JAX's packages brought"
        yield warning("LD_LIBRARY_PATH", message, f"take {each} out of LD_LIBRARY_PATH, or unset it")
    if not overriding:
        yield ok("LD_LIBRARY_PATH", "names no other CUDA")


def check_limits(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Files that may be open at one time, and switches of JAX for looking for mistakes, which make it slow."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FEWEST_FILES:
        mend = (
            f"ulimit -n {_FEWEST_FILES} before the command; in a container docker run --ulimit nofile={_FEWEST_FILES}"
        )
        yield warning("ulimit -n", f"{files} files may be open at one time; checkpoints and clients need more", mend)
    else:
        yield ok("ulimit -n", "without bound" if files < 0 else f"{files} files")
    for name, effect in _SLOW.items():
        if environment.get(name, "").lower() in ("1", "true", "t", "yes", "y", "on"):
            yield warning(name, f"set: {effect}", f"unset {name}")


def check_allocator() -> Iterator[Finding]:
    """How the C allocator was set up when this command began (`compat.prepare_process`)."""
    fault = compat.allocator_fault()
    if fault is None:
        yield ok("allocator", "keeps what is freed, in huge pages where the system has them")
    else:
        yield warning("allocator", *fault)


def check_native() -> Iterator[Finding]:
    """The native extension, which makes writing text on a CPU fast."""
    from mesh_transformer.kernels.native import VARIABLE, available, description, why_not

    if available():
        yield ok("native extension", description().partition(": ")[2])
        return
    reason = why_not() or ""
    off = reason.startswith(VARIABLE)
    mend = f"unset {VARIABLE}" if off else "install a C++ compiler, then: pip install --force-reinstall --no-deps ."
    yield warning("native extension", f"not used ({reason}): text is written more slowly on a CPU", mend)
