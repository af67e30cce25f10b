"""The container's files agree with the project: nothing here builds an image."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml
from dockerfile import Instruction, read

from mesh_transformer.cli.main import app
from mesh_transformer.config.paths import cache_directory

ROOT = Path(__file__).parents[2]
DOCKERFILE = read(ROOT / "Dockerfile")
LAST = [i for i in DOCKERFILE if i.stage == max(j.stage for j in DOCKERFILE)]
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
SERVER, PROXY = COMPOSE["services"]["server"], COMPOSE["services"]["proxy"]
ENTRYPOINT = ROOT / "deploy" / "entrypoint.sh"


def the(name: str) -> Instruction:
    """The one instruction of that name of the last stage."""
    (found,) = [i for i in LAST if i.name == name]
    return found


def environment() -> dict[str, str]:
    return dict(word.split("=", 1) for word in the("ENV").words)


def seconds(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([sm])", text).groups()
    return int(number) * {"s": 1, "m": 60}[unit]


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def check_options(words: list[str]) -> None:
    """The first word is a command, and it has the options that follow."""
    command = typer.main.get_command(app).commands[words[0]]
    known = {name for parameter in command.params for name in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_instructions() -> None:
    """A hand-made list of what is known to go wrong."""
    names = {i.name for i in DOCKERFILE}
    assert "ADD" not in names and "MAINTAINER" not in names
    for i in DOCKERFILE:
        if i.name == "FROM":
            image = i.text.split()[0]
            assert ":" in image and not image.endswith(":latest"), i.text
        if i.name in ("CMD", "ENTRYPOINT"):
            assert isinstance(i.words, list) and i.text.startswith("["), (
                f"{i.name} runs in a shell: no signal reaches it"
            )
        if i.name in ("ENV", "ARG"):
            assert not re.search("KEY|SECRET|TOKEN|PASSWORD", i.text), "it would stay in the image"
        if i.name == "RUN":
            packages = "apt-get" in i.text
            assert not packages or ("--no-install-recommends" in i.text and "rm -rf /var/lib/apt/lists" in i.text)
            assert not packages or i.stage == 0, "nothing is installed in the image itself"


def test_both_stages_stand_on_one_base() -> None:
    """The virtual environment points to the interpreter of the stage that made it."""
    bases = {i.text.split()[0] for i in DOCKERFILE if i.name == "FROM"}
    assert len(bases) == 1
    (default,) = [i.text for i in DOCKERFILE if i.name == "ARG" and i.stage == -1]
    assert default == "PYTHON=3.11"  # what constraints.txt was made with


def test_what_is_copied_exists_and_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert (ROOT / ".dockerignore").read_text().splitlines()[1] == "*"
    copied = [s for i in DOCKERFILE if i.name == "COPY" and i.flags[:1] != ("--from=build",) for s in i.words[:-1]]
    assert set(copied) == kept
    for source in copied:
        assert (ROOT / source).exists(), source


def test_what_the_package_is_built_of_is_copied_before() -> None:
    """The build back-end reads these, and fails without them."""
    names = [i.name for i in DOCKERFILE]
    install = next(n for n, i in enumerate(DOCKERFILE) if i.name == "RUN" and "pip install" in i.text)
    before = {s for i in DOCKERFILE[:install] if i.name == "COPY" for s in i.words[:-1]}
    metadata = (ROOT / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in metadata and 'license-files = ["LICENSE"]' in metadata
    assert {
        "pyproject.toml",
        "CMakeLists.txt",
        "third_party",
        "README.md",
        "LICENSE",
        "src",
        "constraints.txt",
    } <= before
    assert names.index("COPY") < install


def test_versions_are_those_of_the_makefile() -> None:
    (install,) = [i.text for i in DOCKERFILE if i.name == "RUN" and "pip install" in i.text]
    assert "--constraint constraints.txt" in install
    assert "--constraint constraints.txt" in (ROOT / "Makefile").read_text()
    pinned = (ROOT / "constraints.txt").read_text().lower()
    for name in ("jax", "jaxlib", "fastapi", "uvicorn", "prometheus_client", "pydantic", "starlette"):
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), f"{name} is not pinned"


def test_extras_exist() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (default,) = [i.text.removeprefix("EXTRAS=") for i in DOCKERFILE if i.name == "ARG" and i.stage == 0]
    cuda = yaml.safe_load((ROOT / "deploy" / "compose.cuda12.yaml").read_text())
    for asked in (default, cuda["services"]["server"]["build"]["args"]["EXTRAS"]):
        assert set(asked.split(",")) <= set(extras) and "serve" in asked


def test_it_runs_as_nobody_in_particular() -> None:
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", the("USER").text)
    last_run = max(n for n, i in enumerate(LAST) if i.name == "RUN")
    assert LAST.index(the("USER")) > last_run


def test_the_cache_is_where_the_code_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = environment()["MESH_TRANSFORMER_CACHE"]
    monkeypatch.setenv("MESH_TRANSFORMER_CACHE", cache)
    assert str(cache_directory()) == cache
    assert any(cache in i.text and "--owner mesh" in i.text for i in LAST if i.name == "RUN")
    assert f"cache:{cache}" in SERVER["volumes"]


def test_the_health_check_asks_for_health() -> None:
    check = the("HEALTHCHECK")
    command = Instruction(0, "CMD", (), check.text.removeprefix("CMD ")).words
    port = option(the("CMD").words, "--port")
    assert f"127.0.0.1', {port}," in command[-1] and "'/health'" in command[-1]
    assert the("EXPOSE").text == port


@pytest.mark.parametrize(("status", "ended"), [(200, 0), (503, 1)])
def test_the_health_check_says_what_it_is_told(status: int, ended: int) -> None:
    """Its very program, but for the port."""
    import http.server
    import threading

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            script = Instruction(0, "CMD", (), the("HEALTHCHECK").text.removeprefix("CMD ")).words[-1]
            script = script.replace("8000", str(server.server_port))
            # A proxy of the environment must not be asked for an address inside.
            env = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
            assert subprocess.run([sys.executable, "-c", script], env=env, timeout=60).returncode == ended
        finally:
            server.shutdown()


def test_nobody_there_is_not_healthy() -> None:
    import socket

    with socket.socket() as taken:  # bound, and listened on by nobody
        taken.bind(("127.0.0.1", 0))
        script = the("HEALTHCHECK").text.removeprefix("CMD ")
        script = Instruction(0, "CMD", (), script).words[-1].replace("8000", str(taken.getsockname()[1]))
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
        assert done.returncode == 1


def test_it_ends_as_it_is_told() -> None:
    """Whoever waits for the server to stop waits longer than the server takes."""
    assert the("STOPSIGNAL").text == "SIGTERM"
    shutdown = float(option(the("CMD").words, "--shutdown-timeout"))
    assert option(SERVER["command"], "--shutdown-timeout") == option(the("CMD").words, "--shutdown-timeout")
    assert seconds(SERVER["stop_grace_period"]) >= shutdown + 10
    caddy = (ROOT / "deploy" / "Caddyfile").read_text()
    grace = seconds(re.search(r"grace_period (\S+)", caddy)[1])
    assert seconds(PROXY["stop_grace_period"]) > grace > seconds(SERVER["stop_grace_period"])
    assert SERVER["init"] is True


def test_the_server_is_confined() -> None:
    for service in (SERVER, PROXY):
        assert service["read_only"] is True and service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["pids_limit"] and service["mem_limit"]
        assert "privileged" not in service and "network_mode" not in service
    assert SERVER["volumes"][0]["read_only"] is True and SERVER["volumes"][0]["target"] == the("CMD").words[1]
    # Only the proxy is reached from other machines.
    assert all(port.startswith("127.0.0.1:") for port in SERVER["ports"])
    assert PROXY["profiles"] == ["tls"] and PROXY["depends_on"]["server"]["condition"] == "service_healthy"


def test_the_composition_hangs_together() -> None:
    assert set(SERVER["secrets"]) <= set(COMPOSE["secrets"])
    named = [v.split(":")[0] for s in (SERVER, PROXY) for v in s["volumes"] if isinstance(v, str)]
    assert {v for v in named if not v.startswith(".")} == set(COMPOSE["volumes"])
    for path in (v for v in named if v.startswith(".")):
        assert (ROOT / path).exists(), path
    assert SERVER["environment"]["MESH_TRANSFORMER_API_KEY_FILE"] == f"/run/secrets/{SERVER['secrets'][0]}"
    assert PROXY["environment"]["UPSTREAM"] == f"server:{the('EXPOSE').text}"
    cuda = yaml.safe_load((ROOT / "deploy" / "compose.cuda12.yaml").read_text())
    assert set(cuda["services"]) <= set(COMPOSE["services"])


def test_commands_and_options_exist() -> None:
    check_options(the("CMD").words)
    check_options(SERVER["command"])


def entrypoint(tmp_path: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The entry point with a `mesh-transformer` that says how it was called."""
    fake = tmp_path / "bin" / "mesh-transformer"
    fake.parent.mkdir(exist_ok=True)
    fake.write_text(
        '#!/bin/sh\necho "key=${MESH_TRANSFORMER_API_KEY-none}"\necho "file=${MESH_TRANSFORMER_API_KEY_FILE-none}"\n'
        'for word; do echo "[$word]"; done\nexit 7\n'
    )
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", **variables}
    return subprocess.run([ENTRYPOINT, *words], env=env, capture_output=True, text=True, timeout=60)


