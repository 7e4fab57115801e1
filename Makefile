# One command for each common job; `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
MODEL ?= reference
EXPORTED ?= exported
# cpu; gpu (CUDA 13); or cuda12, for an NVIDIA driver older than 580 or a GPU below compute capability 7.5. Without it a
# .venv keeps what it has, and a new one gets what the machine needs; `make install RUNTIME=...` always installs anew.
RUNTIME ?=
# current (transformers 5), or optimum (transformers 4.57 with optimum-onnx). Without it a .venv keeps what it has, and a
# new one gets the current set.
SET ?=
# An index to add for PyTorch, where the default one gives the wrong build; see docs/how-to/install.md.
TORCH_INDEX ?=
# Per cents that `make export` prunes; empty for none. TRAIN_DATA: a CSV to rank by, where SST-2 does not fit.
PRUNE ?= 30 40 50
TRAIN_DATA ?=
# Seconds of `make fuzz`; the seed, the number and the kind of one case to run again.
SECONDS ?= 60
SEED ?=
CASE ?=
KIND ?=
# Number of kills of `make unlucky`.
KILLS ?= 200
# What `make ship` ships.
SHIP ?= onnx-int8
# FULL=1: about 60 s a cell instead of 20.
FULL ?=
# SPARK=1: `make test-clients` also installs Spark, which takes 1 GB and needs Java.
SPARK ?=

# NEEDED is `runtime_set` of toolchain/system/hardware.py, for when there is no Python to ask yet.
ASK = nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2>/dev/null
NEEDED = $(shell $(ASK) | awk -F , \
	'/^[0-9]/ {if ($$1 + 0 < 580 || $$2 + 0 < 7.5) old = 1; else new = 1} END {print old ? "cuda12" : new ? "gpu" : "cpu"}')
INSTALLED := $(filter cpu gpu cuda12,$(shell cat $(VENV)/.installed 2>/dev/null))
INSTALLED_SET := $(filter current optimum,$(shell cat $(VENV)/.installed 2>/dev/null))
ASKED := $(and $(filter install,$(MAKECMDGOALS)),$(filter command,$(origin RUNTIME) $(origin SET)))
override RUNTIME := $(or $(RUNTIME),$(INSTALLED),$(NEEDED))
override SET := $(or $(SET),$(INSTALLED_SET),current)
$(if $(filter cpu gpu cuda12,$(RUNTIME)),,$(error RUNTIME is cpu, gpu or cuda12, not $(RUNTIME)))
$(if $(filter current optimum,$(SET)),,$(error SET is current or optimum, not $(SET)))
ANEW := $(or $(ASKED),$(filter-out $(INSTALLED),$(RUNTIME)),$(filter-out $(INSTALLED_SET),$(SET)))
EXTRAS = $(if $(filter cpu,$(RUNTIME)),cpu,gpu),bnb$(if $(filter optimum,$(SET)),$(COMMA)optimum)
CONSTRAINTS = constraints/$(if $(filter optimum,$(SET)),optimum-)$(RUNTIME).txt
COMMA = ,

BIN = $(VENV)/bin
TOOLCHAIN = $(BIN)/toolchain
PIP = $(BIN)/pip install --disable-pip-version-check -q $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c $(CONSTRAINTS)
CHOICE = --model "$(MODEL)" --exported "$(EXPORTED)"

.DEFAULT_GOAL := help
.PHONY: help install anew export bench compare ship test test-fast test-set test-clients locks fuzz unlucky lint docs docs-serve report clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(VENV)/.installed ## create .venv and install the toolchain into it

# Both ONNX Runtimes fill one folder, CUDA 12's and 13's cuDNN as well, and a torch without CUDA satisfies a GPU's set.
# optimum does not work beside transformers 5. So pip first removes all of these.
REPLACED = onnxruntime|onnxruntime-gpu|torch|nvidia-.*|optimum|optimum-onnx

$(VENV)/.installed: setup.cfg pyproject.toml $(CONSTRAINTS) $(if $(ANEW),anew)
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV): a few minutes where nothing is cached"
	@rm -f $@
	$(if $(and $(ANEW),$(wildcard $(BIN)/pip)),$(BIN)/pip list --disable-pip-version-check --format=freeze | \
		sed -n -E 's/^($(REPLACED))==.*/\1/p' | xargs -r $(BIN)/pip uninstall -q -y)
	$(PIP) -e ".[$(EXTRAS)]"
	@echo $(RUNTIME) $(SET) > $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(PIP) -e ".[$(EXTRAS),test$(if $(filter cuda12,$(RUNTIME)),,$(COMMA)torchao)]"
	@touch $@

