"""A training on a TPU that the cloud may take back."""

from __future__ import annotations

import dataclasses
import tarfile
from pathlib import Path

import pytest
from fake_gcloud import MISSING, NO_CAPACITY, Scene, node

from mesh_transformer.cluster import tpu_source
from mesh_transformer.cluster.tpu_commands import Hardware
from mesh_transformer.cluster.tpu_run import Launcher, StepError, Training
from mesh_transformer.config.errors import ConfigError, RunError, UserError

SPOT = Hardware(accelerator_type="v5litepod-8", version="v2-alpha-tpuv5-lite", spot=True)
WORK = ["scp", "install", "train"]
LOST = {"out": "[worker 1] step 7\n", "status": 255}


@pytest.fixture
def training(config: Path) -> Training:
    return Training(config=str(config), source=tpu_source.default_source(), settings=("name=a b",), new=True, yes=True)


@pytest.fixture
def launcher(scene: Scene, training: Training) -> Launcher:
    return Launcher(cloud=scene.cloud, training=training, hardware=SPOT, show=scene.notes.append)


def remote(scene: Scene) -> list[str]:
    return [line[-1] for verb, line in zip(scene.gcloud.verbs, scene.gcloud.lines, strict=True) if verb == "train"]


def test_it_copies_installs_and_trains(scene: Scene, launcher: Launcher) -> None:
    output = "[worker 0] step 1\n[worker 1] step 1\n"
    scene.gcloud.answer(describe=node(), train={"out": output, "err": "[worker 1] a warning\n"})
    dataclasses.replace(launcher, hardware=None).run()
    assert scene.gcloud.verbs == ["describe", "describe", *WORK]
    assert remote(scene) == [
        "--command=bash mesh-transformer/host.sh train config/tiny.toml --set 'name=a b' --new --yes"
    ]
    assert set(output.splitlines()) | {"[worker 1] a warning"} <= set(scene.notes)
    assert all("--worker=all" in line for line in scene.gcloud.lines[2:])


@pytest.mark.parametrize("left", [node("PREEMPTED"), node("TERMINATED"), MISSING], ids=["taken", "ended", "gone"])
def test_a_taken_one_is_replaced(scene: Scene, launcher: Launcher, left: dict[str, str]) -> None:
    gone = [] if left is MISSING else [MISSING]
    # Ready, and still so just after the failure; then taken, deleted, created again.
    scene.gcloud.answer(describe=[node(), node(), node(), left, left, *gone, node()], train=[LOST, {}])
    launcher.run()
    cleared = [] if left is MISSING else ["delete", "describe"]
    looks = ["describe"] * 2
    assert scene.gcloud.verbs == [*looks, *WORK, *looks, "describe", *cleared, "create", "describe", *WORK]
    first, again = remote(scene)
    # To begin anew once more would delete the checkpoints that it is to go on from.
    assert first.endswith("--new --yes") and again == first.removesuffix(" --new --yes")
    assert "my-tpu in us-west4-a was taken back; restart 1 of at most 100" in scene.notes


@pytest.mark.parametrize("step", ["scp", "install"])
def test_it_may_be_taken_at_every_step(scene: Scene, launcher: Launcher, step: str) -> None:
    scene.gcloud.answer(**{"describe": [node(), node(), MISSING, MISSING, node()], step: [LOST, {}]})
    launcher.run()
    assert scene.gcloud.verbs.count(step) == 2 and scene.gcloud.verbs[-3:] == WORK
    # No training has begun yet, so the earlier run is still to be deleted.
    assert [line.endswith("--new --yes") for line in remote(scene)] == [True]


def test_it_may_be_taken_while_it_is_created(scene: Scene, launcher: Launcher) -> None:
    taken = [node("CREATING"), *[node("PREEMPTED")] * 2]
    scene.gcloud.answer(describe=[MISSING, *taken, MISSING, node()], create=[{}, NO_CAPACITY, {}])
    launcher.run()
    looks = ["describe"] * 3
    assert scene.gcloud.verbs == (
        ["describe", "create", *looks, "delete", "describe", "create", "create", "describe", *WORK]
    )


def test_one_that_was_taken_earlier_is_cleared_away(scene: Scene, launcher: Launcher) -> None:
    scene.gcloud.answer(describe=[node("PREEMPTED"), MISSING, node()])
    launcher.run()
    assert scene.gcloud.verbs == ["describe", "delete", "describe", "create", "describe", *WORK]


def test_restarts_are_bounded(scene: Scene, launcher: Launcher) -> None:
    scene.gcloud.answer(describe=[node(), node(), *[MISSING, MISSING, node()] * 2, MISSING], train=LOST)
    with pytest.raises(RunError, match="taken back 3 times; --max-restarts allows 2"):
        dataclasses.replace(launcher, max_restarts=2).run()
    assert scene.gcloud.verbs.count("train") == 3


