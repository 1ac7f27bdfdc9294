"""The build is described in pyproject.toml; this file is where compiled libraries from csrc/ will be hooked in."""

from setuptools import setup

setup()
