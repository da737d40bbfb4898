package pushctl

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/push-manager/push-manager/internal/plain"
)

// watching are the flags of what goes on until it is interrupted.
type watching struct {
	Metrics  string        `default:"localhost:9093" env:"PUSHCTL_METRICS" context:"metrics" placeholder:"HOST:PORT" help:"METRICS_PORT of each Push-Manager, separated by commas."`
	Interval time.Duration `default:"1s" help:"Time between two looks, 100ms to 1h."`
	Count    int           `help:"Exit after so many. 0: go on until Ctrl-C."`
}

type topCmd struct {
	watching

	Sort string `default:"id" enum:"id,queue,ack" help:"Order of the nodes: id, queue (the longest first), or ack (the slowest first)."`
}

type watchCmd struct{ watching }

// view is what all instances have said, as rates since the look before.
type view struct {
	Time      time.Time      `json:"time"`
	Seconds   float64        `json:"seconds"` // that the rates are over
	Total     rates          `json:"total"`
	NodesUp   int            `json:"nodes_up"` // with a link to each instance that answers
	Nodes     int            `json:"nodes"`
	Ready     int            `json:"instances_ready"`
	Instances []instanceView `json:"instances"`
	Links     []nodeView     `json:"connect_nodes"`
}

// rates are pushes, and users by what became of them, a second.
type rates struct {
	Pushes    float64  `json:"pushes"`
	Delivered float64  `json:"delivered"`
	Offline   float64  `json:"offline"`
	Stored    float64  `json:"stored"`
	Failed    float64  `json:"failed"`
	Unknown   float64  `json:"unknown"`
	Refused   float64  `json:"refused"` // for load
	InFlight  float64  `json:"in_flight"`
	P50       *float64 `json:"p50_ms"` // null: there was no push
	P99       *float64 `json:"p99_ms"`
}

// instanceView is one Push-Manager.
type instanceView struct {
	Address  string   `json:"address"`
	Error    string   `json:"error,omitempty"` // it does not answer, and the rest is empty
	Version  string   `json:"version,omitempty"`
	Ready    bool     `json:"ready"`
	NotReady []string `json:"not_ready,omitempty"` // the reasons
	rates
}

// nodeView is one Connect-Node, over all instances.
type nodeView struct {
	ID         string   `json:"node_id"`
	Links      float64  `json:"links"`
	Without    int      `json:"without,omitempty"` // instances that know it and have no link to it
	QueueBytes float64  `json:"queue_bytes"`
	QueueAge   float64  `json:"queue_age_seconds"`
	Stalled    float64  `json:"stalled_links"`
	Breaks     float64  `json:"breaks"` // a second
	AckP99     *float64 `json:"ack_p99_ms"`
}

