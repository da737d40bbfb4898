# Measuring. Ratios, not absolutes: see benchmarks/e2e/doc.go for how, PERF.md for the figures.

BENCHTIME ?= 200ms
BENCHCOUNT ?= 6
ROUNDS ?= 40
BASE ?= HEAD
CLIENTS ?= 50000
NODES ?= 20
ROOMS ?= 10000
BENCH_DIR := .tmp/bench
BENCHSTAT = $(GO) tool -modfile=tools/benchstat/go.mod benchstat
MICRO := ./benchmarks/micro ./shard ./engine/... ./transport/...

.PHONY: bench
bench: $(BENCH_DIR)/pushbench ## Measure: each hot step, then a short run of each end-to-end suite
	$(GO) test -run='^$$' -bench=. -benchmem -benchtime=$(BENCHTIME) $(MICRO)
	$(BENCH_DIR)/pushbench --rounds=8 suites

.PHONY: bench-bars
bench-bars: $(BENCH_DIR)/pushbench ## Measure every bar: a line each, and a failure if one falls short
	$(BENCH_DIR)/pushbench --rounds=$(ROUNDS) --json=$(BENCH_DIR)/bars.json bars

.PHONY: bench-compare
bench-compare: $(BENCH_DIR)/pushbench ## Compare with the commit BASE: each hot step with benchstat, then both programs side by side
	rm -rf $(BENCH_DIR)/base
	git worktree prune
	git worktree add --detach $(BENCH_DIR)/base $(BASE)
	trap 'git worktree remove --force $(BENCH_DIR)/base' EXIT; \
	rm -f $(BENCH_DIR)/base.txt $(BENCH_DIR)/head.txt; \
	for ((i = 0; i < $(BENCHCOUNT); i++)); do \
		(cd $(BENCH_DIR)/base && $(GO) test -run='^$$' -bench=. -benchmem -benchtime=$(BENCHTIME) $$(ls -d benchmarks/micro 2> /dev/null | sed 's|^|./|') $(filter-out ./benchmarks/micro,$(MICRO))) >> $(BENCH_DIR)/base.txt; \
		$(GO) test -run='^$$' -bench=. -benchmem -benchtime=$(BENCHTIME) $(MICRO) >> $(BENCH_DIR)/head.txt; \
	done; \
	$(BENCHSTAT) base=$(BENCH_DIR)/base.txt head=$(BENCH_DIR)/head.txt; \
	(cd $(BENCH_DIR)/base && $(GO) build -o ../push-manager.base ./cmd/push-manager); \
	$(BENCH_DIR)/pushbench --rounds=$(ROUNDS) compare $(BENCH_DIR)/push-manager.base

.PHONY: bench-test
bench-test: ## Run every part of the benchmarks shortly, so that none rots
	LONG=1 $(GO) test -count=1 -timeout=1h ./benchmarks/e2e

.PHONY: bench-clients
bench-clients: $(BENCH_DIR)/pushbench ## Measure the whole way to 100 and 1,000 WebSocket clients: CPU of all servers, latency, memory
	$(BENCH_DIR)/pushbench --rounds=16 --json=$(BENCH_DIR)/clients.json clients

.PHONY: bench-client
bench-client: ## Hold client.Stream against the generated PushStream, round by round: of-raw and of-rawbatched are the ratios
	$(GO) test -run='^$$' -bench=ClientStream -benchtime=20x ./benchmarks/micro

.PHONY: bench-console
bench-console: ## Measure what 50 viewers of the console cost at 10,000 pushes a second (4 minutes), and one snapshot
	LONG=1 $(GO) test -count=1 -v -timeout=20m -run=TestConsoleOf50ViewersCostsLittle ./internal/acceptance
	$(GO) test -run='^$$' -bench=Snapshot -benchmem ./internal/console

.PHONY: scale
scale: $(BENCH_DIR)/pushbench ## Start a whole deployment and CLIENTS (50000) WebSocket clients on NODES (20) gateways in ROOMS (10000) rooms, and push to them (needs redis-server)
	$(BENCH_DIR)/pushbench --json=$(BENCH_DIR)/scale.json scale --clients=$(CLIENTS) --nodes=$(NODES) --rooms=$(ROOMS)

.PHONY: overload
overload: $(BENCH_DIR)/pushbench ## Offer 2 and 5 times what Push-Manager can do, and see that it stands it (10 minutes; see docs/measurements.md)
	$(BENCH_DIR)/pushbench overload

.PHONY: profile
profile: $(BENCH_DIR)/pushbench ## Profile Push-Manager under load: CPU and allocations, into .tmp/profile
	$(BENCH_DIR)/pushbench profile --dir=.tmp/profile

.PHONY: $(BENCH_DIR)/pushbench
$(BENCH_DIR)/pushbench:
	mkdir -p $(BENCH_DIR)
	$(GO) build -o $@ ./benchmarks/pushbench

.PHONY: observe
observe: ## See every alert fire and clear and every panel show something, in a real Prometheus under load (needs prometheus; 10 to 20 minutes)
	LONG=1 $(GO) test -count=1 -v -timeout=40m ./internal/observe
