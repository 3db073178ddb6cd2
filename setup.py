"Metadata comes from settings.ini, so that it is written once."
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(ROOT/"settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {key.removesuffix("_requirements"): cfg[key].split() for key in cfg if key.endswith("_requirements")}
extras["all"] = sorted({r for extra in ("sim", "lab", "lerobot", "hdf5") for r in extras[extra]})


class WithNotebooks(build_py):
    "The run notebooks lie in `nbs`, and in the wheel inside the package, so that `defi-nb list` works in any folder."
    def run(self):
        super().run()
        if self.editable_mode: return
        to = Path(self.build_lib)/"defi_nb/nbs"
        to.mkdir(parents=True, exist_ok=True)
        for path in (ROOT/"nbs").glob("[a-z]*.ipynb"):
            if path.stem != "index": shutil.copy(path, to)


setup(
    name=cfg["name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(ROOT/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    project_urls={"Paper": cfg["paper"], "Paper on inverse dynamics": cfg["inverse_dynamics_paper"]},
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research", "Framework :: Jupyter",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence", "Operating System :: POSIX :: Linux",
                 "Operating System :: MacOS", *(f"Programming Language :: Python :: 3.{v}" for v in (11, 12, 13, 14))],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=["defi_nb", "defi_nb.*"]),
    package_data={"defi_nb": ["assets/**/*"]},
    cmdclass={"build_py": WithNotebooks},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": ["defi-nb=defi_nb.run.cli:main"], "nbdev": ["defi_nb=defi_nb._modidx:d"]},
)
