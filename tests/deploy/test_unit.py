"""The systemd unit agrees with the project."""

import configparser
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main

from mesh_transformer.cli.main import app

UNIT = Path(__file__).parents[2] / "deploy" / "mesh-transformer.service"


def service() -> configparser.SectionProxy:
    """Its section [Service]; every key stands there once."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment]
    parser.read(UNIT, encoding="utf-8")
    return parser["Service"]


def test_the_command_exists() -> None:
    program, name, *words = shlex.split(service()["ExecStart"])
    assert Path(program).name == "mesh-transformer" and Path(program).is_absolute()
    known = {option for p in typer.main.get_command(app).commands[name].params for option in p.opts}
    assert {word for word in words if word.startswith("--")} <= known
    # Only this machine: others come through the proxy.
    assert words[words.index("--host") + 1] == "127.0.0.1"


def test_it_waits_longer_than_the_server_takes() -> None:
    words = shlex.split(service()["ExecStart"])
    assert int(service()["TimeoutStopSec"]) >= int(words[words.index("--shutdown-timeout") + 1]) + 10
    assert service()["KillSignal"] == "SIGTERM"


def test_it_is_confined_and_can_write_its_cache() -> None:
    unit = service()
    assert unit["DynamicUser"] == "yes" and unit["ProtectSystem"] == "strict" and unit["NoNewPrivileges"] == "yes"
    assert unit["CapabilityBoundingSet"] == ""
    assert f"MESH_TRANSFORMER_CACHE=/var/cache/{unit['CacheDirectory']}" in unit["Environment"].split()
    # JAX writes programs into memory and runs them.
    assert "MemoryDenyWriteExecute" not in unit
    assert "MESH_TRANSFORMER_API_KEY" not in unit["Environment"], "everybody may read a unit"


@pytest.mark.peers
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "systemd-analyze is not installed: apt-get install systemd"
        )
    # A program that exists here, so that nothing is left to complain of.
    (tmp_path / UNIT.name).write_text(
        UNIT.read_text().replace("/opt/mesh-transformer/bin/mesh-transformer", "/bin/true")
    )
    done = subprocess.run([analyze, "verify", tmp_path / UNIT.name], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
