# Clients that come, move and go while nodes fall and a Controller restarts: see internal/faultbench/honesty_test.go.
# DURATION is how long; SEED repeats the people's choices and the faults of a run.

.PHONY: honesty
honesty: ## Real gateways and clients for DURATION (5m), with nodes killed, stopped and drained and the Controller restarted: every answer held against what arrived
	SEED=$(SEED) HONESTY_DURATION=$(if $(filter command environment,$(firstword $(origin DURATION))),$(DURATION),5m) $(GO) test -count=1 -timeout=0 -v -run='^TestHonesty$$' $(FAULTBENCH)
