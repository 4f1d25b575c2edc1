"""What setup.cfg cannot say: configs/ is installed as jaxdiff/configs, where `jaxdiff-train --config=lora` finds it."""

from setuptools import find_packages, setup

CONFIGS = ["jaxdiff.configs", "jaxdiff.configs.finetune"]  # those of icons/ need datasets/, which is not installed

setup(packages=find_packages(include=["jaxdiff*"]) + CONFIGS, package_dir={"jaxdiff.configs": "configs"})
