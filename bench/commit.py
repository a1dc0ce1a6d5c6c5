"""Which commit a figure belongs to."""

import os
import subprocess
from pathlib import Path


def commit(folder: Path) -> str:
    """The commit that `folder` is at, "-dirty" where a file differs from it that is none of results; or "unknown".

    A copy of the tree without its own history is told by the environment variable UNIKE_COMMIT.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True).stdout.strip()

    if told := os.environ.get("UNIKE_COMMIT"):
        return told
    at = git("describe", "--always", "--exclude=*")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(top,exclude)*results/*")
    return f"{at}-dirty" if at and changed else at or "unknown"
