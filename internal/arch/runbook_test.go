package arch

import (
	"regexp"
	"strings"
	"testing"
)

// TestEveryAlertHasItsSectionInTheRunbook: whoever is woken by it follows runbook_url. And no section is left of an alert that
// is gone.
func TestEveryAlertHasItsSectionInTheRunbook(t *testing.T) {
	const url = "https://github.com/push-manager/push-manager/blob/main/docs/runbook.md#"
	sections := map[string]string{}
	for _, part := range regexp.MustCompile(`(?m)^### `).Split(read(t, "docs/runbook.md"), -1)[1:] {
		name, text, _ := strings.Cut(part, "\n")
		sections[strings.ToLower(name)] = text
	}
	rules := read(t, "deploy/prometheus/alerts.yml") + read(t, "deploy/prometheus/slo.yml")
	alerts := regexp.MustCompile(`(?m)^ +- alert: (\w+)$`).FindAllStringSubmatch(rules, -1)
	links := regexp.MustCompile(`(?m)^ +runbook_url: (\S+)$`).FindAllStringSubmatch(rules, -1)
	if len(alerts) == 0 || len(links) != len(alerts) {
		t.Fatalf("%d alerts, and %d of runbook_url", len(alerts), len(links))
	}
	for i, alert := range alerts {
		anchor := strings.ToLower(alert[1])
		if links[i][1] != url+anchor {
			t.Errorf("%s names %s, want %s", alert[1], links[i][1], url+anchor)
		}
		if text, ok := sections[anchor]; !ok || len(text) < 200 {
			t.Errorf("docs/runbook.md has no section for %s, or one that says little", alert[1])
		}
		delete(sections, anchor)
	}
	for name := range sections {
		t.Errorf("docs/runbook.md has the section %q, and there is no such alert", name)
	}
}
