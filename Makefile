# Everything a developer needs. `make help` lists the targets.
#
# Needs Go, and git for `ci`. Tests with the race detector need a C compiler; `make alerts` needs promtool
# (Debian: package prometheus), `make image` buildah, `make interop` Node.js 20, HAProxy and nginx, `make sdk` Node.js 20. All other tools run at the versions that the modules in tools/ pin, which never move a
# dependency of the product. `go tool` keeps what it has built in Go's build cache.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

GO ?= go
PROMTOOL ?= $(firstword $(wildcard .tmp/bin/promtool) promtool)
LINT = $(GO) tool -modfile=tools/lint/go.mod golangci-lint
BUF = $(GO) tool -modfile=tools/buf/go.mod buf
RELEASE_FLAGS = -trimpath -tags nodev -ldflags="-s -w"
FUZZTIME ?= 10s
PACKAGES ?= ./...
KUBERNETES ?= 1.30
FUZZJOBS ?= $(shell echo $$((4 * $$(nproc))))

# The toolchain of go.mod has mended faults that older ones of the `go` line have. Where GOTOOLCHAIN is "local", Go would
# use what is installed. `make GOTOOLCHAIN=local` does so.
ifneq ($(origin GOTOOLCHAIN),command line)
GOTOOLCHAIN := $(shell sed -n 's/^toolchain //p' go.mod)
endif
export GOTOOLCHAIN

GO_FILES = $(shell git ls-files --cached --others --exclude-standard '*.go' | grep -v '\.pb\.go$$')

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: build
build: ## Build all commands into bin/
	mkdir -p bin
	$(GO) build -o bin/ ./cmd/...

.PHONY: build-nodev
build-nodev: ## Build push-manager into bin/ without the development stack (no etcd server in it)
	mkdir -p bin
	$(GO) build -tags nodev -o bin/ ./cmd/push-manager

.PHONY: release
release: ## Build all commands into bin/ as they are shipped: static, without paths of this machine or the development stack
	mkdir -p bin
	CGO_ENABLED=0 $(GO) build $(RELEASE_FLAGS) -o bin/ ./cmd/...

