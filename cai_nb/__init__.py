"""Constitutional AI (Bai et al. 2022) from end to end: a constitution in, three chatting models out.

The names that people use are here: `from cai_nb import Constitution, critique_revise`. Each is imported when it is asked for,
so that `import cai_nb` costs nothing. What else there is lies in the folders, in the order of the method:

    core      what everything is made of         measure  did it work?
    lm        how a model is asked, fast         mini     the embedded model
    train     what the trainings share           runs     one recipe, one folder
    method    the paper, step by step            app, cli what people see
"""
from importlib import import_module

__version__ = "0.1.0"

_FACE = {  # name → where it is made
    "CaiError": "core.errors",
    "Constitution": "core.constitution",
    "Principle": "core.principle",
    "check_constitution": "core.principle",
    "import_constitution": "core.importers",
    "load_prompts": "core.prompts",
    "load_comparisons": "core.prompts",
    "load_model": "lm.model",
    "LocalLM": "lm.generate",
    "EndpointLM": "lm.endpoint",
    "sample_replies": "lm.bulk",
    "generate_prompts": "method.red_team",
    "critique_revise": "method.critique",
    "sl_rows": "method.sl",
    "SLConfig": "method.sl",
    "train_sl": "method.sl",
    "sample_pairs": "method.feedback",
    "label_preferences": "method.feedback",
    "preference_rows": "method.preference",
    "PreferenceConfig": "method.preference",
    "PreferenceModel": "method.preference",
    "train_preference": "method.preference",
    "RLConfig": "method.rl",
    "train_rl": "method.rl",
    "evaluate_suites": "measure.suites",
    "elo_table": "measure.elo",
    "run_recipe": "runs.pipeline",
    "build_demo": "app.server",
}

__all__ = ["__version__", *_FACE]


def __getattr__(name: str):
    "A name of the face, imported now."
    if name not in _FACE:
        raise AttributeError(f"module 'cai_nb' has no attribute {name!r}; dir(cai_nb) lists what it offers")
    value = globals()[name] = getattr(import_module(f"cai_nb.{_FACE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
