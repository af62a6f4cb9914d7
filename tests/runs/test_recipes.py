"""Recipes: each fits its card, its plan holds against a measured run, and the road of real models is driven on
small ones."""

import json
import os
import re
import subprocess
import sys


import pytest
import torch
from tiny import tiny_model

from cai_nb.core.errors import CaiError
from cai_nb.core.constitution import Constitution
from cai_nb.runs.plan import Sizes, evaluated_prompts, measured_pace, memory_of, work_of
from cai_nb.runs.recipe import STAGES, available_recipes, load_recipe
from cai_nb.runs.stage import Amounts

QWEN3 = {  # public figures; all of them: 151,936 tokens, heads of 128 numbers, 8 of keys and values
    "t4": (2048, 6144, 28, 16),
    "24gb": (4096, 12288, 36, 32),
    "80gb": (5120, 17408, 40, 40),
}
RECIPES = ("t4", "24gb", "80gb", "paper")


def config_of(name):
    """The configuration of a recipe's base, by its public figures."""
    from transformers import MistralConfig, Qwen3Config

    if name not in QWEN3:
        return MistralConfig()
    hidden, inner, layers, heads = QWEN3[name]
    return Qwen3Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        tie_word_embeddings=name == "t4",
    )


def cai(*args):
    return subprocess.run(
        [sys.executable, "-m", "cai_nb.cli.commands", *map(str, args)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def test_the_recipes_of_the_contract_are_there():
    assert set(available_recipes()) == {"mini", *RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_card_and_its_trainers(name, tmp_path):
    """With a quarter of the card to spare, at 300 tokens of prompt and 250 of reply; TRL takes every setting."""
    recipe = load_recipe(name)
    assert memory_of(Sizes.of(config_of(name)), recipe, 300, 250)["peak"] < 0.75 * recipe["card"]["memory"]
    model, _ = tiny_model()
    for stage in ("sl", "preference", "rl"):
        for section, config in next(found for found in STAGES if found.name == stage).settings().items():
            args = config(seed=0, **recipe[section]).trainer(tmp_path, model)
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            assert rows == recipe[section]["batch_size"]
    assert recipe["quantization"] == "nf4" and recipe["base"] != recipe["helpful"]


def test_the_paper_recipe_is_the_papers():
    r = load_recipe("paper")
    assert (
        r["prompts"]["limit"],
        r["prompts"]["generate"],
        r["helpfulness"]["limit"],
        r["helpfulness"]["samples"],
    ) == (42496, 140335, 135296, 2)
    assert (r["chains"]["n_revisions"], r["chains"]["temperature"], r["chains"]["few_shot"], r["chains"]["layout"]) == (
        4,
        1.0,
        True,
        "paper",
    )
    assert (r["sl"]["epochs"], r["sl"]["schedule"], r["sl"]["batch_size"], r["sl"]["n_revisions"]) == (
        1,
        "constant",
        1024,
        None,
    )
    assert (r["labels"]["n_principles"], r["labels"]["both_orders"], r["labels"]["cot"], r["labels"]["clamp"]) == (
        1,
        False,
        False,
        None,
    )
    assert (r["rl"]["beta"], r["rl"]["max_new_tokens"], r["rl"]["temperature"], r["preference"]["max_length"]) == (
        0.001,
        128,
        1.0,
        1024,
    )
    assert r["feedback"] == r["base"] != r["helpful"]  # the pretrained model judges, the helpful one revises


def test_a_dry_run_needs_a_configuration_and_prompts_only(tmp_path):
    config_of("t4").save_pretrained(tmp_path / "base")
    rows = [json.dumps({"prompt": f"How do I tie knot number {i}?"}) for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows))
    done = cai(
        "run",
        "t4",
        "--dry-run",
        "--set",
        f"base={tmp_path / 'base'}",
        "--set",
        f"prompts.path={tmp_path / 'prompts.jsonl'}",
        "--set",
        f"helpfulness.path={tmp_path / 'prompts.jsonl'}",
        "--set",
        "helpfulness.comparisons=null",
        "--out",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "estimated for 1.7B parameters on NVIDIA T4" in done.stdout
        and "warning" not in done.stdout
        and not (tmp_path / "run").exists()
    )
    peak = float(re.search(r"peak ([\d.]+) GiB", done.stdout)[1])
    assert 2 < peak < 15
    crowded = cai(
        "run",
        "t4",
        "--dry-run",
        "--set",
        f"base={tmp_path / 'base'}",
        "--set",
        f"prompts.path={tmp_path / 'prompts.jsonl'}",
        "--set",
        f"helpfulness.path={tmp_path / 'prompts.jsonl'}",
        "--set",
        "helpfulness.comparisons=null",
        "--set",
        "sl.micro_batch_size=512",
        "--set",
        "sl.batch_size=512",
    )
    assert "warning: the card has 15 GiB" in crowded.stdout


def test_a_base_out_of_reach_is_one_line(tmp_path):
    done = cai(
        "run",
        "t4",
        "--dry-run",
        "--set",
        "base=nobody/nothing",
        "--set",
        "prompts.path=mini",
        "--set",
        "helpfulness.path=mini",
        "--set",
        "helpfulness.comparisons=null",
    )
    assert done.returncode == 2 and "nobody/nothing" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "change, said",
    [
        ("labels.n_cot=5", "labels.cot=true"),
        ("card={name: x}", "expected name, memory, tflops and bandwidth"),
        ("prompts.generate=-1", "expected 0 or more"),
    ],
)
def test_settings_that_make_no_sense_together(change, said):
    with pytest.raises(CaiError, match=said):
        load_recipe("mini", [change])


# The plan against a measured run

SETS = [
    "prompts.limit=64",
    "helpfulness.limit=48",
    "helpfulness.comparisons_limit=60",
    "eval.n=24",
    "eval.snapshots=12",
    "eval.elo=12",
    "rl.steps=10",
    "rl.snapshot_steps=5",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run of the mini recipe in small, and what its plan said before."""
    out = tmp_path_factory.mktemp("plan") / "run"
    changes = [x for s in SETS for x in ("--set", s)]
    plan = cai("run", "mini", "--out", out, "--dry-run", *changes)
    assert plan.returncode == 0, plan.stderr
    done = cai("run", "mini", "--out", out, *changes)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w+) +([\d,]+) +([\d,]+) +([\d.,]+)$", plan.stdout, re.MULTILINE)
    return (
        out,
        {
            stage: (int(n.replace(",", "")), int(tokens.replace(",", "")), float(minutes))
            for stage, n, tokens, minutes in rows
        },
        plan.stdout,
    )


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_planned_sequences_are_the_runs(measured):
    out, plan, _ = measured
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    chains, helpful = read(out / "chains.jsonl"), read(out / "helpful.jsonl")
    assert plan["chains"][0] == sum(1 + 2 * len(c["steps"]) for c in chains) + len(helpful)
    assert plan["pairs"][0] == 2 * len(read(out / "pairs.jsonl")) and plan["rl"][0] == 10 * 64
    asked = sum(len(row["votes"]) for row in read(out / "labels.jsonl"))
    assert asked <= plan["labels"][0] <= 1.1 * asked  # equal replies are not asked about
    trained = 2 * (stages["sl"]["counts"]["revisions"] + stages["sl"]["counts"]["helpful"])
    assert trained <= plan["sl"][0] <= 1.1 * trained  # flagged rows are not trained on
    assert plan["eval"][0] == len(read(out / "eval/samples.jsonl")) + len(read(out / "eval/snapshots.jsonl"))


def test_planned_tokens_are_near_the_runs(measured):
    """Tokens written in the chains, and trained on in SL-CAI, within a quarter."""
    from cai_nb.lm.model import load_model
    from cai_nb.method.sl import encode_row, sl_rows

    out, _, text = measured
    _, tokenizer = load_model("mini")
    recipe = load_recipe("mini", SETS)
    count = lambda texts: sum(len(tokenizer(t)["input_ids"]) for t in texts)
    chains, helpful, prompts = (read(out / f"{name}.jsonl") for name in ("chains", "helpful", "prompts"))
    written = count(
        [c["response"] for c in chains]
        + [t for c in chains for s in c["steps"] for t in (s["critique"], s["revision"])]
        + [h["response"] for h in helpful]
    )
    rows, _ = sl_rows(prompts, chains, helpful)
    trained = 2 * sum(len(encode_row(tokenizer, row)["input_ids"]) for row in rows)
    conversations = [p["messages"] for p in prompts if p["kind"] == "harmful" and p["split"] == "train"]
    pace = measured_pace(*load_model("mini"), conversations, 64, Constitution.load("mini").critique_principles[0])
    evaluated = evaluated_prompts(recipe, [])
    work = work_of(Amounts(recipe, 64, 48, 60, evaluated, pace.prompt, pace.reply, pace.critique))
    assert work["chains"].written == pytest.approx(written, rel=0.25)
    assert work["sl"].trained == pytest.approx(trained, rel=0.25)


def test_planned_minutes_are_of_the_runs_order(measured):
    """Work that takes seconds, on a machine with other work: within a factor of four as a whole."""
    out, plan, text = measured
    stages = json.loads((out / "manifest.json").read_text())["stages"]
    seconds = sum(stages[s]["seconds"] for s in plan if s in stages)
    planned = 60 * float(re.search(r"^all +([\d.,]+)$", text, re.MULTILINE)[1])
    assert planned / 4 < seconds < 4 * planned + 30


def test_planned_memory_is_what_is_there(measured):
    """Weights and adapters to the byte, a training step from above, the cache of a batch within a factor of two."""
    from cai_nb.lm.decoding import Decoding, row_uniforms
    from cai_nb.lm.model import load_model, lora_config
    from peft import get_peft_model

    model, _ = load_model("mini")
    recipe, sizes = load_recipe("mini"), Sizes.of(model.config)
    planned = {name: gib * 2**30 for name, gib in memory_of(sizes, recipe, 14, 28, itemsize=4).items()}
    assert planned["weights"] == sum(p.numel() * 4 for p in model.parameters())
    adapted = get_peft_model(model, lora_config(r=recipe["sl"]["lora_r"]))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    kept, seen = 0, set()

    def pack(x):
        nonlocal kept
        if x.untyped_storage().data_ptr() not in seen:
            seen.add(x.untyped_storage().data_ptr())
            kept += x.untyped_storage().nbytes() * (x.untyped_storage().data_ptr() not in weights)
        return x

    weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
    ids = torch.randint(2000, (recipe["sl"]["batch_size"], 42))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = adapted.get_base_model().model(input_ids=ids).last_hidden_state.square().mean()  # TRL keeps no logits
    loss.backward()
    optimizer.step()
    moments = sum(s[k].numel() * 4 for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq"))
    own = sum(p.numel() * 4 + p.grad.numel() * 4 for p in trainable)
    assert planned["adapters"] == own + moments + 2 * sum(p.numel() * 4 for p in trainable)  # and two that rest
    assert kept < planned["training step"] < 12 * kept  # three times the mean length, and the larger of three stages
    adapted.unload()


# Real architectures and NF4, on the CPU

def small_qwen(folder, template, seed):
    """A random Qwen of a few thousand parameters with a byte-level tokenizer; a pretrained base has no template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["Is that harmful? The answer is: (A) (B). Please rewrite the answer."] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>" if template else "<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=template,
    )
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            max_position_embeddings=16384,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
            bos_token_id=None,
        )
    )
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 40  # now and then it ends its turn
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder


CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
SHORT = [
    "chains.max_new_tokens=12",
    "chains.batch_size=8",
    "chains.n_revisions=2",
    "pairs.max_new_tokens=12",
    "pairs.batch_size=8",
    "labels.batch_size=4",
    "rl.steps=2",
    "rl.batch_size=8",
    "rl.micro_batch_size=8",
    "rl.max_new_tokens=8",
    "rl.snapshot_steps=1",
    "eval.max_new_tokens=12",
    "eval.snapshots=2",
    "eval.elo=2",
    "sl.batch_size=2",
    "sl.micro_batch_size=2",
    "sl.max_length=4096",
    "preference.batch_size=8",
    "preference.micro_batch_size=4",
    "preference.max_length=4096",
    "helpfulness.samples=1",
]


@pytest.mark.parametrize(
    "name, more",
    [("t4", ["rl.group_size=4"]), ("paper", ["rl.steps=2", "prompts.generate=4", "helpfulness.generate=0"])],
)
def test_a_recipe_runs_through_on_a_real_architecture(tmp_path, name, more):
    """Two models for three roles, four bits, a base without a template: every stage as on a GPU, only smaller."""
    base = small_qwen(tmp_path / "base", None, 0)
    helpful = small_qwen(tmp_path / "helpful", CHATML, 1)
    asked = [f"What do I say to neighbour number {i} who sings?" for i in range(24)]
    (tmp_path / "red.jsonl").write_text("\n".join(json.dumps({"prompt": text}) for text in asked))
    (tmp_path / "help.jsonl").write_text("\n".join(json.dumps({
        "chosen": f"\n\nHuman: How do I fold boat {i}?\n\nAssistant: Fold it once, then once more.",
        "rejected": f"\n\nHuman: How do I fold boat {i}?\n\nAssistant: No."}) for i in range(16)))
    changes = [
        f"base={base}",
        f"helpful={helpful}",
        f"feedback={base if name == 'paper' else helpful}",
        f"prompts.path={tmp_path / 'red.jsonl'}",
        f"helpfulness.path={tmp_path / 'help.jsonl'}",
        f"helpfulness.comparisons={tmp_path / 'help.jsonl'}",
        "prompts.limit=24",
        "helpfulness.limit=12",
        "helpfulness.comparisons_limit=12",
        *SHORT,
        *more,
    ]
    out = tmp_path / "run"
    done = cai("run", name, "--out", out, *[x for s in changes for x in ("--set", s)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "No judge: replies are in" in done.stderr and "Votes of the feedback model" in done.stderr
    page = (out / "report.html").read_text()
    assert "No oracle knows the truth" in page and page.count("<article>") >= 3
    train = [p for p in read(out / "prompts.jsonl") if p["split"] == "train" and p["kind"] == "harmful"]
    assert (
        {c["prompt_id"] for c in read(out / "chains.jsonl")}
        == {p["id"] for p in train}
        == {p["prompt_id"] for p in read(out / "pairs.jsonl")}
    )
    metrics = json.loads((out / "eval/metrics.json").read_text())
    assert set(metrics["scores"]) == {"base", "sl", "rl"} and [row["step"] for row in metrics["snapshots"]] == [0, 1, 2]
    assert {row["model"] for row in metrics["elo"]} == {"base", "sl", "rl"}
    for stage in ("sl", "preference", "rl"):
        assert json.loads((out / stage / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
        assert (
            "Human:" in (out / stage / "chat_template.jinja").read_text()
        )  # the base's own form, not the helpful model's
