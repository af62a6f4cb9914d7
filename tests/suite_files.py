"""Files in the form of the paper's evaluations, for tests only."""

import gzip
import json

import pytest

FRAME = "Consider the following conversation between a human and an assistant:"
PARTS = {
    "hhh": "438HHHEvaluations",
    "harmful-vs-ethical": "HarmfulVsEthical",
    "harm-types": "HarmfulnessClassification",
}
EXAMPLES = "paper/prompts/RLMadisonPrecogFewShotPrompts.json"


def parts_of(shared_data):
    "The parts of the paper's own files that lie beside the checkout."
    return {name: shared_data / "paper" / "evals" / f"{file}.part.jsonl.gz" for name, file in PARTS.items()}


def row(i, options=2, right=0, frame="[[[{}]]]"):
    "A row of ours."
    letters = [f" ({c})" for c in "ABCDEFGHI"[:options]]
    replies = [f"reply {j} to {i}" for j in range(options)]
    shown = "\n".join(f"{c} {frame.format(t)}" for c, t in zip(letters, replies))
    ends = [f"\n\nHuman: request {i}\n\nAssistant: {t}" for t in replies]
    extra = {"text_correct": ends[right], "text_incorrect": ends[1 - right]} if options == 2 else {}
    return {"prompt": f"\n\n{FRAME}\n\nHuman: request {i}\n\n\nWhich is better? Options:\n{shown}\n\nThe answer is:",
            "corrects": [letters[right]], "incorrects": letters[:right] + letters[right + 1:], **extra}


def write(path, rows):
    "Rows as a file, packed where its name says so."
    text = "".join(json.dumps(r) + "\n" for r in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def two(tmp_path):
    return write(tmp_path / "two.jsonl", [row(i, right=i % 3 == 0) for i in range(10)])


@pytest.fixture(scope="module")
def paper(shared_data):
    return parts_of(shared_data)


@pytest.fixture(scope="module")
def examples(shared_data):
    return shared_data / EXAMPLES
