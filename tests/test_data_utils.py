"""Targets, mixing and losses, compared with torchvision, torch and computations by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from data_utils import (
    LOSSES,
    BatchMixer,
    balanced_weights,
    binary_cross_entropy,
    cross_entropy,
    cutmix,
    cutmix_box,
    draw_partner,
    l1_penalty,
    mixup,
    soft_targets,
)


def a_batch(n=5, height=6, width=8, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(n)
    images = torch.randn(n, 3, height, width, generator=generator, dtype=dtype)
    return images, soft_targets(torch.arange(n) % classes, classes, 0.1).to(dtype)


def test_soft_targets_are_smoothed_one_hots():
    labels = torch.tensor([2, 0])
    assert torch.equal(soft_targets(labels, 3), F.one_hot(labels, 3).float())
    expected = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]])
    torch.testing.assert_close(soft_targets(labels, 3, smoothing=0.3), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_on_smoothed_targets_is_torchs_label_smoothing(smoothing):
    logits, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    ours = LOSSES["ce"](logits, soft_targets(labels, 5, smoothing))
    assert ours.dtype == torch.float64
    torch.testing.assert_close(
        ours, F.cross_entropy(logits, labels, label_smoothing=smoothing), rtol=1e-7, atol=0
    )


def test_mixup_is_the_formula_and_leaves_its_input_alone():
    images, targets = a_batch()
    before, partner = images.clone(), torch.tensor([1, 0, 3, 4, 2])
    mixed, labels = mixup(images, targets, partner, lam=0.3)
    for i, j in enumerate(partner.tolist()):
        torch.testing.assert_close(mixed[i], 0.3 * images[i] + 0.7 * images[j])
        torch.testing.assert_close(labels[i], 0.3 * targets[i] + 0.7 * targets[j])
    assert torch.equal(images, before)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_mixup_at_its_ends_is_one_of_the_two_exactly(lam):
    images, targets = a_batch(dtype=torch.float32)
    partner = torch.tensor([1, 2, 3, 4, 0])
    mixed, labels = mixup(images, targets, partner, lam)
    who = torch.arange(5) if lam else partner
    assert torch.equal(mixed, images[who]) and torch.equal(labels, targets[who])


def test_cutmix_pixel_by_pixel_leaves_its_input_alone():
    images, targets = a_batch()
    before, partner, box = images.clone(), torch.tensor([1, 0, 3, 4, 2]), (1, 2, 4, 7)
    mixed, labels = cutmix(images, targets, partner, box)
    pasted = 0
    for y in range(6):
        for x in range(8):
            inside = 1 <= y < 4 and 2 <= x < 7
            pasted += inside
            assert torch.equal(mixed[..., y, x], images[partner if inside else torch.arange(5)][..., y, x])
    share = pasted / (6 * 8)
    torch.testing.assert_close(labels, (1 - share) * targets + share * targets[partner])
    assert torch.equal(images, before)


def test_cutmix_of_an_empty_and_of_a_full_box():
    images, targets = a_batch(dtype=torch.float32)
    partner = torch.tensor([1, 2, 3, 4, 0])
    for box, who in (((3, 3, 3, 3), torch.arange(5)), ((0, 0, 6, 8), partner)):
        mixed, labels = cutmix(images, targets, partner, box)
        assert torch.equal(mixed, images[who]) and torch.equal(labels, targets[who])


def test_cutmix_box_edges():
    assert cutmix_box(0.0, 8, 8, row=4, column=4) == (0, 0, 8, 8)
    assert cutmix_box(0.0, 8, 8, row=0, column=7) == (0, 3, 4, 8)
    top, left, bottom, right = cutmix_box(1.0, 8, 8, row=0, column=7)
    assert (bottom - top) * (right - left) == 0


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(1, 40), st.integers(1, 40), st.data())
def test_a_box_lies_in_the_image_and_is_no_larger_than_drawn(lam, height, width, data):
    row, column = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    top, left, bottom, right = cutmix_box(lam, height, width, row, column)
    assert 0 <= top <= bottom <= height and 0 <= left <= right <= width
    assert (bottom - top) * (right - left) <= (1 - lam) * height * width + 1e-9


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_mixing_equals_torchvisions_for_the_same_draw(name, seed):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    images, targets = a_batch(height=9, width=7)
    partner = torch.arange(5).roll(1)
    reference = getattr(v2, name)(alpha=1.0)
    torch.manual_seed(seed)
    expected_images, expected_targets = reference(images, targets)
    torch.manual_seed(seed)  # the same draw again, by hand
    lam = float(torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample())
    if name == "MixUp":
        mixed, labels = mixup(images, targets, partner, lam)
    else:
        column, row = int(torch.randint(7, (1,))), int(torch.randint(9, (1,)))
        mixed, labels = cutmix(images, targets, partner, cutmix_box(lam, 9, 7, row, column))
    torch.testing.assert_close(mixed, expected_images, rtol=0, atol=1e-14)
    torch.testing.assert_close(labels, expected_targets, rtol=0, atol=1e-14)


@pytest.mark.parametrize("alphas", [(0.2, 0.0), (0.0, 1.0), (0.0, 0.0)])
def test_mixing_keeps_channels_last_and_the_input(alphas):
    images = torch.randn(6, 3, 8, 8).to(memory_format=torch.channels_last)
    before = images.clone()
    mixed, targets = BatchMixer(4, *alphas, 0.1)(images, torch.arange(6) % 4)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)
    assert (targets.dtype, targets.shape) == (torch.float32, (6, 4))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))


def test_a_mixer_without_alphas_only_smooths():
    images, labels = torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 1])
    mixed, targets = BatchMixer(2, 0.0, 0.0, 0.1)(images, labels)
    assert mixed is images
    assert torch.equal(targets, soft_targets(labels, 2, 0.1))


def test_a_mixed_batch_follows_from_the_seed_alone():
    images, labels, mixer = torch.randn(4, 3, 8, 8), torch.arange(4), BatchMixer(4, 0.2, 1.0, 0.1)
    torch.manual_seed(7)
    first = mixer(images, labels)
    again = mixer(images, labels)
    torch.manual_seed(7)
    replay = mixer(images, labels)
    assert all(torch.equal(a, b) for a, b in zip(first, replay, strict=True))
    assert not torch.equal(first[0], again[0])


def test_half_of_the_batches_are_cut_and_half_blended():
    """Images of constant value show which it was: CutMix does not blend values."""
    torch.manual_seed(0)
    images = torch.arange(1.0, 5).view(4, 1, 1, 1).expand(4, 3, 16, 16)
    mixer = BatchMixer(4, 1.0, 1.0, 0.0)
    cut = [bool((mixer(images, torch.arange(4))[0] % 1 == 0).all()) for _ in range(400)]
    assert 0.4 < np.mean(cut) < 0.6


@pytest.mark.parametrize("height, width", [(32, 4), (4, 32)])
def test_boxes_reach_every_corner_of_images_that_are_not_square(height, width):
    torch.manual_seed(0)
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, height, width)
    mixer = BatchMixer(2, 0.0, 1.0, 0.0)
    pasted = sum(mixer(images, torch.tensor([0, 1]))[0][0, 0] for _ in range(200))
    assert pasted.min() > 0


def test_mixing_ratios_follow_their_beta_distribution():
    torch.manual_seed(0)
    mixer = BatchMixer(2, 0.2, 0.0, 0.0)
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1)
    ratios = [mixer(images, torch.tensor([0, 1]))[0][1].item() for _ in range(2000)]
    assert np.mean(ratios) == pytest.approx(0.5, abs=0.03)
    assert np.var(ratios) == pytest.approx(0.25 / (2 * 0.2 + 1), rel=0.1)  # Beta(a, a): 1 / (4 (2 a + 1))


@pytest.mark.parametrize("n", [2, 5])
def test_partners_are_a_permutation_without_fixed_points(n):
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        partner = draw_partner(n, torch.device("cpu"))
        assert sorted(partner.tolist()) == list(range(n))
        assert not (partner == torch.arange(n)).any()
        seen.add(partner[0].item())
    assert seen == set(range(1, n))  # anyone but itself
    assert draw_partner(1, torch.device("cpu")).tolist() == [0]


def test_bce_by_hand():
    logits = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, -2.0]], dtype=torch.float64)
    targets = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    total = 0.0
    for n in range(2):
        for k in range(3):
            p = 1 / (1 + math.exp(-logits[n, k].item()))
            t = targets[n, k].item()
            total -= t * math.log(p) + (1 - t) * math.log(1 - p)
    assert LOSSES["bce"](logits, targets).item() == pytest.approx(total / (2 * 3), rel=1e-12)


def test_a_threshold_makes_targets_hard():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    mixed = mixup(logits, soft_targets(torch.arange(6) % 4, 4), torch.arange(6).roll(1), 0.85)[1]
    hard = soft_targets(torch.arange(6) % 4, 4)
    assert torch.equal(binary_cross_entropy(logits, mixed, threshold=0.2), binary_cross_entropy(logits, hard))
    both = hard + hard.roll(1, 0)
    assert torch.equal(binary_cross_entropy(logits, mixed, threshold=0.1), binary_cross_entropy(logits, both))


def test_class_weights_multiply_each_class_term():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    targets = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    log_p = logits - logits.exp().sum(1, keepdim=True).log()
    expected = sum(-weights[k] * targets[n, k] * log_p[n, k] for n in range(9) for k in range(3)) / 9
    torch.testing.assert_close(cross_entropy(logits, targets, weights), expected)


def test_balanced_weights_are_scikit_learns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 4)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels.numpy())
    assert balanced_weights(torch.bincount(labels)).tolist() == pytest.approx(expected.tolist())


def test_losses_are_computed_in_the_wider_precision():
    logits, targets = torch.randn(4, 3), soft_targets(torch.tensor([0, 1, 2, 0]), 3, 0.1)
    for loss in LOSSES.values():
        rounded = logits.bfloat16()
        assert torch.equal(loss(rounded, targets), loss(rounded.float(), targets))


def test_l1_is_the_sum_over_weights_and_has_their_signs_as_gradient():
    weight = torch.tensor([[1.0, -2.0], [0.5, 0.0]], requires_grad=True)
    kernel = torch.full((1, 1, 3, 3), -1.0, requires_grad=True)
    penalty = l1_penalty(iter([weight, kernel]))
    assert penalty.item() == 3.5 + 9.0
    penalty.backward()
    assert torch.equal(weight.grad, weight.sign()) and torch.equal(kernel.grad, kernel.sign())


@pytest.mark.gpu
def test_mixing_on_a_gpu_equals_the_cpu_and_never_waits():
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    on_gpu, labels_on_gpu = images.to("cuda", memory_format=torch.channels_last), labels.to("cuda")
    mixer = BatchMixer(4, 0.2, 1.0, 0.1)
    for seed in range(6):
        torch.manual_seed(seed)
        expected = mixer(images, labels)
        torch.manual_seed(seed)
        torch.cuda.set_sync_debug_mode("error")
        try:
            mixed = mixer(on_gpu, labels_on_gpu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert mixed[0].is_contiguous(memory_format=torch.channels_last)
        for ours, theirs in zip(mixed, expected, strict=True):
            torch.testing.assert_close(ours.cpu(), theirs)
