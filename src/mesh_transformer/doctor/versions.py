"""Whether the installed packages and drivers fit each other. Nothing is imported to find out."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from mesh_transformer.compat import TESTED_JAX
from mesh_transformer.doctor.finding import Finding, failed, ok, warning

# Accelerator -> packages that must be of one version, and the extra of jax that brings them.
_CUDA = {"cuda12": ("jax-cuda12-plugin", "jax-cuda12-pjrt"), "cuda13": ("jax-cuda13-plugin", "jax-cuda13-pjrt")}
_LIBTPU = "libtpu"
# The oldest NVIDIA driver on Linux, its first number. Source: JAX's installation page.
_DRIVERS = {"cuda12": 525, "cuda13": 580}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")
_TPU_DEVICE = Path("/dev/accel0")

Version = Callable[[str], str | None]


def installed(package: str) -> str | None:
    """The version of an installed package; None: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def needs_of_jax() -> list[str]:
    """What the installed jax says that it requires, one requirement a string, extras included."""
    return importlib.metadata.requires("jax") or []


def check_versions(version: Version = installed, needs: Sequence[str] | None = None) -> Iterator[Finding]:
    """jax against what was tested, jaxlib and the accelerators' plugins against what jax asks for.

    Args:
        version: of a package by its name; None where it is not installed.
        needs: what jax requires; by default what the installed one says.
    """
    jax, jaxlib = version("jax"), version("jaxlib")
    requirements = needs_of_jax() if needs is None else needs
    if jax is None or jaxlib is None:
        missing = " and ".join(name for name, found in (("jax", jax), ("jaxlib", jaxlib)) if found is None)
        yield failed("jax", f"{missing} not installed", "install it: pip install jax")
        return
    if jax in TESTED_JAX:
        yield ok("jax", f"{jax}, which was tested")
    else:
        tested = ", ".join(TESTED_JAX)
        yield warning("jax", f"{jax} was not tested; tested: {tested}", f"pip install 'jax=={TESTED_JAX[-1]}'")
    yield _pair("jaxlib", jaxlib, jax, _asked_for("jaxlib", requirements, extra=""), f"pip install 'jax=={jax}'")
    yield from _cuda_pairs(version, jax, requirements)
    if libtpu := version(_LIBTPU):
        asked = _asked_for(_LIBTPU, requirements, extra="tpu")
        yield _pair(_LIBTPU, libtpu, jax, asked, f"pip install -U 'jax[tpu]=={jax}'")


def _cuda_pairs(version: Version, jax: str, requirements: Sequence[str]) -> Iterator[Finding]:
    there = [extra for extra, (plugin, _) in _CUDA.items() if version(plugin)]
    if len(there) > 1:
        yield warning(
            "CUDA plugins",
            f"those of {' and '.join(there)} are both installed; JAX loads one of them",
            f"pip uninstall {' '.join(_CUDA[there[0]])}",
        )
    for extra in there:
        plugin, pjrt = _CUDA[extra]
        mend = f"pip install -U 'jax[{extra}]=={jax}'"
        of_plugin, of_pjrt = version(plugin), version(pjrt)
        assert of_plugin is not None
        if of_pjrt != of_plugin:
            given = f"{pjrt} is {of_pjrt}" if of_pjrt else f"{pjrt} is not installed"
            yield failed(plugin, f"{of_plugin}, but {given}; they must be of one version", mend)
        else:
            yield _pair(plugin, of_plugin, jax, _asked_for(plugin, requirements, extra=extra), mend)


def _asked_for(package: str, requirements: Sequence[str], *, extra: str) -> str:
    """The versions that jax allows of a package, such as "<=0.10.2,>=0.10.1"; empty where it says nothing."""
    from packaging.requirements import InvalidRequirement, Requirement

    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        applies = requirement.marker is None or (extra and requirement.marker.evaluate({"extra": extra}))
        if requirement.name == package and applies and bool(extra) == bool(requirement.marker):
            return str(requirement.specifier)
    return ""


def _pair(package: str, found: str, jax: str, asked: str, mend: str) -> Finding:
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(asked).contains(found, prereleases=True):
        return ok(package, f"{found}, as jax {jax} asks for ({asked})" if asked else found)
    return failed(package, f"{found} does not fit jax {jax}, which asks for {asked}", mend)


def check_drivers(
    environment: Mapping[str, str],
    version: Version = installed,
    driver_file: Path = _DRIVER_FILE,
    tpu_device: Path = _TPU_DEVICE,
) -> Iterator[Finding]:
    """The NVIDIA driver against the plugin, and accelerators of this machine for which no plugin is installed."""
    platforms = environment.get("JAX_PLATFORMS", "")
    plugins = [extra for extra, (plugin, _) in _CUDA.items() if version(plugin)]
    driver = _driver(driver_file)
    if driver is not None and plugins:
        extra = plugins[-1]
        if driver < _DRIVERS[extra]:
            older = "; or pip install -U 'jax[cuda12]', which needs 525" if extra == "cuda13" and driver >= 525 else ""
            mend = f"install a newer driver{older}"
            yield failed("NVIDIA driver", f"{driver}, and {extra} needs at least {_DRIVERS[extra]}", mend)
        else:
            yield ok("NVIDIA driver", f"{driver}; {extra} needs at least {_DRIVERS[extra]}")
    elif driver is not None and platforms != "cpu":
        mend = f"pip install 'mesh-transformer[{'cuda13' if driver >= _DRIVERS['cuda13'] else 'cuda12'}]'"
        yield warning("NVIDIA driver", f"{driver} is here, and JAX has no plugin for it: the GPU is not used", mend)
    elif plugins and platforms != "cpu":
        mend = "install NVIDIA's driver, or give the container the GPU (docker run --gpus all)"
        yield warning("NVIDIA driver", f"the plugin of {plugins[-1]} is installed, and there is no driver", mend)
    if tpu_device.exists() and version(_LIBTPU) is None and platforms != "cpu":
        mend = "pip install 'mesh-transformer[tpu]'"
        yield warning("TPU", f"{tpu_device} is here, and libtpu is not installed: the TPU is not used", mend)


def _driver(file: Path) -> int | None:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module\D*?(?:x86_64|aarch64)?\s+(\d+)\.\d+", text)
    return int(found[1]) if found else None
