"""A process may die before any operation on a file: its run goes on from the newest checkpoint."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator

import pytest
import torture
from torture import Stage

pytestmark = [
    pytest.mark.skipif(
        not torture.HAS_FORK, reason="children are forked, and watched through /proc"
    ),
    pytest.mark.usefixtures("one_thread"),
]
KINDS = {"killed", "torn", "unsynced", "unnamed"}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    root = torture.quick_folder()  # hundreds of disks
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QLORA_CACHE", str(root / "cache"))
        yield torture.warm(root)
    shutil.rmtree(root)


@pytest.fixture(autouse=True)
def _shared_cache(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_CACHE", str(stage.root / "cache"))


def test_a_run_that_dies_before_any_operation_goes_on_to_the_same_end(stage: Stage) -> None:
    """Start, three checkpoints, rotation, the final adapter and the result."""
    points = torture.record(stage, stage.folder())
    kinds = Counter(point.kind for point in points)
    assert kinds["killed"] > 100 and set(kinds) == KINDS
    assert {point.at_least for point in points} == {0, 2, 4, 6}
    assert torture.problems(stage, points) == []


def test_a_resume_that_dies_before_any_operation_can_be_resumed(stage: Stage) -> None:
    """Sweeping, putting a damaged checkpoint aside and rewinding, from what earlier crashes left."""
    folder = stage.folder()
    torture.wreck(torture.broken_off(stage, folder))
    points = torture.record(stage, folder, resume="newest", at_least=2)
    assert sum(point.kind == "killed" for point in points) > 100
    assert {point.at_least for point in points} == {2, 4, 6}
    assert torture.problems(stage, points) == []


def test_a_mirror_whose_writer_dies_before_any_operation_brings_the_run_home(stage: Stage) -> None:
    """The run's own directory is lost: what its copy has is gone on from."""
    folder = stage.folder()
    points = torture.record(stage, folder, "mirror", run__mirror="mirror")
    shutil.rmtree(folder)
    assert sum(point.kind == "killed" for point in points) > 50
    assert max(point.at_least for point in points) == 6
    assert torture.problems(stage, points, run__mirror="mirror") == []
