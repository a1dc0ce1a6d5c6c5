"""Pictures of a data set under a folder of the user's: all there, or one error that says what is not."""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

SHOWN = 5  # names per folder in the message; the error itself holds all


class MissingPicturesError(FileNotFoundError):
    """Pictures that a data set names and `root` does not hold; missing: all of their names."""

    def __init__(self, root: Path, missing: list[str], wanted: int) -> None:
        self.root, self.missing, self.wanted = root, missing, wanted
        folders: dict[str, list[str]] = defaultdict(list)
        for name in missing:
            folders[str(PurePosixPath(name).parent)].append(PurePosixPath(name).name)
        root = root.absolute()
        lines = [f"{len(missing)} of {wanted} pictures are missing under {root}:"]
        largest = sorted(folders.items(), key=lambda item: -len(item[1]))
        for folder, names in largest[:SHOWN]:
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            where = "" if folder == "." else f"{folder}/: "
            lines.append(f"  {where}{', '.join(names[:SHOWN])}{more}")
        if len(largest) > SHOWN:
            rest = largest[SHOWN:]
            lines.append(f"  and {sum(len(names) for _, names in rest)} in {len(rest)} other folders")
        if not root.is_dir():
            lines.append(f"{root} is not a folder")
        elif len(missing) == wanted and (named := sorted(folders.keys() - {"."})):
            lines.append(f"none is there: is {root} the folder that holds {', '.join(named[:2])}?")
        super().__init__("\n".join(lines))


def resolve(names: Iterable[str], root: str | Path) -> dict[str, Path]:
    """The file of every picture, by its name (a path relative to `root`); MissingPicturesError names all that lack."""
    root = Path(root)
    wanted = list(dict.fromkeys(names))
    found = {name: root / name for name in wanted}
    missing = sorted(name for name, path in found.items() if not path.is_file())
    if missing:
        raise MissingPicturesError(root, missing, len(wanted))
    return found
