"""The house is in order: settings agree, notebooks and modules say the same, imports go one way, the wheel is whole."""
import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from functools import lru_cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement

try:
    import tomllib
except ImportError:  # Python 3.10; nbdev brings tomli there
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cai_nb"
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not {".ipynb_checkpoints", "_proc"} & set(p.parts))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py"))
COME_WITH_GRADIO = {"fastapi", "pydantic", "annotated_types", "typing_extensions"}
COME_WITH_TRANSFORMERS = {"numpy", "tqdm", "safetensors", "tokenizers", "huggingface_hub"}


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@lru_cache
def settings():
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def requirements(key: str) -> list[Requirement]:
    return [Requirement(line) for line in settings()[key].splitlines() if line.strip()]


@lru_cache
def tree(path: Path) -> ast.Module:
    minor = int(settings()["min_python"].split(".")[1])
    return ast.parse(path.read_text(encoding="utf-8"), relative(path), feature_version=(3, minor))


def default_exp(notebook: Path) -> str:
    """The module that a notebook exports to, or "" for a tutorial."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    found = re.search(r"^#\| *default_exp +(\S+)", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    return found.group(1) if found else ""


SOURCES = {default_exp(p): p for p in NOTEBOOKS if default_exp(p)}


# Settings


def test_settings_agree():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert set(pyproject) == {"build-system", "tool"} and set(pyproject["tool"]) == {"nbdev", "pytest"}, (
        "metadata stands in settings.ini"
    )
    assert pyproject["tool"]["nbdev"]["lib_path"] == settings()["lib_name"]
    version = re.search(r'__version__ = "(.+)"', (PACKAGE / "__init__.py").read_text(encoding="utf-8")).group(1)
    assert version == settings()["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", [key for key in settings() if key.endswith("requirements")])
def test_requirements_have_floors_that_the_constraints_meet(key):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(
        line.lower().replace("_", "-").split("==") for line in lines if "==" in line and not line.startswith("#")
    )
    for requirement in requirements(key):
        assert any(spec.operator in (">=", "==", "~=") for spec in requirement.specifier), f"{requirement} has no floor"
        name = requirement.name.lower().replace("_", "-")
        if name not in ("setuptools", "wheel"):
            assert requirement.specifier.contains(pins[name]), (
                f"constraints.txt pins {name}=={pins[name]}, not {requirement}"
            )


def test_requirements_for_a_space_are_those_of_the_package():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [Requirement(line) for line in lines if not line.startswith("#")] == requirements("requirements")


def test_every_import_is_declared():
    extras = [key for key in settings() if key.endswith("requirements") and key != "dev_requirements"]
    declared = {requirement.name for key in extras for requirement in requirements(key)}
    declared |= COME_WITH_TRANSFORMERS | COME_WITH_GRADIO | set(sys.stdlib_module_names)
    declared |= {"cai_nb", "yaml", "spaces"}  # spaces is there on a Space
    for path in MODULES:
        foreign = {name.split(".")[0] for name, level in imports(path) if not level} - declared
        assert not foreign, f"{relative(path)} imports {foreign}, which settings.ini does not name"


# Notebooks and modules


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A copy of the project, its notebooks cleaned and exported anew."""
    copy = tmp_path_factory.mktemp("fresh")
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints", "_proc"))
    for init in PACKAGE.rglob("__init__.py"):
        target = copy / relative(init)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(init, target)
    for command in ("nbdev_clean", "nbdev_export"):
        module = "clean" if command == "nbdev_clean" else "doclinks"
        code = f"from nbdev.{module} import {command}; {command}()"
        subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, timeout=300)
    return copy


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=relative)
def test_notebook_is_clean(fresh, notebook):
    same = (fresh / relative(notebook)).read_text(encoding="utf-8") == notebook.read_text(encoding="utf-8")
    assert same, "not clean; run: make export"


@pytest.mark.parametrize("module", [*MODULES, PACKAGE / "__init__.py", PACKAGE / "_modidx.py"], ids=relative)
def test_module_equals_a_fresh_export(fresh, module):
    exported = fresh / relative(module)
    assert exported.exists(), "no notebook exports this module; remove it, or give it its notebook"
    assert exported.read_text(encoding="utf-8") == module.read_text(encoding="utf-8"), (
        "run: make export (or nbdev-update)"
    )


