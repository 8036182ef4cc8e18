"""One number of steps: what the plan counts is what the loader yields and what the schedule takes."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import config_of, tiny_run
from torch import nn

from base.errors import UsageError
from dataloader import Order
from harness import build
from models import build_model
from optim.schedule import Schedule
from train_utils import phase_of, plan, share_epochs, smallest_piece

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
            plan(
                epochs,
                sizes,
                samples,
                batch,
                phase_batch_sizes=batches,
                phase_epochs=weights,
                world_size=world,
            )
        return
    phases = plan(
        epochs, sizes, samples, batch, phase_batch_sizes=batches, phase_epochs=weights, world_size=world
    )
    total = sum(p.steps for p in phases)
    weight = torch.nn.Parameter(torch.zeros(2, 2))
    schedule = Schedule(
        torch.optim.SGD([weight], 1.0),
        "onecycle",
        peak_lr=1.0,
        total_steps=total,
        phases=tuple((p.steps, 1.0) for p in phases),
    )
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
    assert late.epoch == 6  # used without positions, it advances by itself


# BatchNorm needs more than one value per channel


@given(images=st.integers(1, 300), pieces=st.integers(1, 300))
def test_the_smallest_piece_is_the_one_that_torch_cuts(images, pieces):
    cut = torch.zeros(images).tensor_split(min(pieces, images))
    assert smallest_piece(images, pieces) == min(map(len, cut))


INDEX = SimpleNamespace(train=range(64), classes=range(5))


def plan_of(*arguments, ranks: int = 1):
    return build.make_plan(config_of("--phase-epochs", "1,1,1", *arguments), INDEX, ranks)


@pytest.mark.parametrize("arch, stem, sizes", [
    ("resnet_tiny", "imagenet", (8, 16, 32, 40, 64)), ("resnet_tiny", "small", (8, 16, 32)),
    ("resnet18", "d", (32, 40)), ("preact_resnet50", "small", (8, 16)),
    ("mobilenet_v3_large", "imagenet", (32, 40)), ("swin_t", "imagenet", (16,)),
])  # fmt: skip
def test_a_batch_is_refused_exactly_where_a_real_forward_raises(arch, stem, sizes):
    model = build_model(arch, num_classes=5, stem=stem).train()
    flags = () if arch in ("mobilenet_v3_large", "swin_t") else ("--stem", stem)
    raised = {(size, n): raises(model, torch.zeros(n, 3, size, size)) for size in sizes for n in (1, 2)}
    for size in sizes:
        for batch, pieces in ((1, 1), (2, 1), (3, 2), (4, 3), (5, 4), (4, 2)):
            cut = torch.zeros(batch).tensor_split(pieces)
            wanted = any(raised[size, min(len(piece), 2)] for piece in cut)
            try:
                sizes_of = [
                    "--resize-schedule",
                    f"{size},{size},{size}",
                    "--phase-batch-sizes",
                    f"8,8,{batch}",
                ]
                plan_of("--arch", arch, *flags, *sizes_of, "--accumulate", pieces)
                refused = False
            except UsageError as error:
                # The other phases have 8 images, of which these pieces leave more than one.
                assert f"phase 3: batch size {batch} at {size} px" in error.what
                refused = True
            assert refused == wanted, (size, batch, pieces)


def raises(model: nn.Module, images: torch.Tensor) -> bool:
    try:
        model(images)
    except ValueError as error:
        assert "Expected more than 1 value per channel" in str(error)
        return True
    return False


@pytest.mark.parametrize("arguments, ranks, fixes", [
    (("--phase-batch-sizes", "4,2,1"), 1, ["--phase-batch-sizes 4,2,2"]),
    (("--phase-batch-sizes", "8,8,5", "--accumulate", "4"), 1,
     ["--accumulate 2", "--phase-batch-sizes 8,8,8"]),
    (("--phase-batch-sizes", "4,4,2"), 2, ["--phase-batch-sizes 4,4,4"]),
    (("--phase-batch-sizes", "8,8,8", "--accumulate", "64"), 1, ["--accumulate 4"]),
])  # fmt: skip
def test_a_refused_plan_names_what_works_and_it_does(arguments, ranks, fixes):
    with pytest.raises(UsageError, match="one value per channel") as caught:
        plan_of(*arguments, ranks=ranks)
    for fix in fixes:
        assert fix in caught.value.fix
        assert plan_of(*arguments, *fix.split(), ranks=ranks)


def test_a_batch_that_halves_to_one_image_is_refused_with_the_first_batch_that_works():
    values = vars(config_of()) | {"phase_batch_sizes": None, "batch_size": 4}
    with pytest.raises(UsageError, match="phase 3: batch size 1 at 24 px") as caught:
        build.make_plan(SimpleNamespace(**values), INDEX, 1)
    assert "--batch-size 8 " in caught.value.fix
    assert build.make_plan(SimpleNamespace(**values | {"batch_size": 8}), INDEX, 1)


def test_synchronised_norms_count_the_images_of_all_ranks():
    values = vars(config_of("--phase-batch-sizes", "4,4,2")) | {"sync_bn": True}
    assert build.make_plan(SimpleNamespace(**values), INDEX, 2)
    with pytest.raises(UsageError, match="on each of 2 ranks"):
        build.make_plan(SimpleNamespace(**values | {"sync_bn": False}), INDEX, 2)


def test_a_warm_up_counts_the_steps_of_the_epochs_that_it_lasts(tmp_path):
    plan = ["--phase-batch-sizes", "4,8,8", "--phase-epochs", "1,1,1"]  # 10, 5 and 5 steps
    run = tiny_run(tmp_path, *plan, "--schedule", "cosine", "--warmup-epochs", "1.6")
    assert run.state.schedule.warmup_steps == 10 + 3


def test_a_batch_larger_than_the_data_is_refused_with_a_flag_that_would_not_be():
    for flags, fix in (
        ({}, "use --batch-size 30 or less"),
        ({"phase_batch_sizes": (64, 16)}, "--phase-batch-sizes 30,16"),
    ):
        with pytest.raises(UsageError, match="larger than the 30 training images") as caught:
            plan(4, (8, 16), 30, 64, **flags)
        assert caught.value.fix.endswith(fix)
