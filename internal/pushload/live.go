package pushload

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/load"
)

// pen writes, in colours where there are any.
type pen struct {
	w      io.Writer
	colour bool
}

func newPen(w io.Writer) *pen {
	return &pen{w: w, colour: isTerminal(w) && os.Getenv("NO_COLOR") == ""}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// The colours in use.
const (
	bold   = "1"
	green  = "32"
	red    = "31"
	yellow = "33"
	grey   = "90"
)

// paint puts a text in one of the terminal's colours.
func (p *pen) paint(colour, text string) string {
	if !p.colour {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// live is the line that shows how a run is going. There is none without a terminal.
type live struct {
	pen   *pen
	shown bool
	quiet bool
	total time.Duration
}

func newLive(w io.Writer, quiet bool, cfg load.Config) *live {
	return &live{pen: newPen(w), quiet: quiet || !isTerminal(w), total: cfg.Warmup + cfg.Duration}
}

func (l *live) show(p load.Progress) {
	if l.quiet {
		return
	}
	l.shown = true
	_, _ = fmt.Fprint(l.pen.w, "\r"+l.line(p)+"\x1b[K")
}

// line is short enough for 80 columns.
func (l *live) line(p load.Progress) string {
	const width = 12
	elapsed := min(p.Elapsed, l.total)
	full := int(int64(elapsed) * width / int64(l.total))
	bar := l.pen.paint(green, strings.Repeat("━", full)) + l.pen.paint(grey, strings.Repeat("━", width-full))
	clock := fmt.Sprintf("%d/%ds", int(elapsed.Seconds()), int(l.total.Seconds()))
	switch {
	case p.Draining:
		clock = "last answers"
	case p.Warmup:
		clock += " warm-up"
	}
	latency := "p50 –  p99 –"
	if p.Pushes > 0 {
		latency = "p50 " + brief(p.P50) + "  p99 " + brief(p.P99)
	}
	errors := fmt.Sprintf("%d errors", p.Errors)
	if p.Errors > 0 {
		errors = l.pen.paint(red, errors)
	}
	return fmt.Sprintf("%s %s  %s/s  %d in flight  %s  %s", bar, clock, thousands(int64(p.Rate+0.5)), p.InFlight, latency, errors)
}

// clear takes the line away.
func (l *live) clear() {
	if l.shown {
		_, _ = fmt.Fprint(l.pen.w, "\r\x1b[K")
	}
}

// brief is a duration in three digits.
func brief(d time.Duration) string {
	if d >= 100*time.Second {
		return fmt.Sprintf("%.0f s", d.Seconds())
	}
	if d >= time.Second {
		return fmt.Sprintf("%.3g s", d.Seconds())
	}
	us := float64(d) / float64(time.Microsecond)
	if us >= 999.5 {
		return digits(us/1000) + " ms"
	}
	return digits(us) + " µs"
}

func digits(v float64) string {
	switch {
	case v >= 99.95:
		return fmt.Sprintf("%.0f", v)
	case v >= 9.995:
		return fmt.Sprintf("%.1f", v)
	default:
		return fmt.Sprintf("%.2f", v)
	}
}

// thousands is a number with commas.
func thousands(n int64) string {
	if n < 1000 {
		return strconv.FormatInt(n, 10)
	}
	return fmt.Sprintf("%s,%03d", thousands(n/1000), n%1000)
}
