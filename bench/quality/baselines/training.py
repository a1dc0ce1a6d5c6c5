"""Training what a method learns beforehand: resumable, seeded, with a progress bar, cached under all it depends on."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from unike_kernels.editing.inputs import image_digest
from unike_kernels.evaluation.records import Record

SAVE_EVERY = 30.0  # seconds between checkpoints


def key(model: nn.Module, records: Sequence[Record], settings: dict[str, Any], code: Iterable[Any]) -> str:
    """A digest of all that decides what is learned: base weights, records with their pictures, settings and code.

    code: modules; comments and docstrings do not count.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    pictures: dict[int, str | None] = {}
    for record in records:
        for probe in record.probes:
            s = probe.sample
            if id(s.image) not in pictures:
                pictures[id(s.image)] = image_digest(s.image)
            told = (record.id, probe.kind, probe.part, s.prompt, s.target, pictures[id(s.image)])
            digest.update(repr(told).encode())
    for module in code:
        digest.update(_meaning(inspect.getsource(module)).encode())
    return digest.hexdigest()[:16]


def _meaning(source: str) -> str:
    """The source without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree)


def train(
    module: nn.Module,
    step: Callable[[int, torch.Generator], dict[str, Tensor]],
    steps: int,
    *,
    lr: float,
    seed: int,
    name: str,
    file: Path | None,
    progress: bool = True,
) -> list[dict[str, float]]:
    """Adam on the module's parameters with the losses of `step`; the rate falls along a cosine. Returns what it showed.

    step: takes its number and a generator of its own; returns "loss" and what to show beside it. file: where the
    finished weights lie (then nothing runs) or will lie; beside it a stopped training goes on. Gradients are clipped.
    """
    half = None if file is None else file.with_suffix(".partial")
    if file is not None and file.exists():
        module.load_state_dict(load_file(file))
        return json.loads(file.with_suffix(".json").read_text())
    groups = module.rates(lr) if hasattr(module, "rates") else [{"params": list(module.parameters()), "lr": lr}]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    shown: list[dict[str, float]] = []
    begin = 0
    if half is not None and half.exists():
        kept = torch.load(half, weights_only=True)
        module.load_state_dict(kept["module"])
        optimizer.load_state_dict(kept["optimizer"])
        schedule.load_state_dict(kept["schedule"])
        begin, shown = kept["step"], kept["shown"]
    saved, module_was_training = time.monotonic(), module.training
    module.train()
    sums: dict[str, float] = {}
    with torch.enable_grad(), tqdm(total=steps, initial=begin, desc=name, mininterval=5, disable=not progress) as bar:
        for n in range(begin, steps):
            generator = torch.Generator().manual_seed(1_000_003 * seed + n)  # so that a stopped run goes on the same
            found = step(n, generator)
            optimizer.zero_grad()
            found["loss"].backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            for k, v in found.items():
                sums[k] = sums.get(k, 0.0) + float(v.detach())
            bar.update()
            if (n + 1) % 50 == 0 or n + 1 == steps:
                count = (n + 1) % 50 or 50
                shown.append({k: round(v / count, 4) for k, v in sums.items()} | {"step": n + 1})
                bar.set_postfix({k: f"{v:.3f}" for k, v in shown[-1].items() if k != "step"})
                sums = {}
                if half is not None and time.monotonic() - saved > SAVE_EVERY and n + 1 < steps:
                    kept = {
                        "module": module.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "schedule": schedule.state_dict(),
                        "step": n + 1,
                        "shown": shown,
                    }
                    _whole(half, lambda p, kept=kept: torch.save(kept, p))
                    saved = time.monotonic()
    module.train(module_was_training)
    if file is not None and half is not None:
        _whole(file.with_suffix(".json"), lambda p: p.write_text(json.dumps(shown)))
        weights = {k: v.detach().cpu().contiguous().clone() for k, v in module.state_dict().items()}
        _whole(file, lambda p: save_file(weights, p))
        half.unlink(missing_ok=True)
    return shown


def _whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".tmp")
    write(part)
    part.replace(path)
