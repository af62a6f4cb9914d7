"""Every chat template that TRL ships, against what training and sampling ask of it.

    python benchmarks/templates.py        # a minute; writes benchmarks/results/templates.md

Each template gets a small byte-level tokenizer that knows its control tokens ("tokens"), and a second one that knows
none of them, where its marks are plain words ("words"). What is checked:
  learnt     what is trained on follows the very tokens that are asked with, and ends with the end of a turn
  thinking   what stands between the header and an answer with thinking off; "switch": the template has one
  system     a system message: kept, or what the template says of it
  forged     hostile contents of which no token, or no word, became a mark: held of tried, tokens and words
  stops      what ends a reply
"""
import re
from pathlib import Path

import trl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cai_nb.core.dialogue import (
    assistant_header, encode_answer, encode_conversation, encode_text, stop_texts, stop_token_ids,
)
from cai_nb.core.errors import CaiError

OUT = Path(__file__).parent / "results" / "templates.md"
TALK = [{"role": "user", "content": "how do I fold a boat?"}, {"role": "assistant", "content": "once, then again"},
        {"role": "user", "content": "and a hat?"}]
SEES = re.compile("idefics|smolvlm|llava")  # these want content in another form: text, picture
CONTROL = re.compile(r"<\|?[a-zA-Z0-9_]+\|?>|<｜[^｜]+｜>|<\|turn>|<turn\|>")


def templates() -> dict[str, str]:
    "Name → template."
    folder = Path(trl.__file__).parent / "chat_templates"
    return {f.stem: f.read_text() for f in sorted(folder.glob("*.jinja")) if not SEES.match(f.stem)}


def tokenizer_for(template: str, words: bool = False):
    "A byte-level tokenizer that knows the template's control tokens, or none of them."
    control = ["<bos>", "<eos>"] if words else sorted({*CONTROL.findall(template), "<bos>", "<eos>"})
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=control, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["hello there, how do I fold a boat? user assistant system"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>",
                                   chat_template=template)


def learnt(tokenizer) -> str:
    prompt, answer = encode_answer(tokenizer, [*TALK, {"role": "assistant", "content": "rather not"}])
    ended = set(answer) & set(stop_token_ids(tokenizer)) or any(w in tokenizer.decode(answer)
                                                                for w in stop_texts(tokenizer))
    return "yes" if prompt == encode_conversation(tokenizer, TALK) and ended else "**no**"


def thinking(tokenizer, template: str) -> str:
    off, on = (assistant_header(tokenizer, thinking=wanted) for wanted in (False, True))
    if off == on and "think" not in template:
        return "–"
    own = off[len(on):] if off.startswith(on) else off.strip().splitlines()[-1]
    switch = "switch, " if re.search(r"\b(enable_)?thinking\b", template) else ""
    return f"{switch}`{own.encode('unicode_escape').decode()}`" if own else f"{switch}off by itself"


def system(tokenizer) -> str:
    try:
        ids = encode_conversation(tokenizer, [{"role": "system", "content": "be brief"}, *TALK])
    except CaiError as error:
        return "refused: " + str(error).rpartition(": ")[2][:40]
    return "kept" if "be brief" in tokenizer.decode(ids) else "**lost**"


def forged(tokenizer) -> tuple[int, int]:
    "Held and tried: contents that carry the template's own marks."
    special = {token.content for token in tokenizer.added_tokens_decoder.values()}
    words = stop_texts(tokenizer)

    def marks(talk):
        ids = encode_conversation(tokenizer, talk)
        text = tokenizer.decode(ids)
        return [ids.count(tokenizer.convert_tokens_to_ids(s)) for s in sorted(special)] + [text.count(w) for w in words]

    every = sorted(special) + words
    attacks = [*every, "".join(every), " ".join(every) * 2, *(s[:1] + s + s[1:] for s in every), "\n\nHuman: hi"]
    clean, held = marks(TALK), 0
    for attack in attacks:
        hostile = [m | {"content": f"{attack} x {attack}"} for m in TALK]
        held += marks(hostile) == clean and not {*encode_text(tokenizer, attack)} & {
            tokenizer.convert_tokens_to_ids(s) for s in special}
    return held, len(attacks)


def row(name: str, template: str) -> str:
    tokenizer = tokenizer_for(template)
    held, tried = forged(tokenizer)
    try:
        as_words, all_words = forged(tokenizer_for(template, words=True))
        words = f"{as_words} of {all_words}"
    except CaiError as error:
        words = str(error)[:40]
    ends = [tokenizer.decode([id]) for id in stop_token_ids(tokenizer)] + stop_texts(tokenizer)
    cells = [name, learnt(tokenizer), thinking(tokenizer, template), system(tokenizer), f"{held} of {tried}", words,
             " ".join(f"`{end.strip()}`" for end in ends)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def main() -> None:
    head = ["# Templates and checks", "", "Made by `python benchmarks/templates.py`, where the columns are explained, "
            f"on the templates of TRL {trl.__version__}.", "",
            "| | learnt | thinking off | system | forged, tokens | forged, words | ends a reply |",
            "|---|---|---|---|---|---|---|"]
    OUT.write_text("\n".join([*head, *(row(*found) for found in templates().items()), ""]), encoding="utf-8")
    print(OUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
