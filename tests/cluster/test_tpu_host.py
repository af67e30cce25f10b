"""The hosts' script, run by a real shell in a directory that stands for a host's."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import mesh_transformer.cluster

SCRIPT = Path(mesh_transformer.cluster.__file__).with_name("tpu_host.sh")
# Says what it was given, then does what the test wants.
TRAINER = """#!/bin/bash
for word in "$@"; do echo "<$word>"; done
echo "to standard error" >&2
{then}
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory on the host; the metadata server says that it is number 3."""
    directory = tmp_path / "mesh-transformer"
    (directory / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(SCRIPT, directory / "host.sh")
    executable(tmp_path / "bin" / "curl", "#!/bin/bash\necho 3\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    return directory


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def begin(host: Path, *words: str) -> subprocess.Popen[str]:
    line = ["bash", "mesh-transformer/host.sh", *words]
    return subprocess.Popen(line, cwd=host.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def call(host: Path, *words: str) -> tuple[int, list[str]]:
    with begin(host, *words) as process:
        out, _ = process.communicate(timeout=120)
    return process.returncode, out.splitlines()


def trainer(host: Path, then: str) -> None:
    executable(host / ".venv" / "bin" / "mesh-transformer", TRAINER.format(then=then))


@pytest.mark.parametrize("status", [0, 2])
def test_output_and_status_of_the_training(host: Path, status: int) -> None:
    trainer(host, f"exit {status}")
    ended, lines = call(host, "train", "config/a.toml", "--set", "name=a b")
    said = ["<train>", "<config/a.toml>", "<--set>", "<name=a b>", "to standard error"]
    assert (ended, lines) == (status, [f"[worker 3] {line}" for line in said])


def test_a_second_call_follows_the_first(host: Path) -> None:
    """What gcloud does when the connection breaks."""
    trainer(host, "echo $$ >number; mv number started; until [ -e go ]; do sleep 0.05; done; echo end; exit 7")
    with begin(host, "train") as first:
        deadline = time.monotonic() + 20
        while not (host / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        first.kill()
    number = (host / "started").read_text()
    with begin(host, "train") as second:
        (host / "go").touch()
        out, _ = second.communicate(timeout=120)
    assert second.returncode == 7 and out.splitlines()[-1] == "[worker 3] end"
    assert (host / "started").read_text() == number


def test_stop_lets_it_save(host: Path) -> None:
    trainer(host, "trap 'echo saved; touch saved; exit 143' TERM; touch started; while :; do sleep 0.05; done")
    with begin(host, "train") as process:
        deadline = time.monotonic() + 20
        while not (host / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert call(host, "stop") == (0, ["[worker 3] ending the training that runs here"])
        out, _ = process.communicate(timeout=120)
    assert (host / "saved").exists() and process.returncode == 143 and "[worker 3] saved" in out
    assert call(host, "stop") == (0, [])


def test_a_killed_training_is_a_failure(host: Path) -> None:
    trainer(host, "kill -KILL $PPID")
    assert call(host, "train")[0] == 137


def test_install_takes_the_archive_and_a_python_that_is_new_enough(host: Path, tmp_path: Path) -> None:
    for name in ("src/old.py", "config/old.toml", "train.pid", "train.status", "runs/kept"):
        (host / name).parent.mkdir(exist_ok=True)
        (host / name).touch()
    new = tmp_path / "new"
    (new / "src").mkdir(parents=True)
    (new / "src" / "new.py").touch()
    subprocess.run(["tar", "-czf", tmp_path / "mesh-transformer.tar.gz", "-C", new, "src"], check=True)
    # Python 3.11 is asked first for its version, then for an environment, whose Python notes what it is asked.
    inner = '#!/bin/bash\necho "$@" >>pip.log\n'
    outer = f"#!/bin/bash\n[ $1 = -c ] || {{ mkdir -p .venv/bin; printf '%s' '{inner}' >.venv/bin/python; "
    executable(tmp_path / "bin" / "python3.11", outer + "chmod +x .venv/bin/python; }\n")
    for name in ("python3.13", "python3.12"):
        executable(tmp_path / "bin" / name, "#!/bin/bash\nexit 1\n")
    assert call(host, "install") == (0, ["[worker 3] installed"])
    assert [p.relative_to(host).as_posix() for p in (host / "src").iterdir()] == ["src/new.py"]
    assert not (host / "config").exists() and not (host / "train.pid").exists() and (host / "runs/kept").exists()
    assert (host / "pip.log").read_text() == "-m pip install --quiet --constraint constraints.txt .[tpu]\n"
    # The environment is kept, and a failure of pip is one of the installation.
    (host / ".venv/bin/python").write_text("#!/bin/bash\n[ $1 = -c ] || { echo no network >&2; exit 1; }\n")
    assert call(host, "install") == (1, ["[worker 3] no network"])


def test_without_a_new_python_uv_brings_one(host: Path, tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    subprocess.run(["tar", "-czf", tmp_path / "mesh-transformer.tar.gz", "-C", tmp_path, "src"], check=True)
    for name in ("python3.13", "python3.12", "python3.11"):
        executable(tmp_path / "bin" / name, "#!/bin/bash\nexit 1\n")
    old = '#!/bin/bash\n[ $1 = -c ] && exit 1\necho "$@" >>uv.log\n'
    make = "if [ $2 = uv ]; then mkdir -p .venv/bin; printf '#!/bin/bash\\n' >.venv/bin/python; "
    executable(tmp_path / "bin" / "python3", f"{old}{make}chmod +x .venv/bin/python; fi\n")
    assert call(host, "install")[0] == 0
    assert (host / "uv.log").read_text().splitlines() == [
        "-m pip install --quiet --user uv",
        "-m uv venv --quiet --seed --python 3.12 .venv",
    ]
