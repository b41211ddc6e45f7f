from decoding.schedule_lagged import POOL
from decoding.twins import PATIENCE, Twins


def test_smallest_free_number_of_a_seed():
    twins = Twins()
    assert [twins.take(5), twins.take(5), twins.take(6), twins.take(5)] == [0, 1, 0, 2]
    twins.end(5, 1)
    assert twins.take(5) == 3  # 1 is still kept
    for _ in range(PATIENCE):
        twins.drafted()
    assert [twins.take(5), twins.take(5)] == [1, 4]


def test_numbers_are_kept_until_the_scheduler_has_forgotten_the_request():
    twins = Twins()
    twins.end(1, twins.take(1))
    for _ in range(PATIENCE - 1):
        twins.drafted()
    assert twins.take(1) == 1
    twins.drafted()
    assert twins.take(1) == 0 and twins._taken == {1: {0, 1}}


def test_the_memory_of_lagged_is_shorter():
    assert PATIENCE >= POOL + 2
