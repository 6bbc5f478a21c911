"""CMake builds the native module; everything else is said in pyproject.toml."""

from setuptools import setup

setup(cmake_source_dir=".")
