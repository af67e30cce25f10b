"""One fine-tune for all tests of the report, and its page."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from report_cases import Page, Runs, Written

from mesh_transformer.report.make import ReportOptions, write_report


@pytest.fixture(scope="package")
def quick_compile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every program is compiled once for all models of these tests, and quickly: no test here is about its speed."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_enable_xla_caches": "none",
        "jax_disable_most_optimizations": True,
    }
    before = {name: jax.config.values[name] for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        reset_cache()
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        reset_cache()


@pytest.fixture(scope="package")
def runs(quick_compile: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("report"))
    made.make()
    return made


@pytest.fixture(scope="package")
def written(runs: Runs) -> Written:
    notes: list[str] = []
    file = write_report(runs.tuned.run_directory, options=ReportOptions(rows=6), note=notes.append)
    text = file.read_text(encoding="utf-8")
    return Written(file, text, Page(text), notes)
