# Everything a user or CI runs. `make test` and `make train` need Python >= 3.10 with pip, nothing else.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cuh' -o -name '*.cu')
READY := $(VENV)/.ready
PIP := -m pip install --quiet --disable-pip-version-check --retries 10 --timeout 120

.PHONY: install test ptx compile-matrix build-oldest test-oldest test-newest test-arm lint format train sanitize soak docs gpu-report gpu-check bench bench-quick bench-compare plots ablation clean

install: $(READY)

# The compiled kernels are rebuilt whenever a source of theirs is newer than the environment.
# One call of pip for all requirements, so that none of them replaces the torch that they name.
REQUIREMENTS := requirements-dev.txt requirements-test.txt requirements-integrations.txt
TORCHVISION := $(addprefix tests/tools/torchvision_on_cpu/torchvision_on_cpu,.py .pth)
$(READY): $(REQUIREMENTS) $(TORCHVISION) pyproject.toml setup.py $(shell find csrc -type f)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) --no-compile -r requirements-dev.txt -r requirements-integrations.txt
	cp $(TORCHVISION) "$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
	$(PY) $(PIP) --no-build-isolation --no-deps -e .
	touch $(READY)

# Two processes on two cores: a thread that waits for another one should leave its core to them.
test test-oldest test-newest soak: export OMP_WAIT_POLICY := passive

# A file's tests stay in one process, which compiles what they share once. Files go in their order, not
# those of many tests first: the slowest have few.
PYTEST := -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
test: $(READY)
	$(PY) $(PYTEST)

# Every Triton operation compiled and executed on the CPU; `make test` runs the part that finds most.
ptx: $(READY)
	PYTHONPATH=.:tests/ptx $(PY) -m pytest -n auto --maxprocesses 4 -p plugin \
		tests/ptx/compiled_operations.py

# Compiles every operation, at every dtype and with each size equal to 1, for ten architectures, and asks
# that none fails or uses the stack: benchmarks/NOTES_triton.md says which kernels still do.
compile-matrix: $(READY)
	CWBR_COMPILE_WHOLE=1 $(PY) $(PYTEST) tests/ptx/test_specialisation.py -k compiles_with

# The tests that lean most on torch, on the torch of requirements-oldest.txt and the oldest
# Python that is found, or of requirements-newest.txt and the newest. The oldest builds the kernels
# itself; the newest takes those of `make install`, as one build serves whatever is newer. Of Triton,
# slow in its interpreter, every operation and the loss.
PYTHONS := 3.10 3.11 3.12 3.13
first_python = $(shell for python in $(foreach version,$(1),python$(version) \
	$(wildcard $(or $(PYENV_ROOT),$(HOME)/.pyenv)/versions/$(version).*/bin/python)); \
	do $$python -c "import venv, ensurepip" 2>/dev/null && echo $$python && exit; done; echo $(PYTHON))
PYTHON_oldest ?= $(call first_python,$(PYTHONS))
PYTHON_newest ?= $(call first_python,$(shell printf '%s\n' $(PYTHONS) | sort -rV))
TORCH_TESTS := test_compile.py test_amp.py test_distributed.py overlap/test_loss.py \
	balanced/test_cwbr.py \
	$(patsubst %,operations/test_%.py,ops backends cpu_regularizer cpu_arguments) \
	ptx/test_specialisation.py

# Gigabytes, so a broken connection costs a pause and the wheel that it broke, no more. The file pins
# what it is about, which a machine's own constraints could only contradict.
.venv-%/.ready: requirements-%.txt requirements-test.txt
	test -x .venv-$*/bin/python || $(PYTHON_$*) -m venv .venv-$*
	for pause in 10 60 0; do \
		PIP_CONSTRAINT=/dev/null .venv-$*/bin/python $(PIP) --no-compile -r $< && exit; \
		sleep $$pause; done; exit 1
	touch $@

build-oldest: .venv-oldest/.ready
	rm -rf build/oldest/lib
	CWBR_BUILD=cpu CFLAGS=-O1 .venv-oldest/bin/python setup.py -q build \
		--build-base build/oldest/objects --build-lib build/oldest/lib

# From tests/, where no other package than that one is in sight.
test-oldest: build-oldest
test-oldest: PACKAGE := $(CURDIR)/build/oldest/lib
test-newest: $(READY)
test-newest: PACKAGE := $(CURDIR)
test-oldest test-newest: test-%: .venv-%/.ready
	cd tests && PYTHONPATH=$(PACKAGE) ../.venv-$*/bin/python $(PYTEST) $(TORCH_TESTS) \
		-m "not triton or every_torch"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)

format: $(READY)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

train: $(READY)
	$(PY) examples/train_fgvc.py --compare ce cwbr --out runs/glyphs

# The CPU kernels alone, under the address, undefined-behaviour and thread sanitizers.
sanitize:
	$(MAKE) -C tests/cpp

# The CPU kernels compiled for aarch64, against their definitions, emulated: needs g++-aarch64-linux-gnu
# and qemu-user.
test-arm:
	$(MAKE) -C tests/cpp arm

# The hostile tests on an extension built with the address and undefined-behaviour sanitizers: N new
# examples per test, or with N=0 those of `make test`.
N ?= 5000
SANITIZED := build/sanitize/package
soak: $(READY)
	CWBR_BUILD=cpu CFLAGS="-O1 -fsanitize=address,undefined -fno-omit-frame-pointer" \
		LDFLAGS="-fsanitize=address,undefined" $(PY) setup.py -q build \
		--build-base $(SANITIZED)/objects --build-lib $(SANITIZED)/lib
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so):$$($(CXX) -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=$(SANITIZED)/lib CWBR_HOSTILE_EXAMPLES=$(N) \
		$(VENV)/bin/pytest tests/hostile -k cpu

# The site, into build/docs; a link or a snippet that leads nowhere is an error.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(READY)
	$(PY) $(PIP) -r requirements-docs.txt
	$(PY) -m mkdocs build --strict --quiet

# Resumes where an earlier run ended. Wants a quiet machine.
bench: $(READY)
	$(PY) $(PIP) pykeops
	$(PY) -m benchmarks.run

bench-quick: $(READY)
	$(PY) -m pytest benchmarks -q --benchmark-max-time=0.1 --benchmark-min-rounds=3 \
		--benchmark-columns=min,median,iqr,rounds --benchmark-sort=name

bench-compare: $(READY)
	$(PY) -m benchmarks.compare --base $(BASE)

# Every benchmarks/results/cpu-*.csv; the README shows the first of them, or SHOWN=cpu-avx512.
plots: $(READY)
	$(PY) -m benchmarks.plots $(if $(SHOWN),--shown $(SHOWN))

# Does the method help? Paired training runs of it and of rivals on top of each base, the most telling
# first, for less than 90 minutes; another call goes on with the rest.
ablation: $(READY)
	$(PY) -m benchmarks.ablation --seconds 5000

# What the compiled GPU kernels cost by their machine code; needs no GPU.
gpu-report: $(READY)
	$(PY) -m benchmarks.gpu_report

# Everything that only a GPU can show, in ten minutes; needs a GPU. Without one: --rehearse.
gpu-check: $(READY)
	$(PY) benchmarks/gpu_check.py --out runs/gpu_check

clean:
	rm -rf $(VENV) .venv-oldest .venv-newest build dist runs *.egg-info cwbr_fused/_C*.so cwbr_fused/_cuda*.so
