"""The tables in the documents are what the results say."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables():
    return load("tables")


@pytest.mark.parametrize("document", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_documents_and_results_agree(tables, document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert tables.rewritten(text, RESULTS) == text, "run: python benchmarks/tables.py"


def test_there_are_tables() -> None:
    text = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert text.count("<!-- table: ") == text.count("<!-- end -->") >= 1


def result(date: str, median: float) -> dict:
    figures = {"median": median, "min": median / 2, "max": 2 * median}
    contender = {
        "precision": "int8", "tokens_per_second": figures, "decoded_tokens_per_second": None,
        "weight_bytes_per_step": 4_000_000, "share_of_bandwidth": None, "described": {"jax": "9.9"},
    }  # fmt: skip
    return {
        "benchmark": "decode", "date": date, "batch": 1, "prompt": 2, "tokens": 3, "rounds": 4,
        "precisions": ["int8"], "machine": {"processor": "P", "cores": 2, "python": "3"},
        "model": {"n_layers": 1, "d_model": 8, "n_heads": 1, "n_vocab": 9, "n_ctx": 8},
        "contenders": {"ours int8": contender, "ctranslate2 int8": contender},
        "ratios": {"ours int8 over ctranslate2 int8": figures},
        "best": {"ours": "ours int8", "peers": "ctranslate2 int8"},
        "read_bytes_per_second": {"median": 5e9, "way": "sum"},
    }  # fmt: skip


def test_a_table_is_made_of_the_newest_result(tables, tmp_path) -> None:
    for date, median in (("2026-01-02", 1234.0), ("2026-01-01", 77.0)):
        (tmp_path / f"{date}-decode-x.json").write_text(json.dumps(result(date, median)))
    text = "before\n<!-- table: decode-x -->\nold\n<!-- end -->\nafter\n"
    made = tables.rewritten(text, tmp_path)
    assert made.startswith("before\n<!-- table: decode-x -->\n\n| ") and made.endswith("<!-- end -->\nafter\n")
    assert "| ours int8 | 1,234 (617 to 2,468) |  | 4 |  |" in made
    assert "ours int8 over ctranslate2 int8 1234.00" in made and "old" not in made and "2026-01-01" not in made
    assert "--precisions int8 --against ctranslate2 --rounds 4" in made and "jax 9.9" in made
    assert tables.rewritten(made, tmp_path) == made


def test_a_table_without_a_result_says_so(tables, tmp_path) -> None:
    made = tables.rewritten("<!-- table: nothing -->\n| 1 |\n<!-- end -->", tmp_path)
    assert "Not measured: there is no `benchmarks/results/DATE-nothing.json`." in made and "| 1 |" not in made


def test_a_result_of_an_unknown_benchmark_is_refused(tables, tmp_path) -> None:
    (tmp_path / "2026-01-01-x.json").write_text(json.dumps({"benchmark": "weather"}))
    with pytest.raises(SystemExit, match="no table is known for benchmark 'weather'"):
        tables.rewritten("<!-- table: x -->\n<!-- end -->", tmp_path)


def test_every_benchmark_on_cpu_has_a_table_in_a_document() -> None:
    """`benchmarks/cpu_rows.py` writes nothing that no document shows."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md"))
    rows = load("cpu_rows").ROWS
    assert len(rows) >= 5
    for name in rows:
        assert f"<!-- table: {name} -->" in text


def test_check_finds_a_difference(tables, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "2026-01-01-d.json").write_text(json.dumps(result("2026-01-01", 5.0)))
    (tmp_path / "README.md").write_text("")
    (tmp_path / "docs" / "a.md").write_text("<!-- table: d -->\n<!-- end -->\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    with pytest.raises(SystemExit, match="1"):
        tables.main()
    assert "docs/a.md differs" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["tables.py"])
    tables.main()
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()


def test_a_table_of_many_texts(tables) -> None:
    figures = {"median": 300.0, "min": 200.0, "max": 400.0}
    contender = {"tokens_per_second": figures, "first_token_seconds": {"median": 0.5, "max": 2.0}, "described": {}}
    many = result("2026-01-01", 1.0) | {
        "benchmark": "serve", "texts": 6, "prompt_tokens": [3, 9], "output_tokens": [2, 8], "max_batch": 4,
        "contenders": {"ours int8": contender},
    }  # fmt: skip
    lines = tables.serve_table(many, "f.json")
    assert "| ours int8 | 300 (200 to 400) | 0.50 | 2.00 |" in lines
    assert "--texts 6 --prompt-tokens 3-9 --output-tokens 2-8 --max-batch 4 --precisions int8 --rounds 4" in lines[-1]


def test_a_table_of_starting(tables) -> None:
    seconds = {"median": 0.25, "min": 0.2, "max": 0.3}
    moments = {"python": seconds, "first token": seconds}
    found = {"commands": {"help": seconds}, "cold": moments, "warm": moments, "rounds": 1, "weights": "w", "date": "d"}
    lines = tables.startup_table(found, "f.json")
    assert "| help, whole process | 0.25 |  |" in lines and "| until: first token | 0.25 | 0.25 |" in lines


@pytest.mark.long
def test_starting_is_measured(tmp_path) -> None:
    """Every process of the script, once, with the smallest model."""
    out = tmp_path / "r.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "startup.py"), "--preset", "gpt-j-tiny", "--rounds", "1"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["commands"]["bare python"]["median"] < found["commands"]["import jax"]["median"]
    for state in ("cold", "warm"):
        moments = [found[state][name]["median"] for name in ("import", "open", "first token", "16 tokens")]
        assert moments == sorted(moments)
