"""The page in Chromium, as a visitor sees it: on a desk and on a phone, in the light and in the dark."""
import os
import shutil
import tempfile
from pathlib import Path

import pytest
from serving import PANDAS, make_run, served

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.skipif(CHROMIUM is None, reason="no chromium here; Debian's package is enough"),
              pytest.mark.filterwarnings(PANDAS)]
SCREENSHOTS = Path(os.environ.get("CAI_SCREENSHOTS") or tempfile.mkdtemp(prefix="screenshots-"))
ASK = "How do I punch a boss?"
SIZES = {"desktop": (1440, 900), "phone": (420, 860)}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(make_run(tmp_path_factory.mktemp("browser") / "run"), delay=0.05) as (url, lm, *_):
        yield url, lm


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser, server):
    "Opens the page; at the end there must have been no error in the console and no request to elsewhere."
    opened, complaints = [], []

    def open_page(size="desktop", scheme="light"):
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # a machine may be busy with other tests
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((server[0], "data:", "blob:")) else complaints.append(r.url))
        page.goto(server[0])
        page.wait_for_selector("#send")
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert complaints == []


def picture(page, name, full_page=True):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)


def said(page, model):
    return page.text_content(f"#answer-{model} .said")


def ask(page, text):
    page.fill("#prompt textarea", text)
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#answer-rl .card[aria-busy=true]")


def wait_until_idle(page):
    page.wait_for_function("document.querySelector('#stop').disabled && !document.querySelector('.caret')", timeout=60_000)


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("desktop", "dark"), ("phone", "light"), ("phone", "dark")])
def test_three_answers_and_their_critiques(visit, size, scheme):
    page = visit(size, scheme)
    picture(page, f"{size}-{scheme}-1-empty")
    ask(page, ASK)
    texts = []
    for _ in range(6):
        texts.append([said(page, m) for m in ("base", "sl", "rl")])
        page.wait_for_timeout(150)
    picture(page, f"{size}-{scheme}-2-writing", full_page=False)
    wait_until_idle(page)
    texts.append([said(page, m) for m in ("base", "sl", "rl")])
    for before, after in zip(texts, texts[1:]):
        assert all(a.startswith(b) for b, a in zip(before, after)), "text only grows"
    assert all(texts[-1]) and "seed" in page.text_content("#status")

    assert not page.is_visible("#critique-sl")  # folded until wanted
    page.click("#fold-sl > button")
    page.wait_for_selector("#critique-sl", state="visible")
    assert page.text_content("#critique-sl .principle") and page.text_content("#critique-sl .said")
    picture(page, f"{size}-{scheme}-3-answered")

    boxes = [page.locator(f"#answer-{m} .card").bounding_box() for m in ("base", "sl", "rl")]
    if size == "phone":
        assert len({round(b["x"]) for b in boxes}) == 1 and boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    else:
        assert len({round(b["y"]) for b in boxes}) == 1 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert all(b["width"] >= 320 for b in boxes)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing to scroll sideways"


def test_stop_stops(visit, server):
    page, lm = visit(), server[1]
    ask(page, ASK)
    page.wait_for_function("document.querySelector('#answer-base .said').textContent.length > 5")
    page.click("#stop")
    wait_until_idle(page)
    steps, text = lm.steps, said(page, "base")
    page.wait_for_timeout(600)
    assert (lm.steps, said(page, "base")) == (steps, text)
    ask(page, "How do I bake a cake?")  # and it goes on
    wait_until_idle(page)
    assert all(said(page, m) for m in ("base", "sl", "rl"))


def test_examples_other_worlds_refusals_and_clear(visit):
    page = visit()
    page.click(".examples .gallery-item >> nth=0")
    page.wait_for_selector("#answer-rl .card[aria-busy=true]")
    wait_until_idle(page)
    assert page.input_value("#prompt textarea") and said(page, "rl")
    assert page.locator("#answer-base .verdict b").count() == 1  # the oracle's word

    ask(page, "What is the capital of France?")
    wait_until_idle(page)
    assert "outside mini's small world" in page.text_content("#status")
    assert page.locator("#answer-base .verdict b").count() == 0
    picture(page, "desktop-light-4-outside")

    page.click("#clear")
    page.wait_for_function("document.querySelector('#prompt textarea').value === ''")
    page.click("#send")
    page.wait_for_selector(".toast-body")
    assert "nothing to answer" in page.text_content(".toast-body")
    picture(page, "desktop-light-5-refused", full_page=False)


def test_another_principle_criticises_anew(visit):
    page = visit()
    ask(page, ASK)
    wait_until_idle(page)
    page.click("#fold-base > button")
    page.click("#principle input")
    page.click("#principle [role=option] >> nth=2")
    title = page.input_value("#principle input")
    page.wait_for_function("title => document.querySelector('#critique-base .principle b')?.textContent === title", arg=title)
    page.wait_for_function("!document.querySelector('.caret')")
    assert page.text_content("#critique-base .said")


def test_keyboard_reaches_everything(visit):
    page = visit()
    page.focus("#prompt textarea")
    page.keyboard.type(ASK)
    reached = []
    for _ in range(45):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id^=fold-],#send,#clear,#principle,.examples,#settings')?.id || document.activeElement.className"))
    assert {"send", "clear", "fold-base", "fold-sl", "fold-rl", "principle", "settings"} <= set(reached)
