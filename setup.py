"""Lets tools that still call setup.py find the package; everything it says stands in pyproject.toml."""

from setuptools import setup

setup()
