# How soon all is well again: see docs/measurements.md. TIMES is how often each outage is repeated.

TIMES ?= 50
RECOVERY := ./internal/faultbench

.PHONY: recovery
recovery: ## Nodes killed, stopped and black-holed under load, discovery cut off and wiped, TIMES (50) each
	SEED=$(SEED) TIMES=$(TIMES) $(GO) test -count=1 -timeout=0 -parallel=1 -v -run='^TestRecovery' $(RECOVERY)

.PHONY: slow-node
slow-node: ## One of ten nodes reads nothing for a minute
	SEED=$(SEED) SLOW_FAULTS=1 $(GO) test -count=1 -timeout=0 -v -run='^TestOneOfTenNodesReadsNothingForAMinute$$' $(RECOVERY)

.PHONY: rolling
rolling: ## Every Push-Manager and every node restarted, one by one, behind HAProxy (Debian: package haproxy)
	SEED=$(SEED) SLOW_FAULTS=1 $(GO) test -count=1 -timeout=0 -v -run='^TestRollingRestartOfEverything|^TestShippedBalancer' $(RECOVERY)
