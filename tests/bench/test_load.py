"""`bench load` against a server that behaves as it is told: what it asks, what it notices, what it counts."""

import asyncio
import collections
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.fake_server import Behave, FakeServer, text_of
from mesh_transformer.bench import load_server
from mesh_transformer.bench.load import LoadOptions, drive
from mesh_transformer.bench.load_client import Address, Answer, ask
from mesh_transformer.bench.load_figures import memory, quantiles, summary
from mesh_transformer.bench.load_plan import Plan, Planned, Span
from mesh_transformer.bench.load_run import Asked, faults, run_load
from mesh_transformer.bench.load_server import ServerProcess, idle, metrics, watched_counters
from mesh_transformer.config.errors import RunError, UserError

PLAN = Plan(seed=3, n_ids=500, prompt_tokens=Span(2, 40), output_tokens=Span(3, 12))
WAIT = 20.0  # seconds at the most for what takes milliseconds
SEED = 2  # of a run of which the first request vanishes, and the next two do not


def address(server: FakeServer, key: str | None = None) -> Address:
    return Address("127.0.0.1", server.port, key=key)


def asked(server: FakeServer, number: int = 0, timeout: float = WAIT, **changes: object) -> Answer:
    request = dataclasses.replace(PLAN.request(number), **changes)
    return asyncio.run(ask(address(server, "secret"), request, stream=True, timeout=timeout))


def test_a_plan_is_a_function_of_its_seed() -> None:
    requests = [PLAN.request(i) for i in range(1500)]
    assert requests == [dataclasses.replace(PLAN).request(i) for i in range(1500)]
    assert {len(r.prompt) for r in requests} == set(range(2, 41))
    assert {r.max_tokens for r in requests} == set(range(3, 13))
    assert all(0 <= token < 500 for r in requests for token in r.prompt)
    assert len({r.prompt for r in requests}) == len({r.seed for r in requests}) == 1500
    assert dataclasses.replace(PLAN, seed=4).request(0) != requests[0]
    # Short ones are more frequent than long ones.
    assert sorted(len(r.prompt) for r in requests)[750] < 15


def test_a_salt_changes_the_prompts_alone() -> None:
    for number in range(20):
        plain, salted = PLAN.request(number), dataclasses.replace(PLAN, salt=1).request(number)
        assert plain.prompt != salted.prompt and len(plain.prompt) == len(salted.prompt)
        assert dataclasses.replace(plain, prompt=()) == dataclasses.replace(salted, prompt=())


def test_the_share_that_vanishes() -> None:
    vanishing = [r for i in range(2000) if (r := dataclasses.replace(PLAN, vanish=0.1).request(i)).vanish_after]
    assert 150 < len(vanishing) < 250
    assert all(1 <= r.vanish_after <= r.max_tokens // 2 for r in vanishing)
    assert all(PLAN.request(i).vanish_after is None for i in range(100))


@pytest.mark.parametrize("text", ["", "0-4", "5-4", "a-b", "-3", "3-", "1-2-3", "1.5"])
def test_a_span_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match=r"--x .* cannot be used; expected LOW-HIGH"):
        Span.of(text, "--x")


def test_spans() -> None:
    assert Span.of("4-64", "--x") == Span(4, 64) and Span.of("7", "--x") == Span(7, 7)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000)),
        ("http://localhost:8000/v1/", Address("localhost", 8000)),
        ("https://lm.example.org/models", Address("lm.example.org", 443, True, "/models")),
        ("http://[::1]:80", Address("::1", 80)),
    ],
)
def test_urls(url: str, found: Address) -> None:
    assert Address.of(url, None) == found


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x:port", "http://x/?a=b"])
def test_bad_urls(url: str) -> None:
    with pytest.raises(UserError, match="expected something like http"):
        Address.of(url, None)


