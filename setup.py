import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini")
s = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in s.items() if k.endswith("_requirements")}
extras["all"] = sorted({r for k, v in extras.items() if k not in ("dev", "docs") for r in v})


class WithModels(build_py):
    "The manifest and the small trained weights of models/ travel in the wheel as avlab/models/, the benchmarks' notebooks as avlab/benches/."

    def run(self):
        super().run()
        if getattr(self, "editable_mode", False):
            return
        packed = Path(self.build_lib) / "avlab" / "models"
        packed.mkdir(parents=True, exist_ok=True)
        for f in sorted(p for pattern in ("manifest.json", "*.safetensors", "*.md") for p in Path("models").glob(pattern)):
            shutil.copy2(f, packed / f.name)
        benches = Path(self.build_lib) / "avlab" / "benches"
        benches.mkdir(parents=True, exist_ok=True)
        for f in sorted(Path("nbs/runs").glob("bench_*.ipynb")):
            shutil.copy2(f, benches / f.name)


setup(
    version=s["version"],
    description=s["description"],
    install_requires=s["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": s["console_scripts"].split(), "nbdev": ["avlab=avlab._modidx:d"]},
    packages=find_packages(include=["avlab*"]),
    package_data={"avlab.swap": ["live_page/*"]},
    python_requires=f">={s['min_python']}",
    cmdclass={"build_py": WithModels},
)
