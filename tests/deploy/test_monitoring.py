"""What the document tells Prometheus to watch is what the server says."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from mesh_transformer.engine.service import Load
from mesh_transformer.serve.metrics import Metrics

DOCUMENT = (Path(__file__).parents[2] / "docs" / "deployment.md").read_text(encoding="utf-8")
SCRAPING, ALERTS = re.findall(r"^```yaml\n(.*?)^```", DOCUMENT, re.DOTALL | re.MULTILINE)


class NothingGoesOn:
    """As much of an engine as the figures need."""

    ready = True

    def load(self) -> Load:
        return Load(**dict.fromkeys(Load.__dataclass_fields__, 0))


def test_every_figure_exists() -> None:
    service: Any = NothingGoesOn()
    shown = generate_latest(Metrics(service).registry).decode()
    names = set(re.findall(r"^# TYPE (\S+) ", shown, re.MULTILINE))
    # The histograms' buckets show once something was counted.
    names |= {f"{name}_bucket" for name in re.findall(r"^# TYPE (\S+) histogram", shown, re.MULTILINE)}
    watched = set(re.findall(r"mesh_transformer_\w+", DOCUMENT))
    assert len(watched) > 5 and watched <= names


def test_alerts_do_not_count_what_health_says_while_it_starts() -> None:
    """/health answers 503 until every program is compiled, which is no error."""
    rules = [rule for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]]
    (errors,) = [rule["expr"] for rule in rules if '"5..' in rule["expr"]]
    assert 'endpoint!="/health"' in errors
    (scraped,) = yaml.safe_load(SCRAPING)["scrape_configs"]
    # /metrics needs the key.
    assert scraped["authorization"]["credentials_file"]
    assert all(f'job="{scraped["job_name"]}"' in rule["expr"] for rule in rules if "up{" in rule["expr"])


@pytest.mark.peers
def test_prometheus_understands_the_alerts(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("promtool is not installed: apt-get install prometheus")
    (tmp_path / "alerts.yml").write_text(ALERTS)
    done = subprocess.run([promtool, "check", "rules", tmp_path / "alerts.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
