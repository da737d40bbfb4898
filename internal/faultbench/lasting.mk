# Lasting delivery with its full figures: see internal/faultbench/lasting_test.go. The short forms run with all other tests.

.PHONY: lasting
lasting: ## Message ids, acknowledgements by clients and the store with full figures, while stores, nodes and links fail (half an hour; SEED=n repeats a run)
	SEED=$(SEED) LONG=1 $(GO) test -count=1 -timeout=3h -parallel=1 -v -run='^TestLasting' $(FAULTBENCH)
