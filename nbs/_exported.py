"""Look at what nbdev wrote, which it does not do itself: modules that no notebook exports any more, and Python
that is too new.

    python nbs/_exported.py        # after nbdev-export; `make export` calls it
"""
import ast
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cai_nb"


def exported() -> set[Path]:
    "The modules that notebooks name in `#| default_exp`."
    found = set()
    for notebook in (ROOT / "nbs").rglob("*.ipynb"):
        if not {".ipynb_checkpoints", "_proc"} & set(notebook.parts):
            cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
            text = "\n".join("".join(cell["source"]) for cell in cells)
            names = re.findall(r"^#\| *default_exp +(\S+)", text, re.MULTILINE)
            found |= {PACKAGE / f"{name.replace('.', '/')}.py" for name in names}
    return found


def modules() -> list[Path]:
    "All modules but those that are written by hand or by nbdev for itself."
    return sorted(path for path in PACKAGE.rglob("*.py") if path.name not in ("__init__.py", "_modidx.py"))


def main() -> None:
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    minor, problems, known = int(config["DEFAULT"]["min_python"].split(".")[1]), [], exported()
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        if path not in known:
            problems.append(f"{name}: no notebook exports this module; git rm it, or give it its notebook")
            continue
        try:
            ast.parse(path.read_text(encoding="utf-8"), name, feature_version=(3, minor))
        except SyntaxError as error:
            problems.append(f"{name}:{error.lineno}: {error.msg} (for Python 3.{minor}); write it in an older way")
    print("\n".join(problems) or f"{len(known)} modules, all from notebooks, all good for Python 3.{minor}")
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
