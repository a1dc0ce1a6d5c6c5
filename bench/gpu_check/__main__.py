"""Run every step on the GPU at hand, keep what each one said, and fail if one failed: `bash bench/gpu_check.sh`."""

import argparse
import sys
from pathlib import Path

import torch

from bench.gpu_check.steps import run_all, steps, table, versions

RESULTS = Path(__file__).parent / "results"
SECONDS = 530  # all steps together: under nine minutes


def main() -> int:
    """Parse the command line, run, print the table; 0 when every step passed, 1 otherwise, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="steps whose name contains this")
    parser.add_argument(
        "--out", type=Path, help="the results file (default: bench/gpu_check/results/<date>-<commit>.json)"
    )
    parser.add_argument("--without", action="append", default=[], help="steps whose name contains this; repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for all steps together ({SECONDS})")
    parser.add_argument("--logs", type=Path, help="a folder for the whole output of every step")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            f"there is no CUDA device here (torch {torch.__version__}), so there is nothing to check", file=sys.stderr
        )
        return 2
    about = versions()
    file = args.out or RESULTS / f"{about['date']}-{about['commit']}.json"
    wanted = [step for step in steps() if args.only is None or args.only in step.name]
    wanted = [step for step in wanted if not any(words in step.name for words in args.without)]
    if not wanted:
        left = f"--only {args.only} and --without {', '.join(args.without) or 'nothing'} leave no step"
        parser.error(f"{left}; there are: {', '.join(step.name for step in steps())}")
    results = run_all(wanted, about, file, args.seconds, args.logs)
    print(table(results))
    print(f"written to {file}")
    return 0 if all(step["passed"] for step in results["steps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
