"""The page in Chromium, as a visitor uses it: every tab, desk and phone, light and dark, by keyboard."""
import os
import tempfile
import time
from pathlib import Path

import pytest
from serving import PANDAS, served

pytestmark = pytest.mark.filterwarnings(PANDAS)
SCREENSHOTS = Path(os.environ.get("CAI_SCREENSHOTS") or tempfile.mkdtemp(prefix="screenshots-"))
ASK = "How do I punch a boss?"
MODELS = ("base", "sl", "rl")
WAIT = 1000 * int(os.environ.get("CAI_WAIT", 120))  # a machine may be busy with other tests
SIZES = {"desktop": (1440, 900), "phone": (420, 860)}
REFUSAL = "status of 422"  # what a refused prompt leaves in the console: the browser's own line about the status
WATCH = """window.shifts = []; new PerformanceObserver(list => {
  for (const e of list.getEntries()) if (!e.hadRecentInput)
    window.shifts.push([e.value, ...e.sources.map(s => s.node?.id || s.node?.className)])
  }).observe({type: 'layout-shift'})"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with served(delay=0.05, folder=tmp_path_factory.mktemp("browser") / "kept") as (url, lm, *_):
        yield url, lm


@pytest.fixture
def visit(browser, server):
    "Opens the page; at the end there must have been no error in the console and no request to elsewhere."
    opened, complaints, allowed = [], [], []

    def open_page(size="desktop", scheme="light", query="", allow=None, url=None):
        width, height = SIZES[size]
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(WAIT)
        allowed.extend([allow] if allow else [])
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on(
            "request",
            lambda r: None if r.url.startswith((url or server[0], "data:", "blob:")) else complaints.append(r.url),
        )
        page.goto((url or server[0]) + query)
        page.wait_for_selector("#send")
        page.evaluate(WATCH)
        opened.append(page)
        return page

    yield open_page
    for page in opened:
        page.close()
    assert [c for c in complaints if not any(words in c for words in allowed)] == []


def picture(page, name, full_page=True):
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"{name}.png", full_page=full_page)


def said(page, model):
    return page.locator(f"#answer-{model} .said").last.text_content()


def ask(page, text):
    page.fill("#prompt textarea", text)
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#answer-rl [aria-busy=true]")


def wait_until_idle(page):
    page.wait_for_function(
        "document.querySelector('#stop').disabled && !document.querySelector('.caret')", timeout=WAIT
    )


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def no_sideways(page):
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def axe(page):
    "What axe-core finds against WCAG 2.2, levels A and AA."
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(
        page,
        options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]},
    )
    return [
        f"{v['id']}: {n['html'][:160]} — {n.get('failureSummary', '')[:220]}"
        for v in found.response["violations"]
        for n in v["nodes"]
    ]


# Compare


@pytest.mark.parametrize(
    "size, scheme", [("desktop", "light"), ("desktop", "dark"), ("phone", "light"), ("phone", "dark")]
)
def test_three_answers_and_what_lies_beneath(visit, size, scheme):
    page = visit(size, scheme)
    page.fill("#prompt textarea", ASK)
    page.wait_for_timeout(700)  # what moves within half a second of a key is not counted as a jump
    picture(page, f"compare-{size}-{scheme}-1-empty")
    page.evaluate("window.shifts = []")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#answer-rl [aria-busy=true]")
    texts = []
    for _ in range(6):
        texts.append([said(page, m) for m in MODELS])
        page.wait_for_timeout(150)
    picture(page, f"compare-{size}-{scheme}-2-writing", full_page=False)
    wait_until_idle(page)
    texts.append([said(page, m) for m in MODELS])
    for before, after in zip(texts, texts[1:]):
        assert all(a.startswith(b) for b, a in zip(before, after)), "text only grows"
    assert all(texts[-1]) and "seed" in page.text_content("#status")
    assert page.locator("#answer-base .verdict b").count() == 1  # the oracle's word
    assert sum(shift[0] for shift in page.evaluate("window.shifts")) < 0.02, page.evaluate("window.shifts")

    assert not page.is_visible("#critique-base")  # folded until wanted, and not worked out before
    page.click("#fold-critique-base > button")
    page.wait_for_selector("#critique-base .principle.step")
    page.wait_for_function("!document.querySelector('.caret')")
    assert page.text_content("#critique-base .principle") and page.locator("#critique-base .said").first.text_content()
    page.click("#fold-preference-sl > button")
    page.wait_for_selector("#preference-sl .pair")
    page.wait_for_function(
        "[...document.querySelectorAll('#preference-sl .odds b')].every(b => b.textContent.includes('%'))"
    )
    assert page.locator("#preference-sl .pair").count() == 2
    wait_until_idle(page)
    picture(page, f"compare-{size}-{scheme}-3-inside")

    boxes = [page.locator(f"#answer-{m}").bounding_box() for m in MODELS]
    if size == "phone":
        assert len({round(b["x"]) for b in boxes}) == 1 and boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    else:
        assert len({round(b["y"]) for b in boxes}) == 1 and boxes[0]["x"] < boxes[1]["x"] < boxes[2]["x"]
    assert all(b["width"] >= 300 for b in boxes) and no_sideways(page)


def test_a_conversation_again_copy_and_new(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    ask(page, ASK)
    wait_until_idle(page)
    first = said(page, "rl")
    page.click("#answer-rl .copy")
    assert page.evaluate("navigator.clipboard.readText()") == first
    seeds = set()
    for _ in range(2):
        seeds.add(page.text_content("#status"))
        page.click("#again")
        page.wait_for_selector("#answer-rl [aria-busy=true]")
        wait_until_idle(page)
    assert len(seeds) == 2 and page.locator("#answer-rl .turn").count() == 1  # another seed, the same turn
    page.click(".examples .gallery-item:has-text('I am an adult')")
    page.wait_for_selector("#answer-rl .turn >> nth=1")
    wait_until_idle(page)
    assert page.locator("#answer-base .turn").count() == 2 and page.locator("#answer-base .verdict b").count() == 1
    picture(page, "compare-desktop-light-4-two-turns")
    page.click("#clear")
    page.wait_for_function("!document.querySelector('#answer-base .turn')")
    assert page.is_disabled("#again")


def test_a_link_brings_the_answers_back(visit):
    page = visit()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    for prompt in (ASK, "How do I bake bread?"):
        ask(page, prompt)
        wait_until_idle(page)
    page.click("#link .copy")
    link = page.evaluate("navigator.clipboard.readText()")
    other = visit(query="?" + link.split("?", 1)[1])
    other.wait_for_selector("#link a")
    wait_until_idle(other)
    for m in MODELS:
        assert (
            other.locator(f"#answer-{m} .said").all_text_contents()
            == page.locator(f"#answer-{m} .said").all_text_contents()
        )
    assert "may differ" not in other.text_content("#status")
    wrong = visit(query="?p=How+do+I+bake+a+cake%3F&seed=1&models=sl%3A000000000000")
    wrong.wait_for_selector("#link a")
    wait_until_idle(wrong)
    assert wrong.text_content("#status .warn").startswith(
        "The link was made with other weights of SL-CAI: the answers may differ. mini knows"
    )
    ask(wrong, ASK)
    wait_until_idle(wrong)
    assert "other weights" not in wrong.text_content("#status")


def test_stop_stops(visit, server):
    page, lm = visit(), server[1]
    ask(page, ASK)
    page.wait_for_function("document.querySelector('#answer-base .said').textContent.length > 5")
    page.click("#stop")
    wait_until_idle(page)
    steps, text = lm.steps, said(page, "base")
    page.wait_for_timeout(600)
    assert (lm.steps, said(page, "base")) == (steps, text)
    page.click("#clear")
    ask(page, "How do I bake bread?")  # and it goes on
    wait_until_idle(page)
    assert all(said(page, m) for m in MODELS)


SLOWLY = """const soon = window.fetch; window.fetch = async (to, how) => {
  if (String(to).includes('run/predict')) await new Promise(done => setTimeout(done, 700));
  return soon(to, how); }; 0"""

LAST = "asked => document.querySelector('#answer-rl .asked')?.textContent === asked"


@pytest.mark.parametrize("line", ["quick", "slow"])
def test_what_is_asked_last_counts(visit, line):
    page, then = visit(), "How do I bake bread?"
    if line == "slow":
        page.evaluate(SLOWLY)
    for wait in (True, False):  # "New" while an answer is written; and the next question without waiting for it
        ask(page, ASK)
        page.wait_for_function("document.querySelector('#answer-base .said').textContent.length > 5")
        page.click("#clear")
        if wait:
            wait_until_idle(page)
            page.wait_for_function("!document.querySelector('.answers .turn')")
            page.wait_for_timeout(500)
            assert page.locator(".answers .turn").count() == 0
    ask(page, then)
    page.wait_for_function(LAST, arg=then)
    wait_until_idle(page)
    assert page.locator("#answer-rl .asked").all_text_contents() == [then] and all(said(page, m) for m in MODELS)
    page.click("#clear")
    page.wait_for_function("!document.querySelector('.answers .turn')")
    ask(page, ASK)
    ask(page, then)  # by the key: the button waits
    page.wait_for_function(LAST, arg=then)
    assert page.is_enabled("#stop")
    wait_until_idle(page)
    assert page.locator("#answer-rl .asked").all_text_contents() == [then] and all(said(page, m) for m in MODELS)


def test_examples_other_worlds_and_refusals(visit):
    page = visit(allow=REFUSAL)
    page.click(".examples .gallery-item >> nth=0")
    page.wait_for_selector("#answer-rl [aria-busy=true]")
    wait_until_idle(page)
    assert said(page, "rl") and page.locator("#answer-base .verdict b").count() == 1
    page.click("#clear")
    page.fill("#prompt textarea", "What is the capital of France?")
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#answer-rl .said.unknown")
    wait_until_idle(page)
    assert all("does not know what this is about" in said(page, model) for model in MODELS)
    assert page.locator("#answer-base .verdict b").count() == 0 and page.locator("#answer-base .copy").count() == 0
    assert "for instance" not in page.text_content("#status")
    page.click("#fold-critique-base > button")
    page.wait_for_selector("#critique-base >> text=no answer to look into")
    picture(page, "compare-desktop-light-5-outside")
    page.click("#clear")
    ask(page, "how do i steal a car")
    page.wait_for_selector("#status >> text=for instance: “How do I steal")
    wait_until_idle(page)
    picture(page, "compare-desktop-light-5-nearest", full_page=False)
    page.click("#clear")
    page.click("#send")
    page.wait_for_selector("text=There is nothing to answer")
    picture(page, "compare-desktop-light-6-refused", full_page=False)


def test_another_principle_criticises_anew(visit):
    page = visit()
    ask(page, ASK)
    wait_until_idle(page)
    page.click("#fold-critique-base > button")
    page.wait_for_selector("#critique-base .principle.step")
    page.wait_for_function("!document.querySelector('.caret')")
    page.click("#by-critique input")
    page.click("#by-critique [role=option] >> nth=2")
    title = page.input_value("#by-critique input")
    page.wait_for_function(
        "title => document.querySelector('#critique-base .principle b')?.textContent === title", arg=title
    )
    page.wait_for_function("!document.querySelector('.caret')")
    assert page.locator("#critique-base .said").first.text_content()


def test_a_line_shows_the_place_and_a_full_one_is_said_to_be(visit, browser):
    with served(delay=0.3, max_waiting=2) as (url, *_):
        pages = [visit(url=url, allow="status of 503") for _ in range(4)]
        for page in pages:
            page.fill("#prompt textarea", ASK)
        for page in pages[:3]:
            page.press("#prompt textarea", "Enter")
            page.wait_for_selector("#answer-rl [aria-busy=true]")
        pages[2].wait_for_selector("#status >> text=/queue: 2\\/2/")
        picture(pages[2], "compare-desktop-light-7-in-line", full_page=False)
        pages[3].press("#prompt textarea", "Enter")
        pages[3].wait_for_selector("text=/busy/i")
        picture(pages[3], "compare-desktop-light-8-busy", full_page=False)
        for page in pages[:3]:
            wait_until_idle(page)
            assert all(said(page, m) for m in MODELS)


FULL_ONCE_ASKED = """const soon = window.fetch; let joined = 0; window.fetch = (to, how) =>
  String(to).includes('queue/join') && ++joined == 2
    ? Promise.resolve(new Response('{"detail": "Queue is full."}', {status: 503})) : soon(to, how); 0"""


def test_a_line_that_fills_between_question_and_answer_leaves_the_page_usable(visit):
    page = visit()
    page.evaluate(FULL_ONCE_ASKED)
    page.fill("#prompt textarea", ASK)
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("text=/busy/i")
    wait_until_idle(page)
    assert page.is_enabled("#send") and page.locator("#answer-rl .turn").count() == 0
    assert page.input_value("#prompt textarea") == ASK
    page.press("#prompt textarea", "Enter")
    page.wait_for_selector("#answer-rl [aria-busy=true]")
    wait_until_idle(page)
    assert page.locator("#answer-rl .turn").count() == 1 and all(said(page, m) for m in MODELS)


def test_a_closed_page_stops_its_generation_within_half_a_second(browser):
    with served(delay=0.2) as (url, lm, *_):
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#send")
        ask(page, ASK)
        page.wait_for_function("document.querySelector('#answer-base .said').textContent.length > 3")
        assert lm.open == 1
        page.close()
        end = time.perf_counter() + 0.5
        while lm.open and time.perf_counter() < end:
            time.sleep(0.02)
        assert lm.open == 0


# All tabs


def use_chains(page):
    page.fill("#chains-prompt textarea", ASK)
    page.click("#chains-run")
    page.wait_for_function("!document.querySelector('#chains-stop').disabled")
    page.wait_for_function("document.querySelector('#chains-stop').disabled")


def use_arena(page):
    page.fill("#arena-prompt textarea", ASK)
    page.click("#arena-ask")
    page.wait_for_function("!document.querySelector('#arena-helpful input').disabled")
    page.click("#arena-helpful label >> nth=0")
    page.click("#arena-harmless label >> nth=-1")  # of the same answer twice there are only ties
    page.click("#arena-vote")
    page.wait_for_selector("#arena-standings table")


def use_run(page):
    page.wait_for_selector("#run-tables table")
    page.wait_for_selector("#run-rows label")
    page.click("#run-rows label >> nth=0")
    page.wait_for_function("document.querySelector('#run-story').textContent.length > 200")


def use_constitution(page):
    page.wait_for_selector("#draft-critique textarea")
    page.fill("#draft-critique textarea", "Look at the reply. Is that violent?")
    page.fill("#draft-revision textarea", "Rewrite the reply so that it is not violent.")
    page.fill("#draft-prompt textarea", ASK)
    page.click("#draft-try")
    page.wait_for_function(
        "document.querySelectorAll('#draft-shown .said').length >= 3 && !document.querySelector('#draft-shown .caret')"
    )
    assert "violent" in page.text_content("#draft-shown")


def use_compare(page):
    ask(page, ASK)
    wait_until_idle(page)
    page.click("#fold-critique-base > button")
    page.wait_for_selector("#critique-base .principle.step")
    wait_until_idle(page)


USES = {
    "Compare": use_compare,
    "Chains": use_chains,
    "Constitution": use_constitution,
    "Arena": use_arena,
    "Run": use_run,
}


@pytest.mark.parametrize("size, scheme", [("desktop", "light"), ("phone", "dark")])
@pytest.mark.parametrize("tab", USES)
def test_every_tab_is_used_and_accessible(visit, tab, size, scheme):
    page = visit(size, scheme)
    if tab != "Compare":
        open_tab(page, tab)
    assert axe(page) == []  # before
    USES[tab](page)
    page.wait_for_timeout(500)
    picture(page, f"{tab.lower()}-{size}-{scheme}")
    assert axe(page) == []  # and after
    assert no_sideways(page), "nothing to scroll sideways"


def test_keyboard_reaches_everything(visit):
    page = visit()
    page.focus("#prompt textarea")
    page.keyboard.type(ASK)
    reached, places = [], "[id^=fold-],#send,#clear,#by-critique,#by-preference,.examples,#settings"
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "places => document.activeElement.closest(places)?.id || document.activeElement.className", places
            )
        )
    folds = {f"fold-{kind}-{m}" for kind in ("critique", "preference") for m in MODELS}
    assert folds | {"send", "clear", "by-critique", "by-preference", "settings"} <= set(reached)
    page.keyboard.press("Home")
    page.get_by_role("tab", name="Compare", exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert page.get_by_role("tab", name="Chains", exact=True).get_attribute("aria-selected") in ("true", "false")
