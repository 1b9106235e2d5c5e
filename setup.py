"""The optional C++/CUDA extension is declared here; everything else is in pyproject.toml."""

from setuptools import setup

setup()
