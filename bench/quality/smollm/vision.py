"""MobileNetV2 (Sandler et al., 2018) under torchvision's attribute names, and the pictures it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

# (expansion, channels, blocks, stride of the first block): table 2 of the paper
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, WIDTH = 32, 1280  # channels after the first and the last convolution
IMAGE_SIZE = 160  # pixels, 5 x 5 patches; trained at 224, at three times the time for drawings of 64 x 64 pixels
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as the weights were trained
BILINEAR = 2  # PIL's filter


def unit(channels: int, out: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU6."""
    convolution = nn.Conv2d(channels, out, size, stride, (size - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Widen with 1 x 1, filter every channel with 3 x 3, narrow with 1 x 1; added to its input where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == out
        parts: list[nn.Module] = [] if expansion == 1 else [unit(channels, wide, 1)]
        parts += [unit(wide, wide, 3, stride, wide), nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, out, H / stride, W / stride]."""
        return x + self.conv(x) if self.residual else self.conv(x)


class MobileNetV2(nn.Module):
    """A vision tower: pictures [B, 3, H, W] to patches [B, H / 32 * W / 32, WIDTH]; `classify`: ImageNet logits."""

    def __init__(self, classes: int = 1000) -> None:
        super().__init__()
        blocks: list[nn.Module] = [unit(3, STEM, stride=2)]
        channels = STEM
        for expansion, out, count, stride in STAGES:
            for i in range(count):
                blocks.append(InvertedResidual(channels, out, stride if i == 0 else 1, expansion))
                channels = out
        self.features = nn.Sequential(*blocks, unit(channels, WIDTH, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, classes))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """The last feature map, row by row."""
        return self.features(pixel_values).flatten(2).transpose(1, 2)

    def classify(self, pixel_values: Tensor) -> Tensor:
        """[B, classes] logits."""
        return self.classifier(self(pixel_values).mean(1))


def make_image_processor() -> Any:
    """transformers' processor with ImageNet's mean and deviation: pictures to [B, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return BlipImageProcessorPil(size=size, resample=BILINEAR, image_mean=list(MEAN), image_std=list(STD))


def normalise(pictures: Tensor) -> Tensor:
    """[0, 1] pictures [B, 3, H, W] at IMAGE_SIZE, as the image processor gives them but for its rounding to 8 bits."""
    grown = nn.functional.interpolate(pictures, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(v, device=pictures.device).view(3, 1, 1) for v in (MEAN, STD))
    return (grown - mean) / std
