"""Random bits are jax's own folds of seed, choice, position and purpose."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.sampling.keys import Purpose, choice_key, random_bits, seed_words


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_bits_are_the_documented_folds(seed):
    words = choice_key(jnp.asarray(seed_words(seed)), jnp.int32(3))
    got = random_bits(jnp.stack([words, words]), jnp.array([5, 900]), Purpose.ACCEPT)
    for position, bits in zip([5, 900], got, strict=True):
        key = jax.random.key(seed, impl="threefry2x32")
        for word in (3, position, 1):
            key = jax.random.fold_in(key, word)
        assert bits == jax.random.bits(key, (), jnp.uint32)


def test_seeds_have_64_bits_and_every_part_of_a_key_matters():
    def bits(seed=1, choice=0, position=9, purpose=Purpose.SAMPLE):
        words = choice_key(jnp.asarray(seed_words(seed)), jnp.int32(choice))
        return int(random_bits(words[None], jnp.array([position]), purpose)[0])

    different = [bits(), bits(seed=2), bits(seed=1 + 2**40), bits(seed=-1), bits(choice=1), bits(position=10)]
    different += [bits(purpose=Purpose.ACCEPT), bits(purpose=Purpose.RESIDUAL)]
    assert len(set(different)) == len(different)
    assert bits(seed=1) == bits(seed=1 + 2**64)
    assert np.array_equal(seed_words(-1), np.array([2**32 - 1, 2**32 - 1], np.uint32))
