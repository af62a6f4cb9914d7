"""What the app shows of the method is what training does; and the chains tab, to a client and in Chromium."""
import json
import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scripted import ScriptedLM

from cai_nb.app.answers import UNKNOWN
from cai_nb.app.models import Models, load_models
from cai_nb.method.comparison import COMPARISON_EXAMPLES as EXAMPLES
from cai_nb.core.errors import CaiError
from cai_nb.method.critique import critique_examples, critique_request, critique_revise, revision_request
from cai_nb.method.feedback import label_preferences
from cai_nb.lm.generate import Reply
from cai_nb.app.watch import base_says, criticise, draw_steps, prefer, rate_text, so_far, walk
from cai_nb.lm.bulk import read_reply
from cai_nb.core.rows import row_id

PROMPT = [{"role": "user", "content": "How do I punch a boss?"}]
PANDAS = "ignore:.*(no_silent_downcasting|The copy keyword)"  # Gradio's queue uses what pandas is giving up: not ours


@pytest.fixture(scope="module")
def mini():
    return load_models()


class Streaming(ScriptedLM):
    "The scripted model, streaming letter by letter; it can be slow, and is not to be asked more after a stop."

    def __init__(self, *args, delay=0.0, **settings):
        super().__init__(*args, **settings)
        self.delay, self.model, self.stopped = delay, None, False

    def with_adapter(self, name):
        assert name is None, "the base is the critic and the judge"
        return self

    def stream(self, conversations, adapters, temperature, max_new_tokens, seed, stop=None):
        assert adapters == [None] * len(conversations)
        texts = [of_row[0].text for of_row in self.sample(conversations, 1, temperature, max_new_tokens, seed)]
        for n in range(1, max(map(len, texts)) + 1):
            if stop is not None and stop():
                return
            time.sleep(self.delay)
            yield [text[:n].strip() for text in texts]

    def choice_logprobs(self, contexts, choices):
        assert not self.stopped
        return super().choice_logprobs(contexts, choices)


def scripted(layout="chat", few_shot=False, **settings):
    "Models on a scripted base, as a recipe with this layout makes them."
    recipe = {"chains": {"few_shot": few_shot}, "labels": {"few_shot": few_shot, "max_new_tokens": 80}}
    lm = Streaming(**settings)
    return Models(lm, {"base": None}, layout=layout, comparison_layout="paper", recipe=recipe), lm


def grows(before, after):
    "Whether every text of a state begins with what it was before."
    if isinstance(before, dict):
        return all(
            grows(before[key], after[key])
            for key in before
            if key not in ("score", "verdict", "complete", "p_a", "plain")
        )
    if isinstance(before, list):
        return len(before) <= len(after) and all(map(grows, before, after))
    return after.startswith(before) if isinstance(before, str) else True


# The words of training


@pytest.mark.parametrize(
    "layout, few_shot, critiques",
    [("chat", False, True), ("paper", True, True), ("paper", True, False), ("chat_plain", True, True)],
)
def test_a_walk_asks_what_training_asks(mini, layout, few_shot, critiques):
    """Same contexts, same seeds, same texts; what a plain base writes after its turn is cut off in the same way."""
    def reply(conversation, seed):
        return (
            f"text {seed % 1000}\n\nsecond paragraph\n\nHuman: and on" if layout == "paper" else f"text {seed % 1000}"
        )

    constitution, id = mini[1], row_id(PROMPT)
    models, lm = scripted(layout, few_shot, reply=reply)
    states = list(walk(models, PROMPT, draw_steps(constitution, [], 3, id, 5), 5, critiques))
    other = ScriptedLM(reply=reply)
    (row,) = critique_revise(other, [{"id": id, "messages": PROMPT}], constitution, n_revisions=3, critiques=critiques,
                             few_shot=critique_examples(layout) if few_shot else None, seed=5, layout=layout)
    assert lm.asked == other.asked and lm.seeds == other.seeds
    assert states[-1]["response"] == row["response"] and "Human" not in row["response"]
    assert [{k: s[k] for k in row["steps"][0]} for s in states[-1]["steps"]] == row["steps"]
    assert all(map(grows, states, states[1:]))


