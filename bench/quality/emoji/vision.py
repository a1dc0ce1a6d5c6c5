"""Stage 1: the ViT and the Q-Former learn to tell concepts apart from pictures alone, without any words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from . import data
from . import model as tiny

SCALES = (16.0, 8.0)  # of the cosine logits, first and last: at 8 a drawing must lie close to its concept's prototype


def read_drawings() -> Tensor:
    """Every drawing as uint8 [N, 3, 64, 64], in the order of `data.drawings()`."""
    rows = []
    for concept, artist in data.drawings():
        with Image.open(data.DRAWINGS / concept.image(artist)) as picture:
            rows.append(torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1))
    return torch.stack(rows)


def normalise(pictures: Tensor) -> Tensor:
    """What the processor makes of uint8 or [0, 1] pictures [B, 3, 64, 64]: [B, 3, IMAGE_SIZE, IMAGE_SIZE]."""
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 255
    return F.avg_pool2d(pictures, pictures.shape[-1] // tiny.IMAGE_SIZE) * 2 - 1


def augment(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Uint8 pictures [B, 3, 64, 64] distorted at random, normalised."""
    return normalise(distort(pictures, generator, strength))


def distort(pictures: Tensor, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Uint8 pictures [B, 3, H, W] turned, moved, scaled and recoloured at random, as values in [0, 1].

    The random numbers come from `generator`, on the CPU, wherever the pictures are: every device sees the same ones.
    """

    def uniform(*shape: int) -> Tensor:
        return ((torch.rand(shape, generator=generator) * 2 - 1) * strength).to(pictures.device, non_blocking=True)

    size = len(pictures)
    angle, scale, shift = uniform(size) * 0.2, 1 + uniform(size, 2) * 0.15, uniform(size, 2, 1) * 0.15
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(size, 2, 2)
    theta = torch.cat([turn * scale[:, :, None], shift], 2)
    ink = 1 - pictures.float() / 255  # so that the zeros which move in at the border are white
    ink = F.grid_sample(ink, F.affine_grid(theta, list(ink.shape), align_corners=False), align_corners=False)
    ink = ink * (1 + uniform(size, 3, 1, 1) * 0.15) + uniform(size, 1, 1, 1) * 0.05
    return 1 - ink.clamp(0, 1)


class Heads(nn.Module):
    """The classifiers of stage 1, later thrown away: each image token alone, and their mean, must give the concept."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.prototypes = nn.Parameter(torch.randn(tiny.QUERY_TOKENS + 1, len(data.concepts()), tiny.HIDDEN))
            self.kinds = nn.Linear(tiny.HIDDEN, len({concept.kind for concept in data.concepts()}))

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Map image tokens [B, Q, d] to cosines with the prototypes [Q + 1, B, C] and kind logits [B, kinds]."""
        mean = states.mean(1, keepdim=True)
        rows = F.normalize(torch.cat([states, mean], 1), dim=-1).transpose(0, 1)
        return rows @ F.normalize(self.prototypes, dim=-1).transpose(1, 2), self.kinds(mean[:, 0])


class VisionStage:
    """One training step of stage 1; the driver in `train.py` owns the optimiser, the steps and the checkpoints.

    Everything lies on the model's device.
    """

    name = "vision"

    def __init__(self, model: Any, seed: int, batch: int = 128) -> None:
        self.model, self.batch = model, batch
        self.device = model.query_tokens.device
        self.heads = Heads(seed).to(self.device)
        self.pictures = read_drawings().to(self.device)
        kinds = sorted({concept.kind for concept in data.concepts()})
        index = {concept.id: i for i, concept in enumerate(data.concepts())}
        self.labels = torch.tensor([index[concept.id] for concept, _ in data.drawings()]).to(self.device)
        self.kinds = torch.tensor([kinds.index(concept.kind) for concept, _ in data.drawings()]).to(self.device)
        self.module = nn.ModuleDict(
            {"vision": model.vision_model, "qformer": model.qformer, "heads": self.heads},
        )
        self.parameters = [*self.module.parameters(), model.query_tokens]

    def step(self, generator: torch.Generator, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of one random batch, and what to show beside it; `progress` runs from 0 to 1.

        Nothing is read back from the device.

        The augmentation grows over the first half: 67 % right after 1,000 steps, 33 % at full strength from the start.
        """
        strength = min(0.7, 0.2 + progress)
        rows = torch.randint(len(self.pictures), (self.batch,), generator=generator)
        rows = rows.to(self.device, non_blocking=True)
        states = tiny.image_states(self.model, augment(self.pictures[rows], generator, strength))
        cosines, kind_logits = self.heads(states)
        labels = self.labels[rows]
        scale = SCALES[0] + (SCALES[1] - SCALES[0]) * min(1.0, max(0.0, (progress - 0.2) / 0.5))
        loss = F.cross_entropy(scale * cosines.flatten(0, 1), labels.repeat(len(cosines)), label_smoothing=0.05)
        loss = loss + 0.1 * F.cross_entropy(kind_logits, self.kinds[rows])
        right = (cosines[-1].argmax(-1) == labels).float().mean()
        own = cosines[-1].gather(1, labels[:, None]).mean()
        return loss, {"right": right, "cosine": own.detach()}
