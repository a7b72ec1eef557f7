# make demo   train PPO on CartPole from a bare machine, evaluate it, and draw its learning curve
# make test   every check of the project, the same as continuous integration
# Needs make, sh and Python >= 3.11, taken from the PATH or named: make demo PYTHON=/path/to/python3

BIN := .venv/bin
PYTHONS := $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
INSTALL := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt --editable
# Exact tests first: a wrong formula is told within seconds. Learning runs last, with programs that are compiled to run long.
EXACT_TESTS := $(wildcard tests/test_*.py) tests/math/
OTHER_TESTS := $(filter-out $(EXACT_TESTS) tests/learning/ %__pycache__/,$(wildcard tests/*/))
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
export SUREFOOT_TESTS_BEGAN := $(shell date +%s)

.PHONY: demo test

demo: .venv/installed
	@set -e; n=1; while [ -e runs/demo-$$n ]; do n=$$((n + 1)); done; run=runs/demo-$$n; \
	$(BIN)/surefoot train ppo CartPole-v1 --steps 1e5 --out $$run; \
	$(BIN)/surefoot eval $$run --episodes 100; \
	printf '\nRun:     %s\nPicture: %s\n' $$run $$run/curve.png

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(PYTEST) $(EXACT_TESTS) $(OTHER_TESTS)
	SUREFOOT_TESTS_RUN_LONG=1 $(PYTEST) tests/learning/

.venv/installed: $(BIN)/pip pyproject.toml constraints.txt
	@echo "Installing Surefoot into .venv (a minute or two, once) ..."
	@$(INSTALL) .
	@: > $@

.venv/installed-dev: $(BIN)/pip pyproject.toml constraints.txt
	@echo "Installing Surefoot and its development tools into .venv (a minute or two, once) ..."
	@$(INSTALL) '.[dev]'
	@: > $@
	@: > .venv/installed

# pip is the last thing that a new environment receives, so its file says that the environment is whole.
$(BIN)/pip:
	@for python in $(PYTHONS); do \
	  version=$$($$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue; \
	  if ! $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then old="$$old $$python is $$version;"; continue; fi; \
	  if ! $$python -c 'import venv, ensurepip' 2>/dev/null; then bare="$${bare:-$$python $$version}"; continue; fi; \
	  echo "Creating .venv with $$python ($$version) ..."; exec $$python -m venv .venv; \
	done; \
	if [ -n "$$bare" ]; then \
	  echo "$${bare% *} has no modules 'venv' and 'ensurepip', which make virtual environments." >&2; \
	  echo "On Debian and Ubuntu: apt install python3-venv (or python$${bare#* }-venv), then run make again." >&2; \
	else \
	  echo "Surefoot needs Python 3.11 or newer;$${old:- none of '$(PYTHONS)' runs;} install one and run make again," >&2; \
	  echo "or name it: make PYTHON=/path/to/python3" >&2; \
	fi; exit 1
