"""ResNet-18, -34, -50 (https://arxiv.org/abs/1512.03385) and a pre-activation ResNet-50.

State-dict keys are torchvision's. As there, a bottleneck strides in its 3x3 convolution (v1.5).
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UsageError

from .layers import Blur, DropPath, set_drop_path_rate

relu = partial(F.relu, inplace=True)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions. With BlurPool, a strided block blurs before the second one."""

    expansion, last = 1, "bn2"  # the last layer of the branch

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool, pooled: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        # The first convolution strides; with BlurPool, the blur after it does.
        self.conv1 = conv(in_channels, width, 3, 1 if blurred else stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.blur = Blur(width) if blurred else nn.Identity()
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample(in_channels, width, stride, blurred, pooled)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.blur(out)))
        return relu(self.drop_path(out, self.downsample(x)))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions. With BlurPool, a strided block blurs before the last one."""

    expansion, last = 4, "bn3"

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool, pooled: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1 if blurred else stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.blur = Blur(width) if blurred else nn.Identity()
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample(in_channels, width * self.expansion, stride, blurred, pooled)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.blur(out)))
        return relu(self.drop_path(out, self.downsample(x)))


class PreActBottleneck(nn.Module):
    """Bottleneck with norm and ReLU before each convolution (https://arxiv.org/abs/1603.05027).

    There is no ReLU after the sum, and a projection takes the raw input, so the whole shortcut is linear; the
    authors' code and timm project the activated input.
    """

    expansion, last = 4, "conv3"

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool, pooled: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1 if blurred else stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.blur = Blur(width) if blurred else nn.Identity()
        self.conv3 = conv(width, width * self.expansion, 1)
        out_channels = width * self.expansion
        self.downsample = downsample(in_channels, out_channels, stride, blurred, pooled, norm=False)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(relu(self.bn1(x)))
        out = self.conv2(relu(self.bn2(out)))
        out = self.conv3(self.blur(relu(self.bn3(out))))
        return self.drop_path(out, self.downsample(x))


def downsample(
    in_channels: int, out_channels: int, stride: int, blurred: bool, pooled: bool, norm: bool = True
) -> nn.Module:
    """Return the shortcut of a block: the identity if the shapes agree, else a 1x1 projection.

    A strided one drops three quarters of its input, unless it is `blurred`, or `pooled` as in ResNet-D.
    """
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    layers = OrderedDict()
    if blurred:
        layers["blur"] = Blur(in_channels)  # named, so that the other keys stay torchvision's
    elif pooled and stride > 1:
        layers["pool"] = nn.AvgPool2d(2, ceil_mode=True)
    layers["0"] = conv(in_channels, out_channels, 1, 1 if blurred or pooled else stride)
    if norm:
        layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


class ResNet(nn.Module):
    """Stem, four stages of blocks, global average pooling, classifier.

    block:          BasicBlock, Bottleneck or PreActBottleneck
    depths:         number of blocks in each stage
    drop_path_rate: drop probability of the last block; it grows linearly from 0 at the first
    use_blurpool:   low-pass filter before every subsampling, see `layers.Blur`
    head:           "conv" (1x1 convolution) or "linear"; their weights differ only in shape
    stem:           "imagenet" (7x7 stride 2, pool), "small" (3x3, no pool; for images of about 32 px) or
                    "d" for a ResNet-D: three 3x3 instead of the 7x7, and average pools in the shortcuts
                    (https://arxiv.org/abs/1812.01187)
    base_width:     channels of the first stage's convolutions; each later stage doubles them
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: tuple[int, ...],
        num_classes: int = 1000,
        drop_path_rate: float = 0.2,
        use_blurpool: bool = False,
        head: str = "conv",
        stem: str = "imagenet",
        base_width: int = 64,
    ):
        super().__init__()
        self.conv1 = stem_conv(stem, base_width)
        self.bn1 = nn.BatchNorm2d(base_width)
        self.maxpool = stem_pool(stem, use_blurpool, base_width)
        channels = base_width
        for stage, depth in enumerate(depths):
            width = base_width * 2**stage
            strides = [1 if stage == 0 else 2] + [1] * (depth - 1)
            blocks = []
            for stride in strides:
                blocks.append(block(channels, width, stride, use_blurpool, pooled=stem == "d"))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self._init_weights(block)
        # The head keeps torch's default initialization: with few classes, fan_out would make logits huge.
        self.fc = classifier(head, channels, num_classes)
        set_drop_path_rate(self, drop_path_rate)

    def _init_weights(self, block: type[nn.Module]) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Each block starts as its shortcut alone (https://arxiv.org/abs/1706.02677).
        for module in self.modules():
            if isinstance(module, block):
                nn.init.zeros_(module.get_submodule(module.last).weight)

    def features(self, images: Tensor) -> Tensor:
        """Return the last map: (N, 3, H, W) -> (N, C, ceil(H / 32), ceil(W / 32)); small stem: / 8."""
        x = self.maxpool(relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, K)."""
        # Not adaptive pooling, which has no deterministic backward on CUDA.
        pooled = self.features(images).mean((2, 3), keepdim=True)
        return self.fc(pooled).flatten(1)


class PreActResNet(ResNet):
    """A ResNet of pre-activation blocks: norm and ReLU come after the last block instead of in the stem."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        del self.bn1
        self.bn_out = nn.BatchNorm2d(self.fc.weight.shape[1])

    def features(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(images))
        return relu(self.bn_out(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


def stem_conv(stem: str, width: int) -> nn.Module:
    """Return the stem's convolutions: (N, 3, H, W) -> (N, width, H / 2, W / 2); "small" keeps H and W."""
    if stem == "imagenet":
        return conv(3, width, 7, stride=2)
    if stem == "small":
        return conv(3, width, 3)
    if stem == "d":
        half = width // 2
        first = [conv(3, half, 3, stride=2), nn.BatchNorm2d(half), nn.ReLU(inplace=True)]
        second = [conv(half, half, 3), nn.BatchNorm2d(half), nn.ReLU(inplace=True)]
        return nn.Sequential(*first, *second, conv(half, width, 3))
    raise UsageError(f"there is no stem {stem!r}", "choose imagenet, small or d")


def stem_pool(stem: str, use_blurpool: bool, width: int) -> nn.Module:
    """Return the stem's pooling: (N, width, H, W) -> (N, width, H / 2, W / 2); "small" does not pool."""
    if stem == "small":
        return nn.Identity()
    if use_blurpool:
        # Kernel 3, as in the pool it replaces, and padded, so that 112 px stay 112; the package's own ResNets
        # take an unpadded kernel of 2.
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Blur(width))
    return nn.MaxPool2d(3, stride=2, padding=1)


def classifier(head: str, channels: int, num_classes: int) -> nn.Module:
    """Return the classifier: (N, C, 1, 1) -> (N, K, 1, 1) or (N, K)."""
    if head == "conv":
        return nn.Conv2d(channels, num_classes, kernel_size=1)
    if head == "linear":
        return LinearHead(channels, num_classes)
    raise UsageError(f"there is no head {head!r}", "choose conv or linear")


class LinearHead(nn.Linear):
    """A linear classifier on pooled features (N, C, 1, 1)."""

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled.flatten(1))


# Each takes num_classes, drop_path_rate, use_blurpool, head and stem, in this order: see ResNet.
resnet18 = partial(ResNet, BasicBlock, (2, 2, 2, 2))
resnet34 = partial(ResNet, BasicBlock, (3, 4, 6, 3))
resnet50 = partial(ResNet, Bottleneck, (3, 4, 6, 3))
preact_resnet50 = partial(PreActResNet, PreActBottleneck, (3, 4, 6, 3))
# ResNet-10 with an eighth of the width, 80 thousand parameters: for tests and experiments.
resnet_tiny = partial(ResNet, BasicBlock, (1, 1, 1, 1), base_width=8)
