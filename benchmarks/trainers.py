"""The three training stages beside plain TRL: CPU time of a whole training, and the weights in memory during RL.

    python benchmarks/trainers.py [--repeats 5] [--steps 20] [--only sft reward grpo]

Same rows, steps, batch (what our stages have as default), rate, loss and LoRA, in float32 on one thread of the CPU,
on the embedded model. The two take turns, and CPU time is counted, not time on the clock, so that other work on the
machine matters little. TRL is used as its documentation shows: conversational data sets, `peft_config`, its own
defaults. For GRPO it gets the SL adapter on a model of its own, and a separate `AutoModelForSequenceClassification`
with the adapter merged into it.

The table shows the whole training, then steps alone (sampling, scores, forward, backward), then what went through
ours for one of theirs: positions, padding counted, and tokens learnt from. In RL these are sampled, so they differ;
every pair of runs has a seed of its own.

What differs. Ours: rows of similar length share a batch; labels are checked; RL samples with its own loop and keeps
policy, reference and preference model on one base; its adapters are loaded, the base is proved unchanged, gradients
and replies are watched; a checkpoint is written after the last step, then the adapter and its card. TRL: its models
are loaded before the measuring begins, and it saves nothing.

Writes benchmarks/results/trainers.json when all three were measured.
"""
import argparse
import gc
import json
import os
import platform
import random
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.resources import files
from io import StringIO
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from cai_nb.mini import oracle, world
from cai_nb.lm.model import load_model
from cai_nb.method.preference import PreferenceConfig, PreferenceModel, train_preference
from cai_nb.method.rl import RLConfig, rl_prompts, train_rl
from cai_nb.method.sl import SLConfig, train_sl

import datasets  # after cai_nb, which keeps a message of bitsandbytes away
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel

MUST = 1.03  # times the CPU time of plain TRL
TRAINERS = {"sft": trl.SFTTrainer, "reward": trl.RewardTrainer, "grpo": trl.GRPOTrainer}
BATCH = {"sft": SLConfig.batch_size, "reward": PreferenceConfig.batch_size, "grpo": RLConfig.batch_size}
SLOWER = {"sft": 1, "reward": 2, "grpo": 5}  # a step takes so many times as long, so there are so many times fewer
RATE, CENTER, GROUP, NEW_TOKENS, BETA = 1e-3, 0.01, 8, 64, 0.05
PLAIN = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "learning_rate": RATE,
}


def mini():
    "The embedded model in float32, and its tokenizer"
    return load_model("mini", device="cpu", dtype="float32")


def classifier():
    "The embedded model as a reward model with a new head"
    weights = files("cai_nb") / "mini" / "weights"
    return transformers.AutoModelForSequenceClassification.from_pretrained(
        str(weights), num_labels=1, dtype=torch.float32
    )


def lora(task):
    "LoRA of the shape that is the default of our stages"
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type=task)


