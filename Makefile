# flowd-rs: `make help` lists the targets.

CARGO ?= cargo
PREFIX ?= /usr
SYSCONFDIR ?= /etc
DESTDIR ?=
MANDIR = $(PREFIX)/share/man
PROGRAM ?= target/release/flowd-rs
RPM_TOP = $(CURDIR)/target/rpm

# command-or-path:Debian package:RHEL package. Only missing packages are installed.
TOOLS = cc:gcc:gcc clang:clang:clang pkg-config:pkg-config:pkgconf-pkg-config \
	/usr/include/libelf.h:libelf-dev:elfutils-libelf-devel /usr/include/zlib.h:zlib1g-dev:zlib-devel \
	/usr/include/linux/bpf.h:linux-libc-dev:kernel-headers
# Additional packages for `make lint`.
LINT_TOOLS = mandoc:mandoc:mandoc
# Additional packages for tests and benches.
TEST_TOOLS = $(LINT_TOOLS) ip:iproute2:iproute tc:iproute2:iproute-tc nsenter:util-linux:util-linux \
	setpriv:util-linux:util-linux ethtool:ethtool:ethtool tshark:tshark:wireshark-cli \
	iperf3:iperf3:iperf3 python3:python3-venv:python3 prometheus:prometheus:prometheus curl:curl:curl nft:nftables:nftables systemd-analyze:systemd:systemd \
	/usr/share/doc/python3-prometheus-client:python3-prometheus-client:python3-prometheus_client \
	/usr/share/doc/python3-seccomp:python3-seccomp:python3-libseccomp
# Additional packages for `make rpm`.
RPM_TOOLS = rpmbuild:rpm:rpm-build rpmlint:rpmlint:rpmlint systemd-analyze:systemd:systemd git:git:git
# Additional packages for the benches.
BENCH_TOOLS = wrk:wrk:wrk
# Exporters and peers of the collector.
COLLECTOR_TOOLS = softflowd:softflowd:softflowd nfcapd:nfdump:nfdump fprobe:fprobe:fprobe pmacctd:pmacct:pmacct \
	ovs-vswitchd:openvswitch-switch:openvswitch
# Tests the API against its OpenAPI description; from PyPI.
SCHEMATHESIS = target/schemathesis/bin/schemathesis

.PHONY: help deps test-deps test-tools build run run-collector test fuzz bench bench-collector lint install rpm test-rpm

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

deps: ## install missing build dependencies (apt or dnf, with sudo unless root)
	@conf/install-deps $(TOOLS)

test-deps: test-tools $(SCHEMATHESIS)

test-tools:
	@conf/install-deps $(TOOLS) $(TEST_TOOLS) $(COLLECTOR_TOOLS)

$(SCHEMATHESIS): | test-tools
	python3 -m venv target/schemathesis
	target/schemathesis/bin/pip install --quiet --disable-pip-version-check schemathesis==4.32.5

build: deps ## build the release binary
	$(CARGO) build --release --locked

run: build ## build, run the quick start, and print the received fireflies; Ctrl-C stops it
	@conf/quickstart target/release/flowd-rs

run-collector: build ## run the collector; softflowd exports real traffic to it, and the stored records are printed (root)
	@conf/install-deps softflowd:softflowd:softflowd curl:curl:curl python3:python3:python3
	@conf/quickstart-collector target/release/flowd-rs

test: test-deps ## run all tests; without root, those that need it are skipped and a note is printed
	@if [ "$$(id -u)" = 0 ]; then \
		$(CARGO) test --locked -- --include-ignored; \
	elif [ -n "$$CI" ]; then \
		echo "make test: not root; CI must not skip the tests that need root" >&2; exit 1; \
	else \
		$(CARGO) test --locked && echo "Tests marked \"ignored\" need root; run them with sudo make test."; \
	fi

FUZZ_SECONDS = 60
# With a nightly toolchain the address sanitizer watches, too; libFuzzer itself needs none.
fuzz: deps ## run every fuzz target for FUZZ_SECONDS; installs cargo-fuzz if need be
	@command -v cargo-fuzz >/dev/null || $(CARGO) install --locked cargo-fuzz
	@if rustup run nightly rustc --version >/dev/null 2>&1; then \
		echo "make fuzz: nightly toolchain, with the address sanitizer"; toolchain=+nightly; sanitizer=address; \
	else \
		echo "make fuzz: no nightly toolchain, so without a sanitizer"; toolchain=; sanitizer=none; \
	fi; \
	for target in $$($(CARGO) fuzz list); do \
		mkdir -p fuzz/corpus/$$target fuzz/seeds/$$target && \
		$(CARGO) $$toolchain fuzz run --sanitizer $$sanitizer $$target fuzz/corpus/$$target fuzz/seeds/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=8192 || exit; \
	done