.PHONY: reproducible
reproducible: ## Build what is shipped twice, from two clones, the second time with an empty cache, and fail if the files differ
	rm -rf .tmp/reproducible
	git clone --quiet . .tmp/reproducible/one/src
	git clone --quiet . .tmp/reproducible/two/elsewhere/src
	mkdir .tmp/reproducible/one/out .tmp/reproducible/two/out
	cd .tmp/reproducible/one/src && CGO_ENABLED=0 $(GO) build $(RELEASE_FLAGS) -o ../out/ ./cmd/push-manager ./cmd/pushctl
	cd .tmp/reproducible/two/elsewhere/src && CGO_ENABLED=0 GOCACHE="$$(cd ../.. && pwd)/cache" $(GO) build $(RELEASE_FLAGS) -o ../../out/ ./cmd/push-manager ./cmd/pushctl
	cd .tmp/reproducible && sha256sum */out/*
	diff -r .tmp/reproducible/one/out .tmp/reproducible/two/out
	rm -rf .tmp/reproducible

.PHONY: sbom
sbom: release ## Write what is in push-manager and pushctl, as CycloneDX, into bin/
	for program in push-manager pushctl; do \
		$(GO) tool -modfile=tools/sbom/go.mod cyclonedx-gomod bin -json -output "bin/$$program.cdx.json" "bin/$$program"; \
	done

.PHONY: packages
packages: release ## Check .goreleaser.yaml, and make a .deb and an .rpm of bin/ as it says, into .tmp/packages
	rm -rf .tmp/packages
	mkdir -p .tmp/packages
	$(GO) -C tools/goreleaser run . ../../.goreleaser.yaml ../../bin ../../.tmp/packages
	cd .tmp/packages && sha256sum * > SHA256SUMS

.PHONY: image
image: ## Build the container image with buildah, without a registry, and run it read-only: on this machine's Go, from nothing (needs root and buildah)
	bash deploy/docker/build-here

.PHONY: compose
compose: ## Check the files of Compose as Compose reads them
	$(GO) -C tools/compose test ./...
	$(GO) -C tools/compose run . ../../deploy/compose/compose.yml

.PHONY: run
run: ## Start everything in one process (etcd, Controller, three Connect-Nodes, Push-Manager)
	@echo 'Building. The first time everything is compiled, etcd and gRPC too: a minute or two on two cores.'
	$(GO) run ./cmd/push-manager dev

.PHONY: test
test: ## Run all tests (or those of PACKAGES) with the race detector, in random order
	mkdir -p .tmp/programs
	$(GO) build -o .tmp/programs/ ./cmd/...
	PROGRAMS="$$PWD/.tmp/programs" $(GO) test -race -shuffle=on -timeout=1h $(TESTFLAGS) $(PACKAGES)

.PHONY: store-long
store-long: ## Test the store in a cluster of three servers, and kill it ten times amid 100,000 writes
	LONG=1 $(GO) test -timeout=2h ./transport/store/...

.PHONY: interop-tools
interop-tools: ## Build grpcurl and buf into .tmp/bin, install the packages of the Node.js caller, connect-web, axe for the console and what checks OpenAPI (needs npm)
	mkdir -p .tmp/bin
	$(GO) build -modfile=tools/buf/go.mod -o .tmp/bin/ github.com/bufbuild/buf/cmd/buf
	$(GO) build -modfile=tools/grpcurl/go.mod -o .tmp/bin/ github.com/fullstorydev/grpcurl/cmd/grpcurl
	cd internal/acceptance/nodejs && npm ci --ignore-scripts --no-audit --no-fund

.PHONY: interop
interop: interop-tools ## Run the push API with TLS for grpcurl and Node.js, and behind HAProxy and nginx (needs all but grpcurl)
	$(GO) test -race -shuffle=on -run 'Grpcurl|BufCurl|ConnectWeb|OpenAPI|NodeJS|Balancer|Forwarded' ./internal/acceptance

.PHONY: console-pictures
console-pictures: ## Make the README's picture of the console anew, and pictures of all its pages in .tmp/pictures; on a machine that is at rest (needs Chromium)
	mkdir -p .tmp/pictures
	CONSOLE_PICTURES="$$PWD/.tmp/pictures" $(GO) test -count=1 -run '^TestPicturesOfTheConsole$$' ./internal/acceptance
	cp .tmp/pictures/console.png docs/images/console.png

.PHONY: sdk-tools
sdk-tools: ## Install what the Node.js packages are built with (needs npm)
	cd sdk/nodejs && npm ci --ignore-scripts --no-audit --no-fund

.PHONY: sdk
sdk: sdk-tools ## Build the Node.js packages, and test them against the Go programs (needs Node.js 20 and npm)
	cd sdk/nodejs && BUF="$(BUF)" npm run --silent check-generate && npm test --silent && npm run --silent pack-check

.PHONY: sdk-generate
sdk-generate: sdk-tools ## Generate the TypeScript code of proto/*.proto
	cd sdk/nodejs && BUF="$(BUF)" npm run --silent generate

.PHONY: bench-sdk
bench-sdk: sdk-tools ## How much a Connect-Node in TypeScript takes
	cd sdk/nodejs && npm run --silent bench

.PHONY: cover
cover: ## Run all tests and show the coverage per function (.tmp/cover.html has the lines)
	mkdir -p .tmp
	$(GO) test -coverpkg=./... -coverprofile=.tmp/cover.out ./...
	grep -v '\.pb\.go:' .tmp/cover.out > .tmp/cover.own.out
	$(GO) tool cover -html=.tmp/cover.own.out -o .tmp/cover.html
	$(GO) tool cover -func=.tmp/cover.own.out

.PHONY: fuzz-short
fuzz-short: ## Fuzz each target for FUZZTIME (10s; 3000x is so many inputs), FUZZJOBS at a time, from its corpus
	GO="$(GO)" FUZZTIME="$(FUZZTIME)" FUZZJOBS="$(FUZZJOBS)" bash .ci/fuzz

.PHONY: fuzz
fuzz: ## The same for ten minutes each, as many at a time as there are processors
	$(MAKE) fuzz-short FUZZTIME=10m FUZZJOBS="$$(nproc)"

.PHONY: mutants
mutants: ## Break a copy of the code in one way after the other, and see that a test notices each
	$(GO) run ./internal/mutants

.PHONY: lint
lint: ## Run all linters (go vet among them) over Go and proto files
	$(LINT) run ./...
	$(LINT) run --build-tags nodev ./cmd/push-manager/...
	$(BUF) lint

.PHONY: fmt
fmt: ## Format Go and proto files
	$(LINT) fmt ./...
	$(BUF) format -w proto

.PHONY: vuln
vuln: ## Fail if something here calls code with a known fault (the database is as old as its pin in tools/vuln/go.mod)
	$(GO) -C tools/vuln run . ../..

.PHONY: check-fmt
check-fmt: ## Fail if a Go file is not formatted
	@bad=$$(gofmt -l $(GO_FILES)); if [[ -n "$$bad" ]]; then echo "not formatted:"; echo "$$bad"; exit 1; fi

.PHONY: check-tidy
check-tidy: ## Fail if go.mod or go.sum is not what go mod tidy makes of it
	$(GO) mod tidy -diff

.PHONY: generate
generate: ## Generate the Go code of proto/*.proto, the documents of the settings and their part of the Helm chart's schema
	$(BUF) generate
	$(GO) test ./internal/app -run TestDocumentsOfTheSettings -update
	$(GO) test ./transport/ingress/web -run TestTheDocumentIsThatOfTheService -update

.PHONY: check-generate
check-generate: ## Fail if the committed generated code differs from what the proto files give
	rm -rf .tmp/generate
	mkdir -p .tmp/generate/committed
	$(BUF) generate -o .tmp/generate/fresh
	cp proto/*.pb.go .tmp/generate/committed
	diff -ru .tmp/generate/committed .tmp/generate/fresh/proto || { echo "run: make generate"; exit 1; }

.PHONY: envoy
envoy: ## Check the configuration of Envoy against Envoy's own definitions
	$(GO) -C tools/envoy run . ../../deploy/envoy/calls.yaml

.PHONY: alerts
alerts: ## Check the alert rules and run their tests (needs promtool)
	$(PROMTOOL) check rules deploy/prometheus/alerts.yml deploy/prometheus/slo.yml
	$(PROMTOOL) test rules deploy/prometheus/alerts_test.yml deploy/prometheus/slo_test.yml
	$(GO) -C tools/dashboard run . ../..
	$(PROMTOOL) check config --syntax-only deploy/compose/prometheus.yml

# kubectl-validate is a module of its own: it does not compile with the Kubernetes libraries that helm needs.
.tmp/bin/.kube: tools/kube/go.mod tools/kubevalidate/go.mod
	mkdir -p .tmp/bin
	cd tools/kube && CGO_ENABLED=0 nice $(GO) build -trimpath -ldflags="-s -w" -o ../../.tmp/bin/ tool
	cd tools/kubevalidate && CGO_ENABLED=0 nice $(GO) build -trimpath -ldflags="-s -w" -o ../../.tmp/bin/ tool
	touch $@

.PHONY: kube-tools
kube-tools: .tmp/bin/.kube ## Build helm, kubeconform, kubectl-validate and kustomize into .tmp/bin (the first time a quarter of an hour on two cores)
	mkdir -p .tmp/kube
	$(GO) -C tools/kube run . $(KUBERNETES) ../../.tmp/kube

.PHONY: kube
kube: kube-tools ## Check the Helm chart with five sets of values, and the kustomize base: helm lint, kubeconform, kubectl-validate, misspelt values
	KUBERNETES=$(KUBERNETES) bash tools/kube/check

.PHONY: kube-rules
kube-rules: ## Copy the rules of deploy/prometheus into the Helm chart
	rm -rf deploy/helm/push-manager/rules
	mkdir -p deploy/helm/push-manager/rules
	cp $(filter-out %_test.yml,$(wildcard deploy/prometheus/*.yml)) deploy/helm/push-manager/rules/

.PHONY: kube-generate
kube-generate: kube-tools kube-rules ## Write what follows from the Helm chart: the kustomize base, and the rules in the chart
	bash tools/kube/render deploy/kustomize/base/push-manager.yaml

.PHONY: ci
ci: ## Run what CI runs
	bash .ci/run

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .tmp

include benchmarks/bench.mk
include internal/faultbench/chaos.mk
include internal/faultbench/soak.mk
include internal/faultbench/recovery.mk
include internal/faultbench/honesty.mk
include internal/faultbench/lasting.mk
