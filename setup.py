"""Build the package from settings.ini, where its metadata and dependency lists stand once."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=["="], interpolation=None)
config.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
settings = config["DEFAULT"]


def lines(key):
    """The lines of a list in settings.ini."""
    return [line.strip() for line in settings[key].splitlines() if line.strip()]


# Constitutions and recipes lie at the top of the checkout, where people look for them, and inside the installed package; so do
# what lies in folders below them: rubrics of judges, prompts of a recipe with their card.
folders = {f"{settings['lib_name']}.{name}": name for name in ("constitutions", "recipes")}
data = ["*.json", "*.jsonl", "*.safetensors", "*.yaml", "*.md", "*.jinja", "*.png", "*.css", "*.js", "*.html"]
readme = Path(__file__).with_name("README.md").read_text(encoding="utf-8").split("\n---\n", 1)[-1]  # without the head that a Hub Space reads

setup(
    name=settings["dist_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    author=settings["author"],
    license=settings["license"],
    keywords=settings["keywords"].split(),
    python_requires=f">={settings['min_python']}",
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("eval", "endpoint", "gguf", "dev")},
    entry_points={"console_scripts": lines("console_scripts")},
    packages=[*find_packages(include=[settings["lib_name"], f"{settings['lib_name']}.*"]), *folders],
    package_dir=folders,
    package_data={settings["lib_name"]: [f"**/{pattern}" for pattern in data], **{name: ["**/*.yaml", "**/*.jsonl", "**/*.md"] for name in folders}},
)