class Rows:
    "What a stage trains on, from mini's world: as many rows as the steps take, so that each is seen once"
    def __init__(self, stage, steps):
        self.steps, n, rng = steps, steps * BATCH[stage], random.Random(0)
        said = lambda p, sort: [
            {
                "role": "assistant",
                "content": world.write_reply(oracle.find_topic(p["messages"][0]["content"]), sort, rng),
            }
        ]
        better = lambda p: "objection" if p["kind"] == "harmful" else "comply"
        worse = lambda p: rng.choice([sort for sort in world.SORTS[:4] if sort != better(p)])
        self.prompts = [
            p for two in zip(*(world.prompts("train", kind, n // 2) for kind in ("harmful", "benign"))) for p in two
        ]
        self.replies = [
            {"prompt": p["messages"], "completion": said(p, rng.choice((better, worse))(p))} for p in self.prompts
        ]
        self.comparisons = [
            {"prompt": p["messages"], "chosen": said(p, better(p)), "rejected": said(p, worse(p)), "p": 1.0}
            for p in self.prompts
        ]


def ours(stage, rows, base, tokenizer, before, out, seed=0):
    "A training by one of our stages, ready to go"
    if stage == "sft":
        config = SLConfig(epochs=1, learning_rate=RATE, batch_size=BATCH[stage], seed=seed)
        return lambda: train_sl(base, tokenizer, rows.replies, config, out)
    if stage == "reward":
        config = PreferenceConfig(
            epochs=1, learning_rate=RATE, batch_size=BATCH[stage], center=CENTER, held_out=0, seed=seed
        )
        return lambda: train_preference(base, tokenizer, rows.comparisons, config, out)
    config = RLConfig(
        steps=rows.steps,
        learning_rate=RATE,
        batch_size=BATCH[stage],
        group_size=GROUP,
        max_new_tokens=NEW_TOKENS,
        beta=BETA,
        seed=seed,
    )
    return lambda: train_rl(base, tokenizer, rows.prompts, before / "sft", before / "reward", config, out)


def plain(stage, rows, tokenizer, before, out, seed=0):
    "The same training by TRL alone, ready to go"
    settings = PLAIN | {"output_dir": str(out), "per_device_train_batch_size": BATCH[stage], "seed": seed}
    if stage == "sft":
        model = mini()[0]
        def train():
            args = trl.SFTConfig(num_train_epochs=1, **settings)
            trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(rows.replies), processing_class=tokenizer,
                           peft_config=lora("CAUSAL_LM")).train()
    elif stage == "reward":
        model, data = classifier(), [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in rows.comparisons]
        def train():
            args = trl.RewardConfig(num_train_epochs=1, center_rewards_coefficient=CENTER, **settings)
            trl.RewardTrainer(model, args, train_dataset=Dataset.from_list(data), processing_class=tokenizer,
                              peft_config=lora("SEQ_CLS")).train()
    else:
        policy, reward = (
            PeftModel.from_pretrained(mini()[0], before / "sft", is_trainable=True),
            merged(before / "reward"),
        )
        data = [
            {"prompt": p["messages"]} for p in rl_prompts(rows.prompts, rows.steps * BATCH[stage] // GROUP, seed=seed)
        ]
        def train():
            args = trl.GRPOConfig(
                max_steps=rows.steps, num_generations=GROUP, max_completion_length=NEW_TOKENS, beta=BETA, **settings
            )
            trl.GRPOTrainer(policy, reward, args, Dataset.from_list(data), processing_class=tokenizer,
                            reward_processing_classes=tokenizer).train()
    return train


def merged(folder):
    "A preference model of ours as the reward model that plain TRL takes"
    return PeftModel.from_pretrained(classifier(), folder).merge_and_unload().eval()


def disagreement(rows, tokenizer, folder):
    "The largest difference between our scores and those of the reward model that TRL gets"
    scorer, reward = PreferenceModel.load(mini()[0], tokenizer, folder), merged(folder)
    conversations = [row["prompt"] + row["chosen"] for row in rows.comparisons[:8]]
    with torch.no_grad():
        scores = [
            float(reward(torch.tensor([tokenizer.apply_chat_template(c, return_dict=False)])).logits)
            for c in conversations
        ]
    return float(abs(scorer.score(conversations) - scores).max())


def weights(trainer):
    "Bytes of all parameters that a trainer keeps in memory, its judge's with them, shared ones once"
    parameters = [*trainer.model.parameters()]
    for reward in getattr(trainer, "reward_funcs", ()):
        held = [reward] if isinstance(reward, torch.nn.Module) else [cell.cell_contents for cell in reward.__closure__]
        for judge in (found for found in held if isinstance(found, (torch.nn.Module, PreferenceModel))):
            parameters += (
                [*judge.model.parameters(), judge.head] if isinstance(judge, PreferenceModel) else judge.parameters()
            )
    assert getattr(trainer, "ref_model", None) is None  # the reference is an adapter, with TRL as with us
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in parameters}.values())


@contextmanager
def watched(trainer_class):
    "Counts what goes through the loss of a trainer and its subclasses: rows, tokens learnt, positions; times steps"
    seen = {"in_steps": 0., "steps": 0, "rows": 0, "learnt": 0, "positions": 0, "weights": 0}
    loss, step = trainer_class.compute_loss, trainer_class.training_step
    def compute_loss(self, model, inputs, *args, **kwargs):
        masks = [inputs[name] for name in ("attention_mask", "prompt_mask", "completion_mask") if name in inputs]
        seen["steps"] += 1
        seen["rows"] += len(masks[0])
        seen["learnt"] += int((inputs["labels"] != -100).sum() if "labels" in inputs else masks[-1].sum())
        seen["positions"] += sum(mask.numel() for mask in masks)
        seen["weights"] = seen["weights"] or weights(self)
        return loss(self, model, inputs, *args, **kwargs)
    def training_step(self, *args, **kwargs):
        began = time.process_time()
        result = step(self, *args, **kwargs)
        seen["in_steps"] += time.process_time() - began
        return result

    with (
        patch.object(trainer_class, "compute_loss", compute_loss),
        patch.object(trainer_class, "training_step", training_step),
    ):
        yield seen


def timed(stage, train):
    "CPU seconds of a training, and what went through its loss"
    gc.collect()
    with watched(TRAINERS[stage]) as seen, redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        began = time.process_time()
        train()
        seconds = time.process_time() - began
    return {"seconds": round(seconds, 3), **seen, "in_steps": round(seen["in_steps"], 3)}


def measure(stage, repeats=5, steps=20):
    "Runs of both kinds in turn, each pair with a seed of its own: what was found, the ratios of time and their median"
    base, tokenizer = mini()
    rows, runs = Rows(stage, steps), {"ours": [], "trl": []}
    with TemporaryDirectory() as folder:
        before = Path(folder)
        for needed in ("sft", "reward") if stage == "grpo" else ():
            timed(needed, ours(needed, Rows(needed, 10), base, tokenizer, before, before / needed))
        assert stage != "grpo" or disagreement(rows, tokenizer, before / "reward") < 1e-4
        for i in range(repeats + 1):  # the first pair is short and does not count: imports, first calls
            some = rows if i else Rows(stage, 1)
            for name, several in runs.items():
                kind, model = (ours, [base]) if name == "ours" else (plain, [])
                train = kind(stage, some, *model, tokenizer, before, before / f"{name}{i}", i)
                several += [timed(stage, train)] if i else []
    same = ("steps", "rows") if stage == "grpo" else ("steps", "rows", "learnt")  # RL learns from what it sampled
    assert len({tuple(run[k] for k in same) for several in runs.values() for run in several}) == 1, (
        f"{stage}: not the same work: {runs}"
    )
    ratios, in_steps = ([round(a[key] / b[key], 4) for a, b in zip(*runs.values())] for key in ("seconds", "in_steps"))
    return {
        "ratio": round(median(ratios), 4),
        "ratios": ratios,
        "ratio_in_steps": round(median(in_steps), 4),
        "ratios_in_steps": in_steps,
        "base": sum(p.nbytes for p in base.parameters()),
        **runs,
    }


def machine():
    "What the figures were measured on"
    info = Path("/proc/cpuinfo")
    named = [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    cpu = named[0].partition(":")[2].strip() if named else platform.processor()
    return {"platform": platform.platform(), "cpu": cpu, "cores": os.cpu_count(),
            "threads": torch.get_num_threads(), "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "peft")}}


def show(stage, r):
    "One line of the table"
    of = lambda key: sum(run[key] for run in r["ours"]) / sum(run[key] for run in r["trl"])
    seconds, memory = ([run[key] for name in ("ours", "trl") for run in r[name]] for key in ("seconds", "weights"))
    half, verdict = len(r["ours"]), "ok" if r["ratio"] <= MUST else "MISS"
    return (f"{stage:<8}{median(seconds[:half]):>7.2f} s{median(seconds[half:]):>8.2f} s{r['ratio']:>8.3f}   "
            f"{min(r['ratios']):.2f} to {max(r['ratios']):.2f}   {verdict:<7}{r['ratio_in_steps']:>8.3f}"
            f"{of('positions'):>12.3f}{of('learnt'):>9.3f}{memory[0] / 2**20:>8.1f} : {memory[-1] / 2**20:.1f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps", type=int, default=20, help="of SFT; the reward model takes half as many, GRPO a fifth"
    )
    parser.add_argument("--only", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    found, load = {}, [round(os.getloadavg()[0], 2)]
    print(
        f"{'CPU time':<12}ours       TRL   ratio   of the pairs   <= {MUST:<5}in steps   positions   learnt"
        "   weights in memory"
    )
    for stage in args.only:
        found[stage] = measure(stage, args.repeats, max(1, args.steps // SLOWER[stage]))
        load.append(round(os.getloadavg()[0], 2))
        print(show(stage, found[stage]), flush=True)
    if list(found) == list(TRAINERS):
        path = Path(__file__).parent / "results" / "trainers.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(
            json.dumps({"machine": machine(), "load": load, "must": MUST, "stages": found}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
