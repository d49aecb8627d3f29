# What to do with nerve: `make help`. Packagers: `make build`, then `make install DESTDIR=…`.

PREFIX     ?= /usr
BINDIR     ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec/nerve
UNITDIR    ?= $(PREFIX)/lib/systemd/system
MANDIR     ?= $(PREFIX)/share/man
DOCDIR     ?= $(PREFIX)/share/doc/nerve
DESTDIR    ?=

CARGO_TARGET_DIR ?= target
# What is installed.
BUILD ?= $(CARGO_TARGET_DIR)/release

# make soak: how long, how many runs and faults, and of which seed (a new one for each soak).
SECONDS ?= 600
RUNS    ?= 200
FAULTS  ?= 300
SEED    ?=
# make corruption: how many damages.
CORRUPTIONS ?= 200000

# make fuzz: how long each target.
FUZZ_SECONDS ?= 600

# make crash-states: so many distinct ones.
STATES  ?= 100000

.PHONY: help setup build build-failpoints demo test test-suites test-units test-matrix soak crash-states mutants corruption fuzz bench install uninstall clean

help:
	@echo 'make build        compile nerved, nervectl and nerve-worker'
	@echo 'make demo         see it work, in a throwaway machine'
	@echo 'make test         every check there is; test-matrix: the suites on newer systemds'
	@echo 'make soak         ten minutes of faults; SECONDS=, RUNS=, FAULTS=, SEED='
	@echo 'make crash-states every state that a power cut may leave, every call that may fail; STATES=, SEED='
	@echo 'make mutants      see that the simulation finds what is planted'
	@echo 'make corruption   damage a store at random, and see that the check finds it; CORRUPTIONS=, SEED='
	@echo 'make fuzz         feed what reads foreign text with anything, ten minutes each; FUZZ_SECONDS=, TARGETS='
	@echo 'make bench        measure'
	@echo 'make install      put what is built below $$(DESTDIR)$$(PREFIX); starts nothing'
	@echo 'make uninstall    remove just that'
	@echo 'make clean        remove what make build made'

# Installs by apt what these need, where something is missing; tests/box does so itself.
setup:
	@tests/setup build box test

build:
	@tests/setup build
	cargo build --release --locked

# A nerved that dies where a test wants it to: for tests/box only, never to be installed anywhere else.
build-failpoints:
	@tests/setup build
	cargo build --locked --features failpoints

demo:
	tests/box run -- tests/demo

# The suites mostly wait for systemd, so the other half goes on meanwhile.
test: setup
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	cargo clippy --locked --features failpoints -- -D warnings
	cargo build --release --locked
	$(MAKE) --jobs=2 --output-sync=target test-suites test-units

test-suites:
	tests/box run --no-start -- tests/check-units
	tests/box run -- tests/suites/run
	tests/check-release $(BUILD)

test-units:
	cargo test --locked
	python3 -B tests/suites/test_invariants.py
	mandoc -T lint -W warning $(wildcard man/*.[1-8]) </dev/null
	for script in $$(grep -rlE '^#!.*(bash|/sh)' tests .ci --exclude-dir=__pycache__); do bash -n "$$script" || exit; done
	tests/box run --failpoints -- tests/suites/run failpoints

test-matrix:
	for systemd in 257 262; do \
	    tests/box run --systemd $$systemd --no-start -- tests/check-units || exit; \
	    tests/box run --systemd $$systemd -- tests/suites/run || exit; \
	    tests/box run --systemd $$systemd --failpoints -- tests/suites/run failpoints || exit; \
	done

soak: setup
	tests/box run -- tests/soak --seconds $(SECONDS) --runs $(RUNS) --faults $(FAULTS) $(addprefix --seed ,$(SEED))

crash-states:
	@tests/setup build
	NERVE_CRASH_STATES=$(STATES) NERVE_WALK_STRIDE=1 $(addprefix NERVE_SEED=,$(SEED)) \
	    cargo test --locked --test nerve trouble -- --nocapture --test-threads=1

mutants: setup
	tests/mutants/run

corruption: setup
	NERVE_CORRUPTIONS=$(CORRUPTIONS) $(addprefix NERVE_SEED=,$(SEED)) cargo test --locked --test nerve damage_that -- --nocapture

fuzz: setup
	FUZZ_SECONDS=$(FUZZ_SECONDS) tests/fuzz/run $(TARGETS)

bench: setup
	@tests/setup bench
	tests/bench/predecessor
	cargo bench --no-run --locked
	tests/box run -- tests/bench/run

clean:
	cargo clean

# The one list of what is installed, as lines MODE DESTINATION SOURCE; install and uninstall both follow it.
# No D-Bus activation file: nervectl would start a nerve that somebody has stopped.
# No nerve-wf@.service, ever: with a unit file of that name systemd refuses nerve's transient units.
define FILES
{ echo 755 $(BINDIR)/nervectl $(BUILD)/nervectl; \
  for f in nerved nerve-worker; do echo 755 $(LIBEXECDIR)/$$f $(BUILD)/$$f; done; \
  (cd units && find . -type f -printf '644 $(UNITDIR)/%P units/%P\n'); \
  (cd packaging/usr && find . -type f -printf '644 $(PREFIX)/%P packaging/usr/%P\n'); \
  for f in $(wildcard man/*.[1-8]); do echo 644 $(MANDIR)/man$${f##*.}/$${f##*/} $$f; done; \
  for f in $(wildcard README* LICENSE* CHANGELOG*); do echo 644 $(DOCDIR)/$$f $$f; done; }
endef

install:
	@umask 022; $(FILES) | while read -r mode to from; do install -D -m $$mode "$$from" "$(DESTDIR)$$to" || exit; done
	@sed -i 's|/usr/libexec/nerve/|$(LIBEXECDIR)/|; s|/usr/bin/nervectl|$(BINDIR)/nervectl|' $(addprefix "$(DESTDIR)$(UNITDIR)"/,nerve.service nerve-archive.service)

uninstall:
	@$(FILES) | while read -r mode to from; do rm -f "$(DESTDIR)$$to"; done
	@for d in $(LIBEXECDIR) $(DOCDIR) $(PREFIX)/lib/nerve $(PREFIX)/share/nerve $(UNITDIR)/nerve-wf@.service.d; do \
	    [ ! -d "$(DESTDIR)$$d" ] || find "$(DESTDIR)$$d" -depth -type d -empty -delete; done
