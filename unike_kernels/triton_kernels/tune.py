"""Finds launch choices on the GPU at hand: tries the neighbours of every choice of the table, one entry at a time.

A neighbour counts if its results are those of the current choice, and wins if it is faster over all cases that use the
row. Rows that no case here uses (more than 64 items, say) keep their choice. Small inputs stay in the GPU's caches, as
those of a real decode step do not: the times serve to compare choices, and are no figures of the operators.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import cuda_kernels, native
from . import launcher, tuning

GAIN = 0.97  # a choice wins if it takes at most so much of the time: less is noise
ROUNDS = 4
Run = Callable[[], Sequence[Tensor]]


class Model(NamedTuple):
    """The sizes that cases are made of. items: of the memory; n: neurons, in groups of 10."""

    d: int
    width: int
    heads: int
    gated: bool
    act: str
    n: int = 20_000
    items: int = 10_000
    k: int = 40


MODELS = {"opt-2.7b": Model(2560, 10240, 32, False, "relu"), "vicuna-7b": Model(4096, 11008, 32, True, "silu")}
Key = tuple[str, int, tuple[tuple[str, int], ...]]


def key(row: tuning.Row) -> Key:
    """What a row is known by."""
    return row.kernel, row.arch, tuple(sorted(row.at_most.items()))


def neighbours(choice: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Choices that differ in one entry: warps, stages, or a block (also a number of programs) halved or doubled; of a
    CUDA C++ kernel (SPLIT, ROWS, launches, copies) all that it is built for.
    """
    in_cuda = {"SPLIT": 8, "ROWS": 4, "launches": 2, "copies": 2}
    if in_cuda.keys() & choice.keys():
        for name in choice:
            yield from ({**choice, name: n} for n in (1, 2, 4, 8) if n != choice[name] and n <= in_cuda[name])
        return
    for name, options in (("num_warps", (4, 8)), ("num_stages", (2, 3, 4))):
        for option in options:
            if choice.get(name) != option:
                yield {**choice, name: option}
    for name, size in choice.items():
        if name.startswith("num_"):
            continue
        for other in (size // 2, 2 * size):
            if other >= 16:  # the least that tensor cores take
                yield {**choice, name: other}


def same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results differ by no more than another order of summation; few indices may change places among equals."""
    if len(found) != len(expected):
        return False
    for a, b in zip(found, expected, strict=True):
        if not b.is_floating_point():
            if a.numel() and float((a != b).double().mean()) > 0.01:
                return False
            continue
        if not bool(torch.isfinite(a).all()):
            return False
        scale = float(b.abs().max()) if b.numel() else 0.0
        # float32 sums of thousands of products differ by some 1e-5 of the largest; halves by two units of rounding.
        most = scale * max(1e-4, 4 * torch.finfo(b.dtype).eps)
        if a.numel() and float((a.double() - b.double()).abs().max()) > most:
            return False
    return True


class Tuner:
    """The search over the rows that `cases` use; measure: the time of a call of a case."""

    def __init__(self, cases: Mapping[str, Run], measure: Callable[[Run], float]) -> None:
        self.cases, self.measure = cases, measure
        self.chosen: dict[Key, dict[str, int]] = {}
        self.refused: list[str] = []  # choices that failed or were wrong, and why
        self.rows: list[tuning.Row] = []
        self._users: dict[Key, list[str]] = {}
        self._expected: dict[str, list[Tensor]] = {}
        for name, run in cases.items():
            used: list[tuning.Row] = []
            with tuning.trying(partial(_note, used)):
                self._expected[name] = [t.clone() for t in run()]
            for row in used:
                users = self._users.setdefault(key(row), [])
                if name not in users:
                    users.append(name)
                if len(users) == 1 and users[0] == name and all(key(r) != key(row) for r in self.rows):
                    self.rows.append(row)

    def improve(self, row: tuning.Row) -> dict[str, int]:
        """The best choice for a row, the winners so far taken for all others. It is kept in `chosen`."""
        best = dict(self.chosen.get(key(row), row.choice))
        times = self._times(row, best)
        if times is None:
            raise RuntimeError(f"the current choice of {row} is not usable: {self.refused[-1]}")
        tried = [best]
        for _ in range(ROUNDS):
            leader, quickest = None, times
            for choice in neighbours(best):
                if choice in tried:
                    continue
                tried.append(choice)
                found = self._times(row, choice)
                if found is not None and _ratio(found, quickest) <= (GAIN if leader is None else 1.0):
                    leader, quickest = choice, found
            if leader is None:
                break
            best, times = leader, quickest
        self.chosen[key(row)] = best
        return best

    def table(self, arch: int) -> list[tuning.Row]:
        """Rows for this architecture: the winners, and the other rows of their kernels, which else would be hidden."""
        kernels = {kernel for kernel, _, _ in self.chosen}
        rows = [row for row in tuning.rows() if row.kernel in kernels and row.arch in (0, arch)]
        return [tuning.Row(r.kernel, arch, dict(r.at_most), dict(self.chosen.get(key(r), r.choice))) for r in rows]

    def _times(self, row: tuning.Row, choice: dict[str, int]) -> list[float] | None:
        """The time of each case that uses the row; None where one fails, or gives other results."""

        def choose(asked: tuning.Row) -> Mapping[str, int]:
            return choice if key(asked) == key(row) else self.chosen.get(key(asked), asked.choice)

        times = []
        with tuning.trying(choose):
            for name in self._users[key(row)]:
                run = self.cases[name]
                try:
                    found = run()
                except Exception as error:  # does not compile, or wants more than the GPU has: triton has many words
                    if torch.cuda.is_available():
                        torch.cuda.synchronize()  # raises again if the GPU itself has failed
                    self.refused.append(f"{row.kernel} {choice} on {name}: {type(error).__name__}: {error}")
                    return None
                if not same(found, self._expected[name]):
                    self.refused.append(f"{row.kernel} {choice} on {name}: other results")
                    return None
                times.append(self.measure(run))
        return times


def _note(used: list[tuning.Row], row: tuning.Row) -> Mapping[str, int]:
    used.append(row)
    return row.choice


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """The geometric mean of the quotients."""
    return math.exp(sum(math.log(a / b) for a, b in zip(times, others, strict=True)) / len(times))


def measure_on_gpu(run: Run, calls: int = 10, samples: int = 15) -> float:
    """Median microseconds of a call, from replays of a CUDA graph of `calls` of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    times = []
    for _ in range(samples + 3):
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last) * 1e3 / calls)
    return sorted(times[3:])[samples // 2]


# ------------------------------------------------------------------------------------------------------------ cases


def cases(
    device: torch.device,
    models: Mapping[str, Model] = MODELS,
    tokens: Sequence[int] = (1, 16, 64, 512),
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> dict[str, Run]:
    """Every operator at the sizes of real models, in CUDA C++ too; backward at the largest number of tokens."""
    found: dict[str, Run] = {}
    in_cuda = native.no_cuda() is None
    shift_in_cuda, search_in_cuda = (cuda_kernels.launcher(name) for name in ("knowledge_shift", "cosine_topk"))
    for model_name, m in models.items():
        for dtype in dtypes:
            make = partial(_random, device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))
            ffn = _ffn(make, m)
            memory = make(m.items, m.d)
            norm = torch.linalg.vector_norm(memory.float(), dim=1)
            for t in tokens:
                at = f"{model_name} {str(dtype).removeprefix('torch.')} T={t}"
                x = make(t, m.d)
                if t <= 64:
                    found[f"augmented_ffn {at}"] = partial(_run, "augmented_ffn", x, *ffn)
                search = (x, memory, m.k, norm, None)
                found[f"cosine_topk {at}"] = partial(_run, "cosine_topk", *search)
                if in_cuda and cuda_kernels.refusal("cosine_topk", search) is None:
                    found[f"cosine_topk cuda {at}"] = partial(search_in_cuda, *search)
                for routing in ("always", "selected"):
                    args = _neurons(make, m, x, routing)
                    found[f"extra_neurons {routing} {at}"] = partial(_run, "extra_neurons", *args)
                for form in ("given", "computed", "folded"):
                    shift = _shift(make, m, x, form)
                    found[f"knowledge_shift {form} {at}"] = partial(_run, "knowledge_shift", *shift)
                for form in ("given", "raw"):
                    shift = _shift(make, m, x, form)
                    if in_cuda and cuda_kernels.refusal("knowledge_shift", shift) is None:
                        found[f"knowledge_shift cuda {form} {at}"] = partial(shift_in_cuda, *shift)
            for routing in ("route", "selected"):
                args = _neurons(make, m, x, routing)
                run = partial(_run, "extra_neurons_backward", [make(t, m.d)], *args, _needs(args))
                found[f"extra_neurons_backward {routing} {at}"] = run
            for form in ("given", "computed"):
                shift = _shift(make, m, x, form)
                count = len(shift[4]) if form == "computed" else t
                grads = [make(t, m.d), make(count).float()]
                needs = _needs([*shift[:10], *shift[10], *shift[11:]])
                run = partial(_run, "knowledge_shift_backward", grads, *shift, needs)
                found[f"knowledge_shift_backward {form} {at}"] = run
    return found


def named(cases: Mapping[str, Run], only: Sequence[str]) -> dict[str, Run]:
    """The cases whose names have all words of one of `only`, all cases for none; ValueError where there are none."""
    found = {n: run for n, run in cases.items() if not only or any({*w.split()} <= {*n.split()} for w in only)}
    if not found:
        raise ValueError(f"no case has all words of {' or '.join(map(repr, only))}; one is named {next(iter(cases))!r}")
    return found


def _random(*shape: int, device: torch.device, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal, a row's length about 1, so that products neither vanish nor overflow."""
    values = torch.randn(shape, device=device, generator=generator)
    return (values / shape[-1] ** 0.5).to(dtype)


def _run(name: str, *args: Any) -> Sequence[Tensor]:
    out = launcher(name)(*args)
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]


def _needs(args: Sequence[Any]) -> list[bool]:
    return [isinstance(arg, Tensor) and arg.is_floating_point() for arg in args]


def _ffn(make: Callable[..., Tensor], m: Model) -> tuple[Any, ...]:
    w_up, up, n = (make(m.width, m.d), make(20, m.d), 20) if m.gated else (None, None, 20)
    base = (make(m.width, m.d), None, make(m.d, m.width), None, w_up, None)
    return (*base, make(n, m.d), make(n), make(n, m.d), up, None, None, m.act, 0.0)


def _neurons(make: Callable[..., Tensor], m: Model, x: Tensor, routing: str) -> tuple[Any, ...]:
    """Arguments of extra_neurons: all neurons, two selected groups a case, or weights of 100 groups."""
    t, cases_ = len(x), min(len(x), 16)
    n = min(m.n, 1000) if routing == "route" else m.n
    of_token = torch.arange(t, device=x.device) * cases_ // t
    ptr = torch.arange(0, n + 1, 10, device=x.device)
    groups = len(ptr) - 1
    picked = torch.stack([torch.arange(cases_, device=x.device) % groups] * 2, dim=1)
    picked[:, 1] = (picked[:, 1] + groups // 2) % groups
    weights = make(cases_, groups).abs() if routing == "route" else None
    routed = (None, None, None, None) if routing == "always" else (weights, ptr, of_token, None)
    routed = (None, ptr, of_token, picked) if routing == "selected" else routed
    zeta = None if routing == "always" else make(groups, m.d)
    up = make(n, m.d) if m.gated else None
    return (x, make(n, m.d), make(n), make(n, m.d), up, None, zeta, *routed, m.act, 0.0 if zeta is None else 0.5)


def _shift(make: Callable[..., Tensor], m: Model, x: Tensor, form: str) -> tuple[Any, ...]:
    """Knowledge_shift: items per token and alpha given, or (raw) computed from one head, or (folded) from the encoder
    and the projection in one; or items of a case, alpha computed, projections.
    """
    t, hd, device = len(x), m.d // m.heads, x.device
    head = (m.d,) if form == "raw" else (m.heads, hd)
    q, keys, values = make(t, *head), make(m.items, *head), make(m.items, *head)
    rows = min(t, 4) if form == "computed" else t
    indices = (torch.arange(rows * m.k, device=device) * 7919 % m.items).view(rows, m.k)
    rest = ("knowledge", True, None, None, True, None, None, None)
    if form == "raw":
        return (x, q, keys, values, indices, None, None, None, None, None, [], "identity", *rest)
    if form == "given":
        alpha = make(rows).float().abs().clamp(max=1.0)
        return (x, q, keys, values, indices, alpha, None, None, None, None, [], "identity", *rest)
    if form == "folded":
        out, known = (make(m.d, m.d), make(m.d)), (make(m.d, m.d), make(m.d))
        return (x, q, keys, values, indices, None, None, None, *out, [], "identity", *rest[:-2], *known)
    of_token = torch.arange(t, device=device) * rows // t
    case_tokens = (torch.arange(rows, device=device) * t + rows - 1) // rows
    encoder = [make(m.d, m.d), make(m.d)]
    projection = (make(m.d, m.d), make(m.d))
    return (x, q, keys, values, indices, None, of_token, case_tokens, *projection, encoder, "identity", *rest)
