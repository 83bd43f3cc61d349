"""Two page classes: which pages a sequence holds in which form, when pages are sealed, and who may share them."""

import pytest

from jaxserve.scheduler import Scheduler, make_policy
from jaxserve.types import Arrive, Plan
from tests.scheduler.driver import Driver, groups_of, limits_of, two_classes


def driver_of(open: int = 40, sealed: int = 60, limits: dict[str, object] | None = None, **fields: int) -> Driver:
    return Driver(limits=limits_of(**(limits or {})), groups=(two_classes(open, sealed, **fields),))


def used(driver: Driver) -> tuple[int, int]:
    return tuple(driver.groups[0].classes[cls].pages - driver.scheduler.view.free(0, cls) for cls in (0, 1))  # type: ignore[return-value]


def seals(plans: list[Plan]) -> list[tuple[int, int]]:
    return [(plan.step, seal.index) for plan in plans for seal in plan.pages.seals]


@pytest.mark.parametrize(
    ("sinks", "residual", "prompt", "held"),
    [
        (1, 1, 256, (1, 3)),
        (1, 1, 250, (2, 2)),
        (0, 1, 256, (0, 4)),
        (0, 2, 256, (1, 4)),
        (2, 2, 250, (4, 1)),
        (1, 1, 64, (1, 0)),
        (1, 1, 30, (1, 0)),
        (3, 1, 100, (2, 0)),
    ],
)
def test_what_a_prefill_takes(sinks, residual, prompt, held):
    """Full pages behind the sinks are sealed at once and take no 16-bit page, but for those that decode rows read."""
    driver = driver_of(sinks=sinks, residual=residual)
    driver.arrive(1, prompt, max_new=5)
    driver.step()
    assert used(driver) == held


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(("sinks", "residual"), [(1, 1), (0, 1), (1, 2)])
def test_a_decoding_sequence_holds_its_sinks_and_residual_in_16_bits(sinks, residual, lag):
    driver = driver_of(sinks=sinks, residual=residual, limits={"lag": lag, "enable_prefix_caching": False})
    driver.arrive(1, 70, max_new=300)
    driver.run()
    pages = [(70 + i) // 64 for i in range(300)]
    driver = driver_of(sinks=sinks, residual=residual, limits={"lag": lag, "enable_prefix_caching": False})
    driver.arrive(1, 70, max_new=300)
    driver.step()
    for page in pages[:-2]:
        driver.step()
        open, sealed = used(driver)
        assert open <= min(page + 1, sinks + residual)
        assert page - sinks <= sealed <= page + 1 - sinks


def test_a_page_is_sealed_once_with_the_row_that_fills_it():
    driver = driver_of()
    driver.arrive(1, 100, max_new=200)
    driver.run()
    # Step 0 brings token 100, step i writes position 99 + i; page 1 is full with position 127.
    assert seals(driver.plans) == [(28, 1), (92, 2), (156, 3)]


def test_sealing_is_repeated_until_the_page_is_known_to_be_full():
    driver = Driver(limits=limits_of(q=4, lag=1), groups=(two_classes(40, 60),), accepted=lambda: 0)
    driver.arrive(1, 100, max_new=100)
    driver.run()
    steps = [step for step, index in seals(driver.plans) if index == 1]
    # One token a row, but up to four are possible, in this row and the one before: the first six seals may be early.
    assert steps == list(range(steps[0], 29)) and len(steps) == 7


def test_a_16_bit_page_is_for_others_after_the_step_that_seals_it():
    """The sequence that decodes gives its page back and takes another in one plan; the pool has no spare one."""
    driver = driver_of(open=2, limits={"enable_prefix_caching": False, "max_num_seqs": 1})
    driver.arrive(1, 100, max_new=200)
    driver.run()
    assert driver.hosts[1].generated == 200


@pytest.mark.parametrize(("q", "lag"), [(1, 0), (1, 1), (4, 0), (4, 1)])
@pytest.mark.parametrize(("sinks", "residual"), [(0, 1), (1, 1), (2, 2), (0, 2)])
def test_whoever_is_accepted_can_run_alone(sinks, residual, q, lag):
    limits = limits_of(q=q, lag=lag, max_tiles=2, enable_prefix_caching=False)
    for prompt, max_new in ((100, 200), (128, 192), (300, 20), (255, 3)):
        for open in range(1, 8):
            for sealed in range(1, 8):
                group = two_classes(open, sealed, sinks=sinks, residual=residual)
                driver = Driver(limits=limits, groups=(group,), accepted=lambda: 1 if q > 1 else 0)
                if driver.arrive(1, prompt, max_new):
                    driver.run()
                else:
                    assert open < sinks + 2 * residual + 1 or sealed < 6 - sinks


def test_who_does_not_fit_is_told_which_pages_are_missing():
    scheduler = Scheduler(make_policy("sarathi"), limits_of(), (two_classes(40, 3),))
    arrive = Arrive(now=0.0, seq=1, prompt=300, max_new=100)
    assert "need 5 KV pages of 64 tokens (sealed) in group 0, which has 3" in (scheduler.can_ever_fit(arrive) or "")


@pytest.mark.parametrize("full", ["open", "sealed"])
def test_admission_looks_at_both_classes(full):
    driver = driver_of(**{"open": 40, "sealed": 60, full: 5}, limits={"max_tiles": 16, "max_num_batched_tokens": 1100})
    driver.arrive(1, 257, max_new=2)
    driver.arrive(2, 257, max_new=2)
    driver.arrive(3, 257, max_new=2)
    driver.step()
    # Each takes a sink and a page for its end in 16 bits, and three sealed pages.
    assert driver.scheduler.view.num_residents == (2 if full == "open" else 1)
    driver.run()


@pytest.mark.parametrize("residual", [1, 2])
@pytest.mark.parametrize(("prompt", "cached"), [(64, 0), (65, 64), (128, 64), (129, 128), (300, 256)])
def test_a_hit_finds_sealed_pages_and_sinks(prompt, cached, residual):
    """With two residual pages the query behind a hit reads the page before it in 16 bits: chunks keep it."""
    driver = driver_of(residual=residual, limits={"max_tiles": 8, "max_num_batched_tokens": 8 * 64})
    tokens = list(range(prompt))
    for seq in (1, 2):
        driver.arrive(seq, tokens, max_new=1)
        driver.run()
    assert driver.hosts[2].cached == [cached]


@pytest.mark.parametrize(("residual", "cached"), [(1, 256), (2, 256)])
def test_generated_pages_are_found_by_the_next_turn(residual, cached):
    driver = driver_of(residual=residual)
    driver.arrive(1, 100, max_new=160)
    driver.run()
    driver.arrive(2, [*driver.hosts[1].tokens, 1, 2, 3], max_new=2)
    driver.run()
    assert driver.hosts[2].cached == [cached]


@pytest.mark.parametrize(("prompt", "cached"), [(64, 0), (65, 64), (100, 64), (200, 192)])
@pytest.mark.parametrize("caching", [True, False])
def test_choices_begin_with_the_page_of_the_last_prompt_token(prompt, cached, caching):
    driver = driver_of(limits={"enable_prefix_caching": caching})
    for seq in range(3):
        driver.arrive(seq, range(prompt), max_new=90, parent=0 if seq else None, choice=seq)
    driver.run()
    assert [driver.hosts[seq].cached for seq in (1, 2)] == [[cached]] * 2
    assert not any(plan.pages.copies for plan in driver.plans)


def test_a_program_keeps_no_partly_filled_page():
    driver = driver_of(limits={"enable_prefix_caching": False, "pin_share": 1.0})
    driver.arrive(1, 100, max_new=60, program="p")
    driver.run()
    assert used(driver) == (1, 1)
    driver.arrive(2, [*driver.hosts[1].tokens, 1], program="p", max_new=2)
    driver.run()
    assert driver.hosts[2].cached == [128]


def test_windows_free_both_classes():
    driver = Driver(
        limits=limits_of(enable_prefix_caching=False),
        groups=(*groups_of((40, None)), two_classes(40, 60, window=100)),
    )
    driver.arrive(1, 400, max_new=100)
    for _ in range(60):
        driver.step()
    view = driver.scheduler.view
    assert 40 - view.free(1, 0) == 1 and 60 - view.free(1, 1) == 2
    driver.run()