export: install ## build fp32, int8 and pruned variants (MODEL=hub id or folder, PRUNE= for none pruned)
	$(TOOLCHAIN) export $(CHOICE)
	$(TOOLCHAIN) quantize --backend ort $(CHOICE)
	$(if $(PRUNE),$(TOOLCHAIN) prune $(PRUNE:%=--ratio 0.%) $(if $(TRAIN_DATA),--train-data "$(TRAIN_DATA)") $(CHOICE))
	$(if $(PRUNE),$(TOOLCHAIN) quantize $(PRUNE:%=--from onnx-pruned%) $(CHOICE))

bench: install ## build what is missing, measure every cell, compare (FULL=1: longer)
	$(TOOLCHAIN) bench $(if $(FULL),,--quick) $(CHOICE)

compare: install ## show the newest result again
	$(TOOLCHAIN) compare $(CHOICE)

ship: install ## bundles for browser and Node, Python, phones, and other runtimes (SHIP= variants of the first three)
	$(TOOLCHAIN) ship $(SHIP) --target web $(CHOICE)
	$(TOOLCHAIN) ship $(SHIP) --target python $(CHOICE)
	$(TOOLCHAIN) ship $(SHIP) --target mobile $(CHOICE)
	$(TOOLCHAIN) ship onnx-std onnx-std-int8 --target other $(CHOICE)

# A worker runs whole files, so it builds their fixtures once; tests/conftest.py puts the longest files first.
PARALLEL = -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test: $(VENV)/.installed-test lint ## lint, types and all tests
	$(BIN)/python -m pytest $(PARALLEL)

test-fast: $(VENV)/.installed-test lint ## lint, types and all tests that are not marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow"

# Tests of everything that depends on the release of transformers, for a second environment:
# `make test-set VENV=.venv-optimum SET=optimum`.
# Compiled models depend on PyTorch only. The tests of models and of other releases build artifacts and bundles.
SET_TESTS = $(filter-out %/test_torchao.py %/test_compiled.py,$(wildcard tests/backends/test_*.py)) \
	$(addprefix tests/,exporters models pruning training test_entities.py test_finetune.py ship/test_elsewhere.py)
test-set: $(VENV)/.installed-test ## tests of what depends on the installed set of packages
	$(BIN)/python -m pytest $(PARALLEL) $(SET_TESTS)

FILES = toolchain/ship/bundle_files

# What `make test` skips without: npm packages by their lock file, Pythons with nothing but a bundle's requirements, and
# one of these for 64-bit ARM where qemu can run it.
CLIENTS = $(EXPORTED)/.cache/test-clients
SITE = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
# A client's environment has no pip: the one of .venv installs into it, which takes seconds less for each environment.
NEW = $(PYTHON) -m venv --without-pip $(CLIENTS)
INTO = $(BIN)/pip --disable-pip-version-check -q --python $(CLIENTS)
test-clients: $(VENV)/.installed-test ## install the clients that tests run bundles in (npm, Pythons, OpenVINO, servers, S3, ARM, C)
	$(BIN)/python -c 'import sys, pathlib; from toolchain.ship.targets import clients; print(clients.install(pathlib.Path(sys.argv[1])))' \
		"$(EXPORTED)/.cache"
	$(NEW)/python
	$(INTO)/python install -c constraints/cpu.txt onnxruntime tokenizers numpy
	$(NEW)/openvino
	$(INTO)/openvino install -c constraints/cpu.txt openvino==2026.4.1 tokenizers numpy
	$(NEW)/texts
	$(INTO)/texts install -c constraints/cpu.txt onnxruntime onnxruntime-extensions tokenizers numpy
	$(NEW)/triton
	$(INTO)/triton install "tritonclient[grpc]==2.73.0" nvidia-pytriton==0.7.0 onnxruntime==1.32.0 onnxruntime-extensions==0.15.2
	$(NEW)/mlflow
	$(INTO)/mlflow install -c constraints/cpu.txt mlflow-skinny==3.17.2 pandas onnx onnxruntime tokenizers numpy
	$(if $(SPARK),$(NEW)/spark)
	$(if $(SPARK),$(INTO)/spark install -c constraints/cpu.txt pyspark==4.3.0 mlflow-skinny==3.17.2 pyarrow pandas onnx onnxruntime tokenizers numpy)
	$(NEW)/notebook
	$(INTO)/notebook install -c constraints/cpu.txt nbclient==0.11.0 ipykernel==7.4.0
	$(BIN)/python $(SITE) > "$$($(CLIENTS)/notebook/bin/python $(SITE))/venv.pth"
	$(NEW)/kserve
	$(INTO)/kserve install --require-hashes -r $(FILES)/requirements_kserve.lock
	$(NEW)/ray-serve
	$(INTO)/ray-serve install --require-hashes -r $(FILES)/requirements_ray_serve.lock
	$(NEW)/s3
	$(INTO)/s3 install 'moto[server]==5.2.5'
	$(NEW)/phone
	$(INTO)/phone install onnxruntime==1.17.3 'numpy<2' tokenizers==0.22.2
	tests/clients/arm_root.sh $(CLIENTS)/arm $(BIN)/pip
	tests/clients/c_header.sh $(CLIENTS)/c
