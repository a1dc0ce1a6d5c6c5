"""How time is measured: rivals in turns, several input sets beyond the caches, medians with their spread.

On a GPU every rival that allows it is captured in a CUDA graph and replayed, so that Python is not what is measured;
its host time is measured apart. The calls of all sets are one graph, since starting a graph costs more (4 us on an
H100) than many a kernel. On a CPU one thread is used, and its processor time counts, not what it waited for
others; the fastest run is what a quiet machine shows.
"""

import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

Run = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median, fastest, and the middle half's spread; host: until the call returns (GPU).

    captured: replayed from a CUDA graph; `why` it was not, where it should have been.
    """

    median: float
    fastest: float
    spread: float
    runs: int
    captured: bool = False
    host: float | None = None
    why: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    rivals: dict[str, Sequence[Run]], device: torch.device, *, seconds: float, capturable: set[str]
) -> dict[str, Timing]:
    """Times all rivals in turns for about `seconds` in all; a rival is one closure for each of its input sets.

    The order of the turns rotates, so that nobody always runs behind the same one. On a CPU the rivals of a turn take
    different sets, as far as there are, so that nobody finds its inputs in the cache where another has put them. A
    closure's `reset`, if it has one, is called after each of its runs, outside the time.
    """
    if device.type == "cuda":
        return _compare_on_gpu(rivals, seconds=seconds, capturable=capturable)
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    for runs in rivals.values():  # compiles, allocates, fills caches
        for run in runs:
            run()
            _reset(run)
    end, turn, place = time.perf_counter() + seconds, 0, {name: i for i, name in enumerate(rivals)}
    while time.perf_counter() < end or turn < 5:
        for name in _rotated(list(rivals), turn):
            # Each a set of its own: behind one that read the same keys, a product took 240 us instead of 560.
            run = rivals[name][(turn + place[name]) % len(rivals[name])]
            start = time.process_time()
            run()
            samples[name].append((time.process_time() - start) * 1e6)
            _reset(run)
        turn += 1
    return {name: _summary(values) for name, values in samples.items()}


def _summary(values: list[float], **more: Any) -> Timing:
    quarter, median, three = statistics.quantiles(values, n=4)
    return Timing(median, min(values), three - quarter, len(values), **more)


def _rotated(names: list[str], turn: int) -> list[str]:
    at = turn % len(names)
    return names[at:] + names[:at]


def _reset(run: Run) -> None:
    getattr(run, "reset", lambda: None)()


def _compare_on_gpu(rivals: dict[str, Sequence[Run]], *, seconds: float, capturable: set[str]) -> dict[str, Timing]:
    ready: dict[str, list[Run]] = {}  # together they are one call of every run
    host: dict[str, float] = {}
    why: dict[str, str] = {}
    for name, runs in rivals.items():
        for _ in range(3):
            for run in runs:
                run()
                _reset(run)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for run in runs:
            run()
        host[name] = (time.perf_counter() - start) / len(runs) * 1e6
        torch.cuda.synchronize()
        for run in runs:
            _reset(run)
        ready[name] = list(runs)
        if name in capturable:
            try:
                ready[name] = [_captured(runs)]
            except Exception as failed:  # told in the results: such a figure says nothing about the kernels
                why[name] = f"{type(failed).__name__}: {failed}"[:300]
                torch.cuda.synchronize()
    samples: dict[str, list[float]] = {name: [] for name in rivals}
    end, turn = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or turn < 50:
        for name in _rotated(list(ready), turn):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for run in ready[name]:  # all sets in one go: one event pair costs about as much as one small kernel
                run()
            last.record()
            last.synchronize()
            samples[name].append(first.elapsed_time(last) * 1e3 / len(rivals[name]))
            for run in rivals[name]:
                _reset(run)
        turn += 1
        if time.perf_counter() > end + 4 * seconds and turn >= 5:  # slow rivals do not get fifty turns
            break
    return {
        name: _summary(values, captured=name in capturable and name not in why, host=host[name], why=why.get(name))
        for name, values in samples.items()
    }


def _captured(runs: Sequence[Run]) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        runs[0]()  # on the capturing stream once before, as CUDA graphs want it
        _reset(runs[0])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [run() for run in runs]  # the outputs live as long as the graph
    for run in runs:
        _reset(run)  # capturing ran nothing, but the host may have counted

    def replay(kept: Any = kept) -> None:
        graph.replay()

    return replay


# ------------------------------------------------------------------------------------------------- what is possible


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of a large copy in this process."""
    size = 2**30 if device.type == "cuda" else 2**27
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _fastest(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations per second of a square product in this process."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / _fastest(lambda: a @ b, device)


def _fastest(run: Run, device: torch.device, times: int = 10) -> float:
    best = float("inf")
    for _ in range(times):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def environment(device: torch.device) -> dict[str, Any]:
    """What a figure depends on."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
    else:
        found["bf16_units"] = _bf16_units()
    return found


def _bf16_units() -> bool:
    """Whether this CPU multiplies bfloat16 itself, which torch's products then use."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            flags = next((line for line in lines if line.startswith(("flags", "Features"))), "").split()
    except OSError:
        return False
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
