# Half of the peak load for a long time, with a node that leaves and joins all the while: see internal/faultbench/doc.go.
# DURATION is how long; a short one works and says less.

.PHONY: soak
soak: ## Half of peak load for DURATION (10m) while a node leaves and joins every 5 s: nothing may grow
	SOAK_DURATION=$(if $(filter command environment,$(firstword $(origin DURATION))),$(DURATION),10m) $(GO) test -count=1 -timeout=0 -v -run='^TestSoak$$' $(FAULTBENCH)

# Certificates and users that change for longer than the tests of every day have time for.
.PHONY: soak-trust
soak-trust: ## Rotate all certificates under RATE (2000) pushes a second; then etcd with short tokens for DURATION (10m)
	ROTATION_RATE=$(if $(filter command environment,$(firstword $(origin RATE))),$(RATE),2000) $(GO) test -count=1 -timeout=0 -v -run='^TestEverythingIsRotatedUnderLoad' ./internal/app
	SOAK_DURATION=$(if $(filter command environment,$(firstword $(origin DURATION))),$(DURATION),10m) $(GO) test -count=1 -timeout=0 -v -run='^TestSecuredEtcdIsUsedForLong' ./transport/discovery
