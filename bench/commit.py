"""Which commit, and which code, a figure belongs to."""

import hashlib
import os
import subprocess
from pathlib import Path


def commit(folder: Path) -> str:
    """The commit that `folder` is at; "-dirty-" and a digest of what files other than results differ; or "unknown".

    A copy of the tree without its own history is told by the environment variable UNIKE_COMMIT.
    """

    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()
        except FileNotFoundError:  # no git here
            return ""

    if told := os.environ.get("UNIKE_COMMIT"):
        return told
    at = git("describe", "--always", "--exclude=*")
    changed = git("diff", "HEAD", "--", ":(top)", ":(top,exclude)*results/*")
    return f"{at}-dirty-{hashlib.sha256(changed.encode()).hexdigest()[:6]}" if at and changed else at or "unknown"


def code(*folders: Path) -> str:
    """A digest of the Python files in these folders."""
    digest = hashlib.sha256()
    for path in sorted(p for folder in folders for p in folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