// look makes a view of two rounds of samples, in the order of the targets.
func look(targets []string, before, now []*sample) *view {
	v := &view{Time: time.Now(), Instances: []instanceView{}, Links: []nodeView{}}
	all := map[float64]float64{}
	acks := map[string]map[float64]float64{}
	nodes := map[string]*nodeView{}
	for i, s := range now {
		if s.err != nil {
			v.Instances = append(v.Instances, instanceView{Address: targets[i], Error: plain.Line(s.err.Error(), 256)})
			continue
		}
		was, seconds := before[i], 0.0 //nolint:gosec // both rounds are of the same targets
		if was.err == nil {
			seconds = s.at.Sub(was.at).Seconds()
			v.Seconds = max(v.Seconds, math.Round(seconds*1000)/1000)
		}
		rate := func(name string) float64 {
			if seconds <= 0 {
				return 0 // nothing is known before the second look
			}
			return math.Round(grown(s.sum(name), was.sum(name))/seconds*100) / 100
		}
		one := instanceView{Address: targets[i], rates: rates{
			Pushes: rate("push_manager_api_requests_total"), Delivered: rate("push_manager_push_success_total"), Offline: rate("push_manager_push_offline_total"),
			Stored: rate("push_manager_push_stored_total"), Failed: rate("push_manager_push_failed_total"), Unknown: rate("push_manager_push_unknown_total"),
			Refused: rate("push_manager_refused_total"), InFlight: s.sum("push_manager_pushes_in_flight"),
		}}
		own := map[float64]float64{}
		if seconds > 0 {
			grownBuckets(own, s.buckets("push_manager_api_latency_seconds", "")[""], was.buckets("push_manager_api_latency_seconds", "")[""])
			for bound, count := range own {
				all[bound] += count
			}
		}
		one.P50, one.P99 = milliseconds(quantile(0.5, own)), milliseconds(quantile(0.99, own))
		for version := range s.by("push_manager_build_info", "version") {
			one.Version = plain.Line(version, 64)
		}
		one.Ready = s.sum("push_manager_ready") > 0
		for reason, is := range s.by("push_manager_not_ready", "reason") {
			if is > 0 {
				one.NotReady = append(one.NotReady, plain.Line(reason, 64))
			}
		}
		slices.Sort(one.NotReady)
		if one.Ready {
			v.Ready++
		}
		v.Total.add(one.rates)
		v.Instances = append(v.Instances, one)

		queues, ages := s.by("push_manager_node_queue_bytes", "node_id"), s.by("push_manager_node_queue_age_seconds", "node_id")
		stalled, breaks := s.by("push_manager_node_stalled_links", "node_id"), s.by("push_manager_node_breaks_total", "node_id")
		tooks := s.buckets("push_manager_link_ack_seconds", "node_id")
		brokeBefore, tookBefore := was.by("push_manager_node_breaks_total", "node_id"), was.buckets("push_manager_link_ack_seconds", "node_id")
		for id, links := range s.by("push_manager_node_connections", "node_id") {
			n := nodes[id]
			if n == nil {
				n = &nodeView{ID: plain.Line(id, 256)}
				nodes[id], acks[id] = n, map[float64]float64{}
			}
			n.Links += links
			if links == 0 {
				n.Without++
			}
			n.QueueBytes += queues[id]
			n.QueueAge = max(n.QueueAge, ages[id])
			n.Stalled += stalled[id]
			if seconds > 0 {
				n.Breaks += grown(breaks[id], brokeBefore[id]) / seconds
				grownBuckets(acks[id], tooks[id], tookBefore[id])
			}
		}
	}
	v.Total.P50, v.Total.P99 = milliseconds(quantile(0.5, all)), milliseconds(quantile(0.99, all))
	for _, id := range slices.Sorted(maps.Keys(nodes)) {
		n := nodes[id]
		n.AckP99 = milliseconds(quantile(0.99, acks[id]))
		if v.Nodes++; n.Without == 0 {
			v.NodesUp++
		}
		v.Links = append(v.Links, *n)
	}
	return v
}

func (r *rates) add(o rates) {
	r.Pushes += o.Pushes
	r.Delivered += o.Delivered
	r.Offline += o.Offline
	r.Stored += o.Stored
	r.Failed += o.Failed
	r.Unknown += o.Unknown
	r.Refused += o.Refused
	r.InFlight += o.InFlight
}

// milliseconds are those of seconds, nil where they are not known.
func milliseconds(seconds float64) *float64 {
	if !(seconds >= 0 && seconds < 1e9) { // not a number, too
		return nil
	}
	return new(math.Round(seconds*1e6) / 1e3)
}

// Run shows the instances and nodes. On a terminal each picture takes the place of the one before.
func (c *topCmd) Run(ctx context.Context, t *terminal) error {
	paint, begun := t.live && !t.structured(), false
	defer func() {
		if begun {
			_, _ = fmt.Fprint(t.out, screenEnd) // there is nobody to tell
		}
	}()
	return c.each(ctx, func(v *view) error {
		switch c.Sort {
		case "queue":
			slices.SortStableFunc(v.Links, func(a, b nodeView) int { return cmp.Compare(b.QueueBytes, a.QueueBytes) })
		case "ack":
			slices.SortStableFunc(v.Links, func(a, b nodeView) int { return cmp.Compare(orZero(b.AckP99), orZero(a.AckP99)) })
		}
		text := t.picture(v)
		if !paint {
			return t.answer(v, text)
		}
		if !begun { // what went wrong before is to be seen on the usual screen
			begun = true
			text = screenBegin + painted(text, rows(t.out))
		} else {
			text = painted(text, rows(t.out))
		}
		_, err := fmt.Fprint(t.out, text)
		return err
	})
}

