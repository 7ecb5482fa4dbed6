"""For tools that expect this file, as LLaVA users do: everything is in pyproject.toml, exact versions in constraints.txt."""

from setuptools import setup

setup()
