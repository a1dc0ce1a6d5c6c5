"""Edits per second: independent edits trained as one batch, against the loop that the field uses."""

import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench.quality.emoji import records
from bench.quality.rows import Row, RowEditor
from bench.quality.tables import markdown
from bench.quality.world import request, with_memory
from unike_kernels.config import UnikeConfig
from unike_kernels.editing.train import GroupTrainer, _Pass
from unike_kernels.edits_schema import EditEntry
from unike_kernels.models import get_module

GOAL = 10.0  # times the naive loop
NAIVE = "naive loop (deepcopy, one edit, whole forward)"
ONE = "Editor, one edit at a time"
ONE_AT_A_TIME = (NAIVE, ONE)
SLOW = 24  # edits of these two on a GPU, whose minutes are dear
SIZES = (32, 128)  # edits in a batch: the default, and what a small model has room for
SAME_LOSS = 1e-2  # of the edits' final losses, on average: float sums in another order move single steps

Way = Callable[[RowEditor, list[dict[str, Any]]], list[EditEntry]]


class WholeForward(GroupTrainer):
    """Trains with the model's own whole forward at every step, as public editing code does."""

    def _pass(self, samples: Any, rows: Tensor) -> _Pass:
        batch = self.collator.batch(samples, rows.tolist())
        return _Pass(rows, rows + len(self.handle.edits) - len(samples), batch, None)

    def _tail(self, work: _Pass, *, whole: bool = True) -> Tensor:
        kept: list[Tensor] = []
        decoder = get_module(self.model, self.decoder.name)
        hook = decoder.register_forward_hook(lambda module, args, output: kept.append(output[0]))
        self.handle.set_cases(work.batch.token_to_case(), work.batch.case_rows())
        try:
            work.batch.model(**work.batch.inputs, use_cache=False)
        finally:
            self.handle.set_cases()
            hook.remove()
        return kept[0]


class NaiveEditor(RowEditor):
    """The library's editor, but for the whole forward at every step."""

    trainer = WholeForward


def naive(editor: RowEditor, requests: list[dict[str, Any]]) -> list[EditEntry]:
    """One edit after another, each on its own copy of the model."""
    out = []
    for asked in requests:
        model = copy.deepcopy(editor.model)
        alone = NaiveEditor(model, editor.collator.processor, editor.config).prepare(Row("UniKE"), editor)
        out += alone.edit([asked], independent=False, progress=False).entries
    return out


def one_by_one(editor: RowEditor, requests: list[dict[str, Any]]) -> list[EditEntry]:
    """The library's editor, one edit at a time: no copies, and the lower layers run once an edit."""
    return [e for asked in requests for e in editor.edit([asked], independent=True, progress=False).entries]


def together(editor: RowEditor, requests: list[dict[str, Any]]) -> list[EditEntry]:
    """The library's editor: all edits in batches."""
    return list(editor.edit(requests, independent=True, progress=False).entries)


def in_batches(size: int) -> Way:
    """`together` with this many edits in a batch."""

    def way(editor: RowEditor, requests: list[dict[str, Any]]) -> list[EditEntry]:
        neurons = replace(editor.config.neurons, batch_size=size)
        like = RowEditor(editor.model, editor.collator.processor, editor.config).prepare(Row("UniKE"), editor)
        like.config = replace(like.config, neurons=neurons)
        return together(like, requests)

    return way


WAYS: dict[str, Way] = {
    NAIVE: naive,
    ONE: one_by_one,
    **{f"Editor, batches of {size}": in_batches(size) for size in SIZES},
}


