"""Real connections: clients that vanish, read or write slowly, and a server that is told to stop."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from server_thread import DEADLINE, ServerThread, post, read_all, read_until, wait_for

from mesh_transformer.config.errors import UserError
from mesh_transformer.engine.request import Output
from mesh_transformer.serve.run import bind, url_of

STREAM = {"prompt": "a", "stream": True, "max_tokens": 50}


# ------------------------------------------------------------------------------------------- clients that go away


def test_a_client_that_vanishes_in_mid_stream_frees_its_slot() -> None:
    with ServerThread() as server:
        with server.connect() as client:
            client.sendall(post("/v1/completions", STREAM))
            group = server.submitted()
            group.receive(0, Output(tokens=(1,), text="Hel"))
            assert b"Hel" in read_until(client, b"Hel")
        # No further output is needed to notice it.
        assert group.cancelled.wait(DEADLINE)
        wait_for(lambda: server.served.metrics.gone._value.get() == 1)
        assert server.served.metrics.streams._value.get() == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/completions", {"prompt": "a", "n": 2}), ("/complete", {"context": "a", "top_p": 1, "temp": 1})],
)
def test_a_client_that_does_not_wait_for_its_answer(path: str, body: dict[str, Any]) -> None:
    with ServerThread() as server:
        with server.connect() as client:
            client.sendall(post(path, body))
            group = server.submitted()
        assert group.cancelled.wait(DEADLINE)
        wait_for(lambda: server.served.metrics.gone._value.get() == 1)


def test_who_waits_for_a_prediction_may_go_without_ending_it() -> None:
    with ServerThread() as server:
        with server.connect() as client:
            client.sendall(post("/model/predict", {"context": "a", "length": 2}))
            assert read_until(client, b"qid").endswith(b'{"qid":1}')
            group = server.submitted()
            client.sendall(post("/model/get_prediction", {"qid": 1}))
        wait_for(lambda: server.served.metrics.gone._value.get() == 1)
        assert not group.cancelled.is_set()
        server.service.answer(group)
        with server.connect() as client:
            client.sendall(post("/model/get_prediction", {"qid": 1}))
            assert b'"completion":"He"' in read_until(client, b"completion")


def test_a_client_that_vanishes_while_it_sends() -> None:
    with ServerThread(body_timeout=DEADLINE) as server:
        with server.connect() as client:
            client.sendall(post("/v1/completions", b"{" * 100)[:-50])
        wait_for(lambda: server.served.metrics.gone._value.get() == 1)
        assert not server.service.groups


def test_the_connection_is_kept_and_used_again() -> None:
    with ServerThread(held=False) as server, server.connect() as client:
        for body in (STREAM, {"prompt": 5}, STREAM):
            client.sendall(post("/v1/completions", body))
            found = read_until(client, b"[DONE]\n\n\r\n0\r\n\r\n" if body is STREAM else b'"code": null}}')
            assert found.startswith(b"HTTP/1.1 200" if body is STREAM else b"HTTP/1.1 400")
        for group in server.service.groups:
            assert not group.cancelled.is_set()


# ------------------------------------------------------------------------------------------------- slow clients


def test_a_client_that_does_not_read_frees_its_slot() -> None:
    with ServerThread(write_timeout=0.2, send_buffer=4096) as server, server.connect(receive_buffer=4096) as client:
        client.sendall(post("/v1/completions", STREAM))
        group = server.submitted()
        read_until(client, b"\r\n\r\n")
        for _ in range(200):
            group.receive(0, Output(tokens=(1,), text="x" * 10_000))
        assert group.cancelled.wait(DEADLINE)
        wait_for(lambda: server.served.metrics.slow._value.get() == 1)
        # The connection itself is given up by the system, or by the server's end of it.
        wait_for(lambda: not server.server.server_state.connections)


def test_a_client_that_reads_slowly_but_reads_gets_all() -> None:
    with ServerThread(write_timeout=DEADLINE, send_buffer=4096) as server, server.connect(4096) as client:
        client.sendall(post("/v1/completions", STREAM, "Connection: close"))
        group = server.submitted()
        for _ in range(50):
            group.receive(0, Output(tokens=(1,), text="x" * 10_000))
        group.receive(0, Output(finish_reason="length"))
        assert read_all(client).count(b"x" * 10_000) == 50


def test_a_body_that_does_not_arrive() -> None:
    with ServerThread(body_timeout=0.1) as server, server.connect() as client:
        client.sendall(post("/v1/completions", b"{}" * 100)[:-1])
        found = read_all(client)
        assert found.startswith(b"HTTP/1.1 408 ") and b"the body did not arrive within 0.1 seconds" in found


def test_a_body_of_ten_megabytes_is_told_why() -> None:
    with ServerThread() as server, server.connect() as client:
        client.sendall(post("/v1/completions", b" " * 10_000_000))
        found = read_all(client)
        assert found.startswith(b"HTTP/1.1 413 ") and b"the body is larger than 1,048,576 bytes" in found


def test_who_asks_before_sending_is_told_not_to() -> None:
    with ServerThread() as server, server.connect() as client:
        head = post("/v1/completions", b"", "Expect: 100-continue").replace(
            b"Content-Length: 0", b"Content-Length: 9999999"
        )
        client.sendall(head)
        found = read_all(client)
        assert found.startswith(b"HTTP/1.1 413 ") and b"100 Continue" not in found


# --------------------------------------------------------------------------------------------------- the end


def test_a_server_that_stops_finishes_what_runs() -> None:
    with ServerThread() as server, server.connect() as client:
        client.sendall(post("/v1/completions", STREAM))
        group = server.submitted()
        group.receive(0, Output(tokens=(1,), text="begun, "))
        found = read_until(client, b"begun")
        server.server.should_exit = True
        wait_for(lambda: server.service.closed_with is not None)
        assert (server.service.closed_with, server.served.stopping) == (30.0, True)
        found += read_all(client)
        assert b"data: [DONE]" in found
        server.thread.join(DEADLINE)
        assert server.server.finished


def test_what_is_cut_off_is_told() -> None:
    with ServerThread(shutdown_timeout=0) as server, server.connect() as client:
        server.service.finishes = False
        client.sendall(post("/v1/completions", STREAM))
        server.submitted()
        read_until(client, b"\r\n\r\n")
        server.server.should_exit = True
        assert b'"code":"shutting_down"' in read_all(client)
        server.thread.join(DEADLINE)
        assert not server.server.finished
        assert server.notes[-1] == "stopped before everything was finished"


RUN = """
import sys, threading
sys.path.insert(0, {here!r})
from server_thread import ServerThread
from mesh_transformer.serve.run import bind, run
server = ServerThread()
server.bound.close()
server.service.finishes = sys.argv[1] == "finishes"
if sys.argv[1] == "warming":
    server.service.start = lambda: setattr(server.service, "ready", False)
