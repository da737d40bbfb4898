// Command dashboard checks the expressions of the dashboard and of the rules with Prometheus's own parser, and the names
// and labels in them against docs/metrics.md.
package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/common/model"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/model/rulefmt"
	"github.com/prometheus/prometheus/promql/parser"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: dashboard REPOSITORY")
		os.Exit(2)
	}
	n, problems := check(os.Args[1])
	for _, p := range problems {
		fmt.Fprintln(os.Stderr, p)
	}
	if len(problems) > 0 {
		os.Exit(1)
	}
	fmt.Printf("%d expressions of rules and dashboard parse, and name documented metrics and labels\n", n)
}

var promql = parser.NewParser(parser.Options{})

// expression is one of the dashboard or the rules.
type expression struct{ where, text string }

func check(root string) (int, []error) {
	documented, err := metricsOf(filepath.Join(root, "docs/metrics.md"))
	if err != nil {
		return 0, []error{err}
	}
	var all []expression
	var problems []error
	for _, name := range []string{"alerts.yml", "slo.yml"} {
		groups, errs := rulefmt.ParseFile(filepath.Join(root, "deploy/prometheus", name), false, model.UTF8Validation, promql, slog.Default())
		problems = append(problems, errs...)
		if groups == nil {
			continue
		}
		for _, g := range groups.Groups {
			for _, r := range g.Rules {
				if r.Record != "" {
					documented[r.Record] = []string{"slo"}
				}
				all = append(all, expression{name + ": " + r.Alert + r.Record, r.Expr})
			}
		}
	}
	panels, err := dashboard(filepath.Join(root, "deploy/grafana/push-manager.json"))
	if err != nil {
		return 0, append(problems, err)
	}
	all = append(all, panels...)
	for _, e := range all {
		for _, err := range e.check(documented) {
			problems = append(problems, fmt.Errorf("%s: %w", e.where, err))
		}
	}
	return len(all), problems
}

// metricsOf reads the tables: the labels by the metric.
func metricsOf(file string) (map[string][]string, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	list := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-zA-Z0-9_]+)(?:\\{([^`]*)\\})?` \\| (\\w+) \\|").FindAllStringSubmatch(string(text), -1) {
		own := []string{"job", "instance"} // what Prometheus adds
		for _, label := range strings.Split(row[2], ",") {
			own = append(own, strings.TrimSpace(label))
		}
		switch name := row[1]; row[3] {
		case "histogram":
			list[name+"_bucket"], list[name+"_sum"], list[name+"_count"] = append(slices.Clone(own), "le"), own, own
		case "summary":
			list[name], list[name+"_sum"], list[name+"_count"] = append(slices.Clone(own), "quantile"), own, own
		default:
			list[name] = own
		}
	}
	if len(list) < 100 {
		return nil, fmt.Errorf("%s: %d metrics", file, len(list))
	}
	return list, nil
}

// dashboard lists the expressions of the panels.
func dashboard(file string) ([]expression, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	type panel struct {
		Title   string
		Targets []struct{ Expr string }
	}
	var board struct{ Panels []panel }
	if err := json.Unmarshal(text, &board); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	var list []expression
	for _, p := range board.Panels {
		for _, t := range p.Targets {
			list = append(list, expression{"dashboard: " + p.Title, t.Expr})
		}
	}
	if len(list) < 20 {
		return nil, fmt.Errorf("%s: %d expressions", file, len(list))
	}
	return list, nil
}

func (e expression) check(documented map[string][]string) (problems []error) {
	text := strings.NewReplacer("$__rate_interval", "1m", "$__range", "1h", "$__interval", "1m").Replace(e.text)
	tree, err := promql.ParseExpr(text)
	if err != nil {
		return []error{err}
	}
	parser.Inspect(tree, func(node parser.Node, _ []parser.Node) error {
		vector, ok := node.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		known, ok := documented[vector.Name]
		if !ok {
			problems = append(problems, fmt.Errorf("%s is not in docs/metrics.md", vector.Name))
			return nil
		}
		for _, m := range vector.LabelMatchers {
			if m.Name != labels.MetricName && !slices.Contains(known, m.Name) {
				problems = append(problems, fmt.Errorf("%s has no label %s", vector.Name, m.Name))
			}
		}
		return nil
	})
	return problems
}
