"""Runs the blocks of a page in their order, in a directory of its own, as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import yaml
from document_blocks import ROOT, Block, commands_in
from document_materials import put

import quickly

# What is there already where the tests run. That targets, extras and options exist is tested in tests/house.
_INSTALLING = re.compile(
    r"make( |$)|(\. |source )\S*activate$|\S*python\S* -m venv |\S*pip install |"
    r"python\S* -m pip install |\S*pre-commit install|git clone |cd mesh-transformer$"
)
_ADDRESS = re.compile(r"127\.0\.0\.1:8000|localhost:8000")
# Seconds that a command may take, and a server until it is ready.
_PATIENCE, _READY = 900, 240


class Reader:
    """Types what stands in the blocks. With `servers` false, no server is started and nothing is asked of one."""

    def __init__(self, directory: Path, *, compile_quickly: bool, servers: bool) -> None:
        self.directory, self._servers, self._server, self._port = directory, servers, None, ""
        self._python = ""  # what the page's Python blocks have done so far
        self._cwd = directory
        variables = quickly.variables() if compile_quickly else {"XLA_FLAGS": ""}
        self._environment = os.environ | variables | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "MESH_TRANSFORMER_CACHE": str(directory / ".cache"), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg",
            "HOME": str(directory / ".home"), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        for name in ("benchmarks", "scripts", "deploy"):
            (directory / name).symlink_to(ROOT / name)

    def read(self, blocks: list[Block]) -> None:
        """Takes every block of a page; those that are not run are passed over.

        Raises:
            AssertionError: a command failed, or a block is not what its language says. Names page and line.
        """
        for block in reversed(blocks):  # a file that a page shows after it is used; the first of that name stays
            if "file" in block.says:
                self._write(block)
        try:
            for block in blocks:
                if block.reason is None:
                    put(block.says.get("needs", ""), self.directory)
                    self._take(block)
        finally:
            self._stop()

    def _take(self, block: Block) -> None:
        if "file" in block.says:
            self._write(block)
        elif block.language == "python":
            self._run_python(block)
        elif block.language in ("console", "sh"):
            for command in commands_in(block):
                self._run(block, command)
        check_parsed(block)

    def _write(self, block: Block) -> None:
        path = self.directory / block.says["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.as_run(), encoding="utf-8")

    def _run_python(self, block: Block) -> None:
        source = block.as_run()
        self._python = self._python + source if "continues" in block.says else source
        done = self._finish([sys.executable, "-c", self._python], self._environment)
        assert done.returncode == 0, f"{block.place}\n{done.stdout}{done.stderr}"

    def _run(self, block: Block, command: str) -> None:
        if _INSTALLING.match(command):
            return
        if re.match(r"mesh-transformer serve\b", command):
            self._serve(block, command)
            return
        if _ADDRESS.search(command):
            if not self._servers:
                return
            assert self._server is not None, f"{block.place}: nobody serves\n{command}"
            command = _ADDRESS.sub(f"127.0.0.1:{self._port}", command)
            command = re.sub(r"^curl ", "curl --silent --show-error --fail-with-body ", command)
        # Flags before a command would take the place of those that make it compile quickly.
        flags = self._environment["XLA_FLAGS"]
        command = re.sub(r"^XLA_FLAGS=(\S+)", lambda given: f"XLA_FLAGS='{given[1]} {flags}'", command)
        # What a command leaves in its shell, such as a directory or a variable, the next one finds.
        state = self.directory / ".shell"
        script = f"{command}\nstatus=$?\npwd -P > {state}.cwd; env -0 > {state}.env; exit $status"
        done = self._finish(["bash", "-o", "pipefail", "-c", script], self._environment)
        assert done.returncode == 0, f"{block.place}\n$ {command}\n{done.stdout}{done.stderr}"
        self._cwd = Path(Path(f"{state}.cwd").read_text().rstrip("\n"))
        pairs = Path(f"{state}.env").read_text().rstrip("\0").split("\0")
        self._environment = dict(pair.split("=", 1) for pair in pairs)

    def _finish(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, cwd=self._cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_PATIENCE,
        )  # fmt: skip

    def _serve(self, block: Block, command: str) -> None:
        if not self._servers:
            return
        self._stop()
        words = [word for word in shlex.split(command) if word != "&"]
        if "--port" in words:
            del words[words.index("--port") :][:2]
        told = self.directory / ".server"
        with told.open("w") as output:
            self._server = subprocess.Popen(
                [*words, "--port", "0"], cwd=self._cwd, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        deadline = time.monotonic() + _READY
        while "ready after" not in told.read_text():
            assert self._server.poll() is None, f"{block.place}\n$ {command}\n{told.read_text()}"
            assert time.monotonic() < deadline, f"{block.place}: not ready\n{told.read_text()}"
            time.sleep(0.2)
        found = re.search(r"http://127\.0\.0\.1:(\d+)", told.read_text())
        assert found, told.read_text()
        self._port = found[1]

    def _stop(self) -> None:
        if self._server is None:
            return
        self._server.send_signal(signal.SIGTERM)
        try:
            assert self._server.wait(60) == 0, (self.directory / ".server").read_text()
        except subprocess.TimeoutExpired:
            self._server.kill()
            raise
        finally:
            self._server = None


def check_parsed(block: Block) -> None:
    """TOML, JSON and YAML are such.

    Raises:
        AssertionError, ValueError, yaml.YAMLError: it is not.
    """
    if block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "yaml":
        assert yaml.safe_load(block.text) is not None, block.place
    elif block.language == "json":
        try:
            json.loads(block.text)
        except json.JSONDecodeError:
            for line in block.text.splitlines():  # one object a line
                assert isinstance(json.loads(line), dict), block.place
