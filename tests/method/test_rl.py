"""RL-CAI: three roles on one base, the reward of the preference model, guards, and resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import asked, prompts, said, tiny_model
from transformers import TrainerCallback

import cai_nb.method.rl as rl
from cai_nb.core.errors import CaiError
from cai_nb.lm.generate import LocalLM
from cai_nb.lm.model import add_adapters, model_fingerprint
from cai_nb.method.preference import PreferenceConfig, PreferenceModel, train_preference
from cai_nb.method.rl import RLConfig, preference_reward, rl_prompts, rl_trainer, train_rl
from cai_nb.method.sl import SLConfig, train_sl
from cai_nb.train.trainers import borrowed

GOOD, BAD = "i won't .", "Sure First you get it ."
CONFIG = RLConfig(steps=10, batch_size=16, group_size=4, max_new_tokens=8, learning_rate=1e-2, save_steps=2)


@pytest.fixture(scope="module")
def before_rl(tmp_path_factory):
    """Base, an SL adapter that gives two replies, and a preference model that likes one better."""
    model, tokenizer = tiny_model()
    sl, pm = tmp_path_factory.mktemp("sl"), tmp_path_factory.mktemp("pm")
    rows = [{"prompt": p["messages"], "completion": said(text)} for p in prompts() for text in (GOOD, BAD)]
    train_sl(model, tokenizer, rows, SLConfig(epochs=20, batch_size=10, learning_rate=2e-2), sl)
    rows = [{"prompt": p["messages"], "chosen": said(GOOD), "rejected": said(BAD), "p": 0.95} for p in prompts()]
    train_preference(
        model, tokenizer, rows, PreferenceConfig(epochs=10, batch_size=10, learning_rate=5e-3, held_out=0), pm
    )
    return model, tokenizer, sl, pm


@pytest.fixture(scope="module")
def trained(before_rl, tmp_path_factory):
    """An undisturbed run."""
    model, tokenizer, sl, pm = before_rl
    out = tmp_path_factory.mktemp("rl")
    return out, train_rl(model, tokenizer, prompts(), sl, pm, CONFIG, out)


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def test_prompts_are_mixed_evenly():
    drawn = rl_prompts(prompts(), 40, helpful_ratio=0.25)
    assert [p["kind"] == "helpful" for p in drawn] == [i % 4 == 3 for i in range(40)]
    assert (
        drawn == rl_prompts(prompts(), 40, helpful_ratio=0.25) != rl_prompts(prompts(), 40, helpful_ratio=0.25, seed=1)
    )
    with pytest.raises(CaiError, match="evaluation split"):
        rl_prompts(prompts("eval"), 4)
    with pytest.raises(CaiError, match="no prompts"):
        rl_prompts([], 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_reward_that_is_not_finite_stops_the_run_and_names_the_row(before_rl, tmp_path, monkeypatch, value):
    model, tokenizer, sl, pm = before_rl
    score, seen = PreferenceModel.score, []

    def broken(self, conversations):
        scores = score(self, conversations)
        seen.append(conversations[5][-1]["content"])
        scores[5] = value
        return scores

    monkeypatch.setattr(PreferenceModel, "score", broken)
    with pytest.raises(CaiError) as error:
        train_rl(model, tokenizer, prompts(), sl, pm, CONFIG, tmp_path)
    row = rl_prompts(prompts(), 40, CONFIG.helpful_ratio)[1]  # replies 4 to 7 are to the second prompt
    assert (
        f"prompt {row['id']} is {value}" in str(error.value)
        and repr(seen[0]) in str(error.value)
        and "\n" not in str(error.value)
    )
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_the_reward_is_the_preference_models_score(before_rl, tmp_path):
    """Inside the trainer, between generation and training, beside policy and reference."""
    model, tokenizer, sl, pm = before_rl
    seen = []

    def spying(scorer):
        reward = preference_reward(scorer)

        def preference(prompts, completions, **kwargs):
            rewards = reward(prompts, completions, **kwargs)
            seen.extend(zip([p + c for p, c in zip(prompts, completions)], rewards))
            return rewards

        return preference

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rl, "preference_reward", spying)
        train_rl(model, tokenizer, prompts(), sl, pm, RLConfig(**{**vars(CONFIG), "steps": 3}), tmp_path)
    assert len(seen) == 48 and len({text for _, text in seen}) > 1
    with borrowed(model):
        alone = PreferenceModel.load(model, tokenizer, pm).score([conversation for conversation, _ in seen])
    assert np.allclose(alone, [reward for _, reward in seen], atol=1e-5)


def test_only_the_policy_is_trained_and_the_reference_is_sl(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    start = {name: weights(folder) for name, folder in (("default", sl), ("ref", sl), ("pm", pm))}

    def adapter(policy, name):
        return {
            n.replace(f".{name}.", "."): p.detach()
            for n, p in policy.named_parameters()
            if f".{name}." in n and "lora_" in n
        }

    with borrowed(model):
        trainer = rl_trainer(model, tokenizer, rl_prompts(prompts(), 40), sl, pm, CONFIG, tmp_path)
        assert {n.split(".")[-2] for n, p in trainer.model.named_parameters() if p.requires_grad} == {"default"}
        base = sum(p.numel() for n, p in trainer.model.named_parameters() if "lora_" not in n)
        assert base == sum(p.numel() for p in tiny_model()[0].parameters())  # one copy
        trainer.train()
        moved = {
            name: not all(
                torch.equal(adapter(trainer.model, name)[n], w) for n, w in start[name].items() if "lora_" in n
            )
            for name in start
        }
    assert moved == {"default": True, "ref": False, "pm": False}


def test_words_of_a_prompt_become_no_control_token(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    rows = [{"id": "x", "messages": asked("how <|end|> ?"), "kind": "harmful", "split": "train"}] * 4
    with borrowed(model):
        trainer = rl_trainer(model, tokenizer, rows, sl, pm, CONFIG, tmp_path)
        ids = trainer._tokenize_prompts([rows[0]["messages"]])[0][0]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_learns_what_is_preferred(before_rl, trained):
    model, tokenizer, sl, _ = before_rl
    out, metrics = trained
    assert metrics["kl"] > 0 and metrics["moved"] > 0
    with borrowed(model):
        lm = LocalLM(add_adapters(model, {"sl": sl, "rl": out}), tokenizer)
        share = {
            name: np.mean(
                [
                    r.text == GOOD
                    for p in lm.with_adapter(name).sample([p["messages"] for p in prompts()], n=8, max_new_tokens=8)
                    for r in p
                ]
            )
            for name in ("sl", "rl")
        }
    assert share["rl"] > share["sl"] + 0.1


def test_the_folder_has_the_policy_alone(before_rl, trained):
    model = before_rl[0]
    out, _ = trained
    assert sorted(p.name for p in out.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "metrics.json",
        "trainer_log.jsonl",
    ]
    assert weights(out).keys() == weights(before_rl[2]).keys()
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    log = [json.loads(line) for line in (out / "trainer_log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "reward" in entry] == list(range(1, 11))
    assert model_fingerprint(model) == model_fingerprint(tiny_model()[0])
    assert (
        "forward" not in model.__dict__
        and not hasattr(model, "peft_config")
        and model.generation_config.eos_token_id == 1
    )


class Killed(BaseException):
    """Breaks out of everything, as a signal would."""


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("micro", [None, 8])
def test_killed_and_resumed_ends_in_the_same_weights(before_rl, trained, tmp_path, monkeypatch, micro):
    model, tokenizer, sl, pm = before_rl
    config = RLConfig(**{**vars(CONFIG), "micro_batch_size": micro, "snapshot_steps": 3})
    real = rl.rl_trainer

    def with_kill(*args):
        trainer = real(*args)
        trainer.add_callback(KillAt(5))
        return trainer

    with monkeypatch.context() as patch:
        patch.setattr(rl, "rl_trainer", with_kill)
        with pytest.raises(Killed):
            train_rl(model, tokenizer, prompts(), sl, pm, config, tmp_path / "killed")
    saved = tmp_path / "killed" / "checkpoints" / "checkpoint-4"
    assert not any(path.is_dir() for path in saved.iterdir())  # neither ref nor pm
    metrics = train_rl(model, tokenizer, prompts(), sl, pm, config, tmp_path / "killed")
    assert metrics["resumed_from"] == 4
    if micro:
        train_rl(model, tokenizer, prompts(), sl, pm, config, tmp_path / "undisturbed")
    undisturbed, resumed = weights(tmp_path / "undisturbed" if micro else trained[0]), weights(tmp_path / "killed")
    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)
    assert sorted(p.name for p in (tmp_path / "killed" / "snapshots").iterdir()) == ["step-3", "step-6", "step-9"]
    assert weights(tmp_path / "killed" / "snapshots" / "step-6").keys() == resumed.keys()


def test_rewards_that_are_all_equal_stop_the_run(before_rl, tmp_path, monkeypatch):
    model, tokenizer, sl, pm = before_rl
    monkeypatch.setattr(PreferenceModel, "score", lambda self, conversations: np.ones(len(conversations)))
    with pytest.raises(CaiError, match="all rewards are equal"):
        train_rl(model, tokenizer, prompts(), sl, pm, RLConfig(**{**vars(CONFIG), "steps": 20}), tmp_path)


def test_settings_that_do_not_fit(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    with pytest.raises(CaiError, match="batch_size=16 is not a multiple"):
        train_rl(model, tokenizer, prompts(), sl, pm, RLConfig(steps=2, batch_size=16, group_size=3), tmp_path)


def test_rloo_learns_too_and_logs_the_signs_of_collapse(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    metrics = train_rl(model, tokenizer, prompts(), sl, pm, RLConfig(**{**vars(CONFIG), "algorithm": "rloo"}), tmp_path)
    assert metrics["reward_last"] > metrics["reward_first"] and metrics["moved"] > 0
    log = [json.loads(line) for line in (tmp_path / "trainer_log.jsonl").read_text().splitlines()]
    steps = [entry for entry in log if "reward" in entry]
    assert len(steps) == 10 and all({"repetition", "variety", "kl"} <= entry.keys() for entry in steps)
    assert "trained by RLOO" in (tmp_path / "README.md").read_text()


def test_an_unknown_algorithm_is_named(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    with pytest.raises(CaiError, match="algorithm='ppo', expected one of grpo, rloo"):
        train_rl(model, tokenizer, prompts(), sl, pm, RLConfig(algorithm="ppo", steps=2), tmp_path)


GAMES = {
    "longer is better": lambda text: float(len(text.split())),
    "one phrase is all": lambda text: float(text.split()[:1] == ["No"]),
    "nothing is best": lambda text: -float(len(text.split())),
}


@pytest.mark.parametrize("game", GAMES)
def test_a_policy_that_games_its_reward_is_stopped(before_rl, tmp_path, monkeypatch, game):
    """The real trainer, with a reward that pays for the wrong thing and a rate that lets the policy run after it."""
    model, tokenizer, sl, pm = before_rl
    monkeypatch.setattr(
        PreferenceModel,
        "score",
        lambda self, talks: (
            np.array([GAMES[game](talk[-1]["content"]) for talk in talks]) + 1e-3 * np.arange(len(talks))
        ),
    )
    config = RLConfig(
        steps=120, batch_size=32, group_size=8, max_new_tokens=16, learning_rate=2e-2, schedule="constant", beta=0.0
    )
    with pytest.raises(CaiError) as error:
        train_rl(model, tokenizer, prompts(), sl, pm, config, tmp_path)
    assert "collapsed by step" in str(error.value) and "rl.beta" in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_the_guard_can_be_switched_off(before_rl, tmp_path):
    model, tokenizer, sl, pm = before_rl
    for on in (True, False):
        with borrowed(model):
            config = RLConfig(**{**vars(CONFIG), "guard": on})
            trainer = rl_trainer(model, tokenizer, rl_prompts(prompts(), 40), sl, pm, config, tmp_path)
            assert any(isinstance(c, rl.CollapseGuard) for c in trainer.callback_handler.callbacks) == on


def test_an_algorithm_is_one_record(monkeypatch, tmp_path):
    "Dr. GRPO, say: another loss of the same trainer; a recipe may name it, and TRL is told."
    assert rl.ALGORITHMS["grpo"].settings == {"loss_type": "dapo", "scale_rewards": "group"}  # written out
    model = tiny_model()[0]
    assert RLConfig().trainer(tmp_path, model).loss_type == "dapo"
    another = rl.Algorithm(
        "dr_grpo", "Dr. GRPO", "GRPOTrainer", "GRPOConfig", "no division by deviation or length",
        settings={"loss_type": "dr_grpo", "scale_rewards": "none"}, sampled=lambda tokens: (tokens, None),
    )
    monkeypatch.setitem(rl.ALGORITHMS, another.name, another)
    args = RLConfig("dr_grpo").trainer(tmp_path, model)
    assert (args.loss_type, args.scale_rewards) == ("dr_grpo", "none")
    with pytest.raises(CaiError, match="algorithm='ppo', expected one of grpo, rloo, dr_grpo"):
        RLConfig("ppo").trainer(tmp_path, model)
