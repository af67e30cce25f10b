"""The notebook, executed without a browser from its first cell to its last, and its widgets used."""

from __future__ import annotations

import base64
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import quickly

if importlib.util.find_spec("nbclient"):  # where they are missing the tests are only collected; run, they fail
    import nbclient
    import nbformat

pytestmark = pytest.mark.peers
NOTEBOOK = Path(__file__).parents[2] / "examples" / "demo.ipynb"
STEPS = 2  # each is followed by a validation

# What a reader does next: another prompt, other sliders, the button; and the sliders of the probabilities.
USED = """
prompt.value, temperature.value, tokens.value = "class Queue:", 0.0, 12
write.click()
first = written.value
temperature.value, seed.value = 1.5, 2
write.click()
second = written.value
write.click()
assert written.value == second != first, (first, second)
assert "<b>class Queue:</b>" in first and "<b>class Queue:</b>" in second

logits = model.logits([model.encode("for line in")])[0, -1]
for temperature_now, top_p_now in ((0.7, 0.9), (1.0, 1.0), (1.3, 0.0), (0.05, 0.5)):
    drawn = drawn_from(logits, temperature_now, top_p_now)
    assert abs(drawn.sum() - 1) < 1e-5
    assert drawn.argmax() == logits.argmax()
    if top_p_now == 1:
        assert np.allclose(drawn, softmax(logits / temperature_now), atol=1e-6)
    if top_p_now == 0:
        assert np.count_nonzero(drawn) == 1
print("used")
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook with its outputs, and a last cell that uses its widgets."""
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    notebook.cells.append(nbformat.v4.new_code_cell(USED))
    variables = quickly.variables() | {
        "NOTEBOOK_STEPS": str(STEPS), "MESH_TRANSFORMER_CACHE": str(folder / "cache"), "IPYTHONDIR": str(folder),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as environment:
        for name, value in variables.items():
            environment.setenv(name, value)
        client = nbclient.NotebookClient(
            notebook, timeout=240, startup_timeout=240, kernel_name="python3", resources={"metadata": {"path": folder}}
        )
        return client.execute()


def outputs(notebook: Any, name: str) -> list[Any]:
    return next(cell for cell in notebook.cells if cell.id == name).outputs


def pictures(found: list[Any]) -> list[bytes]:
    return [base64.b64decode(each.data["image/png"]) for each in found if "image/png" in each.get("data", {})]


def test_nothing_went_wrong(executed: Any) -> None:
    """Warnings of libraries go to standard error too; there is none."""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            assert output.get("name") != "stderr", f"{cell.id}: {output.text}"


def test_it_trained(executed: Any) -> None:
    printed = "".join(output.text for output in outputs(executed, "train"))
    assert f"step {STEPS}/{STEPS}" in printed and "held-out text" in printed


def test_the_loss_is_drawn(executed: Any) -> None:
    (picture,) = pictures(outputs(executed, "loss"))
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


def test_there_are_sliders(executed: Any) -> None:
    widgets = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    said = [each["state"].get("description") for each in widgets.values() if "Slider" in each["model_name"]]
    assert said.count("temperature") == 2 and said.count("top-p") == 2


def test_the_probabilities_are_drawn(executed: Any) -> None:
    widgets = executed.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    (drawn,) = [each["state"]["outputs"] for each in widgets.values() if each["model_name"] == "OutputModel"]
    (picture,) = pictures(drawn)
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000


def test_surprise_is_shown(executed: Any) -> None:
    (shown,) = outputs(executed, "surprise")
    nats = [float(each) for each in re.findall(r'title="([\d.]+) nats"', shown.data["text/html"])]
    mean = float(re.search(r"mean ([\d.]+) nats", shown.data["text/html"])[1])
    assert len(nats) > 10 and abs(sum(nats) / len(nats) - mean) < 0.01


def test_the_widgets_do_what_they_say(executed: Any) -> None:
    assert executed.cells[-1].outputs[-1].text.endswith("used\n")


def test_it_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.outputs and cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