bench: test-deps ## measure the codecs, and the daemon against the limits of this machine (needs root)
	@conf/install-deps $(BENCH_TOOLS)
	$(CARGO) bench --locked --bench codecs
	$(CARGO) bench --locked --bench end_to_end
	$(CARGO) bench --locked --bench marker
	$(CARGO) bench --locked --bench inputs
	$(CARGO) bench --locked --bench sockets
	$(CARGO) bench --locked --bench metrics

bench-collector: test-deps ## measure the collector, beside nfcapd and nfdump (needs root, a quiet machine)
	$(CARGO) bench --locked --bench collector
	$(CARGO) bench --locked --bench filter
	$(CARGO) bench --locked --bench segments
	$(CARGO) bench --locked --bench collect

# A manual page that ours refer to need not be installed on this machine.
lint: deps ## check formatting, clippy and manual pages
	@conf/install-deps $(LINT_TOOLS)
	$(CARGO) fmt --check
	$(CARGO) clippy --locked --all-targets -- -D warnings
	$(CARGO) clippy --locked --all-targets --no-default-features -- -D warnings
	! mandoc -T lint man/*.[578] 2>&1 | grep -v "referenced manual not found\|mandoc.db"

install: ## install the output of `make build` below DESTDIR
	install -D -m 755 $(PROGRAM) $(DESTDIR)$(PREFIX)/bin/flowd-rs
	[ -e $(DESTDIR)$(SYSCONFDIR)/flowd/flowd.cfg ] || \
		install -D -m 644 conf/flowd.cfg $(DESTDIR)$(SYSCONFDIR)/flowd/flowd.cfg
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	[ -e $(DESTDIR)$(SYSCONFDIR)/flowd/collector.cfg ] || \
		install -D -m 644 conf/collector.cfg $(DESTDIR)$(SYSCONFDIR)/flowd/collector.cfg
	for unit in flowd-rs.service flowd-rs@.service flowd-collector.service; do \
		sed 's,/usr/bin/flowd-rs,$(PREFIX)/bin/flowd-rs,' conf/$$unit > $(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit; \
		chmod 644 $(DESTDIR)$(PREFIX)/lib/systemd/system/$$unit; \
	done
	install -D -m 644 conf/flowd-rs.sysusers $(DESTDIR)$(PREFIX)/lib/sysusers.d/flowd-rs.conf
	install -D -m 644 conf/flowd-rs.tmpfiles $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/flowd-rs.conf
	install -D -m 644 man/flowd-rs.8 $(DESTDIR)$(MANDIR)/man8/flowd-rs.8
	ln -sf flowd-rs.8 $(DESTDIR)$(MANDIR)/man8/flowd.8
	install -D -m 644 man/flowd-collector.8 $(DESTDIR)$(MANDIR)/man8/flowd-collector.8
	install -D -m 644 man/flowd-reader.8 $(DESTDIR)$(MANDIR)/man8/flowd-reader.8
	install -D -m 644 man/flowd-collector.cfg.5 $(DESTDIR)$(MANDIR)/man5/flowd-collector.cfg.5
	install -D -m 644 man/flowd.cfg.5 $(DESTDIR)$(MANDIR)/man5/flowd.cfg.5
	install -D -m 644 man/flowd-rs-migration.7 $(DESTDIR)$(MANDIR)/man7/flowd-rs-migration.7
	install -D -m 644 conf/grafana/flowd-rs.json $(DESTDIR)$(PREFIX)/share/flowd-rs/grafana/flowd-rs.json
	install -D -m 644 conf/prometheus/flowd-rs.rules.yml $(DESTDIR)$(PREFIX)/share/flowd-rs/prometheus/flowd-rs.rules.yml
	install -D -m 644 conf/completion/flowd-rs.bash $(DESTDIR)$(PREFIX)/share/bash-completion/completions/flowd-rs
	install -d $(DESTDIR)$(PREFIX)/share/zsh/site-functions
	sed 's,/usr/share/bash-completion,$(PREFIX)/share/bash-completion,' conf/completion/flowd-rs.zsh > \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_flowd-rs
	chmod 644 $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_flowd-rs

rpm: deps ## build source and binary packages of the checked-out commit in target/rpm
	@conf/install-deps $(RPM_TOOLS)
	rpm/build $(RPM_TOP)

test-rpm: rpm ## test the package: files, modes, scriptlets, and the packaged daemon (needs root)
	$(CARGO) test --locked --test package -- --include-ignored
