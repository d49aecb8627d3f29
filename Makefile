# What to do with nerve: `make help`. Packagers: `make build`, then `make install DESTDIR=…`.

PREFIX     ?= /usr
BINDIR     ?= $(PREFIX)/bin
LIBEXECDIR ?= $(PREFIX)/libexec/nerve
UNITDIR    ?= $(PREFIX)/lib/systemd/system
MANDIR     ?= $(PREFIX)/share/man
DOCDIR     ?= $(PREFIX)/share/doc/nerve
DESTDIR    ?=

CARGO_TARGET_DIR ?= target
RELEASE = $(CARGO_TARGET_DIR)/release

.PHONY: help setup build demo test test-matrix bench install uninstall clean

help:
	@echo 'make build        compile nerved, nervectl and nerve-worker'
	@echo 'make demo         see it work, in a throwaway machine'
	@echo 'make test         every check there is; test-matrix: the suites on newer systemds'
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

demo:
	tests/box run -- tests/demo

test: setup
	cargo fmt --check
	cargo clippy --all-targets --locked -- -D warnings
	cargo test --locked
	mandoc -T lint -W warning $(wildcard man/*.[1-8]) </dev/null
	for script in $$(grep -rlE '^#!.*(bash|/sh)' tests .ci --exclude-dir=__pycache__); do bash -n "$$script" || exit; done
	tests/box run --no-start -- tests/check-units
	tests/box run -- tests/suites/run

test-matrix:
	for systemd in 257 262; do \
	    tests/box run --systemd $$systemd --no-start -- tests/check-units || exit; \
	    tests/box run --systemd $$systemd -- tests/suites/run || exit; \
	done

bench: setup
	cargo bench --no-run --locked
	tests/box run -- tests/bench/run

clean:
	cargo clean

# The one list of what is installed, as lines MODE DESTINATION SOURCE; install and uninstall both follow it.
# No D-Bus activation file: nervectl would start a nerve that somebody has stopped.
# No nerve-wf@.service, ever: with a unit file of that name systemd refuses nerve's transient units.
define FILES
{ echo 755 $(BINDIR)/nervectl $(RELEASE)/nervectl; \
  for f in nerved nerve-worker; do echo 755 $(LIBEXECDIR)/$$f $(RELEASE)/$$f; done; \
  (cd units && find . -type f -printf '644 $(UNITDIR)/%P units/%P\n'); \
  (cd packaging/usr && find . -type f -printf '644 $(PREFIX)/%P packaging/usr/%P\n'); \
  for f in $(wildcard man/*.[1-8]); do echo 644 $(MANDIR)/man$${f##*.}/$${f##*/} $$f; done; \
  for f in $(wildcard README* LICENSE* CHANGELOG*); do echo 644 $(DOCDIR)/$$f $$f; done; }
endef

install:
	@umask 022; $(FILES) | while read -r mode to from; do install -D -m $$mode "$$from" "$(DESTDIR)$$to" || exit; done
	@[ "$(LIBEXECDIR)" = /usr/libexec/nerve ] || sed -i 's|/usr/libexec/nerve/|$(LIBEXECDIR)/|' "$(DESTDIR)$(UNITDIR)/nerve.service"

uninstall:
	@$(FILES) | while read -r mode to from; do rm -f "$(DESTDIR)$$to"; done
	@for d in $(LIBEXECDIR) $(DOCDIR) $(PREFIX)/lib/nerve $(UNITDIR)/nerve-wf@.service.d; do \
	    [ ! -d "$(DESTDIR)$$d" ] || find "$(DESTDIR)$$d" -depth -type d -empty -delete; done