# Both releases of transformers, with the dependencies that differ; PyTorch and the rest are those of .venv.
	for release in 4 5; do \
		$(NEW)/transformers$$release && \
		$(BIN)/python $(SITE) > "$$($(CLIENTS)/transformers$$release/bin/python $(SITE))/venv.pth" || exit 1; \
	done
	$(INTO)/transformers4 install --no-deps -c constraints/optimum-cpu.txt \
		transformers huggingface_hub tokenizers optimum optimum-onnx
	$(INTO)/transformers5 install --no-deps -c constraints/cpu.txt \
		transformers huggingface_hub tokenizers httpx2 httpcore2 truststore

# The newest onnxruntime-extensions has no wheel for Windows. The packages that two lock files share have the same release,
# except protobuf, of which KServe takes only older ones.
LOCK = $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make locks" --upgrade --no-emit-index-url
locks: $(VENV)/.installed ## pin the Python packages of bundles with sha256, in the releases of constraints/cpu.txt
	$(BIN)/pip install --disable-pip-version-check -q uv
	(sed "s/^onnxruntime-extensions==.*/& ; sys_platform != 'win32'/" constraints/cpu.txt; \
		echo "onnxruntime-extensions==0.15.0 ; sys_platform == 'win32'") > $(VENV)/locks.txt
	for name in requirements requirements_text requirements_mlflow requirements_ray_serve; do \
		sed 's/{{.*}}/0/' $(FILES)/$$name.txt.j2 | $(LOCK) -c $(VENV)/locks.txt -o $(FILES)/$$name.lock - || exit 1; \
	done
	sed -n 's/ \\$$//p' $(FILES)/requirements_text.lock | grep -v -e '^ ' -e '^protobuf==' > $(VENV)/locks.txt
	sed 's/{{.*}}/0/' $(FILES)/requirements_kserve.txt.j2 | \
		$(LOCK) -c $(VENV)/locks.txt -o $(FILES)/requirements_kserve.lock -

fuzz: $(VENV)/.installed-test ## attack the readers of files for SECONDS (60); SEED, CASE and KIND repeat one case
	$(BIN)/python tests/hostile/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed "$(SEED)") $(if $(CASE),--case $(CASE)) \
		$(if $(KIND),--kind "$(KIND)")

unlucky: $(VENV)/.installed-test ## let system calls of each writing command fail, and kill the commands KILLS (200) times
	$(BIN)/python tests/hostile/unlucky.py faults
	$(BIN)/python tests/hostile/unlucky.py kills --count $(KILLS)

lint: $(VENV)/.installed-test ## lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

$(VENV)/.installed-docs: $(VENV)/.installed
	$(PIP) -e ".[$(EXTRAS),docs]"
	@touch $@

docs: $(VENV)/.installed-docs ## write the generated parts of README and docs/ anew, and build the site into site/
	$(BIN)/python docs/readme_parts.py
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.installed-docs ## show the site at http://localhost:8000, rebuilt on every change
	$(BIN)/mkdocs serve

report: install ## write benchmarks/reports from the committed results, then run `make docs`
	$(BIN)/python benchmarks/report.py
	$(MAKE) docs

# Only what the toolchain made: folders whose manifest has an id, work folders (`WORK` of
# toolchain/artifacts/publishing.py), records of checkpoints' folders, caches. Whatever else lies there is not ours to delete.
MADE = { \
	find "$(EXPORTED)" -mindepth 3 -maxdepth 3 -name manifest.json \
		-exec grep -qE '^ "id": "[0-9a-f]{64}",$$' {} \; -printf '%h\0'; \
	find "$(EXPORTED)" -mindepth 2 -maxdepth 2 -type d -name '.*.toolchain-6f1d0b9c' -print0; \
	find "$(EXPORTED)" -mindepth 2 -maxdepth 2 -type f -name .location.json -print0; \
	find "$(EXPORTED)" -mindepth 2 -maxdepth 2 -type d -regextype posix-extended \
		-regex '.*/\.cache/([0-9a-f]{12}|clients-[0-9a-f]{12}|test-clients)' -print0; }

clean: ## delete built artifacts and caches, and say what that frees
	@test -n "$(EXPORTED)" || { echo "EXPORTED is empty"; exit 1; }
	@$(MADE) | xargs -0 -r du -sch | sed 's/^/freeing /'
	@$(MADE) | xargs -0 -r sh -c 'rm -rf "$$@"; for folder; do rmdir "$${folder%/*}" 2>/dev/null; done; true' clean
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build site toolchain.egg-info
	find toolchain tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## clean, and delete .venv as well
	@du -sh $(VENV) 2>/dev/null | sed 's/^/freeing /' || true
	rm -rf $(VENV)
