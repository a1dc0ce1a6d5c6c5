"""The benchmarks refuse to time what fails the tolerance of the tests, so it lives with them."""

from bench.tolerance import assert_close_to_reference, error

__all__ = ["assert_close_to_reference", "error"]