def test_chains_of_the_shipped_run_come_out_again(mini):
    """Not only like training: the very rows of chains.jsonl."""
    models, constitution = mini
    prompts = {row["id"]: row for row in map(json.loads, open(models.folder / "prompts.jsonl"))}
    rows = list(map(json.loads, open(models.folder / "chains.jsonl")))[7::400]
    assert len(rows) >= 2
    for row in rows:
        prompt = prompts[row["prompt_id"]]
        seed = models.recipe["seed"]
        *_, last = walk(models, prompt["messages"], draw_steps(constitution, [], 4, prompt["id"], seed), seed)
        assert last["response"] == row["response"]
        assert [{k: s[k] for k in ("principle_id", "critique", "revision")} for s in last["steps"]] == row["steps"]


def test_preferences_are_those_of_the_labels(mini):
    """With few-shot examples and the paper's layout: same question, reasoning and verdict, options swapped back."""
    principle = mini[1].comparison_principles[0]
    def reply(conversation, seed): return f"reasoning {seed % 1000}"
    def logprobs(context):
        question = context[-3 if context[-1]["role"] == "user" else -2]["content"]
        return [-0.1, -2.0] if " (A) [[[first" in question else [-3.0, -1.0]

    models, lm = scripted("paper", True, reply=reply, logprobs=logprobs)
    *_, found = prefer(models, PROMPT, {"a": "first", "b": "second"}, principle, seed=2)
    other = ScriptedLM(reply=reply, logprobs=logprobs)
    pair = {"id": "a:b", "prompt_id": "p", "responses": ["first", "second"], "flags": []}
    (label,) = label_preferences(
        other,
        [pair],
        mini[1].subset(ids=[principle.id]),
        [{"id": "p", "messages": PROMPT}],
        cot=True,
        clamp=(0, 1),
        few_shot=EXAMPLES,
        seed=2,
    )
    assert [[c[-2:] for c in batch] for batch in lm.asked] == [
        [c[-2:] for c in batch] for batch in other.asked
    ] and lm.seeds == other.seeds
    assert [c[-3:] for c in lm.scored[-1]] == [c[-3:] for c in other.scored[0]]
    view = found["a", "b"]
    assert view["p_a"] == pytest.approx(label["p_a"]) and view["p_a"] > 0.5
    assert view["reasoning"] == {v["order"]: v["rationale"] for v in label["votes"]}
    assert view["by_order"] == pytest.approx({v["order"]: v["p_a"] for v in label["votes"]})
    assert view["by_order"]["ab"] == pytest.approx(1 / (1 + np.exp(-1.9)))


def test_critics_and_revisers_see_each_answer_alone(mini):
    principle = mini[1].critique_principles[0]
    models, lm = scripted()
    talks = {name: [*PROMPT, {"role": "assistant", "content": name}] for name in ("one", "two", "three")}
    states = list(criticise(models, talks, principle, seed=4))
    critiques, revisions = lm.asked
    assert critiques == [critique_request(talk, principle) for talk in talks.values()]
    assert revisions == [
        revision_request(talk, principle, states[-1][name]["critique"]) for name, talk in talks.items()
    ]
    assert len(set(lm.seeds[0])) == len(set(lm.seeds[1])) == 1 and all(map(grows, states, states[1:]))
    assert list(states[-1]) == list(talks)


def test_what_cannot_be_asked_is_refused_in_a_sentence(mini):
    only_compares = next(p for p in mini[1].comparison_principles if p.critique is None)
    models, lm = scripted()
    for ask in (
        lambda: walk(models, PROMPT, [only_compares]),
        lambda: criticise(models, {"base": PROMPT}, only_compares),
        lambda: prefer(models, PROMPT, {"a": "x", "b": "y"}, mini[1].critique_principles[0]),
    ):
        with pytest.raises(CaiError, match="choose another one"):
            next(ask())
    assert lm.calls == 0
    assert list(criticise(models, {}, mini[1].critique_principles[0])) == [] and list(base_says(models, [], [])) == []


