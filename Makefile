PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SIZE ?= 2
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help serve test test-clients test-structured test-serving test-ranks test-cluster test-page test-install test-ptx bench-ranks proto diagram lint format clean

help:
	@echo 'make serve   serve the model in models/ on this machine (OpenAI HTTP on :8000, gRPC on :9000)'
	@echo 'make test    run the test suite'
	@echo 'make test-clients  openai, LangChain, LlamaIndex, lm-eval, Open WebUI, Codex and others, unchanged, against a server (Node, npm; 10 GB)'
	@echo 'make test-structured  2,025 structured answers under 45 JSON Schemas, by both schedules: minutes'
	@echo 'make test-serving  load steps, shared prefixes, killed processes, misbehaving clients, a rolling update: minutes'
	@echo 'make test-ranks  replicas of several processes, of which one is killed or stopped; where Ray places them: minutes'
	@echo 'make test-cluster  ray up, traffic, a lost host, ray down, on hosts in network namespaces (needs root, iproute2, openssh-server, rsync)'
	@echo 'make test-page  the web page in Chromium, driven by Playwright (says if one is missing): minutes; makes the screenshots in docs/'
	@echo 'make test-install  installs beside other packages named kernels, cluster and deployments: minutes; needs a package index'
	@echo 'make test-ptx  the kernels for Hopper, compiled and run by an emulator on the CPU, in many sizes and orders (needs g++ or clang++): about 8 minutes'
	@echo 'make bench-ranks SIZE=2  how much faster 2, 4 or 8 GPUs of this host are than one, compared with the aims'
	@echo 'make proto   make the gRPC stubs from deployments/proto/orthrus.proto; a test fails when they are stale'
	@echo 'make diagram  draw docs/rooms.svg from docs/rooms.yaml; a test fails when it is stale'
	@echo 'make lint    ruff check, ruff format --check, mypy'
	@echo 'make format  let ruff fix and format'
	@echo 'make clean   remove .venv and caches'

serve: $(INSTALLED)
	$(BIN)/orthrus serve configs/tiny-cpu.yaml

test: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2

test-clients: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=1800 tests/proofs/clients_proof.py

test-structured: $(INSTALLED)
	$(BIN)/python -m pytest -q -s -o faulthandler_timeout=1800 tests/proofs/structured_proof.py

test-serving: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=420 -o faulthandler_exit_on_timeout=true tests/proofs/serving_proof.py

test-ranks: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=420 tests/proofs/ranks_proof.py tests/proofs/gpu_hosts_proof.py

test-cluster: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=1200 tests/proofs/cluster_proof.py

test-page: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=600 tests/proofs/page_proof.py

test-install: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=600 tests/proofs/install_proof.py

test-ptx: $(INSTALLED)
	$(BIN)/python -m pytest -q -o faulthandler_timeout=600 tests/proofs/ptx_proof.py

bench-ranks: $(INSTALLED)
	$(BIN)/python -m tests.gpu.ranks_bench $(SIZE)

proto: $(INSTALLED)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. orthrus/deployments/proto/orthrus.proto

diagram: $(INSTALLED)
	$(BIN)/python docs/draw_rooms.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@echo 'Installing about 130 packages into $(VENV): some minutes the first time, most of them for torch and ray'
	@# The loop ends with the shell, also if Ctrl-C ends the shell.
	@(seconds=0; while sleep 10 && kill -0 $$$$ 2> /dev/null; do seconds=$$((seconds + 10)); \
		echo "  $$(ls -d $(VENV)/lib/python*/site-packages/*.dist-info 2> /dev/null | wc -l) packages so far ($$seconds s)"; \
	done) & beat=$$!; trap "kill $$beat" EXIT; \
	{ test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); } && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@