@pytest.mark.parametrize("status", [1, 2, 143, 255])
def test_a_failure_of_the_training_is_not_repeated(scene: Scene, launcher: Launcher, status: int) -> None:
    lines = "".join(f"[worker 0] line {n}\n" for n in range(9))
    scene.gcloud.answer(describe=node(), train={"out": lines, "status": status})
    with pytest.raises(StepError, match=f"training on my-tpu .*exit status {status}(?s:.*)tpu delete") as caught:
        launcher.run()
    assert caught.value.exit_status == 1
    assert str(caught.value).splitlines()[2:] == [f"  [worker 0] line {n}" for n in range(4, 9)]
    assert scene.gcloud.verbs.count("train") == 1 and not {"delete", "create"} & set(scene.gcloud.verbs)
    # The cloud is given time to say that it took the TPU, but not after a mistake of the user.
    assert scene.clock.now == (0 if status == 2 else 90)


def test_without_leave_nothing_is_created_again(scene: Scene, launcher: Launcher) -> None:
    on_demand = dataclasses.replace(SPOT, spot=False)
    scene.gcloud.answer(describe=[node(), node(), MISSING], train=LOST)
    with pytest.raises(StepError, match="exit status 255"):
        dataclasses.replace(launcher, hardware=on_demand).run()
    assert scene.gcloud.verbs == ["describe", "describe", *WORK]


def test_one_that_somebody_deletes_is_not_created_again(scene: Scene, launcher: Launcher) -> None:
    scene.gcloud.answer(describe=[node(), node(), node("DELETING")], train=LOST)
    with pytest.raises(RunError, match="is being deleted, so it is not created again"):
        launcher.run()


def test_an_installation_that_hangs_is_ended(scene: Scene, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh_transformer.cluster.tpu_run._INSTALLATION_SECONDS", 0.5)
    scene.gcloud.answer(describe=node(), scp={"sleep": 60})
    with pytest.raises(StepError, match=r"copying on my-tpu .* took longer than"):
        launcher.run()


def test_options_of_train(config: Path) -> None:
    more = {"init_from": "/mnt/m", "fresh_optimizer": True, "keep_schedule": True, "init_step": 0, "init_config": "c"}
    training = Training(config=str(config), source=Path(), settings=("a=1", "b=2"), **more)
    assert training.arguments(is_first=False) == (
        ["config/tiny.toml", "--set", "a=1", "--set", "b=2", "--init-from", "/mnt/m", "--fresh-optimizer"]
        + ["--keep-schedule", "--init-step", "0", "--init-config", "c"]
    )
    url = Training(config="gs://b/c.toml", source=Path())
    assert url.arguments(is_first=True) == ["gs://b/c.toml"]
    traced = Training(config="gs://b/c.toml", source=Path(), profile=3)
    assert traced.arguments(is_first=True) == ["gs://b/c.toml", "--profile", "3"]
    for option in ({"fresh_optimizer": True}, {"keep_schedule": True}, {"init_step": 0}, {"init_config": "c"}):
        with pytest.raises(ConfigError, match="add --init-from MODEL"):
            Training(config="c", source=Path(), **option)


def test_the_archive_is_what_pip_needs(config: Path, tmp_path: Path, scene: Scene, launcher: Launcher) -> None:
    kept = tmp_path / "kept.tar.gz"
    scene.gcloud.answer(describe=node(), scp={"keep": str(kept)})
    launcher.run()
    with tarfile.open(kept) as archive:
        names = archive.getnames()
        assert archive.extractfile("config/tiny.toml").read() == config.read_bytes()
        assert {member.mtime for member in archive} == {0} and {member.uid for member in archive} == {0}
    assert names == sorted(names)
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "host.sh"} <= set(names)
    assert {"src/mesh_transformer/cli/main.py", "src/mesh_transformer/cluster/tpu_host.sh"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or name.startswith((".", "tests"))]
    again = tmp_path / "again.tar.gz"
    tpu_source.make_archive(tpu_source.default_source(), str(config), again)
    assert again.read_bytes() == kept.read_bytes()


def test_no_checkout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no pyproject.toml; expected a checkout(?s:.*)--source DIRECTORY"):
        tpu_source.check_source(tmp_path)


@pytest.mark.parametrize(
    ("log", "settings", "found"),
    [
        ("", (), "runs"),
        ('[log]\ndirectory = "out/runs"', (), "out/runs"),
        ('[log]\ndirectory = "~/runs"', (), "~/runs"),
        ('[log]\ndirectory = "/mnt/runs"', (), None),
        ('[log]\ndirectory = "/mnt/runs"', ("log.directory=runs",), "runs"),
        ("", ("log.directory=/mnt/runs",), None),
        ("", ('log={directory="/mnt/runs"}',), None),
    ],
)
def test_where_a_run_is_lost_with_the_tpu(tmp_path: Path, log: str, settings, found: str | None) -> None:
    path = tmp_path / "c.toml"
    path.write_text(log)
    assert tpu_source.directory_on_host(str(path), settings) == found