def test_what_mini_does_not_know_is_not_criticised(mini):
    models, lm = scripted()
    models = replace(models, border=lambda lm, talks: [[] for _ in talks])
    principle, by = mini[1].critique_principles[0], mini[1].comparison_principles[0]
    talks = {"base": [*PROMPT, {"role": "assistant", "content": "Well."}]}
    (walked,), (criticised,) = walk(models, PROMPT, [principle]), criticise(models, talks, principle)
    (preferred,) = prefer(models, PROMPT, {"a": "x", "b": "y"}, by)
    assert (walked["response"], walked["steps"], walked["complete"]) == (UNKNOWN, [], 0)
    assert criticised["base"]["critique"] == UNKNOWN and preferred["a", "b"]["plain"] is None
    assert all(state["outside"] for state in (walked, criticised["base"], preferred["a", "b"])) and lm.calls == 0
    assert list(walk(models, PROMPT, [principle], state=walked)) == [walked]


def test_a_new_request_is_criticised_without_what_was_said_before(mini):
    models, lm = scripted()
    models = replace(models, border=lambda lm, talks: [talk[-1:] for talk in talks])
    before, answer = (
        [{"role": "user", "content": "Hm."}, {"role": "assistant", "content": "Hm?"}],
        {"role": "assistant", "content": "Well."},
    )
    principle = mini[1].critique_principles[0]
    *_, _ = criticise(models, {"base": [*before, *PROMPT, answer]}, principle)
    assert lm.asked[0] == [critique_request([*PROMPT, answer], principle)]


@pytest.mark.parametrize(
    "text",
    [
        "No.\n\nHuman: x",
        "No.\n\nHumane\n\nCritique\n\nRevisionRequest: x",
        "a\n\n\n\nAssistant:",
        "\n\nHuman:",
        "Hm\n\nHu",
    ],
)
def test_a_growing_reply_never_shrinks(text):
    shown = [so_far(text[:n].strip(), "paper") for n in range(len(text) + 1)]
    assert all(map(grows, shown, shown[1:]))
    assert read_reply(Reply(text.strip(), True), "paper")[0].startswith(shown[-1])


# Stopping, pace, neighbours


def test_a_stop_ends_it_before_the_next_token_and_is_made_good_later(mini):
    models, lm = scripted(delay=0.01)
    principles = draw_steps(mini[1], [], 3, row_id(PROMPT))
    *_, whole = walk(models, PROMPT, principles)
    for wanted in (0, 1, 2, 3):
        switch, state, steps = threading.Event(), None, 0
        for state in walk(models, PROMPT, principles, stop=switch.is_set):
            steps += switch.is_set()
            if state["complete"] == wanted and (state["steps"] or not wanted):
                switch.set()
        assert steps <= 1 and state["complete"] <= wanted + 1, "one state may have been waiting, no more"
        *_, mended = walk(models, PROMPT, principles, state=state)
        assert mended == whole


def test_a_judge_is_not_asked_after_a_stop(mini):
    principle, switch = mini[1].comparison_principles[0], threading.Event()
    models, lm = scripted(delay=0.02, logprobs=lambda context: [-1, -2])
    *states, last = _until(
        prefer(models, PROMPT, {"a": "x", "b": "y"}, principle, stop=switch.is_set), lm, switch, after=2
    )
    assert last["a", "b"]["p_a"] is None and last["a", "b"]["plain"] is not None and len(lm.scored) == 1
    switch, models.lm.stopped = threading.Event(), False
    switch.set()
    assert (
        list(prefer(models, PROMPT, {"a": "x", "b": "y"}, principle, stop=switch.is_set)) == [] and len(lm.scored) == 1
    )


def _until(states, lm, switch, after):
    for i, state in enumerate(states):
        if i == after:
            lm.stopped = True
            switch.set()
        yield state


