"""The report of a fine-tune: everything that it promises is there, and everything in it is text."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from report_cases import EVIL, SETS, Page, Runs, Written

from mesh_transformer import compat
from mesh_transformer.cli.main import main
from mesh_transformer.config.errors import UserError
from mesh_transformer.config.load import load_run_config
from mesh_transformer.report.make import ReportOptions, write_report


def test_every_section_is_there(written: Written) -> None:
    assert written.file.name == "report.html"
    titles = ["Configuration", "Curves", "Validation", "Before and after", "Held-out loss", "Samples"]
    assert "missing" not in written.page.sections["Before and after"], written.page.sections["Before and after"]
    assert list(written.page.sections)[1:] == [*titles, "Tokens that moved most", "Verbatim copies", "Evaluation"]
    assert all(len(text) > 60 for text in written.page.sections.values())
    assert written.page.tags.count("svg") >= 5 + 3 + 2  # curves, intervals of sets and tasks


def test_nothing_in_it_is_markup_or_comes_from_elsewhere(written: Written) -> None:
    assert not {"script", "img", "link", "iframe", "b", "i", "object", "base", "form"} & set(written.page.tags)
    names = {name for name, _ in written.page.attributes}
    assert not names & {"src", "href", "xlink:href", "srcset", "action"} and not [n for n in names if n[:2] == "on"]
    assert "url(" not in written.text and "@import" not in written.text
    assert "default-src 'none'" in written.text
    assert written.page.open == []  # every tag is closed, in the right order


def test_what_texts_hold_is_shown(written: Written) -> None:
    everything = "".join(written.page.sections.values())
    assert "<script>alert(1)</script>" in everything.replace("\n", " ") or "<script>" in everything
    assert EVIL in written.page.sections["Validation"] and EVIL in written.page.sections["Evaluation"]


def test_three_validation_sets_and_evaluations_show(written: Written) -> None:
    validation, evaluation = written.page.sections["Validation"], written.page.sections["Evaluation"]
    assert all(name in validation for name in SETS)
    assert "step 10" in validation and "step 60" in validation
    assert "20 to 60" in evaluation and "0.2500 ± 0.0625" in evaluation and "0.5000 ± 0.0625" in evaluation
    assert "+0.2500 ± 0.0884" in evaluation  # the errors of both added in squares
    assert all(name in written.page.sections["Curves"] for name in ("training", *SETS))


def test_before_is_the_model_that_the_run_began_from(written: Written, runs: Runs) -> None:
    words = written.page.sections["Before and after"]
    assert str(runs.base.run_directory) in words and "which the run began from" in words
    assert "before" in written.page.sections["Samples"] and "after" in written.page.sections["Samples"]


def test_rows_trained_on_for_long_are_found_memorised(written: Written) -> None:
    """Four rows in sixty steps of four; the model before knew them no better than held-out ones."""
    table = re.search(r"<h2>Verbatim copies</h2>.*?</table>", written.text, re.S)
    assert table is not None
    first = re.findall(r"<tr><td>.*?</tr>", table[0])[0]
    n, before, after, longest, complete = re.findall(r"<td class=n>([^<]*)</td>", first)
    assert (int(n), int(complete)) == (4, 4)
    assert int(longest) >= 20
    assert float(after.split()[0]) > 2 * float(before.split()[0])


def test_the_command_repeats_the_run(written: Written, runs: Runs) -> None:
    command = re.search(r"<pre>(mesh-transformer train .*?)</pre>", written.text)
    assert command is not None
    words = shlex.split(Page(command[1]).sections[""])
    config, overrides = words[2], [words[4]]
    again, _ = load_run_config(config, overrides)
    assert again.name == f"{runs.tuned.name}-again" and again.train == runs.tuned.train
    assert words[5] == "--init-from" and Path(words[6]).is_relative_to(runs.base.run_directory)


@pytest.mark.long
def test_a_run_from_random_parameters_is_compared_with_its_earliest_checkpoint(runs: Runs, tmp_path: Path) -> None:
    file = write_report(runs.base.run_directory, tmp_path / "base.html", ReportOptions(rows=6), note=lambda _: None)
    page = Page(file.read_text())
    assert "checkpoint 10, the earliest that the run has kept" in page.sections["Before and after"]
    assert "evaluate.tasks is empty" in page.sections["Evaluation"]


@pytest.mark.long
def test_a_base_that_has_gone_is_said_and_the_rest_stands(runs: Runs, tmp_path: Path) -> None:
    elsewhere = runs.base.run_directory.rename(runs.base.run_directory.with_name("moved"))
    try:
        file = write_report(runs.tuned.run_directory, tmp_path / "r.html", ReportOptions(rows=6), note=lambda _: None)
    finally:
        elsewhere.rename(runs.base.run_directory)
    page = Page(file.read_text())
    assert "Nothing to compare with" in page.sections["Before and after"]
    assert "cannot be used" in page.sections["Before and after"]
    assert "there is no model to compare with" in page.sections["Tokens that moved most"]
    assert "before" not in page.sections["Samples"].replace("beforehand", "")


def test_a_run_whose_data_has_gone_keeps_its_curves(runs: Runs, tmp_path: Path) -> None:
    data = runs.directory / "few.tfrecords"
    data.rename(runs.directory / "gone")
    try:
        file = write_report(runs.tuned.run_directory, tmp_path / "r.html", note=lambda _: None)
    finally:
        (runs.directory / "gone").rename(data)
    page = Page(file.read_text())
    assert "few.tfrecords" in page.sections["Before and after"]
    assert "Curves" in page.sections and "Samples" not in page.sections


def test_what_is_asked_for_by_name_must_be_there(runs: Runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere"):
        write_report(
            runs.tuned.run_directory, options=ReportOptions(base=str(tmp_path / "nowhere")), note=lambda _: None
        )
    with pytest.raises(UserError, match=r"not a run directory") as caught:
        write_report(tmp_path)
    assert str(caught.value).count("\n") == 1


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`mesh-transformer report ARGUMENTS` in this process; its exit status."""
    # Settings of a whole process, which is here the one that runs the tests.
    monkeypatch.setattr(compat, "prepare_process", lambda: None)
    monkeypatch.setattr(compat, "use_compile_cache", lambda: None)
    monkeypatch.setattr(sys, "argv", ["mesh-transformer", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_the_command(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    how = ("--out", str(out), "--base", str(runs.base.run_directory), "--prompt", "The <b>", "--rows", "6")
    assert command(monkeypatch, str(runs.tuned.run_directory), *how) == 0
    assert capsys.readouterr().out == f"{out}\n"
    samples = Page(out.read_text()).sections["Samples"]
    assert samples.count("The <b>") >= 2
    assert command(monkeypatch, str(tmp_path)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path}: not a run directory") and said.count("\n") == 2
