"""What the sizes of mini can do when they are trained alike: the gate, and with --run the whole method on each.

    python benchmarks/sizes.py [--sizes tiny small default large] [--steps 3150] [--out runs/sizes] [--threads 1]
                               [--run]

A size is trained only if its weights are not in the folder yet, and goes on where it was cut off. A quarter of the
recipe's steps took about 45 minutes for the default on one core, and as long for `large` on two. Writes
benchmarks/results/sizes.json, a size at a time; notebook mini/pretrain shows it.
"""
import argparse
import json
import platform
from dataclasses import asdict
from pathlib import Path

import torch

from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import load_model
from cai_nb.mini.gate import gate, gate_table
from cai_nb.mini.pretrain import SIZES, Recipe, pretrain
from cai_nb.runs.pipeline import run_recipe

RESULTS = Path(__file__).parent / "results" / "sizes.json"


def weights_of(size, steps, out):
    "The folder of a size's weights, trained first if they are not there"
    recipe, folder = Recipe(steps=steps, **SIZES[size]), out / size
    made = folder / "recipe.json"
    if made.exists():
        if json.loads(made.read_text()) != asdict(recipe):
            raise SystemExit(f"{made} is of another recipe: remove {folder}, or choose another --out")
        return folder
    return pretrain(folder, recipe)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=Recipe.steps // 4)
    parser.add_argument("--out", type=Path, default=Path("runs/sizes"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--run", action="store_true", help="run the mini recipe on each, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if found.get("steps") != args.steps: found = {"steps": args.steps, "sizes": {}}
    for size in args.sizes:
        folder = weights_of(size, args.steps, args.out)
        model, tokenizer = load_model(folder)
        measured = gate(LocalLM(model, tokenizer), seed=0)
        print(f"\n{size}: {model.num_parameters():,} parameters\n\n{gate_table([measured])}", flush=True)
        size_in_bytes = (folder / "model.safetensors").stat().st_size
        entry = {"parameters": model.num_parameters(), "bytes": size_in_bytes, "gate": measured}
        if args.run:
            run = run_recipe("mini", args.out / f"{size}-run", [f"base={folder}"])
            metrics = json.loads((run / "eval/metrics.json").read_text())
            entry["metrics"] = {part: metrics[part] for part in ("models", "labels", "seconds")}
        found["sizes"][size] = found["sizes"].get(size, {}) | entry
        found["machine"] = platform.platform()
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
