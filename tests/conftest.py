"""What every test starts from: one thread, no network, fixed seeds."""

import os

# Before torch is imported: OpenMP reads these once. Two test processes that spin on two cores are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

# Read when a kernel's file is imported, so before any of them. Without a GPU, kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter

    interpreter.repair()

# The same examples in every run, so that a red run is red again; no deadline, since a busy machine is no bug.
hypothesis.settings.register_profile("house", deadline=None, derandomize=True)
hypothesis.settings.load_profile("house")


@pytest.fixture(autouse=True)
def _same_seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="module")
def editors():
    """One editor a family, made once; a test that changes its config makes its own."""
    from tests.editing_tiny import make_editor

    made = {}

    def get(name):
        if name not in made:
            made[name] = make_editor(name)
        return made[name]

    return get