def test_every_source_notebook_is_exported(fresh):
    missing = [
        relative(p) for p in SOURCES.values() if not (PACKAGE / f"{default_exp(p).replace('.', '/')}.py").exists()
    ]
    assert not missing, f"run: make export ({missing})"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=relative)
def test_notebook_form(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    title = "".join(cells[0]["source"])
    assert re.match(r"# \S.*\n+> \S", title), "opens with an H1 and one > line, which becomes the module's docstring"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"], "a stored output is an error"
    assert len(json.dumps(outputs)) < 1_000_000, "stored outputs are small"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=relative)
def test_links_between_notebooks_lead_somewhere(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    dead = [link for link in re.findall(r"\]\(([^)#:]+\.ipynb)\)", text) if not (notebook.parent / link).is_file()]
    assert not dead, f"no such notebook: {dead}"


def test_code_lines_have_at_most_120_characters():
    """Modules, cells, tests and benchmarks. The first line of a module and its list of names are nbdev's."""
    long = []
    for notebook in NOTEBOOKS:
        for i, cell in enumerate(json.loads(notebook.read_text(encoding="utf-8"))["cells"]):
            lines = "".join(cell["source"]).splitlines() if cell["cell_type"] == "code" else []
            long += [f"{relative(notebook)}, cell {i}: {line[:60]}…" for line in lines if len(line) > 120]
    for path in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("nbs/*.py"), ROOT / "app.py"]:
        lines = path.read_text(encoding="utf-8").splitlines()
        long += [f"{relative(path)}:{i}: {line[:60]}…" for i, line in enumerate(lines, 1) if len(line) > 120]
    assert not long, "\n".join(long)


def test_names_are_defined_and_imports_used():
    """What a linter knows without running anything: undefined names, imports that nobody uses."""
    paths = [PACKAGE, ROOT / "nbs", ROOT / "tests", ROOT / "benchmarks"]
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--isolated",
        "--no-cache",
        "--output-format=concise",
        "--select",
        "F821",
    ]
    undefined = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)
    assert undefined.returncode == 0, undefined.stdout
    command[command.index("F821")] = "F401"
    unused = subprocess.run([*command, "--exclude", "__init__.py", str(PACKAGE)], capture_output=True, text=True)
    assert unused.returncode == 0, unused.stdout


# Modules


def imports(path: Path) -> set[tuple[str, int]]:
    """Names that a module imports, with the level of relative imports; those inside functions, too."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, 0) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {(".".join(filter(None, [node.module, alias.name])), node.level) for alias in node.names}
    return found


def own_imports(path: Path) -> set[str]:
    """Modules of this package (cai_nb. left out) that a module imports."""
    here = path.relative_to(ROOT).with_suffix("").parts
    full = {name if not level else ".".join([*here[:-level], name]) for name, level in imports(path)}
    parts = [name.split(".")[1:] for name in full if name.split(".")[0] == "cai_nb"]
    return {m for m in SOURCES if any(part[: m.count(".") + 1] == m.split(".") for part in parts)}


FOLDERS = (
    "core",
    "lm",
    "train",
    "method",
    "measure",
    "mini",
    "runs",
    "app",
    "cli",
)  # a folder imports from those before it


def order(module: str) -> tuple[int, str]:
    """A notebook's place: its folder's, then its number."""
    return FOLDERS.index(SOURCES[module].parent.name), SOURCES[module].name


def test_folders_and_numbers():
    """Folders are one deep and known; in each the notebooks are numbered from 00 with two digits and no gap."""
    for folder in (ROOT / "nbs").iterdir():
        if folder.is_dir() and folder.name not in (".ipynb_checkpoints", "_proc", "tutorials", "experiments"):
            names = sorted(path.name for path in NOTEBOOKS if path.parent == folder)
            assert folder.name in FOLDERS and names, f"{relative(folder)} is not in the map of the house"
            assert [name[:3] for name in names] == [f"{i:02}_" for i in range(len(names))], (
                f"{relative(folder)}: {names}"
            )
    for module, notebook in SOURCES.items():
        assert module == f"{notebook.parent.name}.{notebook.stem[3:]}", f"{relative(notebook)} exports {module}"


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_follow_the_notebook_order(module):
    path = PACKAGE / f"{module.replace('.', '/')}.py"
    later = [name for name in own_imports(path) if name != module and order(name) >= order(module)]
    assert not later, f"{module} imports {later}, whose notebooks come later"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_module_is_old_enough_and_documented(path):
    """It compiles under the oldest supported Python's grammar, and everything it exports has a docstring."""
    module = tree(path)
    assert ast.get_docstring(module), "no module docstring; it comes from the notebook's > line"
    exported = exported_names(path)
    definitions = [n for n in module.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name in exported]
    bare = [n.name for n in definitions if not ast.get_docstring(n)]
    assert not bare, f"without a docstring: {bare}"


