"""Steps fill the programs that run them."""

from tests.scheduler.driver import Driver, groups_of, limits_of


def test_prepacking_fills_tile_buckets():
    limits = limits_of(max_num_seqs=8, max_tiles=8, max_num_batched_tokens=600, tile_buckets=(1, 2, 4, 8))
    seen = {}
    for name in ("sarathi", "prepacking"):
        driver = Driver(name, limits)
        for seq, tiles in enumerate((3, 2, 1, 1)):
            driver.arrive(seq, 64 * tiles, max_new=2)
        driver.run()
        seen[name] = [len(plan.prefill) for plan in driver.plans if plan.prefill]
    assert seen["sarathi"] == [7]
    assert seen["prepacking"] == [4, 2, 1]


def test_prepacking_prefers_whole_prompts():
    driver = Driver("prepacking", limits_of(max_num_seqs=8))
    for seq, tiles in enumerate((3, 3, 1)):
        driver.arrive(seq, 64 * tiles, max_new=2)
    assert [work.seq for work in driver.step().prefill] == [0, 0, 0, 2]


def test_prepacking_goes_on_with_a_prompt_that_holds_the_pages_which_a_shorter_one_wants():
    driver = Driver(
        "prepacking", limits_of(max_num_seqs=2, max_num_batched_tokens=64, max_tiles=1), groups_of((4, None))
    )
    driver.arrive(0, 3 * 64, max_new=2)
    driver.step()
    driver.arrive(1, 60, max_new=2)
    driver.run()
    assert driver.plans[1].prefill[0].seq == 0
