# Everything a developer needs. `make help` lists the targets.
#
# Needs Go, and git for `ci`. Tests with the race detector need a C compiler; `make alerts` needs promtool
# (Debian: package prometheus). All other tools are built from pinned versions into .tmp/bin, from modules of their
# own in tools/, so that they never move a dependency of the product.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --warn-undefined-variables

GO ?= go
TOOLS := .tmp/bin
PROMTOOL ?= $(firstword $(wildcard $(TOOLS)/promtool) promtool)
FUZZTIME ?= 60s
FUZZJOBS ?= $(shell echo $$((4 * $$(nproc))))
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

.PHONY: run
run: ## Start everything in one process (etcd, Controller, three Connect-Nodes, Push-Manager)
	@echo 'Building. The first time everything is compiled, etcd and gRPC too: a minute or two on two cores.'
	$(GO) run ./cmd/push-manager dev

.PHONY: test
test: ## Run all tests with the race detector, in random order
	$(GO) test -race -shuffle=on -timeout=1h ./...

.PHONY: cover
cover: ## Run all tests and show the coverage per function (.tmp/cover.html has the lines)
	mkdir -p .tmp
	$(GO) test -coverpkg=./... -coverprofile=.tmp/cover.out ./...
	grep -v '\.pb\.go:' .tmp/cover.out > .tmp/cover.own.out
	$(GO) tool cover -html=.tmp/cover.own.out -o .tmp/cover.html
	$(GO) tool cover -func=.tmp/cover.own.out

.PHONY: fuzz-short
fuzz-short: ## Fuzz each target for FUZZTIME (60s; 3000x is so many inputs), FUZZJOBS at a time, from its corpus
	GO="$(GO)" FUZZTIME="$(FUZZTIME)" FUZZJOBS="$(FUZZJOBS)" bash .ci/fuzz

.PHONY: mutants
mutants: ## Break a copy of the code in fifteen ways, one by one, and see that a test notices each
	$(GO) run ./internal/mutants

.PHONY: lint
lint: $(TOOLS)/golangci-lint $(TOOLS)/buf ## Run all linters over Go and proto files
	$(TOOLS)/golangci-lint run ./...
	$(TOOLS)/buf lint

.PHONY: fmt
fmt: $(TOOLS)/golangci-lint $(TOOLS)/buf ## Format Go and proto files
	$(TOOLS)/golangci-lint fmt ./...
	$(TOOLS)/buf format -w proto

.PHONY: check-fmt
check-fmt: ## Fail if a Go file is not formatted
	@bad=$$(gofmt -l $(GO_FILES)); if [[ -n "$$bad" ]]; then echo "not formatted:"; echo "$$bad"; exit 1; fi

.PHONY: check-tidy
check-tidy: ## Fail if go.mod or go.sum is not what go mod tidy makes of it
	$(GO) mod tidy -diff

.PHONY: vet
vet: ## Run go vet
	$(GO) vet ./...
	$(GO) vet -tags nodev ./cmd/push-manager

.PHONY: generate
generate: $(TOOLS)/buf ## Generate the Go code of proto/*.proto and the documents of the settings
	$(TOOLS)/buf generate
	$(GO) test ./internal/app -run TestDocumentsOfTheSettings -update

.PHONY: check-generate
check-generate: $(TOOLS)/buf ## Fail if the committed generated code differs from what the proto files give
	rm -rf .tmp/generate
	mkdir -p .tmp/generate/committed
	$(TOOLS)/buf generate -o .tmp/generate/fresh
	cp proto/*.pb.go .tmp/generate/committed
	diff -ru .tmp/generate/committed .tmp/generate/fresh/proto || { echo "run: make generate"; exit 1; }

.PHONY: alerts
alerts: ## Check the alert rules and run their tests (needs promtool)
	$(PROMTOOL) check rules deploy/prometheus/alerts.yml
	$(PROMTOOL) test rules deploy/prometheus/alerts_test.yml

.PHONY: ci
ci: ## Run what CI runs
	bash .ci/run

.PHONY: tools
tools: $(TOOLS)/golangci-lint $(TOOLS)/buf ## Build the linters and generators into .tmp/bin

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin .tmp

$(TOOLS)/buf: tools/buf/go.mod tools/buf/go.sum
	mkdir -p $(TOOLS)
	$(GO) build -C tools/buf -o "$(CURDIR)/$@" github.com/bufbuild/buf/cmd/buf

$(TOOLS)/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	mkdir -p $(TOOLS)
	$(GO) build -C tools/lint -o "$(CURDIR)/$@" github.com/golangci/golangci-lint/v2/cmd/golangci-lint

include benchmarks/bench.mk
include internal/faultbench/chaos.mk
include internal/faultbench/soak.mk
include internal/faultbench/recovery.mk
include internal/faultbench/honesty.mk
