"""Device memory that is full of zeros whenever no kernel runs: each launch leaves it as it found it.

So a kernel whose blocks count or tell each other something needs no launch that clears before it. No two launches may
have the same bytes at a time. Launches on one stream follow each other and share theirs. One that is captured gets
bytes of its own for good, as nobody knows beside what its graph will run; a graph waits for its own last run. The
memory comes from CUDA itself, not from torch's pools: those of a graph are reused between replays. It is never given
back: some kilobytes for each stream and captured launch.
"""

import threading

import torch

from .. import native
from .launching import stream_of

PAGE = 2**20  # bytes that are asked for at a time
LINE = 128


class Zeros:
    """Bytes for the launches of one kernel, at most `most` each."""

    def __init__(self, most: int) -> None:
        self.most = -(-most // LINE) * LINE
        self._lock = threading.Lock()
        self._of_stream: dict[tuple[torch.device, int], int] = {}  # device and stream -> address
        self._left: dict[torch.device, tuple[int, int]] = {}  # device -> address and bytes that nobody has

    def of(self, device: torch.device, size: int) -> int:
        """The address of `size` zeros for a launch on the current stream of the device, which is the current one."""
        if captured(device):
            return self._take(device, size)
        key = (device, native.cuda().stream_number(stream_of(device)))
        address = self._of_stream.get(key)
        if address is None:
            address = self._of_stream.setdefault(key, self._take(device, self.most))
        return address

    def forget(self, address: int) -> None:
        """After a launch that failed: who knows what it left there."""
        for key in [key for key, at in list(self._of_stream.items()) if at == address]:
            self._of_stream.pop(key, None)

    def _take(self, device: torch.device, size: int) -> int:
        size = -(-size // LINE) * LINE
        with self._lock:
            address, left = self._left.get(device, (0, 0))
            if left < size:
                left = max(size, PAGE)
                address = native.cuda().zeros(left)
            self._left[device] = address + size, left - size
        return address


def captured(device: torch.device) -> bool:
    """Whether what is launched now on the current stream goes into a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