def exported_names(path: Path) -> list[str]:
    """What stands in a module's `__all__`."""
    assigned = [node for node in tree(path).body if isinstance(node, ast.Assign)]
    return next(ast.literal_eval(node.value) for node in assigned if getattr(node.targets[0], "id", "") == "__all__")


def test_no_public_name_stands_twice():
    """A name that others import means one thing in the whole package."""
    found = {}
    for path in MODULES:
        for name in exported_names(path):
            found.setdefault(name, []).append(relative(path))
    assert not {name: paths for name, paths in found.items() if len(paths) > 1}


def test_the_face_of_the_package():
    """About 25 names, each with a docstring; one of them imports only what it needs."""
    code = (
        "import sys; from cai_nb import Constitution, critique_revise\n"
        "print('torch' in sys.modules, 'gradio' in sys.modules)\n"
        "import cai_nb; print(len(dir(cai_nb)), [n for n in cai_nb._FACE if not getattr(cai_nb, n).__doc__])"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    light, face = out.stdout.strip().splitlines()
    assert light == "False False" and face == f"{len(dir(__import__('cai_nb')))} []", out.stderr
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from cai_nb import nothing")


def test_import_and_command_line_stay_light():
    """Neither `import cai_nb` nor `cai-nb --help` waits for a large library."""
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "gradio", "matplotlib", "numpy"]
    code = f"import sys, cai_nb, cai_nb.cli.commands; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# What is shipped


def tracked() -> list[Path]:
    """Files of the checkout that git does not ignore, or all files where there is no git."""
    try:
        names = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split("\0")
        return [ROOT / name for name in names if name and (ROOT / name).is_file()]
    except (OSError, subprocess.CalledProcessError):
        return [
            p for p in ROOT.rglob("*") if p.is_file() and not {".venv", ".venv-vllm", "runs", ".git"} & set(p.parts)
        ]


def test_no_machine_paths():
    """Paths of the machine that a file was made on help nobody else."""
    pattern = re.compile(r"(?<![\w.~-])/(?:" + "|".join(["work", "root", "tmp", "home", "Users"]) + r")/\w")
    found = []
    for path in tracked():
        if path.suffix in (".safetensors", ".png", ".gz") or path == Path(__file__).resolve():
            continue
        for i, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{relative(path)}:{i}: {line.strip()[:120]}")
    assert not found, "\n".join(found)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the checkout, and the folder that it unpacks to."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        if path.relative_to(ROOT).parts[0] not in ("nbs", "tests", "benchmarks"):
            target = copy / relative(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(copy),
    ]
    subprocess.run(command, check=True, timeout=300)
    (file,) = out.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(out / "site")
    return file, out / "site"


def test_wheel_carries_constitutions_recipes_and_mini(wheel):
    file, site = wheel
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    for folder in ("constitutions", "recipes"):
        files = {f"cai_nb/{relative(path)}" for path in tracked() if path.is_relative_to(ROOT / folder)}
        assert files and files <= names, f"the wheel lacks {files - names}"
    data = {relative(p) for p in tracked() if p.is_relative_to(PACKAGE) and p.suffix != ".py"}
    assert any(name.endswith(".safetensors") for name in data), "mini's weights are not in the checkout"
    assert data <= names, f"the wheel lacks {sorted(data - names)[:5]}"
    assert not [
        name for name in names if name.split("/")[0] in ("tests", "nbs", "benchmarks", "constitutions", "recipes")
    ]
    assert file.stat().st_size < 12_000_000, "the wheel carries at most 10 MB of weights"


def test_wheel_works_outside_the_checkout(wheel, tmp_path):
    _, site = wheel
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import cai_nb; from cai_nb import Constitution; from cai_nb.core.files import package_folder\n"
        f"assert cai_nb.__file__.startswith({str(site)!r}), cai_nb.__file__\n"
        "assert package_folder('recipes').is_relative_to(sys.path[0])\n"
        "print(len(Constitution.load('harmlessness').principles))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.strip() == "32", out.stderr
