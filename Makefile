# Two commands matter: `make demo` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -ec
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3.11
VENV ?= .venv
MODEL := build/models/smollm2-135m-instruct
HEAD := training/heads/smollm2-135m-instruct
TARGET ?= $(MODEL)
DRAFT ?= $(HEAD)
BACKEND ?= onnxruntime
DEVICE ?= cpu
DTYPE ?= $(if $(filter onnxruntime,$(BACKEND)),$(if $(filter cpu,$(DEVICE)),int8,fp32),fp16)
BUNDLE ?= build/bundles/$(NAME)$(if $(filter onnxruntime,$(BACKEND)),,-$(BACKEND))-$(DTYPE)
PROMPTS ?=
QUICK ?=
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
TORCH_INDEX ?=
NAME := $(notdir $(patsubst %/,%,$(TARGET)))
DATA ?= $(if $(PROMPTS),build/data/$(NAME),$(if $(filter $(MODEL),$(TARGET)),$(HEAD)/data,build/data/$(NAME)))
RUN ?= build/runs/$(NAME)
GENERATE ?= --count 3600 --seed 1
CALIBRATION ?= build/calibration
MINUTES ?= 3.5
TRAIN ?= $(if $(filter $(MODEL),$(TARGET)),$(shell cat $(HEAD)/recipe.txt 2>/dev/null),--minutes 60 --seed 1)
ARGS ?=

PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
NEEDS := $(if $(filter $(MODEL),$(TARGET)),model,$(STAMP))
ON = $(if $(filter-out cpu,$(DEVICE)),--device $(DEVICE))
BUNDLE_ARGS = --target $(TARGET) --draft $(DRAFT) --bundle $(BUNDLE) --dtype $(DTYPE)

.PHONY: help venv model demo test export serve data train profile calibrate bench scheduling acceptance eval finetune heads equality peers clean

help: ## list the targets and the variables
	@echo "Targets (make TARGET [VARIABLE=value ...]):"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "Variables:"
	@echo "  PYTHON=$(PYTHON)            Python 3.11 or 3.12, used once to make $(VENV)"
	@echo "  TORCH_INDEX=                extra package index URL for torch (a CPU-only wheel is 10 times smaller)"
	@echo "  TARGET=$(TARGET)   Hugging Face folder of the target model"
	@echo "  DRAFT=$(DRAFT)    DeepSpec folder of the DSpark head"
	@echo "  BACKEND=$(BACKEND)         of make export: onnxruntime, tensorrt, tensorrt-rtx or auto (whichever TensorRT is there)"
	@echo "  DTYPE=$(DTYPE)                  fp32, int8 or int8-block64; with a TensorRT fp16, bf16 or int8 (weights)"
	@echo "  DEVICE=$(DEVICE)                  of export, profile, serve and bench: cpu, cuda or cuda:N (serve: cuda:0,1 too)"
	@echo "  BUNDLE=$(BUNDLE)"
	@echo "  PROMPTS=                    JSONL of your own prompts ('prompt', 'messages' or 'turns' lines)"
	@echo "  QUICK=1                     a small grid of make bench"
	@echo "  HTTP_PORT=$(HTTP_PORT) GRPC_PORT=$(GRPC_PORT) METRICS_PORT=$(METRICS_PORT)   of make serve, on 127.0.0.1"
	@echo "  DATA=$(DATA) RUN=$(RUN)   of make train"
	@echo "  GENERATE='$(GENERATE)' TRAIN='$(TRAIN)'   its recipe"
	@echo "  CALIBRATION=$(CALIBRATION) MINUTES=$(MINUTES)   of make calibrate: where its files go, how long it records at most"
	@echo "  ARGS=                       passed on to the target's command"

venv: $(STAMP) ## make .venv and install the pinned dependencies

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null || \
	  { echo "'$(PYTHON)' is not a Python 3.11 or 3.12 with the venv module; name one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11"; exit 1; }
	@mkdir -p build
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "venv: installing the pinned packages into $(VENV) (1 to 5 minutes; log: build/venv.log)"
	@$(PY) -m pip install --disable-pip-version-check --progress-bar off -c constraints.txt \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -e '.[serve,train,test]' 2>&1 | tee build/venv.log | \
	  awk -v tty="$$(test -t 1 && echo 1)" '!tty{next} /^Collecting/{n++; printf "\r\033[K  %d packages found: %s", n, $$2; fflush()} \
	    /^Installing collected/{printf "\r\033[K  installing %d packages", n; fflush()} END{if(tty) printf "\r\033[K"}' || \
	  { grep -m 3 ^ERROR build/venv.log || tail -n 5 build/venv.log; echo "venv: the installation failed; see build/venv.log"; exit 1; }
	@touch $@

model: $(STAMP) ## fetch SmolLM2-135M-Instruct and convert it once
	@$(PY) -m training fetch --out $(MODEL)

demo: $(NEEDS) ## the whole way: model, head, bundle, Triton server, streamed text, a table
	@$(PY) -m benchmarks.demo $(BUNDLE_ARGS) $(if $(PROMPTS),--prompts $(PROMPTS)) $(ARGS)

test: model ## the default test suite (ARGS="-m slow" for the slow part)
	@$(PY) -m pytest -q $(ARGS)

export: $(NEEDS) ## compile TARGET and DRAFT into BUNDLE
	@$(PY) -m export --target $(TARGET) --draft $(DRAFT) --out $(BUNDLE) --backend $(BACKEND) --dtype $(DTYPE) $(ON) $(ARGS)

