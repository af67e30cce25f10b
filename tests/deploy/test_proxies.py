"""The examples of TLS proxies, run by the real programs on loopback addresses before a server that behaves as told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from bench.fake_server import FakeServer, pieces
from mesh_transformer.cli.main import app

ROOT = Path(__file__).parents[2]
CADDYFILE, NGINX = ROOT / "deploy" / "Caddyfile", ROOT / "deploy" / "nginx.conf"
WAIT = 30.0
# The proxies' limits on a request and on keeping still, shortened, so that a stream of STREAM_SECONDS outlasts them.
SHORT = 1
STREAM_SECONDS = 3.0
N_TOKENS = 12
LIMIT = 2 * 2**20  # bytes of a body


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def needed(program: str) -> str:
    """Where it is. Tests that need an absent program are skipped, but in CI they fail."""
    found = shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin")
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{program} is not installed: apt-get install {program}")
    return found


def start_caddy(port: int, upstream: int, place: Path) -> subprocess.Popen[bytes]:
    caddy = needed("caddy")
    env = {**os.environ, "SITE": f"https://localhost:{port}", "UPSTREAM": f"127.0.0.1:{upstream}"}
    env |= {"HOME": str(place), "XDG_DATA_HOME": str(place / "data"), "XDG_CONFIG_HOME": str(place / "config")}
    adapt = [caddy, "adapt", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
    config = json.loads(subprocess.run(adapt, env=env, capture_output=True, check=True).stdout)
    config["admin"] = {"disabled": True}
    config["apps"]["pki"] = {"certificate_authorities": {"local": {"install_trust": False}}}
    (server,) = config["apps"]["http"]["servers"].values()
    server["automatic_https"] = {"disable_redirects": True}
    assert server["read_timeout"] == 30e9
    server["read_timeout"] = SHORT * 10**9
    (place / "caddy.json").write_text(json.dumps(config))
    return subprocess.Popen([caddy, "run", "--config", str(place / "caddy.json")], env=env)


def start_nginx(port: int, upstream: int, place: Path) -> subprocess.Popen[bytes]:
    nginx = needed("nginx")
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *name]
    subprocess.run([*new, "-keyout", place / "key", "-out", place / "certificate"], check=True, capture_output=True)
    text = NGINX.read_text()
    for old, changed in [
        ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
        ("listen 443 ssl http2;", f"listen 127.0.0.1:{port} ssl http2;"),
        ("/etc/ssl/certs/lm.example.org.pem", str(place / "certificate")),
        ("/etc/ssl/private/lm.example.org.key", str(place / "key")),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{upstream};"),
        ("client_body_timeout 30s;", f"client_body_timeout {SHORT}s;"),
        ("client_header_timeout 10s;", f"client_header_timeout {SHORT}s;"),
    ]:
        assert text.count(old) == 1, old
        text = text.replace(old, changed)
    paths = "".join(
        f"{kind}_temp_path {place}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    whole = f"daemon off; master_process off; pid {place}/pid; error_log {place}/error.log;\nevents {{}}\n"
    (place / "nginx.conf").write_text(whole + f"http {{\naccess_log off;\n{paths}{text}}}\n")
    return subprocess.Popen([nginx, "-p", place, "-c", place / "nginx.conf", "-e", place / "error.log"])


STARTS = {"caddy": start_caddy, "nginx": start_nginx}


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeServer]:
    def behave(number: int, body: dict[str, Any]) -> str:
        return "held" if body.get("user") == "held" else "whole"

    with FakeServer(behave, seconds_a_token=STREAM_SECONDS / N_TOKENS) as server:
        yield server


@pytest.fixture(scope="module", params=list(STARTS))
def proxy(
    request: pytest.FixtureRequest, upstream: FakeServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port of a running proxy."""
    port = free_port()
    process = STARTS[request.param](port, upstream.port, tmp_path_factory.mktemp(request.param))
    try:
        deadline = time.monotonic() + WAIT
        while True:
            assert process.poll() is None and time.monotonic() < deadline
            with contextlib.suppress(OSError):
                if status(port, "GET", "/health") == 200:
                    break
            time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(WAIT)


