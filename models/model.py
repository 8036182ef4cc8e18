"""ResNet-18, -34, -50 and the pre-activation ResNet-50, with torchvision's state-dict keys.

Paper: https://arxiv.org/abs/1512.03385, with the stride of a bottleneck on its 3x3 convolution as in
torchvision. Choosing among architectures by name belongs to `models.build_model`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from base.errors import UsageError

from .layers import Blur, DropPath, set_drop_path_rate

relu = functools.partial(F.relu, inplace=True)


def conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False)


def blur_if(wanted: bool, channels: int) -> nn.Module:
    return Blur(channels) if wanted else nn.Identity()


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; antialiased as in antialiased-cnns: blur in front of the second."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        # torchvision strides the first convolution; the blur comes behind it and takes over the stride.
        self.conv1 = conv(in_channels, width, 3, 1 if blurred else stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.blur = blur_if(blurred, width)
        self.conv2 = conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample(in_channels, width, stride, blurred)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(self.blur(out)))
        return relu(self.drop_path(out, self.downsample(x)))

    def silence(self) -> None:
        nn.init.zeros_(self.bn2.weight)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1; antialiased as in antialiased-cnns: blur between the last two."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        self.conv1 = conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1 if blurred else stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.blur = blur_if(blurred, width)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.bn3 = nn.BatchNorm2d(width * self.expansion)
        self.downsample = downsample(in_channels, width * self.expansion, stride, blurred)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(self.blur(out)))
        return relu(self.drop_path(out, self.downsample(x)))

    def silence(self) -> None:
        nn.init.zeros_(self.bn3.weight)


class PreActBottleneck(nn.Module):
    """Bottleneck whose norms and ReLUs come before its convolutions (https://arxiv.org/abs/1603.05027).

    Nothing nonlinear lies on the skip: no ReLU after the sum, and projections take the raw input.
    """

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, use_blurpool: bool):
        super().__init__()
        blurred = use_blurpool and stride > 1
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv(in_channels, width, 1)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, 1 if blurred else stride)
        self.bn3 = nn.BatchNorm2d(width)
        self.blur = blur_if(blurred, width)
        self.conv3 = conv(width, width * self.expansion, 1)
        self.downsample = downsample(in_channels, width * self.expansion, stride, blurred, norm=False)
        self.drop_path = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(relu(self.bn1(x)))
        out = self.conv2(relu(self.bn2(out)))
        out = self.conv3(self.blur(relu(self.bn3(out))))
        return self.drop_path(out, self.downsample(x))

    def silence(self) -> None:
        nn.init.zeros_(self.conv3.weight)  # no norm closes this branch: its last layer takes that part


def downsample(
    in_channels: int, out_channels: int, stride: int, blurred: bool, norm: bool = True
) -> nn.Module:
    """The shortcut: the input itself where shapes agree, else a 1x1 projection."""
    if stride == 1 and in_channels == out_channels:
        return nn.Identity()
    layers = OrderedDict()
    if blurred:
        layers["blur"] = Blur(in_channels)  # named, so that the numbers below stay torchvision's
    layers["0"] = conv(in_channels, out_channels, 1, 1 if blurred else stride)
    if norm:
        layers["1"] = nn.BatchNorm2d(out_channels)
    return nn.Sequential(layers)


class LinearHead(nn.Linear):
    """The classifier as a linear layer on pooled features (N, C, 1, 1)."""

    def forward(self, pooled: Tensor) -> Tensor:
        return super().forward(pooled.flatten(1))


class ResNet(nn.Module):
    """Stem, four stages of blocks, mean, classifier.

    block:          BasicBlock, Bottleneck or PreActBottleneck
    depths:         blocks per stage
    drop_path_rate: of the last block; the blocks before it follow the linear rule from 0
    head:           "conv" (1x1 convolution) or "linear"; the weights differ by a reshape only
    stem:           "imagenet" (7x7 stride 2, pool), "small" (3x3, no pool, for images of about 32 px) or
                    "d" (three 3x3 in place of the 7x7, https://arxiv.org/abs/1812.01187)
    base_width:     channels of the first stage, doubled at each of the others
    """

    def __init__(
        self,
        block: type[nn.Module],
        depths: tuple[int, ...],
        *,
        num_classes: int,
        drop_path_rate: float,
        use_blurpool: bool,
        head: str,
        stem: str,
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
                blocks.append(block(channels, width, stride, use_blurpool))
                channels = width * block.expansion
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self._init_weights()
        # The head keeps torch's own initialisation: fan_out of a few classes would give it huge logits.
        self.fc = classifier(head, channels, num_classes)
        set_drop_path_rate(self, drop_path_rate)

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for module in self.modules():
            if isinstance(module, (BasicBlock, Bottleneck, PreActBottleneck)):
                module.silence()  # every block starts as the identity (https://arxiv.org/abs/1706.02677)

    def features(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> the last map, (N, C, ceil(H / 32), ceil(W / 32)); the small stem: / 8."""
        x = self.maxpool(relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> logits (N, K)."""
        # A mean, because adaptive pooling has no deterministic backward on CUDA.
        pooled = self.features(images).mean((2, 3), keepdim=True)
        return self.fc(pooled).flatten(1)


class PreActResNet(ResNet):
    """ResNet of pre-activation blocks: the norm and ReLU that follow the stem come after the last block."""

    def __init__(self, depths: tuple[int, ...], **options):
        super().__init__(PreActBottleneck, depths, **options)
        del self.bn1
        self.bn_out = nn.BatchNorm2d(self.fc.weight.shape[1])

    def features(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.conv1(images))
        return relu(self.bn_out(self.layer4(self.layer3(self.layer2(self.layer1(x))))))


def stem_conv(stem: str, width: int) -> nn.Module:
    """(N, 3, H, W) -> (N, width, ...), halved except by the small stem."""
    if stem == "imagenet":
        return conv(3, width, 7, stride=2)
    if stem == "small":
        return conv(3, width, 3)
    if stem == "d":
        half = width // 2
        return nn.Sequential(
            conv(3, half, 3, stride=2),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv(half, half, 3),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            conv(half, width, 3),
        )
    raise UsageError(f"there is no stem {stem!r}", "choose imagenet, small or d")


def stem_pool(stem: str, use_blurpool: bool, width: int) -> nn.Module:
    if stem == "small":
        return nn.Identity()
    if use_blurpool:
        # Padded, so that the map keeps its even size: the unpadded pool turns 112 px into 110.
        return nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), Blur(width))
    return nn.MaxPool2d(3, stride=2, padding=1)


def classifier(head: str, channels: int, num_classes: int) -> nn.Module:
    """(N, C, 1, 1) -> (N, K, 1, 1) or (N, K)."""
    if head == "conv":
        return nn.Conv2d(channels, num_classes, kernel_size=1)
    if head == "linear":
        return LinearHead(channels, num_classes)
    raise UsageError(f"there is no head {head!r}", "choose conv or linear")


def resnet18(
    num_classes: int = 1000,
    drop_path_rate: float = 0.2,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
) -> ResNet:
    return ResNet(
        BasicBlock,
        (2, 2, 2, 2),
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_blurpool=use_blurpool,
        head=head,
        stem=stem,
    )


def resnet34(
    num_classes: int = 1000,
    drop_path_rate: float = 0.2,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
) -> ResNet:
    return ResNet(
        BasicBlock,
        (3, 4, 6, 3),
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_blurpool=use_blurpool,
        head=head,
        stem=stem,
    )


def resnet50(
    num_classes: int = 1000,
    drop_path_rate: float = 0.2,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
) -> ResNet:
    return ResNet(
        Bottleneck,
        (3, 4, 6, 3),
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_blurpool=use_blurpool,
        head=head,
        stem=stem,
    )


def preact_resnet50(
    num_classes: int = 1000,
    drop_path_rate: float = 0.2,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
) -> PreActResNet:
    return PreActResNet(
        (3, 4, 6, 3),
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_blurpool=use_blurpool,
        head=head,
        stem=stem,
    )


def resnet_tiny(
    num_classes: int = 1000,
    drop_path_rate: float = 0.2,
    use_blurpool: bool = False,
    head: str = "conv",
    stem: str = "imagenet",
) -> ResNet:
    """A ResNet-10 an eighth as wide: 80 thousand parameters, to try things out and for tests."""
    return ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        num_classes=num_classes,
        drop_path_rate=drop_path_rate,
        use_blurpool=use_blurpool,
        head=head,
        stem=stem,
        base_width=8,
    )
