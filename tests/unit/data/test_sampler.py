"""Order of the samples."""

import numpy as np
import pytest

from megatron_rb.data.sampler import Sampler, SamplerState


def test_each_epoch_is_another_permutation():
    sampler = Sampler(20, shuffle=True)
    first, second = sampler.order(7, 0), sampler.order(7, 1)
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()


def test_order_is_the_same_in_every_process_and_release():
    assert Sampler(8, shuffle=True).order(1234, 0).tolist() == [5, 6, 3, 7, 4, 1, 2, 0]


def test_a_step_crosses_the_end_of_an_epoch():
    sampler = Sampler(5, shuffle=True)
    samples, state = sampler.take(SamplerState(3, 0, 4), 3)
    assert samples.tolist() == [sampler.order(3, 0)[4], *sampler.order(3, 1)[:2]]
    assert state == SamplerState(3, 1, 2)


def test_a_step_may_hold_several_epochs():
    samples, state = Sampler(3, shuffle=False).take(SamplerState(0), 7)
    assert samples.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert state == SamplerState(0, 2, 1)


def test_state_of_taken_samples_resumes_exactly():
    sampler = Sampler(11, shuffle=True)
    whole, end = sampler.take(SamplerState(5), 30)
    head, middle = sampler.take(SamplerState(5), 13)
    tail, resumed_end = sampler.take(middle, 17)
    assert np.concatenate([head, tail]).tolist() == whole.tolist()
    assert resumed_end == end


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="no sample to draw from"):
        Sampler(0, shuffle=True)
