"""Packages of the wheel: every package in stem/, and kernels/ as stem.kernels. All else stands in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["stem", "stem.*"]), "stem.kernels"],
    package_dir={"stem.kernels": "kernels"},
)
