from configparser import ConfigParser

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="])
config.read("settings.ini")
s = config["DEFAULT"]
extras = {k.removesuffix("_requirements"): v.split() for k, v in s.items() if k.endswith("_requirements")}
extras["all"] = sorted({r for k, v in extras.items() if k not in ("dev", "docs") for r in v})

setup(
    version=s["version"],
    description=s["description"],
    install_requires=s["requirements"].split(),
    extras_require=extras,
    entry_points={"console_scripts": s["console_scripts"].split(), "nbdev": ["avlab=avlab._modidx:d"]},
    packages=find_packages(include=["avlab*"]),
    python_requires=f">={s['min_python']}",
    include_package_data=True,
)
