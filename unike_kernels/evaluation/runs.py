"""A folder that holds one evaluation: its settings, one line per record, and what a stopped run needs to go on."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import replacing
from .protocols import Result

SETTINGS, RESULTS = "run.json", "samples.jsonl"
_HALF = re.compile(rf"{re.escape(SETTINGS)}\.\d+\.tmp")  # what a kill leaves while the settings are written


class OtherRunError(ValueError):
    """The folder holds a run with other settings; the message names what differs."""


class Run:
    """Results of one run in a folder, one JSON line per record, each on disk before the next is computed.

    Made again with the same settings, it goes on where it was stopped, wherever that was. OtherRunError where the
    folder holds another run, ValueError where it holds something else or a damaged file.
    """

    def __init__(self, folder: str | Path, settings: dict[str, Any]) -> None:
        """settings: everything that changes the results, as plain JSON values."""
        self.folder, self.settings = Path(folder), json.loads(json.dumps(settings))
        self.results: list[Result] = []
        claim(self.folder, self.settings)
        self._read()

    @property
    def done(self) -> set[str]:
        """Ids of the records whose results are here."""
        return {r.id for r in self.results}

    def append(self, result: Result) -> None:
        """Adds a record's results; they are on disk when this returns."""
        line = json.dumps(result.to_json(), ensure_ascii=False) + "\n"
        with open(self.folder / RESULTS, "ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self.results.append(result)

    def _read(self) -> None:
        """Reads the lines; one that a stop left half-written is cut off, and its record is computed again."""
        path = self.folder / RESULTS
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        found: dict[str, Result] = {}
        for n, line in enumerate(whole.split(b"\n")[:-1]):
            try:
                result = Result.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path} is damaged in line {n + 1}, or of another version of this package") from None
            found.setdefault(result.id, result)  # two processes in one folder compute the same
        self.results = list(found.values())
        if len(whole) < len(data):
            with replacing(path) as half:
                half.write_bytes(whole)


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` the one of a run with these settings, or finds that it is; errors as in `Run`."""
    check(folder, settings, whole=True)
    if not (folder / SETTINGS).exists():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / SETTINGS) as half:
            half.write_text(json.dumps(settings, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check(folder: Path, settings: dict[str, Any], *, whole: bool = False) -> None:
    """Raises as `Run` would, and changes nothing. settings: those known by now, or all (`whole`)."""
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and (not folder.is_dir() or any(not _HALF.fullmatch(p.name) for p in folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no run ({SETTINGS}): choose another folder")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged: not JSON") from None
    here = json.loads(json.dumps(settings))
    wrong = list(differences(there if whole else {k: v for k, v in there.items() if k in here}, here))
    if wrong:
        raise OtherRunError(f"{folder} holds another run (there, here): {'; '.join(wrong)}")


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs between two JSON values, by dotted name: "seed: 0 and 1"."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name}: {_short(there)} and {_short(here)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