def test_eyes_can_follow_and_a_closed_page_ends_the_stream(mini):
    models, lm = scripted(delay=0.003)
    times = [time.monotonic() for _ in walk(models, PROMPT, draw_steps(mini[1], [], 4, row_id(PROMPT)))]
    assert len(times) > 3 and min(np.diff(times)[:-1]) > 0.1, "not more than eight states in a second"
    calls, states = lm.calls, walk(models, PROMPT, draw_steps(mini[1], [], 4, row_id(PROMPT)))
    next(states)
    states.close()
    time.sleep(0.1)
    assert lm.calls == calls + 1


def test_neighbours_do_not_disturb_each_other(mini):
    """Several visitors at once, with scores in between that switch adapters on the shared base."""
    models, constitution = mini
    prompts = [[{"role": "user", "content": f"How do I {what}?"}] for what in ("punch a boss", "bake bread")]
    answers = {
        "base": "I will not help you punch a boss: that is violent. Let us talk it over instead.",
        "sl": "Sure. Do it.",
    }

    def one(prompt): return list(walk(models, prompt, draw_steps(constitution, [], 1, row_id(prompt))))[-1]
    def two(): return list(prefer(models, PROMPT, answers, constitution.comparison_principles[0]))[-1]

    alone, found = [one(prompt) for prompt in prompts] + [two()], {}
    work = [lambda i=i, prompt=prompt: found.update({i: one(prompt)}) for i, prompt in enumerate(prompts)]
    threads = [threading.Thread(target=job) for job in [*work, lambda: found.update({2: two()})]]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i in range(2):
        assert {k: found[i][k] for k in ("response", "verdict")} == {k: alone[i][k] for k in ("response", "verdict")}
        assert found[i]["score"] == pytest.approx(alone[i]["score"], abs=1e-4)
        assert [s["revision"] for s in found[i]["steps"]] == [s["revision"] for s in alone[i]["steps"]]
    assert found[2]["base", "sl"]["reasoning"] == alone[2]["base", "sl"]["reasoning"]
    assert found[2]["base", "sl"]["p_a"] == pytest.approx(alone[2]["base", "sl"]["p_a"], abs=1e-4)


def test_texts_are_rated_by_who_is_there(mini):
    models = mini[0]
    assert models.scorer is not None, "the shipped run has a preference model"
    objection = rate_text(
        models, PROMPT, "I will not help you punch a boss: that is violent. Let us talk it over instead."
    )
    harmful = rate_text(
        models, PROMPT, "Sure. Bring patience. First make a plan. Then punch a boss slowly. Last, tidy up."
    )
    assert objection["verdict"]["kind"] == "objection" and harmful["verdict"]["kind"] == "harmful"
    assert objection["score"] > harmful["score"]
    assert rate_text(replace(models, scorer=None, oracle=None), PROMPT, "Sure.") == {"score": None, "verdict": None}
    insists = [
        *PROMPT,
        {"role": "assistant", "content": "I cannot help with that."},
        {"role": "user", "content": models.goes_on[-1]},
    ]
    assert (
        rate_text(models, insists, "I cannot help with that.")["verdict"]["kind"] == "evasive"
    )  # the oracle reads the conversation
    json.dumps(objection)


# The tab


class Slow:
    "The same language model, slow enough to be watched; it counts its steps."

    def __init__(self, lm, delay):
        self.lm, self.delay, self.steps = lm, delay, 0

    def stream(self, *args, **settings):
        for texts in self.lm.stream(*args, **settings):
            time.sleep(self.delay)
            self.steps += 1
            yield texts

    def __getattr__(self, name):
        return getattr(self.lm, name)


@contextmanager
def served(models, constitution, delay):
    "The chains tab behind another one, on a free port."
    import gradio as gr

    from cai_nb.app.chains_tab import CHAINS_TAB
    from cai_nb.app.theme import look
    from cai_nb.app.wiring import Site

    lm = Slow(models.lm, delay)
    with gr.Blocks(analytics_enabled=False) as demo, gr.Tabs():
        with gr.Tab("Other"):
            gr.Markdown("Nothing here.")
        with gr.Tab("Chains"):
            CHAINS_TAB.build(Site(replace(models, lm=lm), constitution))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    _, url, _ = demo.queue(max_size=8, default_concurrency_limit=1).launch(
        server_port=port, prevent_thread_lock=True, quiet=True, ssr_mode=False, **look(CHAINS_TAB.style))
    try:
        yield SimpleNamespace(url=url, lm=lm)
    finally:
        demo.close()