def now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def run(
    seed: int,
    edits: int = 128,
    rounds: int = 3,
    *,
    quick: bool = False,
    device: torch.device | str = "cpu",
    slow: int | None = None,
) -> dict[str, Any]:
    """Every way in turn, `rounds` times over; the result's "differ" says where they do not come to the same edits.

    slow: edits of the two ways that train one at a time, the first of them (None: all); their rate is per edit anyway.
    """
    device = torch.device(device)
    base = with_memory(seed, UnikeConfig(), RowEditor, quick=quick, device=device)
    base.fit(progress=False)
    requests = [request(r) for r in records.records("development", "name", edits)]

    def asked_of(name: str, few: int | None) -> list[dict[str, Any]]:
        return requests[:few] if name in ONE_AT_A_TIME else requests

    found: dict[str, list[EditEntry]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    cpu: dict[str, list[float]] = {name: [] for name in WAYS}
    # cuDNN would round a picture's convolution to TF32, by another kernel for one picture than for 128
    exactly = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with warnings.catch_warnings(), exactly:
        warnings.filterwarnings("ignore", message=".* edits miss their target")
        together(base, requests[:2])  # first calls allocate
        if device.type == "cuda":  # and compile a kernel for every kind of size
            for name in tqdm(WAYS, desc="first calls", unit="run"):
                WAYS[name](base, asked_of(name, 2))
        for name in tqdm([*WAYS] * rounds, desc=f"model {seed}", unit="run"):
            asked = asked_of(name, slow)
            started, used = now(device), time.process_time()
            found[name] = WAYS[name](base, asked)
            seconds[name].append((now(device) - started) / len(asked))
            cpu[name].append((time.process_time() - used) / len(asked))
    rows = {
        name: {
            "edits_per_second": 1 / statistics.median(seconds[name]),
            "edits_per_cpu_second": 1 / statistics.median(cpu[name]),
            # within a round, so that what else the machine does changes little
            "times_naive": statistics.median(a / b for a, b in zip(seconds[NAIVE], seconds[name], strict=True)),
            "times_naive_cpu": statistics.median(a / b for a, b in zip(cpu[NAIVE], cpu[name], strict=True)),
            "mean_steps": statistics.fmean(e.steps or 0 for e in found[name]),
            "reached": f"{sum(bool(e.success) for e in found[name])} of {len(found[name])}",
        }
        for name in WAYS
    }
    about = {"seed": seed, "edits": edits, "slow": slow, "rounds": rounds, "threads": torch.get_num_threads()}
    about["differ"] = differences(found)
    return about | {"device": device.type if device.type == "cpu" else torch.cuda.get_device_name(device), "rows": rows}


def differences(found: dict[str, list[EditEntry]]) -> list[str]:
    """Which ways do not reach the same targets as the first, or not the same losses but for rounding."""
    (name, first), *others = found.items()
    told = []
    for other, entries in others:
        pairs = list(zip(first, entries, strict=False))  # the ways may have made more and fewer of the same edits
        reached = [[pair[i].success for pair in pairs] for i in range(2)]
        off = [abs((a.loss or 0.0) - (b.loss or 0.0)) for a, b in pairs]
        if reached[0] != reached[1] or sum(off) / len(off) > SAME_LOSS:
            told.append(
                f"{name} and {other} do not make the same edits: {sum(map(bool, reached[0]))} and "
                f"{sum(map(bool, reached[1]))} reach their target, the losses differ by {sum(off) / len(off):.4f} on "
                f"average (at most {SAME_LOSS})"
            )
    return told


def table(result: dict[str, Any]) -> str:
    """The ways beside each other, and whether the goal is met."""
    head = ["way", "edits / s", "times naive", "edits / CPU s", "times naive, CPU", "mean steps", "reached"]
    lines = [
        [
            name,
            f"{r['edits_per_second']:.2f}",
            f"{r['times_naive']:.1f}",
            f"{r['edits_per_cpu_second']:.2f}",
            f"{r['times_naive_cpu']:.1f}",
            f"{r['mean_steps']:.1f}",
            r["reached"],
        ]
        for name, r in result["rows"].items()
    ]
    rows, device = result["rows"], result.get("device", "cpu")
    # what else the machine does slows wall time, never CPU time: the smaller ratio counts; a GPU's work is in neither
    counted = ("times_naive", "times_naive_cpu") if device == "cpu" else ("times_naive",)
    times = {name: min(r[c] for c in counted) for name, r in rows.items()}
    name = max(times, key=lambda n: times[n])
    differ = result.get("differ", [])
    verdict = "met" if times[name] >= GOAL and not differ else "**MISSED**"
    told = "wall and in CPU time" if device == "cpu" else "wall time"
    goal = f"- {verdict}: {GOAL:g} times the naive loop, in {told} ({times[name]:.1f}, {name})"
    goal += "".join(f"\n- **{words}**" for words in differ)
    where = f"{result['threads']} threads" if device == "cpu" else device
    slow = result.get("slow")
    fewer = f" ({slow} of them one at a time)" if slow else ""
    about = f"{result['edits']} edits{fewer}, median of {result['rounds']} rounds, {where}"
    return f"#### Base model {result['seed']}: {about}\n\n{markdown(head, lines)}\n\n{goal}"
