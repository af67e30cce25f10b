"""What is refused, and the words it is refused with."""

from __future__ import annotations

from typing import Any

import pytest
from serve_cases import error_of

from mesh_transformer.config.errors import UserError

PROMPT = (
    "a string, a list of strings, a list of token ids, or a list of lists of token ids; "
    "without it, or empty, the text begins at end-of-text"
)
STOP = "a string or a list of up to 16 strings, none empty or longer than 1,000 characters"
BIAS = 'an object of up to 300 token ids and numbers from -100 to 100, such as {"50256": -100}'
TEMPERATURE = "a number from 0 to 2; 0 always takes the likeliest token (default 1)"
MAX_TOKENS = "a whole number of at least 0, the most tokens to write (default 16)"
N = "a whole number of at least 1, completions of each prompt (default 1)"
LOGPROBS = "a whole number from 0 to 20, alternatives reported beside each token"
SEED = "a whole number of 64 bits; the same seed and request give the same answer"
USAGE = "true for a last chunk with the counts of tokens and no choices, or false"

# (field, value, how the value is shown, what is expected)
WRONG: list[tuple[str, Any, str, str]] = [
    ("prompt", 5, "5", PROMPT),
    ("prompt", {}, "{}", PROMPT),
    ("prompt", True, "true", PROMPT),
    ("prompt", ["a", 1], '["a", 1]', PROMPT),
    ("prompt", [1, True], "[1, true]", PROMPT),
    ("prompt", [1.5], "[1.5]", PROMPT),
    ("prompt", [[1], "a"], '[[1], "a"]', PROMPT),
    ("prompt", [[["a"]]], '[[["a"]]]', PROMPT),
    ("prompt", [None] * 40, "[" + "null, " * 9 + "null,...", PROMPT),
    ("max_tokens", "5", '"5"', MAX_TOKENS),
    ("max_tokens", 5.0, "5.0", MAX_TOKENS),
    ("max_tokens", True, "true", MAX_TOKENS),
    ("max_tokens", -1, "-1", MAX_TOKENS),
    ("max_tokens", 2**40, "1099511627776", MAX_TOKENS),
    ("temperature", "1", '"1"', TEMPERATURE),
    ("temperature", True, "true", TEMPERATURE),
    ("temperature", -0.1, "-0.1", TEMPERATURE),
    ("temperature", 2.1, "2.1", TEMPERATURE),
    ("temperature", 10**400, "1" + "0" * 59 + "...", TEMPERATURE),
    ("temperature", [1], "[1]", TEMPERATURE),
    ("top_p", 1.1, "1.1", "a number from 0 to 1 (default 1)"),
    ("min_p", -1, "-1", "a number from 0 to 1 (default 0)"),
    ("top_k", -1, "-1", "a whole number of at least 0, 0 for no limit (default 0)"),
    ("top_k", 2.5, "2.5", "a whole number of at least 0, 0 for no limit (default 0)"),
    ("min_tokens", "x", '"x"', "a whole number of at least 0, tokens before end-of-text may come"),
    ("ignore_eos", 1, "1", "true or false: whether to go on past end-of-text (default false)"),
    ("n", 0, "0", N),
    ("n", 1.5, "1.5", N),
    ("stream", "true", '"true"', "true or false (default false)"),
    ("stream", 1, "1", "true or false (default false)"),
    ("echo", 0, "0", "true or false: whether the answer begins with the prompt (default false)"),
    ("logprobs", 21, "21", LOGPROBS),
    ("logprobs", -1, "-1", LOGPROBS),
    ("logprobs", True, "true", LOGPROBS),
    ("stop", "", '""', STOP),
    ("stop", ["a", ""], '["a", ""]', STOP),
    ("stop", ["a"] * 17, '["a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a", "a",...', STOP),
    ("stop", ["a" * 1001], '["' + "a" * 58 + "...", STOP),
    ("stop", 5, "5", STOP),
    ("stop", [None], "[null]", STOP),
    ("presence_penalty", 2.5, "2.5", "a number from -2 to 2 (default 0)"),
    ("frequency_penalty", -3, "-3", "a number from -2 to 2 (default 0)"),
    ("logit_bias", {"a": 1}, '{"a": 1}', BIAS),
    ("logit_bias", {"01": 1}, '{"01": 1}', BIAS),
    ("logit_bias", {"-1": 1}, '{"-1": 1}', BIAS),
    ("logit_bias", {"1": 101}, '{"1": 101}', BIAS),
    ("logit_bias", {"1": "5"}, '{"1": "5"}', BIAS),
    ("logit_bias", {"1": True}, '{"1": true}', BIAS),
    ("logit_bias", [1], "[1]", BIAS),
    ("logit_bias", dict.fromkeys(map(str, range(301)), 1),
     '{"0": 1, "1": 1, "2": 1, "3": 1, "4": 1, "5": 1, "6": 1, "7"...', BIAS),
    ("seed", 2**63, "9223372036854775808", SEED),
    ("seed", 1.0, "1.0", SEED),
    ("seed", "1", '"1"', SEED),
    ("user", 5, "5", "a string; it has no effect"),
    ("suffix", "", '""', "null: text after the completion is not taken into account"),
    ("model", 5, "5", "the name of the served model, a string"),
    ("best_of", "1", '"1"', "null or the value of n: choosing among more completions than are returned is not offered"),
    ("best_of", 2, "2", "null or the value of n: choosing among more completions than are returned is not offered"),
    ("stream_options", True, "true", 'an object such as {"include_usage": true}, together with stream'),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "shown", "expected"), WRONG)
