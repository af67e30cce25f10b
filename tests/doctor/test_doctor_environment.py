"""Planted faults of packages, drivers, variables and devices, each named with its mend."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import pytest
from doctor_cases import check, named

import mesh_transformer.kernels.native as native
from mesh_transformer import compat
from mesh_transformer.config.errors import ConfigError, RunError
from mesh_transformer.doctor import Finding, Options, examine, faults_before_start
from mesh_transformer.doctor import devices as of_devices
from mesh_transformer.doctor.devices import Devices, check_devices, look_for_devices
from mesh_transformer.doctor.environment import (
    check_allocator,
    check_libraries,
    check_limits,
    check_native,
    check_platforms,
    check_xla_flags,
)
from mesh_transformer.doctor.finding import Check, carry_out, ok
from mesh_transformer.doctor.versions import check_drivers, check_versions, needs_of_jax

JAX = compat.TESTED_JAX[-1]
NEEDS = [
    f"jaxlib<={JAX},>=0.10.1",
    f'jaxlib<={JAX},>={JAX}; extra == "cuda12"',
    f'jax-cuda12-plugin[with-cuda]<={JAX},>={JAX}; extra == "cuda12"',
    f'jax-cuda13-plugin[with-cuda]<={JAX},>={JAX}; extra == "cuda13"',
    'libtpu==0.0.42.*; extra == "tpu"',
]


def versions(**changes: str) -> list[Finding]:
    """What is said of these packages; "jax_cuda12_plugin" stands for the name with hyphens."""
    there = {"jax": JAX, "jaxlib": JAX} | {name.replace("_", "-"): version for name, version in changes.items()}
    return list(check_versions(lambda name: there.get(name), NEEDS))


def test_a_sound_set_of_packages() -> None:
    plugins = {"jax_cuda12_plugin": JAX, "jax_cuda12_pjrt": JAX, "libtpu": "0.0.42.1"}
    assert [each.status for each in versions(**plugins)] == ["ok"] * 4
    assert [each.status for each in check_versions()] == ["ok", "ok"]  # what is installed here
    assert any(need.startswith("jaxlib") for need in needs_of_jax())


def test_a_jax_that_was_not_tested() -> None:
    check(named(versions(jax="9.9.9"), "jax"), "warning", "9.9.9 was not tested", JAX, mend=f"'jax=={JAX}'")


def test_a_jaxlib_of_another_version() -> None:
    check(named(versions(jaxlib="0.9.0"), "jaxlib"), "failed", "0.9.0 does not fit", "0.10.1", mend=f"'jax=={JAX}'")


def test_no_jaxlib() -> None:
    found = check_versions(lambda name: JAX if name == "jax" else None, NEEDS)
    check(next(found), "failed", "jaxlib not installed", mend="pip install jax")


def test_a_plugin_of_another_version() -> None:
    found = named(versions(jax_cuda12_plugin="0.9.0", jax_cuda12_pjrt="0.9.0"), "jax-cuda12-plugin")
    check(found, "failed", "0.9.0 does not fit jax", mend=f"'jax[cuda12]=={JAX}'")


def test_a_plugin_without_its_other_half() -> None:
    found = named(versions(jax_cuda13_plugin=JAX), "jax-cuda13-plugin")
    check(found, "failed", "jax-cuda13-pjrt is not installed", mend=f"'jax[cuda13]=={JAX}'")


def test_two_plugins() -> None:
    both = {f"jax_cuda{n}_{part}": JAX for n in (12, 13) for part in ("plugin", "pjrt")}
    check(named(versions(**both), "CUDA plugins"), "warning", "both", mend="pip uninstall jax-cuda12-plugin")


def test_another_libtpu() -> None:
    check(named(versions(libtpu="0.0.17"), "libtpu"), "failed", "0.0.17 does not fit", mend=f"'jax[tpu]=={JAX}'")


DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}.54.03  Tue\n"


def driver(tmp_path: Path, number: int | None, *packages: str, platforms: str = "") -> Finding:
    file = tmp_path / "version"
    if number is not None:
        file.write_text(DRIVER.format(number))
    there = dict.fromkeys(packages, JAX)
    return next(check_drivers({"JAX_PLATFORMS": platforms}, lambda n: there.get(n), file, tmp_path / "no TPU"))


def test_drivers(tmp_path: Path) -> None:
    check(driver(tmp_path, 535, "jax-cuda13-plugin"), "failed", "535", "at least 580", mend="jax[cuda12]")
    check(driver(tmp_path, 470, "jax-cuda12-plugin"), "failed", "470", "at least 525", mend="newer driver")
    check(driver(tmp_path, 570), "warning", "not used", mend="mesh-transformer[cuda12]")
    check(driver(tmp_path, 580), "warning", "not used", mend="mesh-transformer[cuda13]")
    assert driver(tmp_path, 580, "jax-cuda13-plugin").status == "ok"


def test_a_plugin_without_a_driver(tmp_path: Path) -> None:
    check(driver(tmp_path, None, "jax-cuda12-plugin"), "warning", "no driver", mend="--gpus all")
    with pytest.raises(StopIteration):
        driver(tmp_path, None, "jax-cuda12-plugin", platforms="cpu")


def test_the_drivers_open_kernel_module_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    found = next(check_drivers({}, lambda n: JAX if n == "jax-cuda13-plugin" else None, file, tmp_path / "no TPU"))
    assert found.status == "ok" and "580" in found.message


def test_a_tpu_without_libtpu(tmp_path: Path) -> None:
    (tmp_path / "accel0").touch()
    found = next(check_drivers({}, lambda n: None, tmp_path / "none", tmp_path / "accel0"))
    check(found, "warning", "libtpu is not installed", mend="mesh-transformer[tpu]")


def test_an_unknown_xla_flag() -> None:
    flags = "--xla_force_host_platform_device_count=8 --xla_force_host_platform_device_cuont=8"
    (found,) = check_xla_flags({"XLA_FLAGS": flags})
    nearest = "the nearest that there is: --xla_force_host_platform_device_count"
    check(found, "failed", "device_cuont is not known", nearest, mend="XLA_FLAGS")
    (found,) = check_xla_flags({"XLA_FLAGS": "xla_flag=1"})
    check(found, "failed", "file's name", mend="--name=value")
    assert [each.status for each in check_xla_flags({"XLA_FLAGS": flags.split()[0]})] == ["ok"]


def test_a_platform_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "cuda_plugin", lambda: None)
    (found,) = check_platforms({"JAX_PLATFORMS": "cuda,cpu"})
    check(found, "failed", "'cuda,cpu' names cuda", mend="mesh-transformer[cuda13]")
    (found,) = check_platforms({"JAX_PLATFORMS": "abacus"})
    check(found, "warning", "abacus", mend="expected some of cpu, cuda, tpu")
    assert next(check_platforms({"JAX_PLATFORMS": "cpu"})).status == "ok"
    assert next(check_platforms({"JAX_PLATFORMS": "tpu", "TPU_LIBRARY_PATH": "/libtpu.so"})).status == "ok"


def test_another_cuda_in_the_library_path(tmp_path: Path) -> None:
    (tmp_path / "libcudnn.so.8").touch()
    (found,) = check_libraries({"LD_LIBRARY_PATH": f"/nowhere:{tmp_path}"}, plugin=tmp_path)
    check(found, "warning", str(tmp_path), "in place of", mend=f"take {tmp_path} out of LD_LIBRARY_PATH")
    assert next(check_libraries({"LD_LIBRARY_PATH": "/nowhere"}, plugin=tmp_path)).status == "ok"


def test_few_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    check(next(check_limits({})), "warning", "256 files", mend="ulimit -n 1024")


def test_a_switch_that_makes_everything_slow() -> None:
    found = named(list(check_limits({"JAX_DISABLE_JIT": "True", "JAX_DEBUG_NANS": "0"})), "JAX_DISABLE_JIT")
    check(found, "warning", "nothing is compiled", mend="unset JAX_DISABLE_JIT")
    assert "JAX_DEBUG_NANS" not in {each.name for each in check_limits({"JAX_DEBUG_NANS": "0"})}


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator is left alone elsewhere")
def test_the_allocator_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "_in_huge_pages", False)
    monkeypatch.setenv("MESH_TRANSFORMER_ALLOCATOR", "default")
    check(next(check_allocator()), "warning", "left alone", mend="unset MESH_TRANSFORMER_ALLOCATOR")
    monkeypatch.delenv("MESH_TRANSFORMER_ALLOCATOR")
    check(next(check_allocator()), "warning", "not in huge pages", mend="vm.overcommit_memory")
    monkeypatch.setattr(compat, "_in_huge_pages", True)
    monkeypatch.setattr(compat, "_system_setting", lambda name: "always madvise [never]")
    check(next(check_allocator()), "warning", "no huge pages", mend="transparent_hugepage")
    monkeypatch.setattr(compat, "_system_setting", lambda name: "always [madvise] never")
    assert next(check_allocator()).status == "ok"


def test_no_native_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "why_not", lambda: "it was not built")
    check(next(check_native()), "warning", "it was not built", mend="C++ compiler")
    monkeypatch.setattr(native, "why_not", lambda: f"{native.VARIABLE} = off")
    check(next(check_native()), "warning", mend=f"unset {native.VARIABLE}")


# ------------------------------------------------------------------------------------------------------------ devices


def test_the_real_devices_exchange_what_they_should(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(own_cache))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=3")
    found = look_for_devices()
    assert found.platform == "cpu" and found.count == 3 and found.memory is None
    assert found.collective is not None and found.collective["right"] and found.collective["seconds"] > 0
    counted, exchanged = check_devices(found, {"JAX_PLATFORMS": "cpu"})
    assert counted.status == exchanged.status == "ok"
    assert counted.message == "3 x cpu (cpu)" and "GB/s a device" in exchanged.message
    assert not own_cache.exists()


def test_a_process_that_jax_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(RunError, match=r"ended the process in which it started .*xla_no_such_flag"):
        look_for_devices()


def test_a_start_that_never_ends(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "hanging.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(of_devices, "_PROBE", "hanging")
    with pytest.raises(RunError, match=r"did not find its devices in 1 s\n.*JAX_PLATFORMS=cpu"):
        look_for_devices(1.0)


def test_devices_that_do_not_start_are_a_finding() -> None:
    def refuse() -> Devices:
        raise RunError("JAX does not start: RuntimeError: no TPU")

    found = named(list(examine(Options(), {"JAX_PLATFORMS": "cpu"}, refuse)), "devices")
    check(found, "failed", "no TPU", mend="JAX_PLATFORMS=cpu")


def test_a_wrong_sum() -> None:
    wrong = Devices(
        platform="cuda", kinds=("H100",) * 2, memory=2**36, collective={"bytes": 8, "seconds": 1, "right": False}
    )
    counted, exchanged = check_devices(wrong, {})
    assert counted.message == "2 x H100 (cuda), 64.0 GiB each"
    check(exchanged, "failed", "is wrong", mend="NCCL_P2P_DISABLE")


def test_an_accelerator_left_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "cuda_plugin", lambda: Path("/plugin"))
    found = next(check_devices(Devices(platform="cpu", kinds=("cpu",)), {}))
    check(found, "warning", "does not use it", mend="JAX_PLATFORMS=cuda")


# ----------------------------------------------------------------------------------------------------- carrying out


def test_a_check_that_goes_wrong_itself_stops_nothing() -> None:
    def raise_error(error: Exception) -> list[Finding]:
        raise error

    def check_of(name: str, error: Exception) -> Check:
        return Check(name=name, look=lambda: raise_error(error), mend="the usual mend")

    last = Check(name="last", look=lambda: [ok("last", "well")], mend="none")
    checks = [
        check_of("first", ZeroDivisionError("division by\nzero")),
        check_of("second", ConfigError("this is wrong\nmend it so")),
        check_of("third", ConfigError("this is wrong; mend it so")),
        last,
    ]
    first, second, third, end = carry_out(checks)
    check(first, "failed", "ZeroDivisionError: division by zero", mend="the usual mend")
    check(second, "failed", "this is wrong", mend="mend it so")
    check(third, "failed", "this is wrong; mend it so", mend="the usual mend")
    assert end.status == "ok"


def test_a_finding_has_a_mend_where_something_is_wrong_and_only_there() -> None:
    with pytest.raises(ValueError, match="has the mend"):
        Finding(name="a", status="failed", message="b")
    with pytest.raises(ValueError, match="has the mend"):
        Finding(name="a", status="ok", message="b", mend="c")


def test_what_train_asks_before_jax_starts() -> None:
    faults = faults_before_start({"JAX_PLATFORMS": "cpu", "JAX_DISABLE_JIT": "1"})
    assert [fault.name for fault in faults] == ["JAX_DISABLE_JIT"]
    assert faults[0].as_line().startswith("warning: JAX_DISABLE_JIT: ") and "unset" in faults[0].as_line()
