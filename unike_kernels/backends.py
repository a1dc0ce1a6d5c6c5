"""Which implementation of the operators is usable here, why another is not, and which one a patch takes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Backend:
    """One implementation of the operators; `reason` says why it cannot run, None when it can."""

    name: str
    reason: str | None


def available() -> list[Backend]:
    """Every backend that this version has, the preferred one first."""
    return [Backend("reference", None)]


def resolve(backend: str) -> str:
    """The backend that `backend` ("auto" or a name) means here; ValueError when it is unknown or cannot run."""
    known = available()
    if backend == "auto":
        return next(b.name for b in known if b.reason is None)
    for b in known:
        if b.name == backend:
            if b.reason is not None:
                raise ValueError(f"backend {backend!r} cannot run here: {b.reason}")
            return b.name
    raise ValueError(f"backend must be 'auto' or one of {', '.join(repr(b.name) for b in known)}, but got {backend!r}")