def test_the_entry_point_passes_everything_on(tmp_path: Path) -> None:
    done = entrypoint(tmp_path, "serve", "/a model", "--name", "")
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines() == ["key=none", "file=none", "[serve]", "[/a model]", "[--name]", "[]"]


def test_the_entry_point_reads_a_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("se=c$ret 1\r\nanother line\n")
    done = entrypoint(tmp_path, MESH_TRANSFORMER_API_KEY_FILE=str(tmp_path / "key"))
    assert done.stdout.splitlines() == ["key=se=c$ret 1", "file=none"]


@pytest.mark.parametrize(("content", "said"), [(None, "cannot be read by user"), ("", "is empty"), ("\nx", "is empty")])
def test_a_key_that_is_none(tmp_path: Path, content: str | None, said: str) -> None:
    """Never a server that is open because its key was not there."""
    if content is not None:
        (tmp_path / "key").write_text(content)
    done = entrypoint(tmp_path, MESH_TRANSFORMER_API_KEY_FILE=str(tmp_path / "key"))
    assert done.returncode == 2 and done.stdout == ""
    assert said in done.stderr and len(done.stderr.splitlines()) == 2


def test_the_entry_point_may_be_executed() -> None:
    assert ENTRYPOINT.stat().st_mode & stat.S_IXUSR
    (copy,) = [i for i in LAST if i.name == "COPY" and "deploy/entrypoint.sh" in i.words]
    assert copy.flags == ("--chmod=0755",) and Path(copy.words[-1]).name == the("ENTRYPOINT").words[0]
