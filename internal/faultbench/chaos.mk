# Breaking the deployment on purpose: see internal/faultbench/doc.go. SEED repeats a run, DURATION is how long faults
# happen.

SEED ?=
DURATION ?= 30s
FOREIGN_NODE ?=
FAULTBENCH := ./internal/faultbench

.PHONY: chaos
chaos: ## Random faults that overlap, for DURATION (30s); SEED=n repeats those of a run, FOREIGN_NODE="node $PWD/sdk/nodejs/build/test/faultnode.js" has one node in TypeScript
	SEED=$(SEED) FOREIGN_NODE="$(FOREIGN_NODE)" CHAOS_DURATION=$(DURATION) $(GO) test -count=1 -timeout=0 -v -run='^TestChaos$$' $(FAULTBENCH)

.PHONY: faults
faults: ## Every fault of docs/faults.md, the slow ones included (half an hour)
	SEED=$(SEED) SLOW_FAULTS=1 $(GO) test -count=1 -timeout=0 -v $(FAULTBENCH)

.PHONY: client-faults
client-faults: ## Push 100,000 messages with the Go client through broken connections and killed Push-Managers, and count what arrives (ten minutes)
	SEED=$(SEED) LONG=1 $(GO) test -count=1 -timeout=1h -v -run='^TestNoPushOfTheGoClientArrivesTwice$$' $(FAULTBENCH)
