package pushload

import (
	"encoding/json"
	"fmt"
	"io"
	"math"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"google.golang.org/grpc/codes"

	"github.com/push-manager/push-manager/internal/load"
)

// report is a result as JSON. docs/load.md describes it.
type report struct {
	Version  int       `json:"version"`
	Started  time.Time `json:"started"`
	Settings settings  `json:"settings"`

	WindowSeconds float64 `json:"window_seconds"`
	Stopped       bool    `json:"stopped"` // before its time
	AskedRate     float64 `json:"asked_rate"`
	AchievedRate  float64 `json:"achieved_rate"`
	ErrorShare    float64 `json:"error_share"`
	Unsent        int64   `json:"unsent"`
	Unfinished    int64   `json:"unfinished"`

	Total kindReport            `json:"total"`
	Kinds map[string]kindReport `json:"kinds"`

	SendLag   *latency  `json:"send_lag_ms"`
	Held      *latency  `json:"held_ms"`
	Timeline  []point   `json:"timeline"`
	Clients   *clients  `json:"clients"`
	Generator generator `json:"generator"`

	Short    []string `json:"short"`    // why the exit code is 1
	Warnings []string `json:"warnings"` // what speaks against the figures
}

// clients is what came to the generator's own clients. It is null where there were none.
type clients struct {
	Connected int   `json:"connected"`
	Lost      int64 `json:"lost"`
	Received  int64 `json:"received"`
	Acked     int64 `json:"acked"`
	Replayed  int64 `json:"replayed"`
	Twice     int64 `json:"twice"`
}

type settings struct {
	Addresses      []string           `json:"addresses"`
	Way            string             `json:"way"`
	Connections    int                `json:"connections"`
	Arrival        string             `json:"arrival"`
	InFlight       int                `json:"in_flight"`
	WarmupSeconds  float64            `json:"warmup_seconds"`
	TimeoutSeconds float64            `json:"timeout_seconds"`
	Mix            map[string]float64 `json:"mix"`
	Users          int                `json:"users"`
	Rooms          int                `json:"rooms"`
	PayloadBytes   int                `json:"payload_bytes"`
	Seed           uint64             `json:"seed"`
}

type kindReport struct {
	Pushes   int64            `json:"pushes"`
	Outcomes map[string]int64 `json:"outcomes"`
	Codes    map[string]int64 `json:"codes"` // gRPC statuses other than OK
	Targets  load.Targets     `json:"targets"`
	Latency  *latency         `json:"latency_ms"`
	// Each pair is a percentile and the milliseconds that so many pushes did not exceed.
	Distribution [][2]float64 `json:"distribution_ms"`
}

// latency is in milliseconds. It is null where nothing was measured.
type latency struct {
	Count int64   `json:"count"`
	Min   float64 `json:"min"`
	Mean  float64 `json:"mean"`
	P50   float64 `json:"p50"`
	P90   float64 `json:"p90"`
	P99   float64 `json:"p99"`
	P999  float64 `json:"p99_9"`
	Max   float64 `json:"max"`
}

type point struct {
	At       float64  `json:"at_seconds"`
	Length   float64  `json:"length_seconds"`
	Answered int64    `json:"answered"`
	Errors   int64    `json:"errors"`
	InFlight int      `json:"in_flight"`
	P50      *float64 `json:"p50_ms"`
	P99      *float64 `json:"p99_ms"`
	Max      *float64 `json:"max_ms"`
}

type generator struct {
	CPUSeconds   float64 `json:"cpu_seconds"`
	Cores        float64 `json:"cores"`
	Procs        int     `json:"procs"`
	CPUWaitP99   float64 `json:"cpu_wait_p99_ms"`
	MostInFlight int     `json:"most_in_flight"`
}

// shortfall is the share by which a rate may be missed.
const shortfall = 0.05

func newReport(r *load.Result, maxErrors float64) *report {
	c := &r.Config
	rep := &report{
		Version: 1, Started: r.Started.UTC(),
		WindowSeconds: r.Window.Seconds(), Stopped: r.Stopped,
		AskedRate: c.Rate, AchievedRate: r.Rate(), ErrorShare: r.ErrorShare(),
		Unsent: r.Unsent, Unfinished: r.Unfinished,
		Total: newKind(&r.Total), Kinds: map[string]kindReport{},
		SendLag: newLatency(r.Lag), Held: newLatency(r.Held),
		Generator: generator{
			CPUSeconds: r.Generator.CPU.Seconds(), Cores: r.Generator.Cores, Procs: r.Generator.Procs,
			CPUWaitP99: millis(int64(r.Generator.WaitP99)), MostInFlight: r.Generator.MostInFlight,
		},
		Settings: settings{
			Addresses: c.Addresses, Way: c.Way.String(), Connections: c.Connections, Arrival: "even",
			InFlight: c.InFlight, WarmupSeconds: c.Warmup.Seconds(), TimeoutSeconds: c.Timeout.Seconds(),
			Mix: map[string]float64{}, Users: c.Users, Rooms: c.Rooms, PayloadBytes: len(c.Payload), Seed: c.Seed,
		},
		Timeline: []point{}, Short: []string{}, Warnings: append([]string{}, r.Doubts()...),
	}
	if c.Clients > 0 {
		rep.Clients = (*clients)(&r.Clients)
	}
	if c.Poisson {
		rep.Settings.Arrival = "poisson"
	}
	for _, k := range load.Kinds() {
		if c.Mix[k] > 0 {
			rep.Settings.Mix[k.String()] = c.Mix[k]
			rep.Kinds[k.String()] = newKind(&r.Kinds[k])
		}
	}
	for i := range r.Timeline {
		rep.Timeline = append(rep.Timeline, newPoint(&r.Timeline[i]))
	}
	rep.judge(maxErrors)
	return rep
}

