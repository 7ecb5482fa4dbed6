"""For people and tools that expect this file: the package is described in pyproject.toml, see also constraints.txt."""

from setuptools import setup

setup()
