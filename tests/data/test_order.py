"""The order of samples: a pure function of seed and epoch."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmds.data.order import REPLACEMENT_TRIES, SampleOrder, micro_batch_positions

GOLDEN = [
    (0, 0),
    (0, 2),
    (0, 1),
    (1, 0),
    (1, 1),
    (2, 1),
    (2, 2),
    (2, 3),
    (2, 0),
    (2, 1),
    (2, 3),
    (1, 1),
    (2, 0),
    (1, 0),
    (2, 2),
    (0, 0),
    (0, 2),
    (0, 1),
]
COUNTS = st.lists(st.integers(1, 20), min_size=1, max_size=30)


def everything(counts):
    return Counter((shard, i) for shard, count in enumerate(counts) for i in range(count))


@settings(max_examples=60)
@given(COUNTS, st.integers(0, 2**40), st.integers(1, 8), st.integers(0, 3), st.booleans())
def test_every_sample_once_an_epoch(counts, seed, window, epoch, shuffle):
    order = SampleOrder(counts, seed, window, shuffle)
    n = len(order)
    assert Counter(order.locate(epoch * n + p) for p in range(n)) == everything(counts)


@settings(max_examples=60)
@given(COUNTS, st.integers(0, 100), st.integers(0, 200))
def test_any_position_needs_no_history(counts, seed, position):
    walked = SampleOrder(counts, seed, 4)
    for p in range(position):
        walked.locate(p)
    assert walked.locate(position) == SampleOrder(counts, seed, 4).locate(position)


@settings(max_examples=80)
@given(st.sampled_from([(1, 8), (1, 4), (2, 4), (2, 2), (4, 2), (8, 1), (1, 1), (4, 1)]), st.integers(0, 50))
def test_global_batches_do_not_depend_on_the_machine(layout, step):
    """Any world size and micro-batch that divide the global batch read the same positions."""
    world_size, micro_batch = layout
    accumulation = 8 // (world_size * micro_batch)
    positions = [
        p
        for micro in range(accumulation)
        for rank in range(world_size)
        for p in micro_batch_positions(
            step, micro, rank, global_batch=8, micro_batch=micro_batch, world_size=world_size
        )
    ]
    assert positions == list(range(8 * step, 8 * step + 8))


def test_epochs_and_seeds_differ_and_windows_mix_shards():
    def epoch(seed, e):
        order = SampleOrder([50] * 8, seed, window=4)
        return [order.locate(e * 400 + p) for p in range(400)]

    assert len({tuple(epoch(s, e)) for s in (0, 1) for e in (0, 1)}) == 4
    assert len({shard for shard, _ in epoch(0, 0)[:40]}) == 4  # G shards at a time, no more


def test_the_order_is_frozen():
    """A changed value here means that runs from before cannot be resumed."""
    order = SampleOrder([3, 2, 4], seed=7, window=2)
    assert [order.locate(p) for p in range(18)] == GOLDEN


def test_unshuffled_is_the_stored_order():
    order = SampleOrder([2, 3], shuffle=False)
    assert [order.locate(p) for p in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (0, 0)]


@pytest.mark.parametrize("total", [1, 5, 7919, 10_000])
def test_replacements_stay_in_the_epoch(total):
    order = SampleOrder([total])
    tries = list(order.replacements(2 * total))
    assert tries[0] == 2 * total and len(tries) == REPLACEMENT_TRIES
    assert all(2 * total <= p < 3 * total for p in tries)


def test_one_place_costs_the_same_in_a_large_data_set():
    order = SampleOrder([1000] * 10_000, seed=1)
    assert order.locate(9_999_999) != order.locate(0)
    assert (
        sum(
            array.nbytes
            for value in order._cache.values()
            for array in (value if isinstance(value, tuple) else (value,))
        )
        < 2_000_000
    )
