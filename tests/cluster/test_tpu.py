"""One TPU: waiting for it, and every way in which that can fail."""

from __future__ import annotations

import pytest
from fake_gcloud import FORBIDDEN, MISSING, NO_CAPACITY, NO_QUOTA, UNAVAILABLE, Scene, node

from mesh_transformer.cluster.tpu import TakenError
from mesh_transformer.cluster.tpu_commands import Hardware, Tpu
from mesh_transformer.config.errors import ConfigError, RunError, UserError

HARDWARE = Hardware(accelerator_type="v5litepod-8", version="v2-alpha-tpuv5-lite")


def test_creates_and_waits(scene: Scene) -> None:
    creating = [node("CREATING", None)] * 3
    scene.gcloud.answer(describe=[MISSING, *creating, node(health="UNHEALTHY_TENSORFLOW"), node()])
    made = scene.cloud.create(HARDWARE, wait=600)
    assert made.is_ready and made.hosts == (("10.0.0.2", "34.1.2.3"), ("10.0.0.3", ""))
    assert scene.gcloud.verbs == ["describe", "create", *["describe"] * 5]
    assert scene.clock.now == 40
    assert scene.notes[1:] == [
        "my-tpu in us-west4-a is CREATING; waiting",
        "my-tpu in us-west4-a is READY, UNHEALTHY_TENSORFLOW; waiting",
        "my-tpu in us-west4-a is READY and HEALTHY, 2 hosts",
    ]


@pytest.mark.parametrize("state", ["READY", "CREATING"])
def test_an_existing_one_is_used(scene: Scene, state: str) -> None:
    scene.gcloud.answer(describe=[node(state), node()])
    assert scene.cloud.create(HARDWARE).is_ready
    assert "create" not in scene.gcloud.verbs
    assert scene.notes[0] == f"my-tpu in us-west4-a exists and is {state}; it is used as it is"


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", "STOPPED", "DELETING", "REPAIRING", "UNKNOWN"])
def test_an_existing_one_in_another_state_is_refused(scene: Scene, state: str) -> None:
    scene.gcloud.answer(describe=node(state))
    for attempt in (lambda: scene.cloud.create(HARDWARE), scene.cloud.use):
        with pytest.raises(UserError, match=f"is {state}; (?s:.*)tpu delete my-tpu --zone us-west4-a --yes"):
            attempt()
    assert set(scene.gcloud.verbs) == {"describe"}


def test_an_existing_one_of_another_type_is_refused(scene: Scene) -> None:
    scene.gcloud.answer(describe=node(acceleratorType="v4-8"))
    with pytest.raises(UserError, match=r"is a v4-8, not a v5litepod-8\n.*tpu delete"):
        scene.cloud.create(HARDWARE)


def test_none_to_use_is_refused(scene: Scene) -> None:
    scene.gcloud.answer(describe=MISSING)
    with pytest.raises(UserError, match="there is no TPU my-tpu in us-west4-a"):
        scene.cloud.use()


def test_quota_is_not_asked_for_again(scene: Scene) -> None:
    scene.gcloud.answer(describe=MISSING, create=NO_QUOTA)
    with pytest.raises(RunError, match=r"could not be created: .*Quota limit .* has been exceeded"):
        scene.cloud.create(HARDWARE)
    assert scene.gcloud.verbs == ["describe", "create"]


def test_capacity_is_asked_for_again(scene: Scene) -> None:
    scene.gcloud.answer(describe=[MISSING, node()], create=[NO_CAPACITY, NO_CAPACITY, {}])
    scene.cloud.create(HARDWARE)
    assert scene.gcloud.verbs == ["describe", "create", "create", "create", "describe"]
    assert scene.clock.now == 120


def test_no_capacity_within_the_bound(scene: Scene) -> None:
    scene.gcloud.answer(describe=MISSING, create=NO_CAPACITY)
    with pytest.raises(RunError, match=r"within 200 s: .*no more capacity in the zone.*\n.*--wait"):
        scene.cloud.create(HARDWARE, wait=200)
    assert scene.gcloud.verbs.count("create") == 4


