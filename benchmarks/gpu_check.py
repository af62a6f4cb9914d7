"""What only a GPU can show, in minutes: right, small enough, fast enough. One script for a bare CUDA machine.

    make gpu-wheels                                   # once, with a network: the libraries that such a machine lacks
    make gpu-check                                    # or: python benchmarks/gpu_check.py [--out FILE] [--only PART]

The machine needs torch, transformers, peft and accelerate, and no network. Models are random ones made on it (of 1.5
and 8 billion weights, in NF4), and mini, whose replies are known. Each part is a process with a time limit, and each
result is a line of JSON the moment it is there; eight minutes are enough for all. Without CUDA the same parts run on
the CPU at a size of seconds, which says that the script works, and nothing of a card.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from contextlib import redirect_stdout
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / ".gpu-wheels"  # of `make gpu-wheels`; git ignores it
sys.path[:0] = [str(ROOT), str(WHEELS / "site")]
PARTS = {  # name → seconds it may take on a GPU
    "machine": 30, "greedy": 60, "one_base": 90, "chains": 80, "labels": 60, "training": 120, "rl_memory": 120}
MUST_GIB = 16  # peak of RL on 8 billion weights
SHAPES = {  # hidden, inner, layers, heads, key-value heads, vocabulary
    "1.5b": (2048, 6144, 24, 16, 8, 151936), "8b": (4096, 12288, 36, 32, 8, 151936), "small": (64, 128, 2, 4, 2, 3072)}


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def model_of(shape: str, folder: Path):
    "A random model in NF4 with mini's tokenizer, made once and read as any other."
    import torch
    from cai_nb.lm.model import load_model
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, inner, layers, heads, key_heads, words = SHAPES[shape if on_gpu() else "small"]
    place = folder / (shape if on_gpu() else "small")
    if not (place / "config.json").exists():
        config = Qwen3Config(
            hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=key_heads, head_dim=hidden // heads, vocab_size=words, bos_token_id=None,
            eos_token_id=1, pad_token_id=0, max_position_embeddings=4096, dtype="bfloat16")
        torch.manual_seed(0)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda" if on_gpu() else "cpu"):
            model = Qwen3ForCausalLM(config)
        torch.set_default_dtype(torch.float32)
        load_model("mini")[1].save_pretrained(place)
        model.save_pretrained(place, max_shard_size="8GB")
        del model
        if on_gpu():
            torch.cuda.empty_cache()
    return load_model(place, quantization="nf4")


def asks(n: int) -> list[dict]:
    from cai_nb.mini import world

    return world.prompts("train", "harmful", n)


def replies_to(rows: list[dict]) -> list[dict]:
    said = "First look for a quiet place, then begin slowly, and check the result. "
    return [{"prompt": row["messages"], "completion": [{"role": "assistant", "content": said}]} for row in rows]


def timed(work) -> tuple:
    import torch

    on_gpu() and torch.cuda.synchronize()
    began = time.perf_counter()
    found = work()
    on_gpu() and torch.cuda.synchronize()
    return found, time.perf_counter() - began


def peak_gib() -> float:
    "On a GPU what was allocated at most; else what the process took."
    import resource

    import torch

    if on_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


# The parts: each returns what it measured; "good" says whether that is what must be


def machine(folder: Path) -> dict:
    from importlib.metadata import version

    import torch
    from cai_nb.lm.model import hardware

    names = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "datasets")
    free = torch.cuda.mem_get_info()[0] / 2**30 if on_gpu() else None
    found = {name: version(name) for name in names}
    return {"good": True, "is": hardware().reason, "free_gib": free, "versions": found}


def greedy(folder: Path) -> dict:
    "mini's three models on the GPU say what they say on a CPU, and judge as there."
    import torch
    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import add_adapters, load_model
    from cai_nb.runs.folder import reference_folder

    torch.backends.cuda.matmul.allow_tf32 = False
    talks = [row["messages"] for row in asks(64 if on_gpu() else 4)]
    said, judged = {}, {}
    for device in ("cpu", "cuda" if on_gpu() else "cpu"):
        model, tokenizer = load_model("mini", dtype="float32", device=device)
        model = add_adapters(model, {name: reference_folder() / name for name in ("sl", "rl")})
        for name in (None, "sl", "rl"):
            lm = LocalLM(model, tokenizer).with_adapter(name)
            found = [reply.text for (reply,) in lm.sample(talks, temperature=0, max_new_tokens=48 if on_gpu() else 12)]
            scores = lm.choice_logprobs(talks, [" (A)", " (B)"])
            before = said.setdefault(name, found), judged.setdefault(name, scores)
            same = sum(a == b for a, b in zip(found, before[0]))
            said[name, "same"], judged[name, "apart"] = same, float(abs(scores - before[1]).max())
    same = sum(said[name, "same"] for name in (None, "sl", "rl"))
    apart = max(judged[name, "apart"] for name in (None, "sl", "rl"))
    return {"good": same == 3 * len(talks) and apart < 1e-3, "rows": 3 * len(talks), "same": same, "apart": apart}


def one_base(folder: Path) -> dict:
    "Policy, SL-CAI and preference model on one base of 8 billion weights: bytes of each."
    from cai_nb.lm.model import lora_config
    from peft import get_peft_model

    model, _ = model_of("8b", folder)
    size = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    base, pointers = sum(size.values()), set(size)
    model = get_peft_model(model, lora_config())
    for name in ("sl", "pm"):
        model.add_adapter(name, lora_config())
    all_ = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    adapters = sum(n for pointer, n in all_.items() if pointer not in pointers)
    return {"good": pointers <= set(all_), "base_gib": base / 2**30, "three_adapters_gib": adapters / 2**30,
            "peak_gib": peak_gib()}


def chains(folder: Path) -> dict:
    "Chains of two revisions: tokens written per second, beside batched generate that reads everything again."
    import torch
    from cai_nb.core.constitution import Constitution
    from cai_nb.lm.generate import LocalLM
    from cai_nb.method.critique import critique_revise

    (model, tokenizer), rows, longest = model_of("1.5b", folder), asks(32 if on_gpu() else 2), 48 if on_gpu() else 4
    lm, constitution = LocalLM(model, tokenizer, batch_size=len(rows)), Constitution.load("harmlessness")

    def ours():
        return critique_revise(lm, rows, constitution, n_revisions=2, max_new_tokens=longest, batch_size=len(rows))

    ours() if on_gpu() else None  # the first call loads kernels
    found, seconds = timed(ours)
    texts = [text for row in found for text in (row["response"], *(s[k] for s in row["steps"]
                                                                   for k in ("critique", "revision")))]
    written = sum(len(tokenizer(text).input_ids) for text in texts)

    def plain():
        for step in range(5):
            ids = torch.randint(5, 3000, (len(rows), 60 + step * (longest + 40)), device=model.device)
            model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest,
                           min_new_tokens=longest, do_sample=True, pad_token_id=0)

    _, theirs = timed(plain)
    return {"good": written > 0, "tokens_per_s": written / seconds,
            "generate_tokens_per_s": 5 * longest * len(rows) / theirs, "seconds": seconds, "peak_gib": peak_gib()}


def labels(folder: Path) -> dict:
    "The paper's layout, four principles in both orders: labels per second."
    from cai_nb.core.constitution import Constitution
    from cai_nb.lm.generate import LocalLM
    from cai_nb.method.feedback import label_preferences

    (model, tokenizer), rows = model_of("1.5b", folder), asks(32 if on_gpu() else 1)
    said = ["No, because that harms.", "Sure. First begin slowly."]
    pairs = [{"id": f"x{i}", "prompt_id": row["id"], "responses": said, "flags": []} for i, row in enumerate(rows)]
    lm = LocalLM(model, tokenizer, batch_size=16)
    found, seconds = timed(lambda: label_preferences(lm, pairs, Constitution.load("hhh"), rows, n_principles=4))
    votes = sum(len(row["votes"]) for row in found)
    return {"good": votes == 8 * len(pairs), "labels_per_s": votes / seconds, "seconds": seconds}


def _trained(folder: Path, shape: str, out: Path):
    "A base with an SL adapter and a preference model, each of one step."
    from cai_nb.method.preference import PreferenceConfig, train_preference
    from cai_nb.method.sl import SLConfig, train_sl

    model, tokenizer = model_of(shape, folder)
    rows = replies_to(asks(4))
    train_sl(model, tokenizer, rows, SLConfig(epochs=1, batch_size=4, micro_batch_size=2), out / "sl")
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "p": 1.0,
              "rejected": [{"role": "assistant", "content": "Sure. Begin now."}]} for row in rows]
    settings = PreferenceConfig(epochs=1, batch_size=4, micro_batch_size=2, held_out=0)
    train_preference(model, tokenizer, pairs, settings, out / "preference")
    return model, tokenizer


def training(folder: Path) -> dict:
    "Steps of SL-CAI and of GRPO beside plain TRL with the same configuration, in seconds."
    import tempfile

    import trl
    from cai_nb.lm.model import lora_config
    from cai_nb.method.rl import RLConfig, train_rl
    from cai_nb.method.sl import SLConfig, train_sl
    from datasets import Dataset

    steps = 6 if on_gpu() else 2
    with tempfile.TemporaryDirectory() as made:
        out = Path(made)
        model, tokenizer = _trained(folder, "1.5b", out)
        rows = replies_to(asks(8 * steps))
        sft = SLConfig(epochs=1, batch_size=8, learning_rate=1e-4)
        _, ours = timed(lambda: train_sl(model, tokenizer, rows, sft, out / "ours"))
        rl = RLConfig(steps=steps, batch_size=16 if on_gpu() else 4, group_size=4, max_new_tokens=32, guard=False)
        prompts = [row | {"kind": "harmful"} for row in asks(64)] + [row | {"kind": "helpful"} for row in asks(64)]
        _, our_rl = timed(lambda: train_rl(model, tokenizer, prompts, out / "sl", out / "preference", rl, out / "rl"))
        args = trl.SFTConfig(
            output_dir=str(out / "plain"), num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-4,
            use_cpu=not on_gpu(), bf16=on_gpu(), gradient_checkpointing=on_gpu(), save_strategy="no", report_to="none",
            disable_tqdm=True)
        trainer = trl.SFTTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
                                 peft_config=lora_config())
        _, theirs = timed(trainer.train)
        args = trl.GRPOConfig(
            output_dir=str(out / "plain-rl"), max_steps=steps, per_device_train_batch_size=rl.batch_size,
            num_generations=rl.group_size, max_completion_length=rl.max_new_tokens, beta=rl.beta,
            learning_rate=rl.learning_rate, use_cpu=not on_gpu(), bf16=on_gpu(), gradient_checkpointing=on_gpu(),
            save_strategy="no", report_to="none", disable_tqdm=True)
        trainer = trl.GRPOTrainer(
            trainer.model.unload(), lambda completions, **more: [float(i % 4) for i in range(len(completions))], args,
            Dataset.from_list([{"prompt": row["messages"]} for row in asks(64)]), processing_class=tokenizer,
            peft_config=lora_config())
        _, their_rl = timed(trainer.train)
    return {"good": True, "sft_step_s": ours / steps, "trl_sft_step_s": theirs / steps, "grpo_step_s": our_rl / steps,
            "trl_grpo_step_s_without_a_judge": their_rl / steps, "peak_gib": peak_gib()}


def rl_memory(folder: Path) -> dict:
    "RL on 8 billion weights as the recipe for 24 GB has it: memory at its peak."
    import tempfile

    from cai_nb.method.rl import RLConfig, train_rl
    from cai_nb.runs.recipe import load_recipe

    import torch

    recipe = load_recipe("24gb")["rl"]
    size = {"steps": 2, "batch_size": 16, "guard": False} if on_gpu() else {
        "steps": 1, "batch_size": 4, "group_size": 2, "micro_batch_size": 2, "max_new_tokens": 8, "guard": False}
    with tempfile.TemporaryDirectory() as made:
        model, tokenizer = _trained(folder, "8b", Path(made))
        on_gpu() and torch.cuda.reset_peak_memory_stats()
        prompts = [row | {"kind": kind} for kind in ("harmful", "helpful") for row in asks(32)]
        config = RLConfig(**{**recipe, **size, "snapshot_steps": 0})
        _, seconds = timed(lambda: train_rl(
            model, tokenizer, prompts, Path(made) / "sl", Path(made) / "preference", config, Path(made) / "rl"))
    return {"good": peak_gib() <= MUST_GIB or not on_gpu(), "peak_gib": peak_gib(), "must_gib": MUST_GIB,
            "step_s": seconds / config.steps}


def unpack_wheels() -> None:
    "Wheels that travelled along, as a folder that Python imports from; nothing is installed."
    for wheel in WHEELS.glob("*.whl") if not (WHEELS / "site").exists() else ():
        with zipfile.ZipFile(wheel) as file:
            file.extractall(WHEELS / "site")


def run_part(name: str, folder: Path, seconds: float) -> dict:
    "A part in a process of its own, so that it can be ended and its memory is its own; on a CPU in this one."
    began = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # trainers print
            found = _in_a_process(name, folder, seconds) if on_gpu() else globals()[name](folder)
    except subprocess.TimeoutExpired:
        found = {"good": False, "error": f"not done in {seconds:.0f} s"}
    except Exception as error:  # the other parts are worth their minutes
        found = {"good": False, "error": f"{type(error).__name__}: {error}"[:300]}
    return {"part": name, **found, "took_s": round(time.perf_counter() - began, 1)}


def _in_a_process(name: str, folder: Path, seconds: float) -> dict:
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--models", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the results are also written here, line by line")
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--models", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(globals()[args.part](args.models)))
        return
    bad = unpack_wheels() or 0
    with tempfile.TemporaryDirectory() as models:
        for name in args.only:
            found = run_part(name, args.models or Path(models), PARTS[name])
            bad += not found["good"]
            print(line := json.dumps(found), flush=True)
            if args.out:
                with args.out.open("a") as file:
                    file.write(line + "\n")
    sys.exit(min(1, bad))


if __name__ == "__main__":
    main()
