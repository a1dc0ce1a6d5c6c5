"""The frozen tower's patches of every drawing, clean and distorted, computed once and kept in files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from bench.quality.emoji import data
from bench.quality.emoji import vision as drawn
from unike_kernels.files import replacing

from . import vision

VIEWS = 8  # of every drawing: the drawing itself and distortions of it
STRENGTH = 0.7  # of a distortion, as at the end of the emoji world's own training


@torch.no_grad()
def view(tower: nn.Module, pictures: Tensor, number: int, seed: int, batch: int = 32) -> Tensor:
    """fp16 patches [N, P, WIDTH] of uint8 pictures [N, 3, H, W]; number 0 is the drawings as they are."""
    generator = torch.Generator().manual_seed(1000 * seed + number)
    rows = []
    for part in tqdm(pictures.split(batch), desc=f"patches, view {number}", mininterval=5, leave=False):
        shown = drawn.distort(part, generator, STRENGTH) if number else part.float() / 255
        rows.append(tower(vision.normalise(shown)).half())
    return torch.cat(rows)


def cached(tower: nn.Module, folder: Path, seed: int = 0, views: int = VIEWS) -> Tensor:
    """[views, N, P, WIDTH] of all drawings in `data.drawings()`'s order; a stopped run goes on with the next view."""
    found = []
    for number in range(views):
        path = folder / f"view{number}.pt"
        if not path.exists():
            with replacing(path) as half:
                torch.save(view(tower, drawn.read_drawings(), number, seed), half)
        found.append(torch.load(path, weights_only=True))
    return torch.stack(found)


def held_out_drawings(every: int = 6) -> set[tuple[str, str]]:
    """(concept id, artist) never shown in training: one artist each of every sixth known concept drawn by three."""
    three = [c for c in data.splits()["known"] if len(c.artists) == 3]
    return {(c.id, c.artists[i % 3]) for i, c in enumerate(three[::every])}
