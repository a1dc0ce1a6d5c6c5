"""Train the tiny BLIP-2: `python -m bench.quality.emoji.train --seed 0`; the same command resumes a stopped run."""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from unike_kernels.files import replacing

from . import data, evaluate
from . import model as tiny
from .language import VIEWS, LanguageStage, cache_features
from .vision import VisionStage

CACHE = tiny.HERE / ".cache"
VISION_STEPS, LANGUAGE_STEPS = 2500, 900
LEARNING_RATE = {"vision": 3e-3, "language": 1.5e-3}
WEIGHT_DECAY = {"vision": 0.05, "language": 0.01}
WARM_UP = 150  # steps
SHOWN_EVERY = 20  # steps: reading a figure makes the host wait for the device, so not at every step on a GPU


def rate(step: int, steps: int, peak: float, warm_up: int = WARM_UP) -> float:
    """The learning rate: a linear warm-up, then a cosine down to 2 % of `peak`."""
    return peak * min(1.0, (step + 1) / warm_up) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


def write(path: Path, save: Any) -> None:
    """Call `save(temporary path)` and rename, so that a killed run never leaves half a file."""
    with replacing(path) as half:
        save(half)
        half.chmod(0o644)  # safetensors writes for the owner only


def run_stage(
    stage: Any,
    steps: int,
    seed: int,
    checkpoint: Path,
    *,
    stop_at: int | None = None,
    every: float = 60.0,
    rates: tuple[float, float] | None = None,
    warm_up: int = WARM_UP,
) -> bool:
    """Run `stage` up to `steps` from its checkpoint; True when it is finished.

    On the CPU that is bit for bit as if never stopped. A checkpoint of one device goes on on another. `stop_at` ends
    the run early (as a kill would, with a checkpoint); `every` is the seconds between checkpoints. `rates`: the peak
    learning rate and the weight decay, this file's own for the stage's name by default.
    """
    peak, decay = rates or (LEARNING_RATE[stage.name], WEIGHT_DECAY[stage.name])
    optimizer = torch.optim.AdamW(stage.parameters, lr=peak, weight_decay=decay, betas=(0.9, 0.98), fused=True)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")  # the generator's state must be there
        for parameter, value in zip(stage.parameters, saved["parameters"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        start = saved["step"]

    def save(step: int) -> None:
        state = {
            "step": step,
            "parameters": [parameter.detach() for parameter in stage.parameters],
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
        }
        write(checkpoint, lambda path: torch.save(state, path))

    stage.module.train()
    last_saved, end = time.monotonic(), min(steps, stop_at if stop_at is not None else steps)
    averages: dict[str, torch.Tensor] = {}
    shown_every = 1 if stage.device.type == "cpu" else SHOWN_EVERY
    progress = tqdm(range(start, end), initial=start, total=steps, desc=f"{stage.name} {seed}", mininterval=5)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, peak, warm_up)
        loss, shown = stage.step(generator, step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(stage.parameters, 1.0)
        optimizer.step()
        for key, value in {"loss": loss.detach(), **shown}.items():
            averages[key] = torch.lerp(averages.get(key, value), value, 0.02)
        if (step + 1) % shown_every == 0:
            figures = zip(averages, torch.stack([*averages.values()]).tolist(), strict=True)
            progress.set_postfix({key: f"{value:.3f}" for key, value in figures}, refresh=False)
        if time.monotonic() - last_saved > every:
            save(step + 1)
            last_saved = time.monotonic()
    save(end)
    stage.module.eval()
    return end == steps


def save_weights(model: Any, seed: int) -> None:
    """Write the weights in fp16, tied ones once, and round `model` itself so that what is measured is what ships."""
    for parameter in model.parameters():
        parameter.data.copy_(parameter.data.half().float())
    state = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if not name.endswith(("lm_head.weight", "position_ids"))}
    write(tiny.weights_file(seed), lambda path: save_file(state, path, metadata={"format": "pt"}))


def default_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def train(
    seed: int,
    vision_steps: int = VISION_STEPS,
    language_steps: int = LANGUAGE_STEPS,
    device: torch.device | None = None,
) -> None:
    """Train one base model on `device` (default: `default_device()`) and write its weights and its report."""
    device = device if device is not None else default_device()
    if not tiny.TOKENIZER_FILE.exists():
        write(tiny.TOKENIZER_FILE, lambda path: tiny.train_tokenizer(list(data.corpus())).save(str(path)))
    processor, model = tiny.make_processor(), tiny.make_model(seed).to(device)
    folder = CACHE / f"seed{seed}"
    run_stage(VisionStage(model, seed), vision_steps, seed, folder / "vision.pt")
    features = folder / "features.pt"
    if not features.exists():
        generator = torch.Generator().manual_seed(seed + 1)
        write(features, lambda path: torch.save(cache_features(model, generator, VIEWS).half().cpu(), path))
    stage = LanguageStage(model, processor, torch.load(features, weights_only=True, map_location=device).float())
    run_stage(stage, language_steps, seed + 2, folder / "language.pt")
    save_weights(model, seed)
    report(seed)


def report(seed: int) -> None:
    """Measure the weights of `seed` on the CPU, print the figures and write them beside the weights."""
    text = json.dumps(evaluate.report(*tiny.load(seed)), indent=1)
    print(text)
    write(tiny.weights_file(seed).with_suffix(".json"), lambda path: path.write_text(text + "\n", encoding="utf-8"))


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one is best where other work shares the cores")
    parser.add_argument("--vision-steps", type=int, default=VISION_STEPS)
    parser.add_argument("--language-steps", type=int, default=LANGUAGE_STEPS)
    parser.add_argument("--device", type=torch.device, default=default_device(), help="default: %(default)s")
    parser.add_argument("--report", action="store_true", help="only measure the weights that are there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.report:
        report(args.seed)
    else:
        train(args.seed, args.vision_steps, args.language_steps, args.device)


if __name__ == "__main__":
    main()
