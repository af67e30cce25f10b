"""Every block of the documents is run as it stands, in order, in a directory of its own, or says why it is not.

By default the README and the pages that start no process; with `make test-long` all of them. `document_blocks.py` says
how a block is marked.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from document_blocks import DOCUMENTS, PARSED, ROOT, RUN, SHOWN, Block, blocks_in, blocks_of, commands_in
from document_materials import put
from document_runner import Reader, check_parsed

# Why a block may not be run. Everything else is.
REASONS = {
    # what is made for the reader's own place
    "makes an environment and installs; the tests run in one that is there",
    # hardware, and what lasts
    "needs a TPU VM",
    "needs a GPU",
    "needs several machines",
    "needs a Ray cluster",
    "needs another processor's compiler and emulator",
    "takes hours",
    "takes minutes",
    # what is somewhere else
    "fetches GPT-J-6B",
    "needs the archive",
    "needs the weights",
    "needs the weights, and fetches the tasks' data",
    "fetches the tasks' data",
    # the machine of whoever deploys
    "needs a container engine",
    "changes the system's own services",
}
# A reader's machine has the README's commands tried on it by default. Others of its kind take minutes.
_BY_DEFAULT = ("README.md",)


def starts_a_process(blocks: list[Block]) -> bool:
    return any(block.is_run for block in blocks)


def read(page: Path, directory: Path, *, everything: bool) -> None:
    reader = Reader(directory, compile_quickly=not everything, servers=everything)
    reader.read(blocks_of(page))


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.name)
def test_blocks_are_of_a_known_kind_and_say_why_they_are_not_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    found = blocks_of(page)
    assert len([line for line in text.splitlines() if line.lstrip().startswith("```")]) == 2 * len(found)
    for block in found:
        assert block.language in (*RUN, *PARSED, *SHOWN), f"{block.place}: what is {block.language}?"
        assert block.reason is None or block.reason in REASONS, f"{block.place}: {block.reason}"
        assert block.reason is None or block.language in (*RUN, *PARSED), f"{block.place}: nothing to run"
        assert block.language != "console" or commands_in(block), f"{block.place}: no command"
        check_parsed(block)
        block.as_run()


def test_every_reason_is_given_somewhere() -> None:
    given = {block.reason for page in DOCUMENTS for block in blocks_of(page)}
    assert not REASONS - given, "no block gives these"


@pytest.mark.parametrize("page", [page for page in DOCUMENTS if page.name in _BY_DEFAULT], ids=lambda page: page.name)
def test_a_page_works_as_written(page: Path, tmp_path: Path) -> None:
    read(page, tmp_path, everything=False)
    if page.name == "README.md":
        assert (tmp_path / "notes-hf" / "model.safetensors").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    "page", [page for page in DOCUMENTS if starts_a_process(blocks_of(page))], ids=lambda page: page.name
)
def test_every_page_works_as_written(page: Path, tmp_path: Path) -> None:
    read(page, tmp_path, everything=True)


def test_every_page_is_in_the_contents() -> None:
    contents = "\n".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("index.md", "api/index.md"))
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "api").glob("*.md")]:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert page.stem == "index" or f"\n{name.removeprefix('api/')}\n" in contents, f"docs/index.md lacks {name}"


PAGE = """# A page

```console
$ echo one \\
    two > words.txt
printed
$ export WORD=three
```

<!-- file: made/notes.toml -->
<!-- smaller: 350000 -> 2; gpt-j-6b -> gpt-j-tiny -->
```toml
preset = "gpt-j-6b"
steps = 350000
```

```console
$ echo $WORD >> words.txt && grep steps made/notes.toml >> words.txt
```

<!-- not run: takes hours -->

```python
raise SystemExit("it was run")
```

```python
word = "four"
```

<!-- continues -->
```python
open("words.txt", "a").write(word)
```
"""


def test_blocks_run_in_order_and_as_their_comments_say(tmp_path: Path) -> None:
    Reader(tmp_path, compile_quickly=True, servers=False).read(blocks_in(PAGE, "page.md"))
    assert (tmp_path / "words.txt").read_text() == "one two\nthree\nsteps = 2\nfour"


@pytest.mark.parametrize(
    ("page", "place"),
    [
        ("```console\n$ test -e nothing\n```\n", "page.md:1"),
        ("\n```python\nraise ValueError\n```\n", "page.md:2"),
        ("<!-- smaller: 6 -> 7 -->\n```console\n$ true\n```\n", "page.md:2"),
        ("```console\n$ curl http://127.0.0.1:8000/health\n```\n", "page.md:1"),
        ("<!-- needs: a pony -->\n```console\n$ true\n```\n", "a pony"),
    ],
    ids=["command", "python", "smaller", "server", "needs"],
)
def test_what_does_not_work_is_named(tmp_path: Path, page: str, place: str) -> None:
    with pytest.raises(AssertionError, match=place):
        Reader(tmp_path, compile_quickly=True, servers=True).read(blocks_in(page, "page.md"))


def test_materials_are_what_they_are_called(tmp_path: Path) -> None:
    put("notes.toml, step_383500", tmp_path)
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert {"notes.txt", "notes.toml", "data/notes.index", "step_383500/shard_7/15.npz", "config.json"} <= found
