"""Everything around the completions: key, origins, page, models, health, figures, the description."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from serve_cases import error_of

from mesh_transformer.cli import main as cli
from mesh_transformer.config.errors import UserError
from mesh_transformer.engine.request import Output
from mesh_transformer.serve import app as app_module
from mesh_transformer.serve import openapi, page, schema
from mesh_transformer.serve.options import ServeOptions

POSTS = {
    "/v1/completions": {"prompt": "a"},
    "/complete": {"context": "a", "top_p": 1, "temp": 1},
    "/model/predict": {"context": "a"},
    "/model/get_prediction": {"qid": 1},
}
GETS = ["/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json"]


# ------------------------------------------------------------------------------------------------------------ the key


def test_the_key_is_asked_for(make_server: Any) -> None:
    server = make_server(api_key="s3cret")
    wrong: list[dict[str, str]] = [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}]
    wrong += [{"Authorization": "Basic s3cret"}, {"Authorization": "Bearer s3cret2"}, {"Authorization": "Bearer"}]
    for headers in wrong:
        answers = [server.http.post(path, json=body, headers=headers) for path, body in POSTS.items()]
        answers += [server.http.get(path, headers=headers) for path in [*GETS, "/nothing"]]
        for answer in answers:
            status, error = error_of(answer)
            assert (status, error["code"], answer.headers["www-authenticate"]) == (401, "invalid_api_key", "Bearer")
            what = "the API key is wrong" if headers else "no API key was given"
            assert error["message"] == f"{what}; expected the header Authorization: Bearer KEY"
    assert not server.service.groups
    right = {"Authorization": "Bearer s3cret"}
    assert [server.http.post(path, json=body, headers=right).status_code for path, body in POSTS.items()] == [200] * 4
    assert [server.http.get(path, headers=right).status_code for path in GETS] == [200] * 4


def test_health_and_the_page_need_no_key(make_server: Any, some_page: Path) -> None:
    server = make_server(api_key="s3cret")
    assert [server.http.get(path).status_code for path in ("/health", "/", "/page/main.js")] == [200, 200, 200]


def test_a_key_that_is_no_ascii_is_wrong(make_server: Any) -> None:
    server = make_server(api_key="s3cret")
    assert server.http.get("/v1/models", headers={b"Authorization": "Bearer é".encode()}).status_code == 401


# -------------------------------------------------------------------------------------------------------- the origins


def test_pages_of_other_origins_may_not_use_v1(server: Any) -> None:
    headers = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    answer = server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert server.http.options("/v1/completions", headers=headers).status_code == 405


def test_allowed_origins_may(make_server: Any) -> None:
    server = make_server(api_key="k", allow_origins=("https://good.example", "http://localhost:3000"))
    headers = {"Origin": "https://good.example", "Authorization": "Bearer k"}
    answer = server.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert answer.headers["access-control-allow-origin"] == "https://good.example"
    assert answer.headers["vary"] == "Origin"
    # Preflights carry no key; an error is readable for the page too.
    answer = server.http.options("/v1/completions", headers={"Origin": "http://localhost:3000"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-methods"] == "GET, POST"
    assert answer.headers["access-control-allow-headers"] == "Authorization, Content-Type"
    answer = server.http.get("/v1/models", headers={"Origin": "https://good.example"})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == "https://good.example"
    answer = server.http.get("/v1/models", headers={"Origin": "https://bad.example", "Authorization": "Bearer k"})
    assert "access-control-allow-origin" not in answer.headers and answer.headers["vary"] == "Origin"
    answer = server.http.get("/health", headers={"Origin": "https://good.example"})
    assert "access-control-allow-origin" not in answer.headers
    preflight = server.http.options("/complete")
    assert preflight.headers["access-control-allow-headers"] == "*, Authorization"


def test_every_origin_may_be_allowed(make_server: Any) -> None:
    server = make_server(allow_origins=("*",))
    answer = server.http.get("/v1/models", headers={"Origin": "https://any.example"})
    assert answer.headers["access-control-allow-origin"] == "*"


# ----------------------------------------------------------------------------------------------------------- the page


@pytest.fixture
def some_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files as the page has them."""
    for name in ("index.html", "style.css", "main.js", "favicon.svg", ".hidden", "notes.md"):
        (tmp_path / name).write_text(f"content of {name}", encoding="utf-8")
    (tmp_path / "__pycache__").mkdir()
    responses = page.page_responses(tmp_path)
    monkeypatch.setattr(app_module, "page_responses", lambda: responses)
    return tmp_path


