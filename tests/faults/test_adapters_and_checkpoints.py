"""Adapters are read before they go on a model, checkpoints before they are gone on from: each damage is one line."""
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from cai_nb.core.adapters import check_adapter_folder
from cai_nb.core.errors import CaiError
from cai_nb.runs.folder import reference_folder
from cai_nb.train.checkpoint import _publish_checkpoint, newest_checkpoint


@pytest.fixture(scope="module")
def base():
    from cai_nb.lm.model import load_model

    return load_model("mini")[0]


def half(weights):
    return dict(list(weights.items())[:len(weights) // 4 * 2])


DAMAGE = {
    "missing": half,
    "one matrix of two": lambda w: {k: v for k, v in w.items() if "lora_B" not in k or "layers.1" in k},
    "not finite": lambda w: w | {k: v * float("inf") for k, v in list(w.items())[:1]},
    "all weights are zero": lambda w: {k: v * 0 for k, v in w.items()},
    "are not in this base": lambda w: {k.replace("q_proj", "query"): v for k, v in w.items()},
    "no LoRA weight": lambda w: {f"x.{k[-4:]}{i}": v for i, (k, v) in enumerate(w.items())},
    "rank 8": lambda w: {k: (v[:8] if "lora_A" in k else v[:, :8]).contiguous() for k, v in w.items()},
    "numbers, and the base has": lambda w: {k: v[:, :10].contiguous() if "lora_A" in k else v for k, v in w.items()},
    "a preference model": lambda w: w | {"base_model.model.score.weight": torch.ones(1, 128)},
}


@pytest.mark.parametrize("said", DAMAGE)
def test_a_damaged_adapter_is_refused_before_it_is_put_on(tmp_path, base, said):
    from cai_nb.lm.model import add_adapters, adapter_names

    shutil.copytree(reference_folder() / "sl", tmp_path / "sl")
    path = tmp_path / "sl/adapter_model.safetensors"
    save_file(DAMAGE[said](load_file(path)), path)
    with pytest.raises(CaiError, match=said):
        add_adapters(base, {"sl": tmp_path / "sl"})
    assert adapter_names(base) == []


@pytest.mark.parametrize("name, kind", [("preference", "CAUSAL_LM"), ("sl", "SEQ_CLS"), ("rl", "SEQ_CLS")])
def test_the_wrong_kind_is_refused(base, name, kind):
    """The preference model's weights lay in `sl/`, and RL was trained against a score that was never loaded."""
    check_adapter_folder(reference_folder() / name, {"CAUSAL_LM": "SEQ_CLS", "SEQ_CLS": "CAUSAL_LM"}[kind], base)
    with pytest.raises(CaiError, match="expected that of"):
        check_adapter_folder(reference_folder() / name, kind, base)


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"peft_type": "LORA", "r": "16"}', "{"])
def test_a_configuration_that_is_none(tmp_path, text):
    shutil.copytree(reference_folder() / "sl", tmp_path / "sl")
    (tmp_path / "sl/adapter_config.json").write_text(text)
    with pytest.raises(CaiError, match="adapter_config.json"):
        check_adapter_folder(tmp_path / "sl")


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('a pickle ran')",)


def saved(folder, step, **files):
    staged = folder / "staging"
    staged.mkdir(parents=True)
    torch.save({"step": step}, staged / "optimizer.pt")
    (staged / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name, data in files.items():
        (staged / name.replace("_pt", ".pt").replace("_json", ".json")).write_bytes(data)
    _publish_checkpoint(staged, folder / f"checkpoint-{step}", "mine")


def flip(path):
    data = path.read_bytes()
    path.write_bytes(data[:-20] + bytes([data[-20] ^ 1]) + data[-19:])


@pytest.mark.parametrize("damage", ["bytes", "cut", "removed", "no seal", "seal"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capsys, damage):
    saved(tmp_path, 10)
    saved(tmp_path, 20)
    assert newest_checkpoint(tmp_path, "mine").name == "checkpoint-20" and not capsys.readouterr().err
    path = tmp_path / "checkpoint-20/optimizer.pt"
    {"bytes": lambda: flip(path), "cut": lambda: path.write_bytes(b""), "removed": path.unlink,
     "no seal": (tmp_path / "checkpoint-20/complete.json").unlink,
     "seal": lambda: (tmp_path / "checkpoint-20/complete.json").write_text("[1]")}[damage]()
    assert newest_checkpoint(tmp_path, "mine").name == "checkpoint-10"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "checkpoint-20" in said and "the one before it" in said


@pytest.mark.parametrize("files", [
    {"scheduler_pt": pickle.dumps(Hostile())}, {"optimizer_pt": b"garbage"}, {"scheduler_pt": b""},
    {"trainer_state_json": b"garbage"}, {"trainer_state_json": b"[]"}, {"trainer_state_json": b'{"global_step": "x"}'},
    {"trainer_state_json": b"[" * 100_000},
])
def test_what_cannot_be_read_is_passed_over_whatever_its_seal_says(tmp_path, capsys, files):
    saved(tmp_path, 10)
    saved(tmp_path, 20, **files)
    assert newest_checkpoint(tmp_path, "mine").name == "checkpoint-10"
    assert capsys.readouterr().err.count("\n") == 1


def test_names_that_only_look_like_checkpoints(tmp_path):
    saved(tmp_path, 10)
    for name in ("checkpoint-²", "checkpoint-٣", "checkpoint-", "checkpoint-1e9", "checkpoint--5", "checkpoint-x"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(tmp_path, "mine").name == "checkpoint-10"
    assert newest_checkpoint(tmp_path, "other") is None