@pytest.fixture(scope="module")
def server(mini):
    with served(*mini, delay=0.015) as site:
        yield site


@pytest.mark.filterwarnings(PANDAS)
def test_the_endpoint_streams_the_chain(mini, server):
    from gradio_client import Client

    models, constitution = mini
    client, chosen = Client(server.url, verbose=False), constitution.critique_principles[3].id
    job = client.submit(PROMPT[0]["content"], 2, ["", chosen], True, 7, api_name="/chain")
    states = list(job)
    assert len(states) > 3 and all(map(grows, states, states[1:]))
    *_, last = walk(models, PROMPT, draw_steps(constitution, ["", chosen], 2, row_id(PROMPT), 7), 7)
    assert states[-1]["steps"][1]["principle_id"] == chosen and set(states[-1]) == {"seed", *last}
    assert [s["revision"] for s in states[-1]["steps"]] == [s["revision"] for s in last["steps"]] and states[-1][
        "seed"
    ] == 7
    drawn = client.predict(PROMPT[0]["content"], 1, [], False, None, api_name="/chain")
    assert drawn["steps"][0]["critique"] is None and isinstance(drawn["seed"], int)


@pytest.mark.filterwarnings(PANDAS)
@pytest.mark.parametrize(
    "wrong",
    [
        {0: ""},
        {0: 5},
        {0: "x" * 3000},
        {1: 0},
        {1: 99},
        {1: 2.5},
        {1: "2"},
        {2: ["no such"]},
        {2: "harmful"},
        {2: [""] * 99},
        {3: "yes"},
        {3: None},
        {4: -1},
        {4: "seven"},
    ],
)
def test_what_is_wrong_is_answered_at_once(server, wrong):
    import httpx

    sent = [PROMPT[0]["content"], 2, [], True, 7]
    for place, value in wrong.items():
        sent[place] = value
    start = time.monotonic()
    answer = httpx.post(f"{server.url}gradio_api/call/chain", json={"data": sent}, timeout=30)
    assert (
        answer.status_code == 422 and time.monotonic() - start < 2
    )  # half a second on a machine that does nothing else
    assert "Traceback" not in answer.text and "/cai_nb/" not in answer.text


in_chromium = pytest.mark.filterwarnings(PANDAS)


@pytest.fixture(scope="module")
def visit(server, browser):
    complaints = []

    def open_page(width=1440, height=900, scheme="light"):
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.set_default_timeout(120_000)  # a machine may be busy with other tests
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" and "422" not in m.text else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.goto(server.url)
        page.click("button[role=tab]:has-text('Chains')")
        page.wait_for_selector("#chains-run", state="visible")
        return page

    yield open_page
    assert complaints == []


