"""Files that are written whole or not at all, and JSON as people write it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to; what lies there in the end takes the place of `path` at once, after an error nothing does.

    Makes the folder. Two processes may write the same file: the later one stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        yield half
        with open(half, "rb+") as file:
            os.fsync(file.fileno())  # or a power cut may leave the new name of nothing
        os.replace(half, path)
    finally:
        half.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError, naming the file and the place, where it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))  # "-sig": some editors begin a file with a mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}") from None
    except ValueError as error:  # a number of more digits than Python reads
        raise ValueError(f"{path} is not JSON: {error}") from None
    except RecursionError:
        raise ValueError(f"{path} is not JSON: brackets are nested too deep") from None
