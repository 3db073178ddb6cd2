# make demo, make test, make gpu, make lab, make docs. The virtual environment is made on first use, and again when the pins change.
#   OUT=runs/demo      folder of the demo's run; an interrupted run in it goes on, a finished one is shown
#   ARGS="-p k v"      other parameters of the pipeline, see `defi-nb params pipeline`
#   VENV=.venv         where the environment is, or shall be
#   PYTHON=python3.12  what to make it with, if not the first suitable Python on the path
#   TORCH_FLAGS=...    more options for installing torch, such as --index-url for a CPU or CUDA build
VENV ?= .venv
OUT ?= runs/demo
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.13 python3.14 python3 python)
SUITABLE := import sys, venv, ensurepip; raise SystemExit(not (3, 11) <= sys.version_info[:2] <= (3, 14))

RECORDS ?= doctor eval_gfdm eval_gidm eval_features denoising attention ladder explore failures own_data eval_simulators \
  bench_evaluation bench_inference bench_loader bench_serve

.PHONY: demo test gpu lab docs records install clean
.DEFAULT_GOAL := demo

demo: install
	@$(BIN)/defi-nb run pipeline --out "$(OUT)" $(ARGS)
	@echo "The report: $(OUT)/pipeline.html"

# two processes at a time, each with one thread for arithmetic; the tests of a file stay together, because they share what is slow to make
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# what only a GPU can show, made for about ten minutes on one; the table of the benchmark at full size is runs/gpu/table.md
gpu: install
	$(BIN)/python -m pytest -m gpu -rs -s tests/test_gpu.py tests/test_attention.py $(PYTEST_ARGS)

lab: install
	$(BIN)/jupyter lab --ip=127.0.0.1 --ServerApp.root_dir="$(CURDIR)" --LabApp.default_url=/lab/tree/nbs/index.ipynb \
	  --ContentsManager.pre_save_hook=defi_nb.core.page.keep_clean \
	  $(if $(filter 0,$(shell id -u)),--allow-root)

# the experiments that take a laptop minutes each, on the demo's models; their executed copies are what make docs shows
records: demo
	for name in $(RECORDS); do $(BIN)/defi-nb run $$name --out runs/records/$$name || exit 1; done

# search needs a server: python -m http.server -d build/docs
docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "The docs: build/docs/index.html"

install: $(STAMP)

# torch first and alone, at its pin, so that no other package chooses its build; openpi's client last and alone, for the tests: it asks for
# an old NumPy, and works with this one. Git compares run notebooks without outputs (.gitattributes), so that Run All leaves the tree clean
$(STAMP): constraints.txt settings.ini setup.py pyproject.toml
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  for python in $(CANDIDATES); do "$$python" -c '$(SUITABLE)' 2>/dev/null && found="$$python" && break; done; \
	  if [ -z "$$found" ]; then \
	    echo "error: none of '$(CANDIDATES)' is Python 3.11 to 3.14 with its venv module (Debian, Ubuntu: apt-get install python3-venv);" \
	      "name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; fi; \
	  echo "Making the environment $(VENV) with $$found"; "$$found" -m venv "$(VENV)"; }
	@echo "Installing into $(VENV); this takes some minutes the first time"
	$(BIN)/python -m pip install --quiet -c constraints.txt $(TORCH_FLAGS) torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[all,dev]"
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps openpi-client
	mkdir -p "$(VENV)/share/jupyter/lab/settings"
	echo '{"@jupyterlab/docmanager-extension:plugin": {"defaultViewers": {"markdown": "Markdown Preview"}}}' > "$(VENV)/share/jupyter/lab/settings/overrides.json"
	@git rev-parse --git-dir >/dev/null 2>&1 && git config filter.run-notebook.clean "'$(abspath $(BIN))/defi-nb' strip" || true
	@touch $@

# runs, data and checkpoints stay: they are results
clean:
	rm -rf $(VENV) build *.egg-info _proc .pytest_cache .ruff_cache
	find nbs defi_nb tests tools -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