@contextlib.contextmanager
def asked(port: int, method: str, path: str, body: bytes = b"") -> Iterator[http.client.HTTPResponse]:
    """An answer of which the head has come. The certificate is the proxy's own: TLS is what is needed, not trust."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with contextlib.closing(http.client.HTTPSConnection("localhost", port, timeout=WAIT, context=context)) as client:
        client.request(method, path, body or None, {"Content-Type": "application/json"})
        with client.getresponse() as answer:
            yield answer


def status(*question: Any) -> int:
    with asked(*question) as answer:
        return answer.status


def body(**changes: Any) -> bytes:
    fields = {"prompt": [1], "max_tokens": N_TOKENS, "seed": 1, "stream": True, **changes}
    return json.dumps(fields).encode()


pytestmark = pytest.mark.peers


def test_streams_are_not_held_back(proxy: int, upstream: FakeServer) -> None:
    """The server writes the second piece when the first has been read behind the proxy."""
    with asked(proxy, "POST", "/v1/completions", body(user="held", max_tokens=2)) as answer:
        first = answer.readline()
        upstream.go_on()
        rest = answer.read()
    assert json.loads(first.removeprefix(b"data: "))["choices"][0]["text"] == pieces(json.loads(body()))[0]
    assert rest.endswith(b"data: [DONE]\n\n")


def test_streams_are_not_cut_off(proxy: int) -> None:
    """A stream outlasts the limits on the request."""
    begun = time.monotonic()
    with asked(proxy, "POST", "/v1/completions", body()) as answer:
        assert answer.read().endswith(b"data: [DONE]\n\n")
    assert time.monotonic() - begun > 2 * SHORT


def test_a_client_that_goes_away_is_told_to_the_server(proxy: int, upstream: FakeServer) -> None:
    with asked(proxy, "POST", "/v1/completions", body(max_tokens=10_000)) as answer:
        assert answer.readline().startswith(b"data: ")
    assert upstream.left.acquire(timeout=WAIT)


def test_what_passes_and_what_does_not(proxy: int, upstream: FakeServer) -> None:
    assert status(proxy, "GET", "/health") == 200
    assert status(proxy, "GET", "/metrics") == 404
    n_asked = len(upstream.bodies)
    # Caddy says 502 up to version 2.6 and 413 later.
    assert status(proxy, "POST", "/v1/completions", b"[" + b" " * LIMIT + b"]") in (413, 502)
    assert len(upstream.bodies) == n_asked
    fits = body(stream=False, max_tokens=1, padding="x" * (LIMIT - 200))
    assert LIMIT - 200 < len(fits) <= LIMIT
    assert status(proxy, "POST", "/v1/completions", fits) == 200


def test_headers(proxy: int, upstream: FakeServer) -> None:
    with asked(proxy, "GET", "/health") as answer:
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"
        assert not re.search(r"\d", answer.headers.get("Server", ""))
    assert "x-real-ip: 127.0.0.1" in upstream.heads[-1].lower() or "x-real-ip: ::1" in upstream.heads[-1].lower()


def test_limits_agree_with_the_server() -> None:
    """What the server would take passes; what it does in time is waited for."""
    parameters = {p.name: p.default for p in typer.main.get_command(app).commands["serve"].params}
    assert 2 * parameters["max_body_bytes"] == LIMIT
    assert "max_size 2MiB" in CADDYFILE.read_text() and "client_max_body_size 2m;" in NGINX.read_text()
    for file, pattern in ((CADDYFILE, r"response_header_timeout (\d+)m"), (NGINX, r"proxy_read_timeout (\d+)m")):
        assert int(re.search(pattern, file.read_text())[1]) * 60 >= parameters["request_timeout"]


def test_the_whole_caddyfile_is_valid(tmp_path: Path) -> None:
    env = {**os.environ, "SITE": "lm.example.org", "HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    command = [needed("caddy"), "validate", "--adapter", "caddyfile", "--config", str(CADDYFILE)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Valid configuration" in done.stdout + done.stderr
    assert not re.search(r'"level":"(warn|error)"', done.stderr), done.stderr