if sys.argv[1] in ("hangs", "warming"):
    server.service.close = lambda timeout: threading.Event().wait() or False
sys.exit(run(server.served, bind("127.0.0.1", 0), lambda text: print(text, flush=True)))
"""


def started(how: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", RUN.format(here=str(Path(__file__).parent)), how]
    return subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize(
    ("how", "signals", "status"),
    [
        ("finishes", [signal.SIGINT], 0),
        ("cuts", [signal.SIGTERM], 143),
        ("hangs", [signal.SIGTERM, signal.SIGTERM], 143),
    ],
)
def test_signals_while_serving(how: str, signals: list[signal.Signals], status: int) -> None:
    with started(how) as ours:
        assert ours.stdout is not None
        lines = iter(ours.stdout.readline, "")
        host, port = next(lines).split("http://")[1].strip().split(":")
        assert next(lines).startswith("ready after ")
        with socket.create_connection((host, int(port)), timeout=DEADLINE) as client:
            client.sendall(post("/v1/completions", STREAM))
            read_until(client, b"\r\n\r\n")
            ours.send_signal(signals[0])
            assert next(lines) == "stopping: finishing what runs\n"
            for number in signals[1:]:
                ours.send_signal(number)
            rest = read_all(client)
        assert (b"[DONE]" in rest) == (how == "finishes")
        assert ours.wait(DEADLINE) == status


def test_a_signal_while_warming_up() -> None:
    """A compilation cannot be interrupted, and there is nothing to finish."""
    with started("warming") as ours:
        assert ours.stdout is not None and ours.stdout.readline().startswith("serving tiny at ")
        ours.send_signal(signal.SIGTERM)
        assert ours.stdout.readline() == "stopping before it was ready; nothing was asked\n"
        assert ours.wait(DEADLINE) == 0


@pytest.mark.parametrize("was_ready", [True, False])
def test_an_engine_that_has_ended_ends_the_server(was_ready: bool) -> None:
    with ServerThread(held=False) as server:
        server.service.ready = was_ready
        if was_ready:
            wait_for(lambda: any(note.startswith("ready after") for note in server.notes))
        server.service.ended = True
        server.service.ready = False
        server.thread.join(DEADLINE)
        assert server.server.engine_ended and not server.thread.is_alive()
        assert "the engine has ended; what is logged above says why" in server.notes


# ------------------------------------------------------------------------------------------------ where it listens


def test_a_port_that_is_taken() -> None:
    with bind("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        with pytest.raises(UserError) as raised:
            bind("127.0.0.1", port)
    assert str(raised.value) == (
        f"cannot listen at 127.0.0.1 port {port}: Address already in use\n"
        "give another --port (0 takes any free one), or another --host"
    )


def test_hosts_that_cannot_be_used() -> None:
    with pytest.raises(UserError, match=r"--host no\.such\.host\.invalid: no such host"):
        bind("no.such.host.invalid", 0)
    with pytest.raises(UserError, match=r"cannot listen at 192\.0\.2\.1 port 0: "):
        bind("192.0.2.1", 0)
    with pytest.raises(UserError, match=r"--host a+: no such host"):
        bind("a" * 100, 0)


def test_addresses() -> None:
    with bind("127.0.0.1", 0) as bound:
        assert url_of(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
