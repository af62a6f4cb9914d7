"""Shared by all tests: nothing asks the network, the checkout's root, and the data that may lie beside it."""
import os
import shutil
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config):
    for name in ("gradio", "trl"):
        config.addinivalue_line("filterwarnings", f"error::DeprecationWarning:{name}")
        config.addinivalue_line("filterwarnings", f"error::FutureWarning:{name}")


LONGEST = (  # begun first, so that the two processes of `make test` end together
    "app/test_load.py", "runs/test_pipeline.py", "runs/test_recipes.py", "app/test_draft.py", "app/test_app.py",
    "browser/test_browser.py", "test_benchmarks.py", "app/test_votes.py", "lm/test_session.py",
    "lm/test_prefix_tree.py",
)


def pytest_collection_modifyitems(items):
    def place(item):
        path = item.path.relative_to(ROOT / "tests").as_posix() if item.path.is_relative_to(ROOT / "tests") else ""
        return LONGEST.index(path) if path in LONGEST else len(LONGEST)

    items.sort(key=place)  # within a file and after them as they were


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout's root."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Parts of the public data sets, beside the checkout; tests that need them are skipped where they are absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data folder ../shared/data is not here")
    return folder


@pytest.fixture(scope="module")
def browser():
    """Debian's Chromium; tests that need it are skipped where it is absent."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium here; Debian's package is enough")
    with sync_api.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