// judge says what the exit code is about.
func (rep *report) judge(maxErrors float64) {
	if rep.Total.Pushes == 0 {
		rep.Short = append(rep.Short, "no push was answered or given up within the measurement")
	}
	if rep.AchievedRate < rep.AskedRate*(1-shortfall) {
		rep.Short = append(rep.Short, fmt.Sprintf("the rate fell short: %s of %s a second",
			thousands(int64(rep.AchievedRate)), thousands(int64(rep.AskedRate))))
	}
	if rep.Clients != nil && rep.Clients.Twice > 0 {
		rep.Short = append(rep.Short, thousands(rep.Clients.Twice)+" messages came twice to the same connection")
	}
	if rep.ErrorShare > maxErrors {
		rep.Short = append(rep.Short, fmt.Sprintf("too many errors: %s of the pushes, %s are allowed", percent(rep.ErrorShare), percent(maxErrors)))
	}
}

func newKind(f *load.Figures) kindReport {
	k := kindReport{
		Pushes: f.Pushes, Outcomes: map[string]int64{}, Codes: map[string]int64{}, Targets: f.Targets,
		Latency: newLatency(f.Latency), Distribution: [][2]float64{},
	}
	for _, o := range load.Outcomes() {
		k.Outcomes[o.String()] = f.Outcomes[o]
	}
	for code, n := range f.Codes {
		k.Codes[code.String()] = n
	}
	for _, q := range quantiles(f.Latency.TotalCount()) {
		value := f.Latency.Min() // the library has 0 for the percentile 0
		if q > 0 {
			value = f.Latency.ValueAtQuantile(q)
		}
		k.Distribution = append(k.Distribution, [2]float64{q, millis(value)})
	}
	return k
}

// quantiles are percentiles ever closer to 100: ten for each nine that so many values can show.
func quantiles(count int64) []float64 {
	var all []float64
	const perNine = 10
	for i := 0; count > 0; i++ {
		left := math.Pow(10, -float64(i)/perNine) // the share above
		if left*float64(count) < 1 {
			break
		}
		all = append(all, 100*(1-left))
	}
	if count > 0 {
		all = append(all, 100)
	}
	return all
}

func newLatency(h *hdrhistogram.Histogram) *latency {
	if h.TotalCount() == 0 {
		return nil
	}
	at := func(q float64) float64 { return millis(h.ValueAtQuantile(q)) }
	return &latency{
		Count: h.TotalCount(), Min: millis(h.Min()), Mean: h.Mean() / float64(time.Millisecond),
		P50: at(50), P90: at(90), P99: at(99), P999: at(99.9), Max: millis(h.Max()),
	}
}

func newPoint(i *load.Interval) point {
	p := point{At: i.At.Seconds(), Length: i.Length.Seconds(), Answered: i.Answered, Errors: i.Errors, InFlight: i.InFlight}
	if i.Pushes > 0 {
		p50, p99, most := millis(int64(i.P50)), millis(int64(i.P99)), millis(int64(i.Max))
		p.P50, p.P99, p.Max = &p50, &p99, &most
	}
	return p
}

func millis(ns int64) float64 { return float64(ns) / float64(time.Millisecond) }

func (rep *report) json(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(rep)
}

// text prints the results for people.
func (rep *report) text(p *pen) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n\n", p.paint(bold, rep.headline()))
	asked := ""
	if rep.AskedRate > 0 {
		asked = fmt.Sprintf(" of %s asked (%s)", thousands(int64(rep.AskedRate)), percent(rep.AchievedRate/rep.AskedRate))
	}
	fmt.Fprintf(&b, "  answers/s  %s%s\n", thousands(int64(rep.AchievedRate+0.5)), asked)
	fmt.Fprintf(&b, "  pushes     %s\n", rep.counts(p))
	t := rep.Total.Targets
	fmt.Fprintf(&b, "  users      %s\n", list(
		some(t.Delivered, "delivered"), some(t.Offline, "offline"), some(t.Failed, "failed"), some(t.Unknown, "unknown")))
	if t.Acked+t.Duplicates+t.Stored > 0 {
		fmt.Fprintf(&b, "  of them    %s\n", list(
			some(t.Acked, "acknowledged"), some(t.Duplicates, "duplicates"), some(t.Stored, "stored"), some(t.Unsure, "unsure")))
	}
	if c := rep.Clients; c != nil {
		fmt.Fprintf(&b, "  clients    %s: %s\n", thousands(int64(c.Connected)), list(thousands(c.Received)+" pushes received",
			some(c.Acked, "acknowledged"), some(c.Replayed, "replayed"), some(c.Twice, "twice"), some(c.Lost, "connections lost")))
	}
	if len(rep.Total.Codes) > 0 {
		fmt.Fprintf(&b, "  statuses   %s\n", p.paint(red, rep.statuses()))
	}
	b.WriteString("\n")
	rep.table(&b)
	fmt.Fprintf(&b, "\n  %s\n", p.paint(grey, rep.generatorLine()))
	if _, err := io.WriteString(p.w, b.String()); err != nil {
		return err
	}
	rep.complain(p)
	return nil
}