def test_the_page_is_served_with_a_strict_policy(make_server: Any, some_page: Path) -> None:
    server = make_server()
    types = {"/": "text/html", "/page/style.css": "text/css", "/page/main.js": "text/javascript"}
    types["/page/favicon.svg"] = "image/svg+xml"
    for path, media_type in types.items():
        answer = server.http.get(path)
        assert answer.text == f"content of {'index.html' if path == '/' else path.removeprefix('/page/')}"
        assert answer.headers["content-type"].split(";")[0] == media_type
        assert answer.headers["content-security-policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert (server.http.head(path).status_code, server.http.head(path).content) == (200, b"")
        again = server.http.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    for path in ("/page/.hidden", "/page/notes.md", "/page/index.html", "/page/__pycache__", "/page/", "/page"):
        assert error_of(server.http.get(path))[0] == 404


def test_a_page_that_is_not_there(tmp_path: Path) -> None:
    assert page.page_responses(tmp_path / "nothing") == {}
    assert page.page_responses(tmp_path) == {}


# --------------------------------------------------------------------------------------------------- models and health


def test_models(make_server: Any) -> None:
    server = make_server(name="some/model")
    card = server.http.get("/v1/models").json()
    assert card["object"] == "list" and len(card["data"]) == 1
    assert card["data"][0].pop("created") > 1_700_000_000
    assert card["data"][0] == {
        "id": "some/model",
        "object": "model",
        "owned_by": "mesh-transformer",
        "max_model_len": 64,
    }
    assert server.http.get("/v1/models/some/model").json()["id"] == "some/model"
    status, error = error_of(server.http.get("/v1/models/other"))
    assert (status, error["code"]) == (404, "model_not_found")


def test_health(server: Any) -> None:
    server.service.ready = False
    answer = server.http.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "warming up"})
    server.service.ready = True
    answer = server.http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
    assert server.http.head("/health").status_code == 200
    server.served.stopping = True
    answer = server.http.get("/health")
    assert (answer.status_code, answer.json()) == (503, {"status": "shutting down"})


def test_a_server_that_stops_takes_nothing_more(server: Any) -> None:
    server.served.stopping = True
    for path, body in POSTS.items():
        if path != "/model/get_prediction":
            answer = server.http.post(path, json=body)
            status, error = error_of(answer)
            assert (status, error["code"], answer.headers["retry-after"]) == (503, "shutting_down", "5")
    assert not server.service.groups


def test_an_engine_that_has_ended(server: Any) -> None:
    server.service.ended = True
    status, error = server.error(prompt="a")
    assert (status, error["type"], error["code"]) == (503, "server_error", "engine_ended")


def test_an_answer_may_take_too_long(make_server: Any) -> None:
    server = make_server(held=True, request_timeout=0.05)
    status, error = server.error(prompt="a")
    assert (status, error["type"], error["code"]) == (504, "server_error", "request_timeout")
    assert error["message"].startswith("the answer was not done within 0.05 seconds; ask for fewer tokens or try")
    assert server.service.groups[0].cancelled.is_set()
    events = server.events(prompt="a")
    assert len(events) == 1 and events[0]["error"]["code"] == "request_timeout"
    assert server.service.groups[1].cancelled.is_set()


# --------------------------------------------------------------------------------------------------------- the figures


def figures(server: Any) -> dict[tuple[str, ...], float]:
    """Name and label values of every sample -> value."""
    answer = server.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name.removeprefix("mesh_transformer_"), *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def test_figures(make_server: Any) -> None:
    server = make_server(held=True)
    server.service.figures = {"waiting": 3, "running": 2, "slots": 16, "prompt_tokens": 100, "cached_tokens": 40}
    server.service.figures |= {"generated_tokens": 70, "steps": 9, "failures": 1, "compiled": 12}

    def answer(group: Any) -> None:
        for tokens in ((1,), (2, 3), (4,)):
            group.receive(0, Output(tokens=tokens, text="x"))
        group.receive(0, Output(finish_reason="length"))

    server.service.answer_with(answer)
    server.complete(prompt="a")
    server.events(prompt="a")
    server.error(prompt=5)
    server.http.get("/page/x")
    server.http.get("/v1/models/x")
    server.http.get("/no/such/thing")
    found = figures(server)
    expected: dict[tuple[str, ...], float] = {
        ("requests_total", "/v1/completions", "200"): 2,
        ("requests_total", "/v1/completions", "400"): 1,
        ("requests_total", "/page/", "404"): 1,
        ("requests_total", "/v1/models/", "404"): 1,
        ("requests_total", "other", "404"): 1,
        ("request_seconds_count", "/v1/completions"): 3,
        ("time_to_first_token_seconds_count",): 2,
        ("time_per_output_token_seconds_count",): 2,
        ("streams",): 0,
        ("clients_gone_total",): 0,
        ("slow_readers_total",): 0,
        ("ready",): 1,
        ("queue_length",): 3,
        ("slots_used",): 2,
        ("slots",): 16,
        ("prompt_tokens_total",): 100,
        ("cached_prompt_tokens_total",): 40,
        ("generated_tokens_total",): 70,
        ("engine_steps_total",): 9,
        ("engine_step_failures_total",): 1,
        ("compilations_total",): 12,
    }
    assert {key: found[key] for key in expected} == expected


