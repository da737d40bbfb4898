package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
)

// Result is what one suite has found.
type Result struct {
	Suite string `json:"suite"`
	Rows  []Row  `json:"rows"`
	Bars  []Bar  `json:"bars"`
	// Ratios compare Push-Manager with another build of it.
	Ratios []Row `json:"ratios,omitempty"`
}

// Column is one figure of a row.
type Column struct {
	Name   string `json:"name"`
	Figure Figure `json:"figure"`
}

// Row is one slot of a table.
type Row struct {
	Name    string   `json:"name"`
	Columns []Column `json:"columns"`
}

// Bar is a promise and whether it is kept.
type Bar struct {
	What   string  `json:"what"`
	Figure Figure  `json:"figure"`
	Limit  float64 `json:"limit"`
	Kind   Kind    `json:"kind"`
	Note   string  `json:"note,omitempty"`
	// Failure is why there is no figure.
	Failure string `json:"failure,omitempty"`
}

// Kind is how a figure is compared with its limit.
type Kind string

// The kinds of bars.
const (
	AtMost   Kind = "<="
	AtLeast  Kind = ">="
	Includes Kind = "includes" // the interval has the limit in it
	Stretch  Kind = "stretch <="
)

// OK tells whether the bar is met.
func (b Bar) OK() bool {
	if b.Failure != "" {
		return false
	}
	switch b.Kind {
	case AtMost, Stretch:
		return b.Figure.Value <= b.Limit
	case AtLeast:
		return b.Figure.Value >= b.Limit
	case Includes:
		return b.Figure.Low <= b.Limit && b.Limit <= b.Figure.High
	default:
		return false
	}
}

// Short tells whether a run with this bar fails. A stretch is only a wish.
func (b Bar) Short() bool { return !b.OK() && b.Kind != Stretch }

// String is one line.
func (b Bar) String() string {
	verdict := "ok"
	if !b.OK() {
		verdict = "short"
	}
	if b.Kind == Stretch && !b.OK() {
		verdict = "-"
	}
	figure := b.Figure.String()
	if b.Failure != "" {
		figure = b.Failure
	}
	line := fmt.Sprintf("%-5s  %-62s %-26s %s %v", verdict, b.What, figure, b.Kind, b.Limit)
	if b.Note != "" {
		line += "  (" + b.Note + ")"
	}
	return line
}

// Write prints the rows as a table.
func (r *Result) Write(w io.Writer) error {
	if len(r.Rows) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(t, "%s\t", r.Suite) // a failing writer fails in Flush, too
	for _, c := range r.Rows[0].Columns {
		_, _ = fmt.Fprintf(t, "%s\t", c.Name)
	}
	_, _ = fmt.Fprintln(t)
	for _, row := range r.Rows {
		_, _ = fmt.Fprintf(t, "%s\t", row.Name)
		for _, c := range row.Columns {
			_, _ = fmt.Fprintf(t, "%s\t", short(c.Figure.Value))
		}
		_, _ = fmt.Fprintln(t)
	}
	if err := t.Flush(); err != nil { // ratios are a table of their own
		return err
	}
	for _, row := range r.Ratios {
		_, _ = fmt.Fprintf(t, "%s\t", row.Name)
		for _, c := range row.Columns {
			_, _ = fmt.Fprintf(t, "%s %v\t", c.Name, c.Figure)
		}
		_, _ = fmt.Fprintln(t)
	}
	return t.Flush()
}

// WriteLong prints a line for each figure: for more than a table has room for.
func (r *Result) WriteLong(w io.Writer) error {
	if len(r.Rows) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintf(t, "%s\t", r.Suite) // a failing writer fails in Flush, too
	for _, row := range r.Rows {
		_, _ = fmt.Fprintf(t, "%s\t", row.Name)
	}
	_, _ = fmt.Fprintln(t)
	for i, c := range r.Rows[0].Columns {
		_, _ = fmt.Fprintf(t, "%s\t", c.Name)
		for _, row := range r.Rows {
			_, _ = fmt.Fprintf(t, "%s\t", short(row.Columns[i].Figure.Value))
		}
		_, _ = fmt.Fprintln(t)
	}
	return t.Flush()
}

// WriteJSON prints everything on one line.
func (r *Result) WriteJSON(w io.Writer) error { return json.NewEncoder(w).Encode(r) }

// row says what one slot did.
func row(name string, s Series) Row {
	at := func(q float64) Figure {
		return Figure{Value: s.Quantile("", q) * 1e3}
	}
	return Row{Name: name, Columns: []Column{
		{"req/s", Median(s, Rate)},
		{"CPU-us/req", Median(s, CPUPerRequest)},
		{"cores", Median(s, Cores)},
		{"allocs/req", Median(s, Allocations)},
		{"writes/req", Median(s, Writes)},
		{"B/req", Median(s, WrittenBytes)},
		{"nodeB/req", Median(s, NodeBytes)},
		{"pushes/frame", Median(s, PushesPerFrame)},
		{"load-us", Median(s, LoadPerRequest)},
		{"nodes-us", Median(s, NodesPerRequest)},
		{"p50-ms", at(0.5)},
		{"p99-ms", at(0.99)},
		{"p99.9-ms", at(0.999)},
	}}
}

// result makes rows of all slots, in their order.
func result(suite string, slots []Slot, table Table) *Result {
	r := &Result{Suite: suite}
	for _, s := range slots {
		r.Rows = append(r.Rows, row(s.Name, table[s.Name]))
	}
	return r
}

// bar adds a bar to the result. Series with failures have no figure.
func (r *Result) bar(b Bar, from ...Series) {
	for _, s := range from {
		if err := s.check(); err != nil {
			b.Failure = err.Error()
		}
	}
	r.Bars = append(r.Bars, b)
}
