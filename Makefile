# `make` lists the targets. LINE=4 runs any of them on transformers 4.57 instead of 5.x, LINE=latest on whatever pip finds.
PYTHON ?= python3
LINE ?= 5
VENV_4 := .venv-transformers-4
VENV_5 := .venv
VENV_latest := .venv-latest
VENV := $(VENV_$(LINE))
CONSTRAINTS := constraints/$(LINE).txt
OTHER := $(abspath $(wildcard $(if $(filter 4,$(LINE)),$(VENV_5),$(VENV_4))/bin/python))
RUN := HF_HUB_OFFLINE=1 BLIP3_OTHER_PYTHON=$(OTHER) $(VENV)/bin/python
ENVIRONMENT = $(PYTHON) .ci/environment.py $(VENV) --constraints $(CONSTRAINTS)
# What a new transformers breaks first; the pinned lines run everything.
TESTS_latest := tests/model/test_modeling_blip3.py tests/model/test_conversations.py tests/model/test_generation_blip3.py tests/model/test_engines.py tests/model/test_labels_and_adapters.py tests/training/test_training_runs.py tests/model/test_small_model.py tests/serving/test_transformers_serve.py

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup:  ## make or complete the virtual environment (every other target does so itself)
	$(ENVIRONMENT) --extra $(if $(filter 4,$(LINE)),test,dev)

demo:  ## ask about example images, with no more installed than that needs; python demo.py --help for your own
	$(ENVIRONMENT) --extra demo
	$(RUN) demo.py

examples: setup  ## run every script of examples/, a few minutes each, and the notebook (docs/finetuning.md)
	$(RUN) examples/stripes.py outputs/stripes
	for name in finetune_lora finetune_trl_sft preference_dpo reward_grpo; do $(RUN) examples/$$name.py || exit 1; done
	mkdir -p outputs/tour
	HF_HUB_OFFLINE=1 $(VENV)/bin/jupyter-execute examples/tour.ipynb --output ../outputs/tour/tour

test: setup  ## every test that needs no large disk (LINE=latest: some); LINE=4 after LINE=5 also exchanges folders
	$(RUN) -m pytest -m 'not slow' $(TESTS_$(LINE))

test-slow: setup  ## convert a source of true size (9 GB of disk; the source is a sparse file), thousands of random requests, the notebook
	$(RUN) -m pytest -m slow

test-common: setup  ## transformers' own tests of models, processors and image processors
	$(RUN) tests/run.py common

test-vllm:  ## vLLM's engine and OpenAI server on the CPU (environment of its own, 3.5 GB)
	$(PYTHON) tests/run.py vllm

test-backends:  ## the page in headless Chromium, batches on Ray Data, quantization (environment of its own, 2 GB)
	$(PYTHON) tests/run.py backends

test-engines:  ## the data engines on Ray with their readers, OCR and filters (environment of its own, 2 GB)
	$(PYTHON) tests/run.py engines

test-harness:  ## lmms-eval, and VLMEvalKit where a copy is named, on look-alikes (environment of its own, 2.4 GB)
	$(PYTHON) tests/run.py harness

test-scale:  ## several processes, DeepSpeed, 4-bit weights, object stores, ONNX, towers of timm (environment of its own, 2.7 GB)
	$(PYTHON) tests/run.py scale

test-wheel:  ## the package installed as a wheel, without the repository (environment of its own, 2 GB)
	$(PYTHON) tests/run.py wheel

soak: setup  ## ten minutes of load on the handler, ten with hostile files, ten on `transformers serve` (LINE=5 only)
	$(RUN) tests/run.py soak --backend handler
	$(RUN) tests/run.py soak --backend handler --hostile
	$(RUN) tests/run.py soak --backend http

bench: setup  ## speed and memory beside the peers (docs/speed.md); an environment of its own, with torchvision
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint $(CONSTRAINTS) --editable '.[benchmarks]'
	HF_HUB_OFFLINE=1 .venv-bench/bin/python -m blip3.benchmarks.run --update-docs

bench-gpu:  ## a GPU at the 4B sizes, in at most 8 minutes (docs/speed.md); an environment of its own around PYTHON's torch
	test -x .venv-bench-gpu/bin/python || $(PYTHON) -m venv --system-site-packages .venv-bench-gpu
	grep -v '^torch==' $(CONSTRAINTS) > .venv-bench-gpu/constraints.txt  # a CUDA build is the machine's own
	.venv-bench-gpu/bin/pip install --quiet --constraint .venv-bench-gpu/constraints.txt --editable '.[benchmarks-gpu]'
	HF_HUB_OFFLINE=1 .venv-bench-gpu/bin/python -m blip3.benchmarks.gpu $(ARGS)

check: setup  ## lint and types
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy -p blip3
	mkdir -p .mypy_cache/root/model && cp *_blip3.py .mypy_cache/root/model/  # mypy refuses `from .x` in files outside a package
	MYPYPATH=.mypy_cache/root $(VENV)/bin/mypy -p model

fix: setup  ## format
	$(VENV)/bin/ruff format . && $(VENV)/bin/ruff check --fix .

.PHONY: help setup demo examples test test-slow test-common test-vllm test-backends test-engines test-harness test-scale test-wheel soak bench bench-gpu check fix
