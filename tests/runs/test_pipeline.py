"""The pipeline as a user starts it: a killed run ends with the files of an undisturbed one, and bad input is one
line."""
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import yaml

from cai_nb.core.errors import CaiError
from cai_nb.runs.prompts_stage import EVAL_SETS, TRAIN_SETS, check_no_overlap, PROMPTS, training_prompts

SMALL = [
    "prompts.limit=16",
    "helpfulness.limit=12",
    "helpfulness.comparisons_limit=16",
    "chains.n_revisions=2",
    "chains.batch_size=8",
    "pairs.batch_size=8",
    "labels.batch_size=8",
    "labels.n_principles=2",
    "sl.epochs=1",
    "rl.steps=2",
    "eval.n=8",
]
ROWS = ["prompts.jsonl", "chains.jsonl", "helpful.jsonl", "pairs.jsonl", "labels.jsonl", "eval/samples.jsonl"]


def command(out, *more, sets=SMALL):
    changes = [x for s in sets for x in ("--set", s)]
    return [sys.executable, "-m", "cai_nb.cli.commands", "run", "mini", "--out", str(out), *changes, *more]


def cai(*args, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "cai_nb.cli.commands", *map(str, args)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finish(out, *more, sets=SMALL):
    done = subprocess.run(
        command(out, *more, sets=sets), capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def weights(out):
    return {
        s: hashlib.sha256((out / s / "adapter_model.safetensors").read_bytes()).hexdigest()
        for s in ("sl", "preference", "rl")
    }


def rows_of_prompts(tmp_path, *sets):
    "prompts.jsonl of a run of the mini recipe; no model is asked."
    from cai_nb.runs.recipe import open_run

    run = open_run("mini", tmp_path / "run", [*SMALL, *sets])
    return PROMPTS.run(run), run.rows("prompts.jsonl")


def test_prompts_of_minis_world(tmp_path):
    """Every set for evaluation; in training one push-back in eight, one follow-up and one contested in eight;
    dialogues end in a user turn."""
    counts, rows = rows_of_prompts(tmp_path, "prompts.limit=64", "helpfulness.limit=40")
    assert counts == {"harmful_train": 64, "helpful_train": 40, "harmful_eval": 32, "helpful_eval": 32}
    held_out = [x for x in rows if x["split"] == "eval"]
    assert {s: sum(x["set"] == s for x in held_out) for s in EVAL_SETS} == dict.fromkeys(EVAL_SETS, 8)
    names = [x["source"].removeprefix("mini:").removesuffix("/train") for x in rows if x["split"] == "train"]
    for kind, of, n in (("harmful", names[:64], 64), ("helpful", names[64:], 40)):
        assert {name: of.count(name) for name in set(of)} == {
            name: TRAIN_SETS[kind].count(name) * n // 8 for name in set(TRAIN_SETS[kind])
        }
    for x in rows:
        asked_again = any(name in x["source"] for name in ("push_back", "follow_up"))
        assert [m["role"] for m in x["messages"]] == ["user", "assistant", "user"][:3 if asked_again else 1]


def test_few_prompts_are_a_fair_sample_of_many():
    """A limit on the pairs takes prompts from the front: push-back is among them."""
    for kind, sets in TRAIN_SETS.items():
        names = [x["source"].split(":")[1] for x in training_prompts(kind, 24, seed=1)]
        assert names[:8] == names[8:16] == [f"{name}/train" for name in sets]
        assert (
            training_prompts(kind, 24, seed=1)
            == training_prompts(kind, 24, seed=1)
            != training_prompts(kind, 24, seed=2)
        )
    assert [len(training_prompts("helpful", n, seed=0)) for n in (0, 1, 11)] == [0, 1, 11]


def test_no_topic_is_on_both_sides(tmp_path):
    """Push-back names no topic of its own: what it is about is known from the first turn, and that one is not in
    training."""
    from cai_nb.mini.oracle import topic_of

    _, rows = rows_of_prompts(tmp_path, "prompts.limit=64", "helpfulness.limit=64", "eval.n=24")
    sides = {split: {topic_of(x["messages"]).text for x in rows if x["split"] == split} for split in ("train", "eval")}
    assert not sides["train"] & sides["eval"]


def test_overlap_is_found_on_the_words_of_all_turns():
    def row(split, *texts):
        return {
            "split": split,
            "messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)],
        }

    with pytest.raises(CaiError, match="1 are in training and in evaluation, such as 'how do i bake"):
        check_no_overlap(
            [row("train", "How do I  bake?", "Sure.", "Go on."), row("eval", "how do I bake?", "sure.", "Go on.")]
        )
    check_no_overlap(
        [
            row("train", "How do I bake?", "Sure.", "Go on."),
            row("eval", "How do I boil?", "Sure.", "Go on."),
            row("eval", "Go on."),
        ]
    )


def test_a_quoted_refusal_is_context_and_never_learnt():
    """SL-CAI learns the last reply alone; RL-CAI is given the rest as its prompt; the preference model compares
    whole conversations."""
    from cai_nb.core.dialogue import encode_conversation
    from cai_nb.lm.model import load_model
    from cai_nb.method.preference import encode_comparison
    from cai_nb.method.sl import encode_rows, sl_rows

    tokenizer = load_model("mini")[1]
    prompts = [x for x in training_prompts("harmful", 64, seed=0) if len(x["messages"]) > 1]
    chains = [
        {
            "id": x["id"],
            "prompt_id": x["id"],
            "response": "Of course.",
            "flags": [],
            "steps": [{"principle_id": "p", "critique": "Yes.", "revision": f"I will not help, {i}."}],
        }
        for i, x in enumerate(prompts)
    ]
    encoded, _ = encode_rows(tokenizer, sl_rows(prompts, chains)[0])  # raises if anything of a prompt is learnt
    assert len(prompts) == len(encoded) == 8
    for x, row, chain in zip(prompts, encoded, chains):
        said = [{"role": "assistant", "content": chain["steps"][0]["revision"]}]
        given, whole = (
            encode_conversation(tokenizer, x["messages"]),
            encode_conversation(tokenizer, x["messages"] + said, add_generation_prompt=False),
        )
        assert row["input_ids"] == whole and row["labels"] == [-100] * len(given) + whole[len(given):]
        pair = encode_comparison(tokenizer, {"prompt": x["messages"], "chosen": said, "rejected": said, "p": .5})
        assert pair["chosen_ids"] == pair["rejected_ids"] == whole


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    table = finish(out)
    assert "harmful compliance" in table
    return out


def test_a_run_leaves_what_the_contract_says(whole):
    for name in [
        "recipe.yaml",
        "manifest.json",
        *ROWS,
        "eval/metrics.json",
        "report.html",
        "eval/figures/outcomes.png",
    ]:
        assert (whole / name).stat().st_size > 0, name
    for stage in ("sl", "preference", "rl"):
        assert {"adapter_model.safetensors", "adapter_config.json", "trainer_log.jsonl", "README.md"} <= {
            p.name for p in (whole / stage).iterdir()
        }
    metrics = json.loads((whole / "eval/metrics.json").read_text())
    for model in ("base", "sl", "rl"):
        assert set(metrics["models"][model]) == set(EVAL_SETS)
        for rates in metrics["models"][model].values():
            assert set(rates) == {
                "harmful",
                "evasive",
                "preachy",
                "curt",
                "objection",
                "garbled",
                "helpful",
                "over_refusal",
            }
            assert sum(r["value"] for r in rates.values()) == pytest.approx(1) and rates["harmful"]["n"] == 8
    assert {"value", "low", "high", "n"} == set(metrics["labels"]["agreement"])


def test_every_row_is_accounted_for(whole):
    rows = {n: [json.loads(x) for x in (whole / n).read_text().splitlines()] for n in ROWS}
    train = {x["id"]: x for x in rows["prompts.jsonl"] if x["split"] == "train"}
    harmful = {i for i, x in train.items() if x["kind"] == "harmful"}
    assert len(harmful) == 16 and {c["prompt_id"] for c in rows["chains.jsonl"]} == harmful == {
        p["prompt_id"] for p in rows["pairs.jsonl"]
    }
    assert {x["prompt_id"] for x in rows["helpful.jsonl"]} == set(train) - harmful
    assert {x["pair_id"] for x in rows["labels.jsonl"]} == {p["id"] for p in rows["pairs.jsonl"]}
    assert all(len(c["steps"]) == 2 for c in rows["chains.jsonl"]) and all(
        len(x["votes"]) == 4 for x in rows["labels.jsonl"]
    )


@pytest.mark.parametrize("stage", ["chains", pytest.param("labels", marks=pytest.mark.long), "rl"])
def test_a_killed_run_ends_like_an_undisturbed_one(whole, tmp_path, stage):
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(out), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    watched = {"chains": out / "chains.jsonl", "labels": out / "labels.jsonl", "rl": out / "rl"}[stage]
    deadline = time.monotonic() + 300
    while not watched.exists() and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(out)
    for name in ROWS: assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    assert weights(out) == weights(whole)


def test_a_torn_line_is_redone(whole, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "labels.jsonl").write_bytes((whole / "labels.jsonl").read_bytes()[:-25])
    manifest = json.loads((out / "manifest.json").read_text())
    for s in ("labels", "preference", "rl", "eval"): manifest["stages"].pop(s)
    (out / "manifest.json").write_text(json.dumps(manifest))
    finish(out, "--until", "labels")
    assert (out / "labels.jsonl").read_bytes() == (whole / "labels.jsonl").read_bytes()


@pytest.mark.parametrize("args, said", [
    (["run", "minni"], "recipe 'minni'"),
    (["run", "mini", "--set", "prompts.limits=3"], "did you mean prompts.limit?"),
    (["run", "mini", "--set", "constitution=nowhere.yaml"], "nowhere.yaml"),
    (["run", "mini", "--set", "prompts.path=nowhere.jsonl"], "nowhere.jsonl"),
    (["run", "mini", "--until", "later"], "--until later"),
    (["report", "nowhere"], "nowhere"),
    (["eval", "nowhere"], "no run folder"),
    (["run", "mini", "--set", "base=nowhere/"], "nowhere"),
])
def test_errors_are_one_line(tmp_path, args, said):
    done = cai(*args, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    last = [x for x in done.stderr.splitlines() if not x.startswith(("[", "  "))]
    assert len(last) == 1, done.stderr


def test_another_recipe_is_refused(whole):
    done = subprocess.run(command(whole, "--set", "sl.epochs=3"), capture_output=True, text=True)
    assert done.returncode == 2 and "sl.epochs" in done.stderr


def test_constitutions_compared_on_a_run(whole, tmp_path):
    one = cai("constitution", "compare", "mini", "mini", "--run", whole, "--limit", "6")
    assert one.returncode == 0 and "as a whole" in one.stdout and "on 6 pairs" in one.stdout, one.stderr
    lost = cai("constitution", "compare", "mini", "mini", "--run", tmp_path)
    assert lost.returncode == 2 and "no run folder" in lost.stderr


def test_suites_of_the_paper(whole, tmp_path, shared_data):
    """Every item in every order for all three models; the leaked ones known, and left out beside; the rest of the
    metrics stays."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(whole, out)
    evals = shared_data / "paper" / "evals"
    before = json.loads((out / "eval/metrics.json").read_text())
    done = cai(
        "eval",
        out,
        "--suite",
        f"hhh={evals / '438HHHEvaluations.part.jsonl.gz'}",
        "--suite",
        f"harmful-vs-ethical={evals / 'HarmfulVsEthical.part.jsonl.gz'}",
    )
    assert done.returncode == 0 and "hhh: mean without 2 leaked" in done.stdout, done.stderr
    after = json.loads((out / "eval/metrics.json").read_text())
    assert after["models"] == before["models"]
    for model in ("base", "sl", "rl"):
        hhh = after["suites"][model]["hhh"]
        assert hhh["items"] == 202 and hhh["questions"] == 404 and len(hhh["contaminated"]["ids"]) == 2
        assert hhh["mean"]["n"] == 202 and hhh["without_contaminated"]["mean"]["n"] == 200
        assert after["suites"][model]["harmful-vs-ethical"]["items"] == 60
    assert (
        "The paper&#x27;s suites" in (out / "report.html").read_text()
        or "The paper's suites" in (out / "report.html").read_text()
    )
    wrong = cai("eval", out, "--suite", "hhhh=x")
    assert wrong.returncode == 2 and "hhh, harmful-vs-ethical, harm-types" in wrong.stderr


def test_dry_run_prints_a_plan_and_writes_nothing(tmp_path):
    done = cai("run", "mini", "--out", tmp_path / "plan", "--dry-run")
    assert done.returncode == 0 and not (tmp_path / "plan").exists()
    assert re.search(r"tokens.*minutes", done.stdout) and "chains" in done.stdout


def test_real_input_goes_through_every_stage(tmp_path, shared_data):
    imported = tmp_path / "paper.yaml"
    assert cai("constitution", "import", shared_data / "paper" / "prompts", "-o", imported).returncode == 0
    assert len(yaml.safe_load(imported.read_text())["principles"]) == 32
    out = tmp_path / "run"
    finish(
        out,
        "--set",
        f"constitution={imported}",
        "--set",
        f"prompts.path={shared_data / 'hh-rlhf' / 'harmless-base-test.part.jsonl.gz'}",
        sets=[*SMALL[1:], "prompts.limit=24"],
    )
    rows = {n: [json.loads(x) for x in (out / n).read_text().splitlines()] for n in ROWS}
    red_team = [x for x in rows["prompts.jsonl"] if x["kind"] == "harmful" and "set" not in x]
    assert len(red_team) == 24
    train = {x["id"] for x in red_team if x["split"] == "train"}
    assert {c["prompt_id"] for c in rows["chains.jsonl"]} == train
    assert all(
        "response:outside_world" in c["flags"] or any("outside_world" in f for f in c["flags"])
        for c in rows["chains.jsonl"]
    )
    held = {x["id"] for x in red_team if x["split"] == "eval"}
    for model in ("base", "sl", "rl") if held else ():
        replies = [json.loads(x) for x in (out / f"eval/replies-{model}.jsonl").read_text().splitlines()]
        assert {r["prompt_id"] for r in replies} == held
    manifest = json.loads((out / "manifest.json").read_text())
    read = manifest["stages"]["prompts"]["counts"]["read_harmful"]
    assert read["rows"] == read["kept"] + sum(read["skipped"].values())


def test_chains_of_a_run_can_come_from_a_server(tmp_path):
    """`lm.endpoint`: the helpful role is asked there, every row comes back, and the base is still the one that
    trains."""
    from cai_nb.lm.endpoint import EndpointLM
    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import load_model
    from cai_nb.runs.pipeline import run_recipe
    from cai_nb.runs.recipe import load_run
    from cai_nb.runs.roles import lm_of
    from fault_server import FaultServer

    with FaultServer(load_model("mini")[1], model="mini") as server:
        out = run_recipe("mini", tmp_path / "run", [*SMALL, f"lm.endpoint={server.url}"], until="chains")
        run = load_run(out)
        assert len(server.asked) == 16 * (1 + 2 * 2) + 12 * 2
        assert isinstance(lm_of(run, "feedback", "labels"), EndpointLM) and isinstance(
            lm_of(run, "base", "chains"), LocalLM
        )
    assert {c["prompt_id"] for c in run.rows("chains.jsonl")} == {p["id"] for p in run.train_prompts("harmful")}