def test_a_request_that_takes_too_long(scene: Scene) -> None:
    scene.gcloud.answer(describe=MISSING, create={"sleep": 60})
    with pytest.raises(RunError, match=r"is not created after 0 s\n.*tpu delete my-tpu"):
        scene.cloud.create(HARDWARE, wait=0.2)


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (node("CREATING"), "is CREATING, not READY and HEALTHY, after 60 s"),
        (node(health="TIMEOUT", healthDescription="no heartbeat"), r"is READY, TIMEOUT \(no heartbeat\), not READY"),
        (node(health=None), "is READY, HEALTH_UNSPECIFIED, not READY"),
    ],
)
def test_not_ready_within_the_bound(scene: Scene, last: dict[str, str], words: str) -> None:
    scene.gcloud.answer(describe=[MISSING, last])
    with pytest.raises(RunError, match=f"{words}(?s:.*)tpu delete"):
        scene.cloud.create(HARDWARE, wait=60)
    assert scene.clock.now == 60


@pytest.mark.parametrize("state", ["STOPPED", "DELETING", "HIDDEN", "UNKNOWN"])
def test_it_will_never_be_ready(scene: Scene, state: str) -> None:
    scene.gcloud.answer(describe=[MISSING, node("CREATING"), node(state)])
    with pytest.raises(RunError, match=f"is {state} and will not become READY"):
        scene.cloud.create(HARDWARE)


@pytest.mark.parametrize("last", [node("PREEMPTED"), node("TERMINATED"), MISSING])
def test_it_is_taken_before_it_is_ready(scene: Scene, last: dict[str, str]) -> None:
    scene.gcloud.answer(describe=[MISSING, node("CREATING"), last])
    with pytest.raises(TakenError, match="the cloud took it back"):
        scene.cloud.create(HARDWARE)


def test_a_look_that_fails_is_repeated(scene: Scene) -> None:
    scene.gcloud.answer(describe=[UNAVAILABLE, {"out": "no JSON"}, {"out": "[]"}, UNAVAILABLE, node()])
    assert scene.cloud.look().is_ready and scene.clock.now == 40


def test_looks_that_fail_are_bounded(scene: Scene) -> None:
    scene.gcloud.answer(describe=UNAVAILABLE)
    with pytest.raises(RunError, match=r"cannot describe my-tpu in us-west4-a: ERROR: .* UNAVAILABLE: try again"):
        scene.cloud.look()
    assert len(scene.gcloud.verbs) == 5


def test_a_refused_look_is_not_repeated(scene: Scene) -> None:
    scene.gcloud.answer(describe=FORBIDDEN)
    with pytest.raises(RunError, match="PERMISSION_DENIED"):
        scene.cloud.look()
    assert len(scene.gcloud.verbs) == 1


def test_delete_waits_until_it_is_gone(scene: Scene) -> None:
    scene.gcloud.answer(describe=[node(), node("DELETING"), node("DELETING"), MISSING])
    scene.cloud.delete()
    assert scene.gcloud.verbs == ["describe", "delete", "describe", "describe", "describe"]
    assert scene.notes[-1] == "my-tpu in us-west4-a is deleted"


def test_delete_of_one_that_is_being_deleted_only_waits(scene: Scene) -> None:
    scene.gcloud.answer(describe=[node("DELETING"), MISSING])
    scene.cloud.delete()
    assert "delete" not in scene.gcloud.verbs


def test_delete_is_bounded(scene: Scene) -> None:
    scene.gcloud.answer(describe=[node(), node("DELETING")])
    with pytest.raises(RunError, match="is still DELETING after 100 s"):
        scene.cloud.delete(wait=100)
    assert scene.clock.now == 100


def test_delete_that_is_refused(scene: Scene) -> None:
    scene.gcloud.answer(describe=node(), delete={"err": "noise\nERROR: (x) FAILED_PRECONDITION: busy\n", "status": 1})
    with pytest.raises(RunError, match=r"could not be deleted: ERROR: \(x\) FAILED_PRECONDITION: busy"):
        scene.cloud.delete()


def test_delete_of_none_is_refused(scene: Scene) -> None:
    scene.gcloud.answer(describe=MISSING)
    with pytest.raises(UserError, match="there is no TPU"):
        scene.cloud.delete()


@pytest.mark.parametrize(
    "names", [{"name": "-x"}, {"name": "My"}, {"name": "a", "zone": "--quiet"}, {"name": "a", "project": "p p"}]
)
def test_names_that_are_none(names: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is no name of that kind; expected for example"):
        Tpu(**names)


def test_hardware_that_is_none() -> None:
    with pytest.raises(ConfigError, match="--type"):
        Hardware(accelerator_type="--spot", version="v")
    with pytest.raises(ConfigError, match="--version"):
        Hardware(accelerator_type="v4-8", version="")
    with pytest.raises(ConfigError, match="--spot and --preemptible"):
        Hardware(accelerator_type="v4-8", version="v", spot=True, preemptible=True)
