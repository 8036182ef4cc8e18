"""models.layers: drop-path and blur, compared with their papers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from base.errors import UsageError
from models.layers import Blur, DropPath, set_drop_path_rate


def test_drop_path_keeps_the_expected_value_and_drops_whole_samples():
    torch.manual_seed(0)
    layer, ones = DropPath(0.25).train(), torch.ones(40_000, 2, 1, 1)
    out = layer(ones, torch.zeros_like(ones))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(out[:, 0], out[:, 1])  # a sample is kept or dropped as a whole
    assert out.mean().item() == pytest.approx(1.0, abs=0.02)


def test_drop_path_adds_the_shortcut_to_what_it_kept():
    torch.manual_seed(1)
    branch, shortcut = (
        torch.randn(64, 3, 2, 2, dtype=torch.float64),
        torch.randn(64, 3, 2, 2, dtype=torch.float64),
    )
    branch.requires_grad_()
    out = DropPath(0.5).train()(branch, shortcut)
    kept = (out != shortcut).flatten(1).any(1)
    assert 10 < kept.sum() < 54
    torch.testing.assert_close(out[kept], shortcut[kept] + 2 * branch[kept], rtol=1e-14, atol=1e-14)
    assert torch.equal(out[~kept], shortcut[~kept])
    out.sum().backward()
    assert torch.equal(branch.grad, 2.0 * kept.view(-1, 1, 1, 1).expand_as(branch))


def test_drop_path_is_the_plain_sum_in_evaluation_and_at_rate_zero():
    branch, shortcut = torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2)
    assert torch.equal(DropPath(0.9).eval()(branch, shortcut), branch + shortcut)
    assert torch.equal(DropPath(0.0).train()(branch, shortcut), branch + shortcut)


def test_drop_path_is_replayed_by_torchs_default_generator():
    branch, shortcut, layer = torch.ones(32, 1, 1, 1), torch.zeros(32, 1, 1, 1), DropPath(0.5).train()
    draws = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        draws.append(layer(branch, shortcut))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_drop_path_keeps_precision_and_memory_format(dtype):
    branch = torch.randn(4, 8, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
    out = DropPath(0.2).train()(branch, branch.clone())
    assert out.dtype == dtype and out.is_contiguous(memory_format=torch.channels_last)


def test_the_linear_rule_runs_from_zero_to_the_rate():
    model = nn.Sequential(DropPath(), nn.Identity(), DropPath(), DropPath())
    set_drop_path_rate(model, 0.3)
    assert [model[i].p for i in (0, 2, 3)] == pytest.approx([0.0, 0.15, 0.3])
    set_drop_path_rate(model, 0.0)
    assert [model[i].p for i in (0, 2, 3)] == [0.0] * 3
    for rate in (1.0, -0.1, float("nan")):
        with pytest.raises(UsageError, match="drop-path rate"):
            set_drop_path_rate(model, rate)


def test_blur_takes_the_aliasing_out_of_a_checkerboard():
    rows, columns = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    board = ((rows + columns) % 2).float().expand(1, 2, 16, 16)
    assert set(board[..., ::2, ::2].unique().tolist()) == {0.0}  # plain subsampling: a black image
    blurred = Blur(2)(board)
    assert blurred.shape == (1, 2, 8, 8)
    # Inside, every pixel is the board's mean: the pattern above the new Nyquist rate is gone.
    torch.testing.assert_close(blurred[..., 1:-1, 1:-1], torch.full((1, 2, 6, 6), 0.5))


def test_blur_is_the_binomial_filter_with_zero_padding():
    maps, taps = (
        torch.randn(2, 3, 9, 6, dtype=torch.float64),
        torch.tensor([1.0, 3, 3, 1], dtype=torch.float64) / 8,
    )
    weight = torch.outer(taps, taps).expand(3, 1, 4, 4)
    expected = F.conv2d(F.pad(maps, (1, 2, 1, 2)), weight, stride=2, groups=3)
    torch.testing.assert_close(Blur(3).double()(maps), expected, rtol=0, atol=1e-15)


def test_blur_halves_any_size_upwards_as_a_strided_convolution_does():
    blur, conv = Blur(4), nn.Conv2d(4, 4, 3, stride=2, padding=1)
    for side in (*range(1, 12), 55, 56, 57):
        maps = torch.ones(1, 4, side, side)
        assert blur(maps).shape == conv(maps).shape == (1, 4, -(-side // 2), -(-side // 2))


def test_blur_has_no_weights_and_follows_dtype_copy_and_autocast():
    blur = Blur(4)
    assert not blur.state_dict() and not list(blur.parameters())
    maps = torch.randn(2, 4, 6, 6).to(memory_format=torch.channels_last)
    plain = blur(maps)
    assert plain.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(copy.deepcopy(blur).double()(maps.double()), plain.double(), rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        half = blur(maps.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), plain, rtol=0.02, atol=0.02)
    assert torch.equal(
        copy.deepcopy(blur).bfloat16()(maps.bfloat16()), half
    )  # sixty-fourths are exact in bf16
