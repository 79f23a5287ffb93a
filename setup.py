"""What pyproject.toml cannot say: the DeepSpeed JSONs lie at the top of the repository and, built
into a package, in vlmds/ds_configs. One set of files, copied at build; no links, which archives and
some file systems lose."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["vlmds*"]), "vlmds.ds_configs"], package_dir={"vlmds.ds_configs": "ds_configs"})