// complain prints what went wrong and what speaks against the figures.
func (rep *report) complain(p *pen) {
	for _, line := range rep.Warnings {
		_, _ = fmt.Fprintf(p.w, "%s %s\n", p.paint(yellow, "warning:"), line)
	}
	for _, line := range rep.Short {
		_, _ = fmt.Fprintf(p.w, "%s %s\n", p.paint(red, "short:"), line)
	}
}

func (rep *report) headline() string {
	s := &rep.Settings
	rate := fmt.Sprintf("%d in flight", s.InFlight)
	if rep.AskedRate > 0 {
		rate = thousands(int64(rep.AskedRate)) + " pushes/s"
	}
	stopped := ""
	if rep.Stopped {
		stopped = " (stopped)"
	}
	window := time.Duration(rep.WindowSeconds * float64(time.Second)).Round(100 * time.Millisecond)
	return fmt.Sprintf("%s for %v%s to %s, %s, %d bytes, %s", rate, window, stopped, strings.Join(s.Addresses, ","), rep.mix(), s.PayloadBytes, s.Way)
}

func (rep *report) mix() string {
	sum := 0.0
	for _, weight := range rep.Settings.Mix {
		sum += weight
	}
	var parts []string
	for _, k := range load.Kinds() {
		if weight := rep.Settings.Mix[k.String()]; weight > 0 {
			parts = append(parts, fmt.Sprintf("%.3g %% %s", 100*weight/sum, k))
		}
	}
	return strings.Join(parts, ", ")
}

func (rep *report) counts(p *pen) string {
	parts := []string{thousands(rep.Total.Pushes) + ":"}
	var each []string
	for _, o := range load.Outcomes() {
		part := some(rep.Total.Outcomes[o.String()], o.String())
		if part != "" && o.Bad() {
			part = p.paint(red, part)
		}
		each = append(each, part)
	}
	each = append(each, some(rep.Unsent, "more never sent"), some(rep.Unfinished, "more given up when stopped"))
	return strings.Join(append(parts, list(each...)), " ")
}

func (rep *report) statuses() string {
	var parts []string
	for c := codes.OK; c <= codes.Unauthenticated; c++ {
		if n := rep.Total.Codes[c.String()]; n > 0 {
			parts = append(parts, thousands(n)+" "+c.String())
		}
	}
	return list(parts...)
}

func (rep *report) table(b *strings.Builder) {
	w := tabwriter.NewWriter(b, 0, 0, 3, ' ', tabwriter.AlignRight)
	row := func(name string, pushes string, l *latency) {
		if l == nil {
			l = &latency{}
		}
		cells := []string{"", name, pushes}
		for _, ms := range []float64{l.P50, l.P90, l.P99, l.P999, l.Max} {
			cell := "–"
			if l.Count > 0 {
				cell = brief(time.Duration(ms * float64(time.Millisecond)))
			}
			cells = append(cells, cell)
		}
		_, _ = fmt.Fprintln(w, strings.Join(cells, "\t")+"\t")
	}
	_, _ = fmt.Fprintln(w, "\tlatency\tpushes\tp50\tp90\tp99\tp99.9\tmax\t")
	for _, k := range load.Kinds() {
		if rep.Settings.Mix[k.String()] > 0 {
			row(k.String(), thousands(rep.Kinds[k.String()].Pushes), rep.Kinds[k.String()].Latency)
		}
	}
	if len(rep.Kinds) > 1 {
		row("all", thousands(rep.Total.Pushes), rep.Total.Latency)
	}
	if rep.AskedRate > 0 {
		row("sent late by", "", rep.SendLag)
	}
	if rep.Held != nil {
		row("held back by", thousands(rep.Held.Count), rep.Held)
	}
	_ = w.Flush() // into memory
}

func (rep *report) generatorLine() string {
	g := &rep.Generator
	return fmt.Sprintf("the generator used %.2f of %d cores; at most %s in flight", g.Cores, g.Procs, thousands(int64(g.MostInFlight)))
}

// some is "3 failed", or nothing for 0.
func some(n int64, what string) string {
	if n == 0 {
		return ""
	}
	return thousands(n) + " " + what
}

// list joins what is not empty.
func list(parts ...string) string {
	parts = slices.DeleteFunc(parts, func(s string) bool { return s == "" })
	if len(parts) == 0 {
		return "none"
	}
	return strings.Join(parts, ", ")
}

func percent(share float64) string { return fmt.Sprintf("%.3g %%", 100*share) }
