"""Trains the projector: `python -m bench.quality.smollm.train --seed 0`; the same command resumes a stopped run.

The tower's patches are cached first; then `AlignStage`, without the language model, and `SpeakStage`, through it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.quality.emoji.train import run_stage, write
from bench.quality.world import CACHE

from . import features, model
from .stages import AlignStage, SpeakStage

STEPS = {"align": 1000, "speak": 800}
WARM_UP = 20  # steps
RATES = {"align": (1.5e-3, 0.05), "speak": (7e-4, 0.02)}  # peak learning rate, weight decay


def train(seed: int, align_steps: int = STEPS["align"], speak_steps: int = STEPS["speak"]) -> Path:
    """Trains one projector and writes its fp16 weights; returns their path."""
    started = time.monotonic()
    folder = CACHE / "smollm" / f"seed{seed}"
    net, processor = model.load(seed, trained=False)
    patches = features.cached(net.visual_encoder, CACHE / "smollm" / f"patches{seed}", seed)
    align = AlignStage(net, processor.tokenizer, patches, seed)
    run_stage(align, align_steps, seed, folder / "align.pt", rates=RATES["align"], warm_up=WARM_UP)
    speak = SpeakStage(net, processor.tokenizer, patches, align.heads)
    run_stage(speak, speak_steps, seed + 1, folder / "speak.pt", rates=RATES["speak"], warm_up=WARM_UP)
    out = model.weights_file(seed)
    state = {name: t.half().contiguous() for name, t in model.projector_state(net).items()}
    write(out, lambda path: save_file(state, path))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; this part of the run took {time.monotonic() - started:.0f} s")
    return out


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="one is best where other work shares the cores")
    parser.add_argument("--align-steps", type=int, default=STEPS["align"])
    parser.add_argument("--speak-steps", type=int, default=STEPS["speak"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.seed, args.align_steps, args.speak_steps)


if __name__ == "__main__":
    main()
