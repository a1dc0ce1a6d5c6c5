"""Everything static stands in pyproject.toml. This file is where a native build goes; it must import without torch."""

from setuptools import setup

setup()