def picture(page, name):
    if folder := os.environ.get("CAI_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"chains-{name}.png", full_page=True)


def begun(page):
    page.wait_for_selector("#chains-chain [aria-busy=true]")


def at_rest(page):
    page.wait_for_selector("#chains-chain [aria-busy=false]")
    page.wait_for_function("document.querySelector('#chains-stop').disabled && !document.querySelector('.caret')")


def tops(page):
    "Where every step stands on the page, and how high it is."
    return page.evaluate(
        """() => [...document.querySelectorAll('.chain .step')].map(e => [e.offsetTop, e.offsetHeight])"""
    )


@pytest.mark.parametrize("width, scheme", [(1440, "light"), (420, "dark")])
class TestChromium:
    pytestmark = in_chromium

    def test_a_chain_is_read_while_it_grows(self, visit, width, scheme):
        page = visit(width, 860, scheme)
        picture(page, f"{width}-1-empty")
        page.fill("#chains-prompt textarea", PROMPT[0]["content"])
        page.fill("#chains-seed input, #chains-seed textarea", "3")
        page.click("#chains-run")
        begun(page)
        assert page.locator("#chains-chain .ahead").count() == 4 and "by “" in page.text_content("#step-4"), (
            "every step is announced"
        )
        places, texts = [], []
        while page.get_attribute("#chains-chain .chain", "aria-busy") == "true":
            places.append(tops(page))
            texts.append(page.text_content("#chains-chain .step >> nth=0"))
            page.wait_for_timeout(120)
        at_rest(page)
        places.append(tops(page))
        picture(page, f"{width}-2-written")
        assert len(places) > 5 and [place for place in places if place != places[0]] == [], (
            "nothing moves while text comes in"
        )
        assert page.locator("#chains-chain .ahead").count() == 0
        assert (
            page.locator("#chains-chain .verdict b").count() == 5
            and page.locator("#chains-chain .scores b").count() == 6
        )
        assert (
            page.locator("#chains-chain ins").count() > 0
            and page.get_attribute("#chains-chain svg", "aria-label").count(",") == 4
        )
        assert "seed 3" in page.text_content("#chains-status")
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "nothing to scroll sideways"
        sides = [
            page.locator(f"#chains-chain .step >> nth=1 >> .{part}").bounding_box() for part in ("critique", "revision")
        ]
        assert (sides[0]["x"] == sides[1]["x"]) == (width < 700)
        page.close()

    def test_further_by_a_chosen_principle_and_folds_stay(self, visit, width, scheme):
        page = visit(width, 860, scheme)
        page.click("#chains-examples .gallery-item >> nth=0")
        begun(page)
        assert page.input_value("#chains-prompt textarea")
        page.click("#chains-stop")
        at_rest(page)
        assert "Stopped" in page.text_content("#chains-status")
        page.uncheck("#chains-chain .fold >> nth=0")
        page.click("#chains-principles input")
        page.click("#chains-principles [role=option] >> nth=2")
        title = page.text_content("#chains-principles .token span >> nth=0").strip()
        page.keyboard.press("Escape")
        page.click("#chains-more")
        begun(page)
        at_rest(page)
        heads = page.locator("#chains-chain h3").all_text_contents()
        assert any(title in head for head in heads) and len(heads) == 5
        assert (
            not page.is_checked("#chains-chain .fold >> nth=0")
            and not page.is_visible("#critique-1")
            and page.is_visible("#critique-2")
        )
        picture(page, f"{width}-3-further")
        page.close()


class TestOnce:
    pytestmark = in_chromium

    def test_stop_stops_and_errors_are_sentences(self, visit, server):
        page = visit()
        page.click("#chains-run")
        page.wait_for_selector("text=There is nothing to answer")
        page.fill("#chains-prompt textarea", "What is the capital of France?")
        page.press("#chains-prompt textarea", "Enter")
        page.wait_for_selector("#chains-chain .said.unknown")
        at_rest(page)
        assert (
            "no critique" in page.text_content("#chains-status")
            and page.locator("#chains-chain .critique").count() == 0
        )
        picture(page, "1440-4-outside")
        page.fill("#chains-prompt textarea", PROMPT[0]["content"])
        page.press("#chains-prompt textarea", "Enter")
        begun(page)
        page.wait_for_function("document.querySelector('#chains-chain .said').textContent.length > 3")
        page.click("#chains-stop")
        at_rest(page)
        steps = server.lm.steps
        page.wait_for_timeout(500)
        assert server.lm.steps == steps
        page.close()

    def test_keyboard_reaches_everything(self, visit):
        page = visit()
        page.focus("#chains-prompt textarea")
        reached = set()
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.add(page.evaluate("""() => { const e = document.activeElement;
                return e.closest('[id^=chains-]:not(#chains-chain),.critique')?.id || e.className }"""))
        assert {
            "chains-run",
            "chains-more",
            "chains-examples",
            "chains-n",
            "chains-principles",
            "chains-seed",
            "chains-critiques",
            "fold",
        } <= reached
        page.close()
