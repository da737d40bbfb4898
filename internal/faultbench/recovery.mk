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

# The release before: the last tag before this commit. PREVIOUS names another commit. Without a tag it is the last commit before
# the first one that is meant to become a release.
PREVIOUS ?= $(shell git describe --tags --abbrev=0 --match='v[0-9]*' HEAD^ 2> /dev/null || echo cf41e43f)

.PHONY: upgrade
upgrade: ## Everything replaced by this release and back again, one by one, under RATE (5000) pushes a second, from PREVIOUS (the last tag)
	rm -rf .tmp/upgrade
	git clone --quiet . .tmp/upgrade/source
	git -C .tmp/upgrade/source checkout --quiet --detach $(PREVIOUS)
	$(GO) -C .tmp/upgrade/source build -o ../push-manager ./cmd/push-manager
	rm -rf .tmp/upgrade/source
	UPGRADE_FROM=$(CURDIR)/.tmp/upgrade/push-manager UPGRADE_RATE=$(if $(filter command environment,$(firstword $(origin RATE))),$(RATE),5000) \
		SEED=$(SEED) $(GO) test -count=1 -timeout=0 -v -run='^TestUpgrade|^TestReleases' $(RECOVERY)
