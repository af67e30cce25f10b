"""The documents' curl commands, as they stand, against the real server."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Iterator

import pytest
from client_cases import PATIENCE, Running, save_model, serving

from house.test_documents import DOCUMENTS, commands

pytestmark = pytest.mark.peers
# Where the documents have it, and what they call the model.
URL, NAME = "http://127.0.0.1:8000", "notes"


SERVING = next(path for path in DOCUMENTS if path.name == "serving.md")
# Those of other addresses are about proxies and other machines.
CURLS = [
    (path, line) for path in DOCUMENTS for line in commands(path) if line.startswith("curl ") and f" {URL}" in line
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    place = tmp_path_factory.mktemp("curl")
    (template,) = re.findall(r"<!-- file: chat.jinja -->\n```text\n(.*?)```", SERVING.read_text(), re.DOTALL)
    (place / "chat.jinja").write_text(template)
    with serving(save_model(place / NAME), "--max-batch", "2", "--chat-template", str(place / "chat.jinja")) as running:
        yield running


def test_there_are_examples() -> None:
    assert {path.name for path, _ in CURLS} >= {"README.md", "serving.md"}


@pytest.mark.parametrize("line", [line for _, line in CURLS], ids=[path.name for path, _ in CURLS])
def test_a_curl_command(running: Running, line: str) -> None:
    words = shlex.split(line.replace(URL, running.url))
    # It ends with a status other than 0 where the server's is an error, and shows no progress.
    done = subprocess.run([*words, "--silent", "--fail-with-body"], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    if "/metrics" in line:
        assert "mesh_transformer_ready 1.0" in done.stdout
    elif '"stream": true' in line:
        events = [event.removeprefix("data: ") for event in done.stdout.split("\n\n") if event]
        assert events.pop() == "[DONE]" and all(json.loads(event)["choices"] for event in events)
    else:
        answer = json.loads(done.stdout)
        assert "error" not in answer and answer
        if "completions" in line:
            assert answer["model"] == NAME and answer["choices"][0]["finish_reason"]
