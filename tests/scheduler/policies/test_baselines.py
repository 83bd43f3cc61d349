"""`sarathi`, `fcfs` and `static`: arrivals in, steps out."""

from tests.scheduler.driver import Driver, groups_of, limits_of


def shape(driver: Driver, steps: int) -> list[tuple[list[int], list[int]]]:
    """Per step: sequences with a decode row, and sequences with tiles (once a tile)."""
    plans = [driver.step() for _ in range(steps)]
    return [([work.seq for work in plan.decode], [work.seq for work in plan.prefill]) for plan in plans]


def test_sarathi_fills_the_budget_with_decodes_then_started_prompts_then_new_ones():
    driver = Driver("sarathi", limits_of(max_num_batched_tokens=3 * 64 + 2, max_tiles=4))
    driver.arrive(1, 64)
    driver.arrive(2, 5 * 64)
    driver.arrive(3, 64)
    assert shape(driver, 4) == [
        ([], [1, 2, 2]),
        ([1], [2, 2, 2]),
        ([1, 2], [3]),
        ([1, 2, 3], []),
    ]


def test_sarathi_never_lets_a_decode_wait():
    driver = Driver("sarathi", limits_of(max_model_len=4096), groups_of((80, None)))
    driver.arrive(1, 10, max_new=40)
    driver.step()
    driver.arrive(2, 4000, max_new=5)
    assert all(1 in decode for decode, _ in shape(driver, 30))


def test_fcfs_computes_whole_prompts_first():
    driver = Driver("fcfs", limits_of(max_num_batched_tokens=4 * 64))
    driver.arrive(1, 2 * 64)
    driver.arrive(2, 3 * 64)
    driver.arrive(3, 64)
    # 2 does not fit whole beside 1, and 3 does not overtake it.
    assert shape(driver, 3) == [([], [1, 1]), ([], [2, 2, 2, 3]), ([1, 2, 3], [])]


def test_fcfs_splits_only_what_fits_no_step():
    driver = Driver("fcfs", limits_of(max_num_batched_tokens=4 * 64))
    driver.arrive(1, 6 * 64)
    driver.arrive(2, 64)
    assert shape(driver, 3) == [([], [1] * 4), ([], [1, 1, 2]), ([1, 2], [])]


def test_static_starts_the_next_batch_when_the_last_has_finished():
    driver = Driver("static", limits_of(max_num_seqs=2, lag=0))
    for seq, max_new in ((1, 2), (2, 6), (3, 2)):
        driver.arrive(seq, 10, max_new=max_new)
    assert shape(driver, 7) == [
        ([], [1, 2]),
        ([1, 2], []),
        *[([2], [])] * 4,
        ([], [3]),
    ]
