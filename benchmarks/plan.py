"""What `--dry-run` promises beside what a run takes: minutes of every stage, and memory at its peak.

    python benchmarks/plan.py [RECIPE] [--set prompts.limit=32 ...] [--out FOLDER]

The plan is made first, in a process of its own; then the run is carried out in another. Both are quickest on a quiet
machine, and both are slower on another. Adds to benchmarks/results/plan.json under the recipe's name.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from generation import RESULTS, machine

RUN = """
import resource, sys
from cai_nb.runs.pipeline import run_recipe
run_recipe(sys.argv[2], sys.argv[3], sys.argv[4:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
"""
PLAN = """
import json, sys, time
from cai_nb.runs.plan import plan_recipe
start = time.perf_counter()
plan = plan_recipe(sys.argv[1], sys.argv[2], sys.argv[3:])
print(json.dumps({"text": str(plan), "minutes": plan.minutes, "memory": plan.memory,
                  "seconds": time.perf_counter() - start}))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="mini")
    parser.add_argument("--set", nargs="+", default=[], dest="sets")
    parser.add_argument("--out", help="keep the run in this folder")
    args = parser.parse_args()
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as made:
        words = [args.recipe, args.out or str(Path(made) / "run"), *args.sets]
        done = subprocess.run([sys.executable, "-c", PLAN, *words], env=env, capture_output=True, text=True, check=True)
        plan = json.loads(done.stdout.splitlines()[-1])
        print(plan["text"], flush=True)
        note = Path(made) / "peak"
        subprocess.run([sys.executable, "-c", RUN, str(note), *words], env=env, check=True)
        peak = int(note.read_text()) / 2**20
        stages = json.loads((Path(words[1]) / "manifest.json").read_text())["stages"]
    taken = {name: entry["seconds"] / 60 for name, entry in stages.items() if name in plan["minutes"]}
    rows = {name: {"planned": plan["minutes"][name], "taken": taken[name], "ratio": plan["minutes"][name] / taken[name]}
            for name in taken}
    found = {"minutes": rows, "memory_gib": {"planned": plan["memory"]["peak"], "taken": peak},
             "seconds_of_the_plan": plan["seconds"], "sets": args.sets, "machine": machine()}
    print(f"{'stage':<12}{'planned':>9}{'taken':>9}{'ratio':>7}")
    for name, row in rows.items():
        print(f"{name:<12}{row['planned']:>9.2f}{row['taken']:>9.2f}{row['ratio']:>7.2f}")
    print(f"memory: planned {plan['memory']['peak']:.2f} GiB, taken {peak:.2f}; the plan took {plan['seconds']:.0f} s")
    path = RESULTS / "plan.json"
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stored | {Path(args.recipe).stem: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
