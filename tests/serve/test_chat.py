"""Messages over HTTP, before an engine that writes what it is told to."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from fake_engine import END, TOKENIZER, WRITTEN
from serve_cases import Server, error_of
from server_thread import ServerThread, post

from mesh_transformer.config.errors import UserError
from mesh_transformer.data import chat as templates
from mesh_transformer.data.chat import read_template
from mesh_transformer.data.chat import with_template as with_text
from mesh_transformer.data.companions import Companions
from mesh_transformer.serve import chat as answering

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' and not m.tool_call_id %}{{ raise_exception('no call') }}{% endif %}"
    "{{ bos_token }}{{ m.role }}:{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments.n }}{% endfor %};{% endfor %}"
    "{% if tools %}{{ tools | length }} tools;{% endif %}"
    "{% if add_generation_prompt %}{{ ending or 'assistant:' }}{% endif %}"
)  # fmt: skip
HELLO = [{"role": "user", "content": "hé"}]


def with_template(template: str = TEMPLATE, **more: Any) -> dict[str, Any]:
    companions = Companions(special={"bos_token": "<|endoftext|>"}, templates={"default": template}, **more)
    return {"tokenizer": dataclasses.replace(TOKENIZER, companions=companions)}


def call_with(arguments: str) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}


@pytest.fixture
def chatty(make_server: Any) -> Server:
    return make_server(model=with_template())


def answer_of(server: Server, **body: Any) -> Any:
    answer = server.http.post(PATH, json={"messages": HELLO, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def events_of(server: Server, **body: Any) -> list[Any]:
    answer = server.http.post(PATH, json={"messages": HELLO, **body, "stream": True})
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    found = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert found.pop() == "[DONE]"
    return [json.loads(text) for text in found]


def prompt_of(server: Server) -> str:
    """The prompt of the last request; its end-of-text is written as what it is."""
    return "".join("|" if token == END else TOKENIZER.decode([token]) for token in server.requests[0].prompt)


def test_an_answer(chatty: Server) -> None:
    found = answer_of(chatty)
    assert TOKENIZER.decode(chatty.requests[0].prompt) == "<|endoftext|>user:hé;assistant:"
    assert chatty.requests[0].prompt[0] == END
    message = {"role": "assistant", "content": WRITTEN, "refusal": None}
    assert found.pop("choices") == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]
    read, wrote = len(chatty.requests[0].prompt), len(TOKENIZER.encode(WRITTEN))
    usage = found.pop("usage")
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (read, wrote, read + wrote)
    assert found.pop("id").startswith("chatcmpl-") and found.pop("created") > 1.7e9
    assert found.pop("system_fingerprint").startswith("mt_")
    assert found == {"object": "chat.completion", "model": "tiny"}
    # What the context has left.
    assert chatty.requests[0].options.max_tokens == chatty.served.model.config.n_ctx - read


def test_options_are_those_of_completions(chatty: Server) -> None:
    options = {
        "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "min_tokens": 2, "ignore_eos": True, "seed": 7,
        "stop": ["x", "y"], "presence_penalty": 1, "frequency_penalty": -1, "logit_bias": {"65": 2}, "n": 3,
    }  # fmt: skip
    answer_of(chatty, max_completion_tokens=5, user="somebody", **options)
    asked = [request.options for request in chatty.requests]
    assert [each.sample for each in asked] == [0, 1, 2] and {each.max_tokens for each in asked} == {5}
    chatty.complete(prompt="a", max_tokens=5, **options)
    assert asked == [request.options for request in chatty.requests]


def test_a_stream(chatty: Server) -> None:
    events = events_of(chatty, n=2, stream_options={"include_usage": True}, max_tokens=6)
    assert {event["object"] for event in events} == {"chat.completion.chunk"} and len({e["id"] for e in events}) == 1
    last = events.pop()
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None and len(event["choices"]) == 1 for event in events)
    for index in range(2):
        parts = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert parts[0]["delta"] == {"role": "assistant", "content": ""}
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        assert "".join(part["delta"].get("content", "") for part in parts) == WRITTEN[:6]
        assert all(list(part["delta"]) == ["content"] for part in parts[1:-1]) and len(parts) > 3


def test_log_probabilities_are_of_the_content_alone(chatty: Server) -> None:
    (choice,) = answer_of(chatty, logprobs=True, top_logprobs=2)["choices"]
    told = choice["logprobs"]["content"]
    assert choice["logprobs"]["refusal"] is None and choice["finish_reason"] == "stop"
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == WRITTEN == choice["message"]["content"]
    assert told[0] == {
        "token": "H",
        "logprob": -0.25,
        "bytes": [72],
        "top_logprobs": [
            {"token": "A", "logprob": -1.0, "bytes": [65]},
            {"token": "B", "logprob": -2.0, "bytes": [66]},
        ],
    }
    parts = [event["choices"][0]["logprobs"] for event in events_of(chatty, logprobs=True, top_logprobs=2)]
    assert parts[0] is None and [entry for part in parts[1:] for entry in part["content"]] == told
    (plain,) = answer_of(chatty, logprobs=True)["choices"]
    assert [entry["top_logprobs"] for entry in plain["logprobs"]["content"]] == [[]] * len(told)


def test_what_messages_may_hold(chatty: Server) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "count", "arguments": '{"n": 42}'}}
    nothing = {"refusal": None, "audio": None, "annotations": [], "function_call": None}
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "", "tool_calls": [call], **nothing},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    tools = [{"type": "function", "function": {"name": "count"}}]
    answer_of(chatty, messages=messages, tools=tools, max_tokens=1)
    assert prompt_of(chatty) == "|system:a\nb;|assistant:42;|tool:7;1 tools;assistant:"
    answer_of(chatty, messages=messages, tools=tools, tool_choice="none", max_tokens=1)
    assert "tools;" not in prompt_of(chatty)
    answer_of(chatty, chat_template_kwargs={"ending": "!"}, max_tokens=1, response_format={"type": "text"})
    assert TOKENIZER.decode(chatty.requests[0].prompt) == "<|endoftext|>user:hé;!"


def test_content_that_is_null_is_shown_as_null(make_server: Any) -> None:
    """And one that is not there as undefined; as transformers shows both."""
    template = "{% for m in messages %}{{ m.content is none }},{{ m.content is defined }};{% endfor %}"
    server = make_server(model=with_template(template))
    call = {"type": "function", "function": {"name": "count", "arguments": "{}"}}
    said = {"role": "assistant", "tool_calls": [call], "name": None, "tool_call_id": None}
    answer_of(server, messages=[{**said, "content": None}, said], max_tokens=1)
    assert prompt_of(server) == "True,True;False,False;"


def test_arguments_of_tool_calls_are_objects_or_texts(make_server: Any) -> None:
    """Objects, as most templates take them; the texts as they came, where a template fails on objects."""
    asked = "{% set f = messages[0].tool_calls[0].function %}"
    call = {"type": "function", "function": {"name": "count", "arguments": '{"n":  42}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    for template, prompt in [
        ("{{ f.arguments | tojson }}", '{"n": 42}'),
        ("{{ 'n' + f.arguments + ';' }}", 'n{"n":  42};'),
        ("{{ f.arguments.strip() }}", '{"n":  42}'),
    ]:
        server = make_server(model=with_template(asked + template))
        answer_of(server, messages=messages, max_tokens=1)
        assert prompt_of(server) == prompt
    # Where neither helps, what was said of the objects is told; an object that came as one stays one.
    server = make_server(model=with_template(asked + "{{ f.arguments + 1 }}"))
    _, error = server.error(PATH, messages=messages)
    assert "'dict' and 'int'" in error["message"]
    call["function"]["arguments"] = {"n": 42}
    assert "'dict' and 'int'" in server.error(PATH, messages=messages)[1]["message"]


def test_a_template_runs_on_another_thread_than_the_streams(chatty: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    real = answering.encode_chat

    def watched(*given: Any, **how: Any) -> list[int]:
        try:
            asyncio.get_running_loop()
            seen.append(True)
        except RuntimeError:
            seen.append(False)
        return real(*given, **how)

    monkeypatch.setattr(answering, "encode_chat", watched)
    answer_of(chatty, max_tokens=1)
    assert seen == [False]


def test_templates_are_compiled_before_the_first_conversation() -> None:
    """Those that cannot be used are named; the others, and completions, are served all the same."""
    companions = Companions(templates={"default": TEMPLATE + " once", "tool_use": "{% for %}"})
    templates._compiled.cache_clear()
    chats = [{"messages": HELLO, **more} for more in ({}, {"tools": [{"type": "function"}]})]
    with ServerThread(held=False, tokenizer=dataclasses.replace(TOKENIZER, companions=companions)) as server:
        status = []
        for path, body in [("/v1/completions", {"prompt": "a"}), *((PATH, chat) for chat in chats)]:
            with server.connect() as client:
                client.sendall(post(path, body, "Connection: close"))
                status.append(client.makefile("rb").readline().split()[1])
            if len(status) == 1:
                assert templates._compiled.cache_info().currsize == 1
        assert status == [b"200", b"200", b"400"]
    (warning,) = [note for note in server.notes if note.startswith("warning")]
    assert warning.startswith("warning: the chat template 'tool_use' cannot be used: the chat template is no Jinja ")
    assert warning.endswith("; chats that need it are refused") and server.notes[0] == warning


def test_a_name_of_a_special_token_in_a_message_is_that_token(chatty: Server) -> None:
    answer_of(chatty, messages=[{"role": "user", "content": "a<|endoftext|>b"}])
    assert prompt_of(chatty) == "|user:a|b;assistant:"


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({"messages": []}, "messages", "messages = []; expected a list of objects such as"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages", 'messages = [{"role": "robot"'),
        ({"messages": [{"role": "user"}]}, "messages", "messages = "),
        ({"messages": [{"role": "user", "content": 5}]}, "messages", "messages = "),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages", "messages"),
        ({"messages": [{"role": "user", "content": "a", "colour": "red"}]}, "messages", "messages = "),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "{"}}]}]}, "messages", "mess"),
        ({"messages": [call_with("[" * 100_000)]}, "messages", 'messages = [{"role": "assistant"'),
        ({"messages": [call_with('{"n": NaN}')]}, "messages", 'messages = [{"role": "assistant"'),
        ({"messages": [call_with('{"n": -Infinity}')]}, "messages", 'messages = [{"role": "assistant"'),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages", "the model's chat template cannot make"),
        ({"messages": [{"role": "user", "content": "a" * 80}]}, "messages", "the prompt has 97 tokens, and the model"),
        ({"tools": [{"type": "retrieval"}]}, "tools", "tools = "),
        ({"tool_choice": "required"}, "tool_choice", 'tool_choice = "required"; expected "auto" or "none"'),
        ({"response_format": {"type": "json_object"}}, "response_format", "response_format = "),
        ({"max_tokens": 0}, "max_tokens", "max_tokens = 0; expected a whole number of at least 1"),
        ({"max_tokens": 9999}, "max_tokens", "max_tokens = 9999; this server writes at most 4096 tokens"),
        ({"max_completion_tokens": 9999}, "max_completion_tokens", "max_completion_tokens = 9999; this server"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "max_tokens = 1 and max_completion_tokens = 2"),
        ({"top_logprobs": 3}, "top_logprobs", "top_logprobs = 3 is given without logprobs"),
        ({"logprobs": 3}, "logprobs", "logprobs = 3; expected true or false"),
        ({"n": 129}, "n", "1 prompts times n = 129 are 129 choices"),
        ({"logit_bias": {"264": 1}}, "logit_bias", "logit_bias names token id 264; expected ids from 0 to 263"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options is given without stream"),
        ({"prompt": "a"}, "prompt", 'the field "prompt" is not known; '),
        ({"chat_template_kwargs": {"add_generation_prompt": False, "messages": []}}, "chat_template_kwargs",
         "chat_template_kwargs: messages, add_generation_prompt cannot be a template's own variable"),
        ({"chat_template_kwargs": {"tools": None}}, "chat_template_kwargs", "chat_template_kwargs: tools cannot be"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs", "chat_template_kwargs: documents cannot"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs", "chat_template_kwargs = []; expected an object"),
    ],
)  # fmt: skip
def test_bad_requests(chatty: Server, body: dict[str, Any], param: str, said: str) -> None:
    status, error = chatty.error(PATH, **{"messages": HELLO, **body})
    assert (status, error["param"]) == (400, param) and error["message"].startswith(said), error
    assert not chatty.service.groups


def test_what_the_template_says_is_told(chatty: Server) -> None:
    _, error = chatty.error(PATH, messages=[{"role": "tool", "content": "a"}])
    assert error["message"] == "the model's chat template cannot make a prompt of these messages: no call"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for %}", "the chat template is no Jinja template: "),
        ("{% break %}", "the chat template is no Jinja template: "),
        ("{{ lipsum(n=1) }}", "cannot make a prompt of these messages: 'lipsum' is undefined"),
        ("{{ messages.pop() }}", "cannot make a prompt of these messages: "),
        ("{{ ''.__class__.__mro__ }}", "cannot make a prompt of these messages: "),
        ("{% set ns = namespace(__class__=1) %}", "a namespace holds no '__class__'"),
        ("{{ 'a' * 99999999 }}", "a product of more than 8,388,608 parts"),
        ("{{ 9 ** 999999 }}", "a power of 999999"),
        ("{% for i in range(9000) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}", "makes more than 8,388,608 characters"),
        ("{{ messages[7].content.x }}", "cannot make a prompt of these messages: "),
        ("{% include 'file' %}", "cannot make a prompt of these messages: no loader"),
        ("{{ 1 / 0 }}", "cannot make a prompt of these messages: division by zero"),
        ("", "makes an empty prompt of these messages"),
    ],
)
def test_templates_of_strangers(make_server: Any, template: str, said: str) -> None:
    """They run in a sandbox, and what they do wrong is the answer."""
    server = make_server(model=with_template(template))
    status, error = server.error(PATH, messages=HELLO)
    assert (status, error["param"]) == (400, "messages") and said in error["message"], error
    assert not server.service.groups
    assert server.complete(prompt="a")["choices"]


def test_dictionaries_that_a_template_makes(make_server: Any) -> None:
    template = "{{ dict(a=1).a }}{{ dict([('b', 2)], c=3) | length }}{{ dict.fromkeys('de', 4).e }}"
    server = make_server(model=with_template(template + "{{ 'class' in (dict | string) }}"))
    answer_of(server, max_tokens=1)
    assert prompt_of(server) == "124False"


def test_without_a_template_or_a_tokenizer(server: Server, make_server: Any) -> None:
    status, error = server.error(PATH, messages=HELLO)
    assert (status, error["code"], error["param"]) == (400, "chat_template_missing", None)
    assert "has no chat template" in error["message"] and "prompts are taken at /v1/completions" in error["message"]
    status, error = make_server(model={"tokenizer": None}).error(PATH, messages=HELLO)
    assert (status, error["param"]) == (400, "messages") and "no tokenizer" in error["message"]


def test_guards(make_server: Any) -> None:
    """The key, the other types and the end of the server are looked after as for completions."""
    server = make_server(model=with_template(), api_key="k")
    assert error_of(server.http.post(PATH, json={"messages": HELLO}))[0] == 401
    key = {"Authorization": "Bearer k"}
    answer = server.http.post(PATH, content=json.dumps({"messages": HELLO}), headers=key)
    assert error_of(answer)[0] == 415
    assert server.http.post(PATH, json={"messages": HELLO}, headers=key).status_code == 200
    server.served.stopping = True
    assert error_of(server.http.post(PATH, json={"messages": HELLO}, headers=key))[0] == 503


def test_the_fingerprint_changes_with_the_template(make_server: Any) -> None:
    prints = {make_server(model=with_template(text)).served.fingerprint for text in (TEMPLATE, TEMPLATE + " ")}
    assert len(prints) == 2


def test_a_template_from_a_file(make_server: Any, tmp_path: Path) -> None:
    """What `serve --chat-template` does; where nothing names special tokens, end-of-text is both of them."""
    file = tmp_path / "chat.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}é", encoding="utf-8"
    )
    server = make_server(model={"tokenizer": with_text(TOKENIZER, read_template(file))})
    answer_of(server)
    assert server.requests[0].prompt == (END, *"hé".encode(), END, *"é".encode())
    with pytest.raises(UserError, match=r"absent\.jinja: cannot be read as a chat template \("):
        read_template(tmp_path / "absent.jinja")
    file.write_text("{% if %}")
    with pytest.raises(UserError, match=r"chat\.jinja: the chat template is no Jinja template: "):
        read_template(file)