// What begins and ends a picture: the terminal's other screen, without a cursor, and lines that are cut at its edge.
const (
	screenBegin = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	screenEnd   = "\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// painted puts a picture over the one before: from the corner on, each line to its end. A screen that is cleared first
// would flicker. rows bounds the lines, 0 for no bound.
func painted(text string, rows int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	if rows > 1 && len(lines) > rows {
		lines = append(lines[:rows-1], fmt.Sprintf("and %d lines more", len(lines)-rows+1))
	}
	return "\x1b[H" + strings.Join(lines, "\x1b[K\r\n") + "\x1b[K\x1b[J"
}

// picture is a view for people.
func (t *terminal) picture(v *view) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s   instances %s   nodes %s\n\n", v.Time.Format(time.TimeOnly), t.of(v.Ready, len(v.Instances)), t.of(v.NodesUp, v.Nodes))
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', tabwriter.AlignRight)
	line := func(cells ...string) { _, _ = fmt.Fprintln(w, strings.Join(cells, "\t")+"\t") } // into memory
	line("PUSH/S", "DELIVERED", "OFFLINE", "STORED", "FAILED", "UNKNOWN", "REFUSED", "IN FLIGHT", "P50", "P99", "", "INSTANCE")
	row := func(r rates, name string) {
		line(number(r.Pushes), number(r.Delivered), number(r.Offline), number(r.Stored), number(r.Failed), number(r.Unknown), number(r.Refused),
			number(r.InFlight), latency(r.P50), latency(r.P99), "", name)
	}
	if len(v.Instances) > 1 {
		row(v.Total, "all")
	}
	var notes []string
	for _, i := range v.Instances {
		switch {
		case i.Error != "":
			notes = append(notes, t.paint(red, fmt.Sprintf("%s does not answer: %s", clean(i.Address), clean(i.Error))))
			continue
		case !i.Ready:
			notes = append(notes, t.paint(red, fmt.Sprintf("%s is not ready: %s", clean(i.Address), clean(strings.Join(i.NotReady, ", ")))))
		}
		name := i.Address
		if t.format == formatWide {
			name += " " + i.Version
		}
		row(i.rates, clean(name))
	}
	_ = w.Flush()
	for _, note := range notes {
		b.WriteString(note + "\n")
	}
	b.WriteString("\n")
	w = tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	head := []string{"NODE", "LINKS", "QUEUED", "OLDEST", "ACK P99", "STATE"}
	if t.format == formatWide {
		head = append(head, "BREAKS/S", "STALLED")
	}
	line(head...)
	for _, n := range v.Links {
		// The colour is in the last cell of its line, so that the width of a column does not count it.
		state := "up"
		switch {
		case n.Links == 0:
			state = t.paint(red, "down")
		case n.Without > 0:
			state = t.paint(yellow, fmt.Sprintf("down for %d of %d", n.Without, len(v.Instances)))
		case n.Stalled > 0:
			state = t.paint(yellow, "stalled")
		}
		cells := []string{clean(n.ID), number(n.Links), size(n.QueueBytes), number(n.QueueAge) + "s", latency(n.AckP99), state}
		if t.format == formatWide {
			cells = append(cells, number(n.Breaks), number(n.Stalled))
		}
		line(cells...)
	}
	_ = w.Flush()
	return b.String()
}

// of is "2 of 3", in red where that is not all.
func (t *terminal) of(n, all int) string {
	text := fmt.Sprintf("%d of %d", n, all)
	if n < all || all == 0 {
		return t.paint(red, text)
	}
	return text
}