@pytest.mark.parametrize("how", ["whole", "split"])
def test_a_stream_is_read(how: str) -> None:
    with FakeServer(lambda number, body: how) as server:
        answer = asked(server)
        (body,) = server.bodies
    request = PLAN.request(0)
    assert (answer.kind, answer.failed) == ("done", False)
    assert answer.text == text_of(body)
    assert (answer.n_tokens, answer.n_cached, len(answer.pieces)) == (request.max_tokens, 1, request.max_tokens)
    assert answer.begun <= answer.pieces[0] <= answer.pieces[-1] <= answer.ended
    assert body["prompt"] == list(request.prompt) and body["ignore_eos"] and body["stream"]
    assert "\r\nAuthorization: Bearer secret\r\n" in server.heads[0]


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("500", "status 500"),
        ("400", "status 400"),
        ("html", "a stream that is no text/event-stream"),
        ("error", "error in the stream: server_error"),
        ("no done", "a stream without [DONE]"),
        ("more", "more after [DONE]"),
        ("torn", "a stream that ends within an event"),
        ("no usage", "no usage"),
        ("short", "another number of tokens than asked for"),
        ("stop", "finish_reason 'stop' in place of 'length'"),
        ("cut", "connection: IncompleteReadError"),
    ],
)
def test_what_a_server_does_wrong_has_a_name(how: str, kind: str) -> None:
    with FakeServer(lambda number, body: how) as server:
        answer = asked(server)
    assert (answer.kind, answer.failed) == (kind, True)


def test_a_server_that_does_not_answer() -> None:
    with FakeServer(lambda number, body: "hang") as server:
        assert asked(server, timeout=0.2).kind == "no end in time"
        assert server.left.acquire(timeout=WAIT)
        there = address(server)
    answer = asyncio.run(ask(there, PLAN.request(0), stream=True, timeout=WAIT))
    assert answer.kind == "connection: ConnectionRefusedError"


@pytest.mark.parametrize("number", [0, 1])
def test_a_client_vanishes(number: int) -> None:
    """By closing and by resetting the connection."""
    with FakeServer(seconds_a_token=0.01) as server:
        answer = asked(server, number, vanish_after=2, max_tokens=1000)
        assert server.left.acquire(timeout=WAIT)
        assert (answer.kind, answer.n_tokens, answer.failed) == ("vanished", 2, False)


def run(behave: Behave, **options: object) -> tuple[FakeServer, list[Answer]]:
    with FakeServer(behave) as server:
        settings = {"clients": 4, "seconds": WAIT, "timeout": WAIT, **options}
        return server, asyncio.run(drive(address(server), PLAN, **settings))


def most_at_once(answers: list[Answer]) -> int:
    """Requests that had begun and not ended when another began."""
    return max(sum(a.begun <= b.begun < a.ended for a in answers) for b in answers)


def test_clients_share_the_plan() -> None:
    server, answers = run(lambda number, body: "whole", most=50, first=7)
    assert sorted(a.number for a in answers) == list(range(7, 57))
    assert {a.kind for a in answers} == {"done"}
    assert most_at_once(answers) <= 4
    assert sorted(b["seed"] for b in server.bodies) == sorted(PLAN.request(i).seed for i in range(7, 57))


def test_the_refused_ask_again_when_they_were_told() -> None:
    server, answers = run(lambda number, body: "429" if number < 2 else "whole", most=2, clients=2)
    assert collections.Counter(a.kind for a in answers) == {"refused": 2, "done": 2}
    assert server.bodies[:2] == server.bodies[2:] or server.bodies[:2] == server.bodies[:1:-1]
    first_refusal, last_begin = min(a.ended for a in answers), max(a.begun for a in answers)
    assert last_begin - first_refusal > 0.99  # Retry-After: 1


def test_the_time_ends_a_wait() -> None:
    _, answers = run(lambda number, body: "429", seconds=0.2, clients=1)
    assert [a.kind for a in answers] == ["refused"]


def test_summary() -> None:
    done = Answer(0, 10.0, 13.0, "done", n_tokens=5, n_cached=2, pieces=[11.0, 11.5, 13.0])
    gone = Answer(1, 10.0, 12.0, "vanished", n_tokens=2, pieces=[11.5, 12.0])
    late = Answer(2, 10.0, 14.0, "no end in time")
    found = summary([done, gone, late, Answer(3, 11.0, 11.0, "refused")], 10.0)
    assert (found["requests"], found["done"], found["vanished"], found["refused"], found["failed"]) == (4, 1, 1, 1, 1)
    assert found["failures"] == {"no end in time": 1}
    assert (found["seconds"], found["output_tokens"], found["tokens_per_second"]) == (4.0, 7, 7 / 4)
    assert found["cached_prompt_tokens"] == 2
    assert found["time_to_first_token"] == {"p50": 1.25, "p99": pytest.approx(1.495), "max": 1.5}
    assert found["time_per_token"] == {"p50": 0.5, "p99": 0.5, "max": 0.5}
    assert found["time_between_pieces"]["p50"] == 0.5 and found["time_between_pieces"]["max"] == 1.5
    assert quantiles([]) is None
    json.dumps(summary([], 1.0), allow_nan=False)


