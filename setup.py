"Metadata comes from settings.ini, so that it is written once."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
cfg = config["DEFAULT"]

setup(
    name=cfg["name"],
    version=cfg["version"],
    description=cfg["description"],
    author=cfg["author"],
    license=cfg["license"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["defi_nb", "defi_nb.*"]),
    package_data={"defi_nb": ["assets/**/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("calvin", "harness", "trackers", "dev")},
    entry_points={"console_scripts": ["defi-nb=defi_nb.run.cli:main"], "nbdev": ["defi_nb=defi_nb._modidx:d"]},
)