def test_wrong_values(server: Any, field: str, value: Any, shown: str, expected: str) -> None:
    more = {"prompt": "a"} if field != "prompt" else {}
    status, error = server.error(**more, **{field: value})
    assert (status, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert error["message"] == f"{field} = {shown}; expected {expected}"
    assert not server.service.groups


OTHER: list[tuple[dict[str, Any], str | None, str]] = [
    ({"temprature": 1}, "temprature", 'the field "temprature" is not known; did you mean temperature?'),
    ({"messages": []}, "messages", 'the field "messages" is not known; the fields are model, temperature, top_p, '),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage",
     f"stream_options.include_usage = 1; expected {USAGE}"),
    ({"stream": True, "stream_options": {"include_usag": 1}}, "stream_options.include_usag",
     'the field "include_usag" is not known; did you mean include_usage?'),
    ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation",
     "stream_options.include_obfuscation = true; expected false: chunks are never padded"),
    ({"stream_options": {"include_usage": True}}, "stream_options",
     "stream_options is given without stream; leave it out, or set stream to true"),
    ({"max_tokens": 0}, "max_tokens",
     "max_tokens = 0 writes nothing; expected at least 1, or echo = true to get the prompt back"),
    ({"max_tokens": 4097}, "max_tokens",
     "max_tokens = 4097; this server writes at most 4096 tokens in one completion"),
    ({"prompt": ["a"] * 43, "n": 3}, "n",
     "43 prompts times n = 3 are 129 choices; this server gives at most 128 in one answer"),
    ({"prompt": [264]}, "prompt", "prompt holds token id 264; expected ids from 0 to 263"),
    ({"prompt": [[1], [-1]]}, "prompt", "prompt holds token id -1; expected ids from 0 to 263"),
    ({"logit_bias": {"264": 1}}, "logit_bias", "logit_bias names token id 264; expected ids from 0 to 263"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param", "message"), OTHER)
def test_what_does_not_fit_together(server: Any, body: dict[str, Any], param: str, message: str) -> None:
    status, error = server.error(**body)
    assert (status, error["param"]) == (400, param)
    assert error["message"].startswith(message)


def test_a_prompt_longer_than_the_context(make_server: Any) -> None:
    server = make_server()
    server.complete(prompt="a" * 64)
    status, error = server.error(prompt="a" * 70)
    assert (status, error["param"], error["code"]) == (400, "prompt", "context_length_exceeded")
    assert error["message"] == "the prompt has 70 tokens, and the model's context holds 64; shorten it by 6 tokens"
    server = make_server(max_prompt_tokens=10)
    assert server.error(prompt="a" * 11)[1]["message"] == (
        "the prompt has 11 tokens, and this server allows 10; shorten it by 1 tokens"
    )
    with pytest.raises(UserError, match="max_prompt_tokens = 65 is out of range: the context holds 64"):
        make_server(max_prompt_tokens=65)


def test_another_model(server: Any) -> None:
    status, error = server.error(model="gpt-4", prompt="a")
    assert (status, error["param"], error["code"]) == (404, "model", "model_not_found")
    assert error["message"] == 'the model "gpt-4" is not served here; expected "tiny"'


def test_what_the_engine_refuses(server: Any) -> None:
    server.service.refusal = UserError("the text needs 9 pages of the cache, which has 8; ask for less")
    assert server.error(prompt="a")[0] == 400
    assert server.error(prompt="a")[1]["message"] == str(server.service.refusal)


# --------------------------------------------------------------------------------------------------------- the body

BODIES: list[tuple[bytes, str]] = [
    (b"", "the body is not JSON (Expecting value: line 1 column 1 (char 0)); expected an object such as {}"),
    (b"{", "the body is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
    (b'{"prompt": "a",}', "the body is not JSON ("),
    (b"[]", "the body is an array; expected a JSON object"),
    (b"null", "the body is null; expected a JSON object"),
    (b"5", "the body is a number; expected a JSON object"),
    (b'"a"', "the body is a string; expected a JSON object"),
    (b"true", "the body is true or false; expected a JSON object"),
    (b'{"prompt": "\xff"}', "the body is not UTF-8: byte 0xff at position 12 does not belong there; send JSON"),
    (b'{"temperature": NaN}', "the body holds NaN, which is not JSON; expected finite numbers"),
    (b'{"temperature": -Infinity}', "the body holds -Infinity, which is not JSON; expected finite numbers"),
    (b'{"temperature": 1e999}', "temperature = Infinity; expected a number from 0 to 2"),
    (b'{"logit_bias": {"1": 1e999}}', "logit_bias = {"),
    (b'{"n": ' + b"9" * 5000 + b"}", "the body is not JSON (Exceeds the limit"),
    (b'{"n": 1, "n": 2}', 'the field "n" is given twice; give it once'),
    (b'{"logit_bias": {"1": 1, "1": 2}}', 'the field "1" is given twice; give it once'),
    (b'{"prompt": ' + b"[" * 100_000, "the body is nested too deeply; no field of this server needs"),
    (b'{"prompt": "\\ud800"}', "prompt holds \\ud800, half of a surrogate pair, which is no character;"),
    (b'{"stop": ["a", "\\uDFFF"]}', "stop holds \\udfff, half of a surrogate pair"),
    (b'{"\\ud800": 1}', "\\ud800 holds \\ud800, half of a surrogate pair"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "message"), BODIES)
def test_bodies_that_are_no_requests(server: Any, body: bytes, message: str) -> None:
    answer = server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    status, error = error_of(answer)
    assert status == 400 and error["message"].startswith(message), error["message"]


def test_whole_surrogate_pairs_are_characters(server: Any) -> None:
    answer = server.http.post(
        "/v1/completions", content=b'{"prompt": "\\ud83d\\ude00"}', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 200 and server.requests[0].prompt == tuple("😀".encode())


@pytest.mark.parametrize("given", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_taken(server: Any, given: str) -> None:
    """A page of another origin can send these types without asking first."""
    answer = server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers={"Content-Type": given})
    status, error = error_of(answer)
    assert (status, error["code"]) == (415, "unsupported_media_type")
    assert error["message"] == f"Content-Type is {given!r}; expected application/json"
    good = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert server.http.post("/v1/completions", content=b'{"prompt": "a"}', headers=good).status_code == 200


@pytest.mark.parametrize("announced", [True, False])
def test_a_body_may_be_too_large(make_server: Any, announced: bool) -> None:
    server = make_server(max_body_bytes=1000)

    def parts() -> Any:
        for _ in range(50):
            yield b" " * 100

    content = b" " * 5000 if announced else parts()
    answer = server.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    status, error = error_of(answer)
    assert (status, error["code"], answer.headers["connection"]) == (413, "body_too_large", "close")
    assert error["message"].startswith("the body is larger than 1,000 bytes, which is the most that this server reads")
    body = b'{"prompt": "a"}'.ljust(1000)
    assert (
        server.http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"}).status_code
        == 200
    )


# -------------------------------------------------------------------------------------------------- paths and methods


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("GET", "/v1/completions", 405, "GET /v1/completions is not offered; expected POST"),
        ("POST", "/health", 405, "POST /health is not offered; expected "),
        ("DELETE", "/v1/models", 405, "DELETE /v1/models is not offered; expected GET"),
        ("GET", "/nothing", 404, "there is nothing at /nothing; the endpoints are listed at /openapi.json"),
        ("POST", "/v1/embeddings", 404, "there is nothing at /v1/embeddings; "),
        ("GET", "/docs", 404, "there is nothing at /docs; "),
        ("GET", "/health/", 404, "there is nothing at /health/; "),
        ("OPTIONS", "/v1/completions", 405, "OPTIONS /v1/completions is not offered; expected POST"),
        ("GET", "/page/../app.py", 404, ""),
    ],
)
def test_unknown_paths_and_methods(server: Any, method: str, path: str, status: int, message: str) -> None:
    answer = server.http.request(method, path)
    found, error = error_of(answer)
    assert found == status and error["message"].startswith(message)
    assert ("allow" in answer.headers) == (status == 405)


def test_a_fault_of_the_server_itself(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr("mesh_transformer.serve.completions.ask", fail)
    status, error = server.error(prompt="a")
    assert (status, error["type"], error["code"]) == (500, "server_error", "internal_error")
    assert error["message"] == "the server failed on this request (ZeroDivisionError); its log says why"
    assert server.http.get("/health").status_code == 200
