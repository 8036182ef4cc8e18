"""One number of steps: what the plan counts is what the loader yields and what the schedule takes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import optim
from dataloader import Order
from errors import UsageError
from train_utils import phase_of, plan, share_epochs

IMAGENET = 1_281_167


def test_the_documents_run_has_their_phases_and_1151020_steps():
    phases = plan(90, (64, 128, 224), IMAGENET, 256)
    shape = [(p.first_epoch, p.last_epoch, p.image_size, p.batch_size) for p in phases]
    assert shape == [(1, 30, 64, 256), (31, 50, 128, 128), (51, 90, 224, 64)]
    assert sum(p.steps for p in phases) == 1_151_020


@settings(max_examples=300, deadline=None)
@given(
    samples=st.integers(1, 300),
    sizes=st.lists(st.integers(8, 256), min_size=1, max_size=4),
    batch=st.integers(1, 64),
    epochs=st.integers(1, 12),
    world=st.sampled_from([1, 2, 3]),
    data=st.data(),
)
def test_planned_yielded_and_scheduled_steps_are_one_number(samples, sizes, batch, epochs, world, data):
    batches = [world * data.draw(st.integers(1, 24)) for _ in sizes] if data.draw(st.booleans()) else None
    batches = batches or [world * max(1, batch >> k) for k in range(len(sizes))]
    weights = data.draw(st.none() | st.lists(st.integers(1, 50), min_size=len(sizes), max_size=len(sizes)))
    used = [b for b, length in zip(batches, share_epochs(epochs, weights, len(sizes)), strict=True) if length]
    if max(used) > samples:
        with pytest.raises(UsageError):
            plan(epochs, sizes, samples, batch, phase_batch_sizes=batches, phase_epochs=weights, world_size=world)
        return
    phases = plan(epochs, sizes, samples, batch, phase_batch_sizes=batches, phase_epochs=weights, world_size=world)
    total = sum(p.steps for p in phases)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    schedule = optim.Schedule(torch.optim.SGD([weight], 1.0), "onecycle", peak_lr=1.0, total_steps=total,
                              phases=tuple((p.steps, 1.0) for p in phases))  # fmt: skip
    yielded = 0
    for epoch in range(1, epochs + 1):
        phase = phase_of(phases, epoch)
        assert phase.step_before(epoch) == yielded
        orders = [Order(samples, phase.batch_size, rank=r, world_size=world) for r in range(world)]
        for order in orders:
            order.seek(epoch)
        for per_rank in zip(*orders, strict=True):
            assert sum(len(b.ids) for b in per_rank) == phase.batch_size
            schedule.step()
            yielded += 1
    assert yielded == total
    with pytest.raises(RuntimeError):
        schedule.step()
    assert phases[-1].last_epoch == epochs
    assert phases[-1].image_size == sizes[-1]


@given(epochs=st.integers(1, 200), weights=st.lists(st.integers(1, 90), min_size=1, max_size=5))
def test_epochs_are_shared_out_whole_and_the_last_size_gets_one(epochs, weights):
    shares = share_epochs(epochs, weights, len(weights))
    assert sum(shares) == epochs
    assert shares[-1] >= 1
    assert all(abs(s - epochs * w / sum(weights)) < 2 for s, w in zip(shares, weights, strict=True))


def test_an_order_can_be_entered_anywhere_and_each_id_comes_once():
    whole = Order(103, 8, seed=5)
    whole.seek(4)
    batches = list(whole)
    ids = [int(i) for b in batches for i in b.ids]
    assert len(ids) == len(set(ids)) == 96
    late = Order(103, 8, seed=5)
    late.seek(4, 7)
    assert [b.ids.tolist() for b in late] == [b.ids.tolist() for b in batches[7:]]
    late.seek(5)
    assert [int(i) for b in late for i in b.ids] != ids
    assert late.epoch == 6  # used without positions, it goes on by itself


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("samples", [1, 2, 5, 16, 17])
def test_evaluation_covers_every_sample_once_over_all_ranks(samples, world):
    orders = [Order(samples, 4, shuffle=False, rank=r, world_size=world) for r in range(world)]
    seen = [int(i) for order in orders for b in order for i in b.ids]
    assert sorted(seen) == list(range(samples))
    assert len({len(list(o)) for o in orders}) == 1  # the same number of batches, so that nobody waits alone


def test_ranks_together_see_what_one_rank_sees():
    one, two = Order(50, 12, seed=1), [Order(50, 12, seed=1, rank=r, world_size=2) for r in (0, 1)]
    together = [[*a.ids, *b.ids] for a, b in zip(*two, strict=True)]
    assert together == [list(b.ids) for b in one]