def test_when_to_try_again_follows_the_rate(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mesh_transformer.serve import served

    assert server.served.retry_after() == 5  # nothing is known yet
    clock = [100.0]
    monkeypatch.setattr(served.time, "monotonic", lambda: clock[0])
    for moment in (100.0, 110.0, 120.0, 130.0):
        clock[0] = moment
        server.served.count_finished()
    assert server.served.retry_after() == 8  # four in 30 seconds
    clock[0] = 10_000.0
    assert server.served.retry_after() == 60


# ------------------------------------------------------------------------------------------------------ the description


def test_the_description(make_server: Any) -> None:
    server = make_server(api_key="k")
    found = server.http.get("/openapi.json", headers={"Authorization": "Bearer k"}).json()
    others = {"/health", "/metrics", "/v1/models", "/v1/models/{model}", "/v1/chat/completions"}
    assert set(found["paths"]) == {*others, *POSTS}
    completions = found["paths"]["/v1/completions"]["post"]
    reference = completions["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    schema = found["components"]["schemas"][reference.rpartition("/")[2]]
    assert schema["additionalProperties"] is False and schema["properties"]["n"]["anyOf"][0]["minimum"] == 1
    assert set(completions["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    statuses = {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}
    assert set(completions["responses"]) == statuses
    assert "401" not in found["paths"]["/health"]["get"]["responses"]
    dumped = str(found)
    for name in {part.split("'")[0] for part in dumped.split("#/components/schemas/")[1:]}:
        assert name in found["components"]["schemas"]
    for operations in found["paths"].values():
        for operation in operations.values():
            assert "422" not in operation["responses"]


# ---------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": ""}, "the served model's name '' cannot be used; expected printable characters"),
        ({"api_key": "a b"}, "the API key cannot be sent in a header; expected printable ASCII characters, no spaces"),
        ({"api_key": ""}, "the API key is empty, which would ask for none"),
        ({"max_body_bytes": 0}, "max_body_bytes = 0 is out of range: at least 1"),
        ({"max_choices": 0}, "max_choices = 0 is out of range: at least 1"),
        ({"request_timeout": float("inf")}, "request_timeout = inf is out of range: more than 0 seconds, and finite"),
        ({"write_timeout": 0}, "write_timeout = 0 is out of range: more than 0 seconds, and finite"),
        ({"shutdown_timeout": -1}, "shutdown_timeout = -1 is out of range: at least 0, and finite"),
        ({"allow_origins": ("example.com",)}, "the origin 'example.com' cannot be used; expected https://host"),
        ({"allow_origins": ("https://a.example/",)}, "the origin 'https://a.example/' cannot be used; expected "),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as raised:
        ServeOptions(**{"name": "x", **options})
    assert str(raised.value).startswith(message)


# --------------------------------------------------------------------------------------------------------- the document

DOCUMENT = Path(__file__).parents[2] / "docs" / "serving.md"


def test_the_document_names_everything(server: Any) -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    for field in schema.CompletionRequest.model_fields:
        assert re.search(rf"^\|[^|]*`{field}`", text, re.MULTILINE), field
    for name in {key[0].removesuffix("_count") for key in figures(server)}:
        if not name.endswith(("_bucket", "_sum", "_created")):
            assert re.search(rf"^\|[^|]*`{name}`", text, re.MULTILINE), name
    for status in openapi._WHY:
        assert f"\n| {status} |" in text
    command = typer.main.get_command(cli.app).commands["serve"]  # type: ignore[attr-defined]
    for parameter in command.params:
        for option in parameter.opts:
            assert f"`{option}`" in text or option in ("model", "--help", "-h"), option