serve: $(NEEDS) ## serve BUNDLE on a real Triton server until Ctrl-C
	@$(PY) -m benchmarks.bundle $(BUNDLE_ARGS)
	@$(PY) -m triton_repo serve --bundle $(BUNDLE) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) $(ON) $(ARGS)

data: $(NEEDS) ## answers of TARGET to the repository's prompts (or PROMPTS) into build/data (an hour or more; resumes)
	@$(PY) -m training generate --target $(TARGET) --out $(if $(filter $(HEAD)/%,$(DATA)),build/data/$(NAME),$(DATA)) $(GENERATE) $(if $(PROMPTS),--prompts $(PROMPTS)) $(ARGS)

train: $(NEEDS) ## a head from DATA into RUN/latest; by default the shipped one again, from its shipped data and seed (an hour or more)
	@ls $(DATA)/shard-*.safetensors >/dev/null 2>&1 || $(MAKE) data
	@$(PY) -m training train --target $(TARGET) --data $(DATA) --out $(RUN) $(TRAIN) $(ARGS)

profile: $(NEEDS) ## what a step of BUNDLE costs on this machine, stored in it for the schedulers (4 minutes; ARGS=--quick: half a minute)
	@test -f $(BUNDLE)/manifest.json || $(PY) -m benchmarks.bundle $(BUNDLE_ARGS)
	@$(PY) -m engines profile --bundle $(BUNDLE) $(ON) $(ARGS)

calibrate: $(NEEDS) ## rollouts of BUNDLE, temperatures of its confidence head from them, stored in it (5 minutes; ARGS=--quick: 1.5)
	@$(PY) -m benchmarks.bundle $(BUNDLE_ARGS)
	@$(if $(PROMPTS),,$(PY) -m training prompts --out $(CALIBRATION)/prompts.jsonl --count 240 $(if $(wildcard $(DATA)/prompts-*.jsonl),--target $(TARGET) --data $(DATA)))
	@$(PY) -m decoding record --bundle $(BUNDLE) --output $(CALIBRATION)/rollouts.npz $(foreach file,$(or $(PROMPTS),$(CALIBRATION)/prompts.jsonl),--prompts $(file)) \
	  $(if $(filter --quick,$(ARGS)),--max-tokens 48 --minutes 0.8 --least 1200,--max-tokens 96 --minutes $(MINUTES) --least 4000) $(filter-out --quick,$(ARGS))
	@$(PY) -m training calibrate --rollouts $(CALIBRATION)/rollouts.npz --out $(CALIBRATION)
	@$(PY) -m engines calibrate --bundle $(BUNDLE) --calibration $(CALIBRATION)/calibration.json

bench: $(NEEDS) ## throughput and latency by mode, users and kind of prompt, in process and over gRPC (half an hour; QUICK=1: 5 minutes)
	@$(PY) -m benchmarks.bench $(BUNDLE_ARGS) $(if $(filter-out 0,$(QUICK)),--quick) $(foreach file,$(PROMPTS),--prompts $(file)) $(ON) $(ARGS)

scheduling: $(NEEDS) ## time of one scheduling decision, and the host's share of a round (2 minutes)
	@$(PY) -m benchmarks.scheduling $(BUNDLE_ARGS) $(ARGS)

acceptance: $(NEEDS) ## acceptance length and per position of PROMPTS, greedy and at temperature 1
	@$(PY) -m benchmarks.acceptance $(BUNDLE_ARGS) $(foreach file,$(PROMPTS),--prompts $(file)) $(ARGS)

eval: $(NEEDS) ## acceptance by position, proposal length and threshold of PROMPTS' rounds: build/eval/report.md (4 minutes)
	@$(PY) -m benchmarks.bundle $(BUNDLE_ARGS)
	@mkdir -p build/eval
	@$(PY) -m decoding record --bundle $(BUNDLE) --output build/eval/rollouts.npz --max-tokens 128 --minutes 3.5 --least 2000 \
	  $(foreach file,$(or $(PROMPTS),$(wildcard benchmarks/prompts/*.jsonl)),--prompts $(file))
	@$(PY) -m benchmarks.evaluation --rollouts $(NAME)=build/eval/rollouts.npz $(ARGS)

heads: $(NEEDS) ## DSpark, DFlash, Eagle3 and MTP trained on DATA's tokens and compared: build/heads-compared/report.md (hours; resumes)
	@$(PY) -m benchmarks.heads --target $(TARGET) --data $(DATA) $(or $(ARGS),--draft dspark --draft dflash --draft eagle3 --draft mtp)

finetune: $(NEEDS) ## DRAFT trained further on PROMPTS; acceptance before and after: build/finetune/report.md (half an hour; resumes)
	@test -n "$(PROMPTS)" || { echo "name your prompts: make finetune PROMPTS=my.jsonl"; exit 1; }
	@$(PY) -m benchmarks.finetune $(BUNDLE_ARGS) --prompts $(PROMPTS) $(ARGS)

equality: $(NEEDS) ## greedy output with and without the draft, over 200 prompts in batches of 1, 3 and 8
	@$(PY) -m benchmarks.equality $(BUNDLE_ARGS) $(if $(PROMPTS),--prompts $(PROMPTS)) $(ARGS)

peers: $(NEEDS) ## other CPU engines on the same weights, in turns with ours (12 minutes; the first time 20 more to install them)
	@$(PY) -m benchmarks.peers install --target $(TARGET) $(if $(TORCH_INDEX),--torch-index $(TORCH_INDEX)) || echo "peers: going on without what could not be installed"
	@$(PY) -m benchmarks.peers run --target $(TARGET) --draft $(DRAFT) $(ARGS)

clean: ## delete build/ (the venv stays)
	rm -rf build
