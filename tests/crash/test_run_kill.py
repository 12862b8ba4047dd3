"""Real training processes killed with SIGKILL, in named places and at random: the end is the same by bits."""

import random
import sys
from collections.abc import Iterator

import pytest
from killing import PLACES, Trial, Victims

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="fork and SIGKILL are not there")

RANDOM_POINTS = 5


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    victims = Victims()
    yield Trial(victims, tmp_path_factory.mktemp("trial"))
    victims.close()


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_in_a_named_place_ends_the_same(trial: Trial, place: str) -> None:
    name = place.replace(" ", "-")
    killed = trial.kill_and_resume(name, trial.at(place))
    assert len(killed) == 1
    assert trial.differences(name) == []


@pytest.mark.parametrize("seed", range(RANDOM_POINTS))
def test_a_run_killed_at_random_points_again_and_again_ends_the_same(trial: Trial, seed: int) -> None:
    chance = random.Random(seed)
    points = [chance.randint(1, trial.num_events) for _ in range(2)]
    killed = trial.kill_and_resume(f"random-{seed}", *({"at_event": point} for point in points))
    assert killed
    assert trial.differences(f"random-{seed}") == []
