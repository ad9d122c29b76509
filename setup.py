"""Packages live in two rooms: eepo_fast/ and kernels/eepo_kernels/.

kernels/ is a folder, never a package: transformers looks for the PyPI package `kernels`, and an __init__.py there
would shadow it. configs/ travels inside a wheel as eepo_fast/configs. This file must not import torch, so that isolated
builds work.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["eepo_fast", "eepo_fast.*"]), "eepo_kernels", "eepo_fast.configs"],
    package_dir={"eepo_kernels": "kernels/eepo_kernels", "eepo_fast.configs": "configs"},
    package_data={"eepo_fast.configs": ["*.yaml"]},
)