def test_memory() -> None:
    megabyte = 2**20
    steady = [1000 * megabyte] * 20 + [1020 * megabyte] * 5
    found = memory(steady)
    assert (found["first_fifth"], found["last_fifth"], found["flat"]) == (1000 * megabyte, 1020 * megabyte, True)
    assert found["samples"] == steady
    assert memory([*steady[:20], *[1021 * megabyte] * 5])["flat"] is False
    assert memory([100 * megabyte] * 4 + [117 * megabyte])["flat"] is False
    assert memory([100 * megabyte] * 4 + [116 * megabyte])["flat"] is True
    assert memory([1] * 4) is None


def test_metrics() -> None:
    with FakeServer() as server:
        samples = asyncio.run(metrics(address(server)))
    assert samples['mesh_transformer_requests_total{endpoint="a b",status="200"}'] == 0
    assert watched_counters(samples) == {"engine_step_failures": 0}
    assert idle(samples) is True
    assert idle({**samples, "mesh_transformer_slots_used": 1.0}) is False
    assert idle({}) is None


SERVER = """
import http.server, sys
print("it begins", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        Handler.asked = getattr(Handler, "asked", 0) + 1
        self.send_response(503 if Handler.asked < 3 else 200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def process(tmp_path: Path, text: str) -> ServerProcess:
    script = tmp_path / "server.py"
    script.write_text(text)
    return ServerProcess("the fake", [sys.executable, str(script)], threads=1)


def test_a_process_is_waited_for_and_stopped(tmp_path: Path) -> None:
    with process(tmp_path, SERVER) as server:
        asyncio.run(server.wait_ready(WAIT))
        assert 10**6 < (server.resident_bytes() or 0) < 10**9
        assert server.stop() == -15
        assert server.resident_bytes() is None
    assert server.status == -15


def test_a_process_that_ends_by_itself(tmp_path: Path) -> None:
    with (
        process(tmp_path, "print('a'); raise SystemExit('no model there')") as server,
        pytest.raises(RunError, match=r"the fake ended with status 1:\n(.|\n)*no model there"),
    ):
        asyncio.run(server.wait_ready(WAIT))


def test_a_process_that_is_never_ready(tmp_path: Path) -> None:
    with (
        process(tmp_path, "import time\nprint('loading', flush=True)\ntime.sleep(100)") as server,
        pytest.raises(RunError, match="the fake was not ready after 0 seconds"),
    ):
        asyncio.run(server.wait_ready(0.3))


def test_a_wait_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_server, "SECONDS_BETWEEN_NOTES", 0.0)
    said: list[str] = []
    with process(tmp_path, SERVER) as server:
        asyncio.run(server.wait_ready(WAIT, said.append))
    assert said[0].startswith("the fake is not ready after 0 s; it said last: ")


def test_sigterm_stops_the_server_too(tmp_path: Path) -> None:
    """A bench that is ended leaves no server behind."""
    script = tmp_path / "bench.py"
    (tmp_path / "server.py").write_text(SERVER)
    script.write_text(
        "import asyncio, sys\n"
        "from mesh_transformer.bench.load_server import ServerProcess, stopped_by_sigterm\n"
        f"line = [sys.executable, {str(tmp_path / 'server.py')!r}]\n"
        "with stopped_by_sigterm(), ServerProcess('the fake', line, threads=1) as server:\n"
        "    asyncio.run(server.wait_ready(20))\n"
        "    print(server._process.pid, flush=True)\n"
        "    asyncio.run(asyncio.sleep(100))\n"
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as bench:
        assert bench.stdout is not None
        served = int(bench.stdout.readline())
        bench.terminate()
        assert bench.wait(WAIT) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(served, 0)


def whole_run(server: FakeServer, **options: object) -> dict:
    said: list[str] = []
    settings = LoadOptions(**{"clients": 3, "seconds": 0.5, "rounds": 2, "compare_seconds": 0.2, **options})
    request = Asked(model=None, url=f"http://127.0.0.1:{server.port}", vanish=0.3, seed=SEED)
    result = run_load(request, settings, said.append)
    assert said[:2] == ["warm-up: 3 requests", "load: 3 clients for 0 s"]
    json.dumps(result, allow_nan=False)
    return result


def test_a_whole_run() -> None:
    with FakeServer(seconds_a_token=0.001) as server:
        result = whole_run(server, one_by_one=True)
        assert result["faults"] == []
        load = result["load"]
        assert load["done"] > 0 and load["vanished"] > 0 and load["failed"] == load["refused"] == 0
        assert load["requests"] == load["done"] + load["vanished"]
        assert load["repeated_alone"] == {"asked": min(8, load["done"]), "equal": min(8, load["done"])}
        assert load["memory"] is None and load["seconds_until_idle"] >= 0
        compared = result["comparison"]
        assert {name: len(turns) for name, turns in compared["turns"].items()} == {"ours": 2, "ours one by one": 2}
        assert list(compared["ratios"]) == ["ours over ours one by one"]
        # Nobody's prompts were another's before, but for the requests that were repeated on purpose.
        prompts = [tuple(body["prompt"]) for body in server.bodies]
        assert len(prompts) - len(set(prompts)) == load["repeated_alone"]["asked"]


def test_a_whole_run_of_a_bad_server() -> None:
    def behave(number: int, body: dict) -> str:
        return "500" if number == 4 else "whole"

    with FakeServer(behave) as server:
        result = whole_run(server)
    assert result["faults"] == ["1 x status 500"] and result["comparison"] is None


def test_faults() -> None:
    load = {
        "failures": {"status 500": 2}, "warmup_failures": {}, "done": 0, "seconds_until_idle": None,
        "memory": {"first_fifth": 1e9, "last_fifth": 2e9, "flat": False}, "counters": {"engine_step_failures": 3.0},
        "repeated_alone": {"asked": 8, "equal": 7},
    }  # fmt: skip
    turns = {"ours": [{"failures": {}}], "hf": [{"failures": {"status 503": 1}}]}
    assert faults({"load": load, "comparison": {"turns": turns}, "server_status": 1}) == [
        "2 x status 500",
        "no request was answered",
        "memory grew from 1,000,000,000 to 2,000,000,000 bytes",
        "slots were still in use after the last answer",
        "1 of 8 texts differ when asked alone",
        "3 engine step failures",
        "1 x status 503 (hf)",
        "the server ended with status 1",
    ]


def test_a_server_that_is_not_there() -> None:
    with FakeServer() as server:
        port = server.port
    with pytest.raises(RunError, match=f"the server at 127.0.0.1:{port} cannot be reached"):
        run_load(
            Asked(model=None, url=f"http://127.0.0.1:{port}"), LoadOptions(clients=1, timeout=1.0), lambda text: None
        )


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Asked(model=None), "needs a MODEL to serve, or --url"),
        (Asked(model="m", url="http://x"), "needs a MODEL to serve, or --url"),
        (Asked(model=None, url="http://x", of_server=("--dtype", "f32")), "^--dtype: of no use with --url"),
        (Asked(model=None, url="http://x", against=("hf",)), "^--against: of no use with --url"),
        (Asked(model=None, url="x"), "--url 'x' cannot be used"),
        (Asked(model="m", against=("tf",)), "'tf' is not known"),
        (Asked(model=None, url="http://x", prompt_tokens="9-1"), "--prompt-tokens '9-1' cannot be used"),
    ],
)
def test_wrong_use(request_: Asked, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_load(request_, LoadOptions(), print)


def test_body() -> None:
    request = Planned(0, (1, 2), 3, 4, None)
    assert "stream_options" not in request.body(False) and request.body(False)["stream"] is False
    assert request.body(True)["stream_options"] == {"include_usage": True}
