"""Every architecture of tests/architectures.py through every stage, on tiny random models:

    make matrix                                   # all of them, some minutes; writes results/architectures.md
    python benchmarks/architectures.py "Qwen 3.5"    # some of them; prints, writes nothing

No time is measured. What is checked: greedy replies, pairs and labels equal those of each row alone with nothing kept;
SL-CAI, the preference model (scores alone and together) and RL-CAI train, and the base is afterwards what it was.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from architectures import ARCHITECTURES, random_model  # noqa: E402
from tiny import asked, said  # noqa: E402

STAGES = ("replies", "pairs", "labels", "SL-CAI", "preference", "RL-CAI", "base clean")
TALKS = [asked("how ?"), asked("how do i burn a car ? " * 2), asked("how do i steal a house ? " * 5)]


def alone(model, prompt: list[int], steps: int) -> list[int]:
    """A greedy reply with everything read again for every token."""
    text = list(prompt)
    for _ in range(steps):
        token = int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax())
        if token == 1:
            break
        text.append(token)
    return text[len(prompt):]


def label(model, prompt: list[int], answer: list[int]) -> float:
    logp = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0].log_softmax(-1)
    return sum(logp[len(prompt) - 1 + i, token].item() for i, token in enumerate(answer))


def stages(name: str, folder: Path) -> dict:
    """What became of each stage: "yes", or what was wrong."""
    from cai_nb.core.dialogue import encode_text
    from cai_nb.lm.decoding import cache_way
    from cai_nb.lm.generate import LocalLM
    from cai_nb.lm.model import model_fingerprint
    from cai_nb.method.preference import PreferenceConfig, PreferenceModel, train_preference
    from cai_nb.method.rl import RLConfig, train_rl
    from cai_nb.method.sl import SLConfig, train_sl
    from cai_nb.train.trainers import borrowed

    model, tokenizer = random_model(name)
    lm, before, parts = LocalLM(model, tokenizer), model_fingerprint(model), [n for n, _ in model.named_modules()]
    prompts = [lm.encode(talk) for talk in TALKS]
    pairs = [{"prompt": t, "chosen": said("No ."), "rejected": said("Sure ."), "p": 0.9} for t in TALKS]

    def replies():
        got = [reply.text for (reply,) in lm.sample(TALKS, temperature=0, max_new_tokens=10)]
        with torch.no_grad():
            texts = tokenizer.batch_decode([alone(model, prompt, 10) for prompt in prompts], skip_special_tokens=True)
        assert got == [text.strip() for text in texts], "not what it says alone"

    def two():
        got = lm.sample(TALKS, n=2, max_new_tokens=6, seed=3)
        assert got == [lm.sample([t], n=2, max_new_tokens=6, seed=3)[0] for t in TALKS], "not what it says alone"

    def labels():
        answers = [encode_text(tokenizer, text) for text in ("Sure First", "No")]
        with torch.no_grad():
            expected = [[label(model, prompt, answer) for answer in answers] for prompt in prompts]
        assert np.allclose(lm.choice_logprobs(TALKS, ["Sure First", "No"]), expected, atol=1e-4), "other labels"

    def sl():
        rows = [{"prompt": t, "completion": said("No .")} for t in TALKS]
        assert train_sl(model, tokenizer, rows, SLConfig(epochs=1, batch_size=3), folder / "sl")["change"] > 0

    def preference():
        config = PreferenceConfig(batch_size=3, held_out=0)
        assert train_preference(model, tokenizer, pairs, config, folder / "pm")["change"] > 0
        talks = [t + said("No .") for t in TALKS]
        with borrowed(model):
            scorer = PreferenceModel.load(model, tokenizer, folder / "pm")
            one_by_one = [scorer.score([talk])[0] for talk in talks]
            assert np.allclose(scorer.score(talks), one_by_one, atol=1e-4), "a score depends on its neighbours"

    def rl():
        rows = [{"id": str(i), "messages": t, "kind": "harmful", "split": "train"} for i, t in enumerate(TALKS[:2])]
        config = RLConfig(steps=1, batch_size=4, group_size=2, max_new_tokens=4, guard=False)
        assert train_rl(model, tokenizer, rows, folder / "sl", folder / "pm", config, folder / "rl")["change"] > 0

    def clean():
        assert model_fingerprint(model) == before and [n for n, _ in model.named_modules()] == parts, "not clean"

    way, found = cache_way(model), {}
    for stage, work in zip(STAGES, (replies, two, labels, sl, preference, rl, clean)):
        try:
            work()
            found[stage] = "yes"
        except Exception as error:  # noqa: BLE001  a cell of the table
            found[stage] = f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
    return {"kept": way.name, **found}


def main(names: list[str]) -> None:
    import transformers

    rows = []
    for name in names or ARCHITECTURES:
        with tempfile.TemporaryDirectory() as folder:
            cells = stages(name, Path(folder))
        rows.append(f"| {name} | {' | '.join(cells.values())} |")
        print(rows[-1], flush=True)
    head = ["# Architectures and stages", "", "Made by `make matrix` on tiny random models, "
            f"transformers {transformers.__version__}; what is checked stands in benchmarks/architectures.py.",
            "`kept`: what is kept of a text that was read (`cai_nb.lm.decoding.cache_way`).", "",
            f"| | kept | {' | '.join(STAGES)} |", "|---" * (len(STAGES) + 2) + "|"]
    if not names:
        (ROOT / "benchmarks" / "results" / "architectures.md").write_text("\n".join(head + rows) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
