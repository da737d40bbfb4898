// Package exposition writes a program's metrics as Prometheus text, each family with its HELP
// and TYPE. Both are those of docs/metrics.md, which the programs carry: what stands there is
// what a dashboard shows.
package exposition

import (
	"bytes"
	"io"
	"regexp"
	"strings"
	"sync"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/docs"
)

// ContentType is that of what Write writes.
const ContentType = "text/plain; version=0.0.4; charset=utf-8"

// Write writes the metrics of Go, of the process and of set.
func Write(w io.Writer, set *metrics.Set) error {
	var plain bytes.Buffer
	metrics.WriteProcessMetrics(&plain)
	metrics.WriteFDMetrics(&plain)
	if set != nil {
		set.WritePrometheus(&plain)
	}
	_, err := w.Write(annotate(plain.Bytes(), described()))
	return err
}

// family is a row of a table.
type family struct{ kind, help string }

//nolint:gochecknoglobals // a constant, but for the reading of it
var described = sync.OnceValue(func() map[string]family { return families(docs.Metrics) })

var (
	row  = regexp.MustCompile("(?m)^\\| `([a-zA-Z0-9_]+)(?:\\{[^`]*)?` \\| ([a-z]+) \\| (.*) \\|$")
	link = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

// families reads the tables of a page: name, type, meaning.
func families(page string) map[string]family {
	all := map[string]family{}
	for _, r := range row.FindAllStringSubmatch(page, -1) {
		help := strings.ReplaceAll(link.ReplaceAllString(r[3], "$1"), "`", "")
		all[r[1]] = family{kind: r[2], help: strings.ReplaceAll(help, `\`, `\\`)}
	}
	// The Controller watches etcd as Push-Manager does, and shows it under its own name.
	const theirs, ours = "push_manager_discovery_", "controller_discovery_"
	for name, f := range all {
		if rest, ok := strings.CutPrefix(name, theirs); ok {
			all[ours+rest] = f
		}
	}
	return all
}

// of finds the family of a sample by its name, which may be a part of a histogram or a summary.
func of(sample string, all map[string]family) (name string, f family, ok bool) {
	if f, ok = all[sample]; ok {
		return sample, f, true
	}
	for _, suffix := range []string{"_bucket", "_sum", "_count"} {
		base, cut := strings.CutSuffix(sample, suffix)
		if f, ok = all[base]; cut && ok && (f.kind == "histogram" || f.kind == "summary") {
			return base, f, true
		}
	}
	return sample, family{kind: "untyped"}, false
}

// annotate puts HELP and TYPE before each family, whose samples it brings together: the format
// allows no other line between them.
func annotate(plain []byte, all map[string]family) []byte {
	samples := map[string][][]byte{}
	var order []string
	size := 0
	for line := range bytes.Lines(plain) {
		end := bytes.IndexAny(line, "{ ")
		if end < 0 || line[0] == '#' {
			continue // of the library
		}
		name, f, _ := of(string(line[:end]), all)
		if samples[name] == nil {
			order = append(order, name)
			size += 2*len(name) + len(f.help) + len("# HELP  \n# TYPE  histogram\n")
		}
		samples[name] = append(samples[name], line)
		size += len(line)
	}
	out := make([]byte, 0, size)
	for _, name := range order {
		f, ok := all[name]
		if ok {
			out = append(out, "# HELP "+name+" "+f.help+"\n# TYPE "+name+" "+f.kind+"\n"...)
		}
		for _, line := range samples[name] {
			out = append(out, line...)
		}
	}
	return out
}