// watchHead is printed above every watchPage lines of a terminal, and once elsewhere.
const (
	watchHead = "    TIME    PUSH/S  DELIVERED  OFFLINE   STORED   FAILED  UNKNOWN  REFUSED  IN FLIGHT       P50       P99  NODES  INSTANCES"
	watchPage = 20
)

// Run prints a line for each look.
func (c *watchCmd) Run(ctx context.Context, t *terminal) error {
	printed := 0
	return c.each(ctx, func(v *view) error {
		if !t.structured() && (printed == 0 || t.live && printed%watchPage == 0) {
			if _, err := fmt.Fprintln(t.out, watchHead); err != nil {
				return err
			}
		}
		printed++
		r := v.Total
		alarm := func(n float64, colour string) string {
			text := fmt.Sprintf("%9s", number(n))
			if n > 0 {
				return t.paint(colour, text)
			}
			return text
		}
		return t.answer(v, fmt.Sprintf("%s %9s %10s%9s%9s%s%s%s %10s %9s %9s  %s  %s", v.Time.Format(time.TimeOnly), number(r.Pushes), number(r.Delivered), number(r.Offline), number(r.Stored),
			alarm(r.Failed, red), alarm(r.Unknown, yellow), alarm(r.Refused, yellow), number(r.InFlight), latency(r.P50), latency(r.P99),
			fmt.Sprintf("%5s", fmt.Sprintf("%d/%d", v.NodesUp, v.Nodes)), fmt.Sprintf("%d/%d", v.Ready, len(v.Instances))))
	})
}

// each shows what happened between two looks, until ctx ends or Count were shown. It is an error only if nobody answers from
// the start on.
func (c *watching) each(ctx context.Context, show func(*view) error) error {
	if c.Interval < 100*time.Millisecond || c.Interval > maxTimeout {
		return &usageError{fmt.Sprintf("--interval: %v must be between 100ms and %v", c.Interval, maxTimeout)}
	}
	if c.Count < 0 {
		return &usageError{fmt.Sprintf("--count: %d is negative", c.Count)}
	}
	targets, err := metricsTargets(c.Metrics)
	if err != nil {
		return err
	}
	s := newScraper(targets)
	defer s.close()
	before := s.all(ctx)
	if !slices.ContainsFunc(before, func(s *sample) bool { return s.err == nil }) {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("there are no metrics at %s (--metrics): %w", targets[0], before[0].err)
	}
	tick := time.NewTicker(c.Interval)
	defer tick.Stop()
	for shown := 0; c.Count == 0 || shown < c.Count; shown++ {
		select {
		case <-ctx.Done():
			return nil // whoever interrupts it has seen enough
		case <-tick.C:
		}
		now := s.all(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err := show(look(targets, before, now)); err != nil {
			return fmt.Errorf("print: %w", err)
		}
		before = now
	}
	return nil
}

func orZero(p *float64) float64 {
	if p == nil {
		return 0
	}
	return *p
}

// number is a rate or a count in few characters.
func number(n float64) string {
	switch {
	case n >= 1e7:
		return strconv.FormatFloat(n/1e6, 'f', 1, 64) + "M"
	case n >= 1e5:
		return strconv.FormatFloat(n/1e3, 'f', 1, 64) + "k"
	case n >= 100 || n == math.Trunc(n):
		return strconv.FormatFloat(n, 'f', 0, 64)
	}
	return strconv.FormatFloat(n, 'f', 1, 64)
}

func size(bytes float64) string {
	switch {
	case bytes >= 1<<20:
		return strconv.FormatFloat(bytes/(1<<20), 'f', 1, 64) + " MiB"
	case bytes >= 1<<10:
		return strconv.FormatFloat(bytes/(1<<10), 'f', 1, 64) + " KiB"
	}
	return strconv.FormatFloat(bytes, 'f', 0, 64) + " B"
}

func latency(ms *float64) string {
	if ms == nil {
		return "-"
	}
	return (time.Duration(*ms*1000) * time.Microsecond).Round(max(10*time.Microsecond, time.Duration(*ms*1000)*time.Microsecond/1000)).String()
}
