"""Policies by name, with their parameters."""

import pytest

from jaxserve.scheduler import make_policy, policies


def test_unknown_names_and_parameters_are_refused():
    with pytest.raises(ValueError, match="'nobody'.*sarathi"):
        make_policy("nobody")
    with pytest.raises(ValueError, match="'mlfq' goes over no other.*slora"):
        make_policy("mlfq+fcfs")
    with pytest.raises(ValueError, match="sarathi.*argument"):
        make_policy("sarathi", budget=3)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="sarathi"):
        policies.register("sarathi")(type(make_policy("fcfs")))


@pytest.mark.parametrize("name", ["slora+mlfq", "prepacking+slora+fairness", "mlfq"])
def test_a_record_knows_how_its_policy_was_made(name):
    policy = make_policy(name, **({"levels": 3} if name == "mlfq" else {}))
    assert policy.name == name
    again = make_policy(policy.name, **policy.params)
    assert again.params == policy.params and type(again) is type(policy)
