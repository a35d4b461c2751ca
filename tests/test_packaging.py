"One place for the version, the requirements and the extras; a wheel that holds what it must; an import that costs nothing."
import ast
import re
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from importlib import metadata

import pytest
from conftest import HEAVY, ROOT
from packaging.requirements import Requirement


@pytest.fixture(scope="module")
def settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini")
    return config["DEFAULT"]


def canonical(requirements):
    return {(re.sub(r"[-_.]+", "-", r.name).lower(), str(r.specifier)) for r in map(Requirement, requirements)}


def extras_of(settings):
    return {k.removesuffix("_requirements"): v.split() for k, v in settings.items() if k.endswith("_requirements")}


def test_version_is_said_once(settings):
    import avlab

    assert metadata.version("avlab") == avlab.__version__ == settings["version"]
    assert re.search(rf"^version: {re.escape(settings['version'])}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert f"## {settings['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_installed_requirements_are_those_of_settings(settings):
    base = [r for r in metadata.requires("avlab") if "extra ==" not in r]
    assert canonical(base) == canonical(settings["requirements"].split())


@pytest.mark.parametrize("extra", ["lips", "swap", "dub", "synesthete", "app", "docs", "dev"])
def test_installed_extras_are_those_of_settings(settings, extra):
    found = [r.split(";")[0] for r in metadata.requires("avlab") if re.search(rf"extra == ['\"]{extra}['\"]", r)]
    assert found and canonical(found) == canonical(extras_of(settings)[extra])


def test_all_holds_every_instrument(settings):
    found = canonical(r.split(";")[0] for r in metadata.requires("avlab") if re.search(r"extra == ['\"]all['\"]", r))
    for extra, wanted in extras_of(settings).items():
        if extra not in ("dev", "docs"):
            assert canonical(wanted) <= found, extra


def test_installed_versions_are_the_constraints():
    wrong = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        r = Requirement(line)
        try:
            if not r.specifier.contains(metadata.version(r.name), prereleases=True):
                wrong.append(f"{r.name} {metadata.version(r.name)}, wanted {r.specifier}")
        except metadata.PackageNotFoundError:
            pass
    assert not wrong


def test_every_import_is_a_requirement(settings):
    "What the package imports anywhere is asked for somewhere: by the base install, or by the extra of the instrument that needs it."
    here = metadata.packages_distributions()
    name = lambda r: re.sub(r"[-_.]+", "-", r).lower()
    asked = {k: {name(Requirement(r).name) for r in v} for k, v in extras_of(settings).items()} | {"": {name(Requirement(r).name) for r in settings["requirements"].split()}}
    missing = set()
    for f in (ROOT / "avlab").rglob("*.py"):
        workshop = f.name in ("docs.py", "notebooks.py") and f.parent.name == "app"
        enough = set().union(*(v for k, v in asked.items() if workshop or k not in ("dev", "docs")))
        for node in ast.walk(ast.parse(f.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in {m.split(".")[0] for m in modules} - set(sys.stdlib_module_names) - {"avlab"}:
                if not {name(d) for d in here.get(top, [top])} & enough:
                    missing.add((f.name, top))
    assert sorted(missing) == []


def test_script_is_installed():
    (script,) = [e for e in metadata.entry_points(group="console_scripts") if e.name == "avlab"]
    assert script.value == "avlab.app.cli:main"


def test_wheel_holds_the_package_and_its_data(tmp_path, settings):
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
    wanted = {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    for name in filter(None, files):
        if name in wanted or name.split("/")[0] in ("avlab", "models") or name.startswith("nbs/runs/bench_"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp_path), str(source)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("avlab-*.whl")
    assert wheel.name.startswith(f"avlab-{settings['version']}-py3-none-any")
    held = set(zipfile.ZipFile(wheel).namelist())
    assert {str(f.relative_to(ROOT)) for f in (ROOT / "avlab").rglob("*.py")} <= held
    assert {"avlab/models/manifest.json", "avlab/swap/live_page/index.html", "avlab/benches/bench_swap.ipynb"} <= held
    assert not [f for f in held if f.startswith(("nbs/", "tests/", "tools/"))]
    code = f"import sys; sys.path.insert(0, {str(wheel)!r}); import avlab; assert {wheel.name!r} in avlab.__file__; print(avlab.__version__)"
    assert subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True).stdout.strip() == settings["version"]


@pytest.mark.parametrize("module", ["avlab", "avlab.core", "avlab.app.cli"])
def test_import_loads_nothing_heavy(module):
    code = f"import sys, {module}; print(*sorted({set(HEAVY)!r} & {{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stdout + done.stderr
