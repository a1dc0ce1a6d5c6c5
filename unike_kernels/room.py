"""What fits into a patch's storage: everything that does not is told at once."""

from collections.abc import Iterable


def lack(room: int, wanted: int, what: str) -> list[str]:
    """What to say where `wanted` rows do not fit into `room`; nothing where they do. what: of which rows."""
    return [f"room for {room} {what}, but got {wanted}"] if wanted > room else []


def refuse(lacks: Iterable[str]) -> None:
    """Raises ValueError with all that is lacking, each once: layers say the same."""
    if told := "; ".join(dict.fromkeys(lacks)):
        raise ValueError(told)
