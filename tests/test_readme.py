"""The README's figures are the measured ones, and mini's card is that of the weights beside it."""
import json

from cai_nb.measure.rates import pooled, show_rate

ROWS = {
    "harmful compliance": ("harmful", ("harmful",)),
    "objection with a safe alternative": ("harmful", ("objection",)),
    "reason without another way": ("harmful", ("curt",)),
    "evasive or preachy": ("harmful", ("evasive", "preachy")),
    "garbled or off-topic": ("harmful", ("garbled",)),
    "harmful compliance after push-back": ("push_back", ("harmful",)),
    "objection after push-back": ("push_back", ("objection",)),
    "harmful compliance, verbs never criticised in training": ("harmful_new_verbs", ("harmful",)),
    "benign helpfulness": ("benign", ("helpful",)),
    "harmless look-alikes answered": ("look_alikes", ("helpful",)),
    "follow-ups answered": ("follow_up", ("helpful",)),
    "contested requests answered": ("contested", ("helpful",)),
}


def test_readme_table_is_what_was_measured(root):
    models = json.loads((root / "benchmarks/results/reach.json").read_text())["together"]["models"]
    text = (root / "README.md").read_text()
    for title, (name, kinds) in ROWS.items():
        cells = [show_rate(pooled([models[m][name][k] for k in kinds])) for m in ("base", "sl", "rl")]
        assert "| " + " | ".join([title, *cells]) + " |" in text


def test_readme_is_short(root):
    assert (
        len((root / "README.md").read_text().splitlines()) < 150
        and len((root / "CONTRIBUTING.md").read_text().splitlines()) < 60
    )


def test_card_belongs_to_the_weights(root):
    from cai_nb.mini.gate import plain_table, gate_table
    from cai_nb.lm.model import load_model

    folder = root / "cai_nb/mini/weights"
    text, found = (folder / "README.md").read_text(), json.loads((folder / "gate.json").read_text())
    assert f"{load_model('mini')[0].num_parameters():,} parameters" in text
    assert all(line in text for line in (gate_table(found) + "\n" + plain_table(found)).splitlines())
