package main

import (
	"cmp"
	"fmt"
	"html"
	"io"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/load"
)

// The places of the plot's panels.
const (
	plotWidth  = 960
	plotHeight = 700
	marginLeft = 66.0
	plotRight  = 880.0 // names of lines stand to the right of it
)

// style has colours that tell lines apart for the colour-blind too, on light and dark.
const style = `
svg { --page:#ffffff; --ink:#1c2430; --dim:#5b6675; --grid:#e3e7ec; --axis:#aab3be;
  --user:#0b67b2; --room:#b85c00; --users:#7a3fa8; --broadcast:#0a7d5c; --all:#1c2430; --p50:#0b67b2; --p99:#b85c00; --bad:#c62828; --fill:#0b67b2;
  background:var(--page); font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif; }
@media (prefers-color-scheme: dark) { svg { --page:#12171e; --ink:#e6ebf1; --dim:#9aa7b5; --grid:#262e38; --axis:#4a5664;
  --user:#5fb0f2; --room:#f0a04b; --users:#c79af0; --broadcast:#4fc9a0; --all:#e6ebf1; --p50:#5fb0f2; --p99:#f0a04b; --bad:#ff7b72; --fill:#5fb0f2; } }
text { fill:var(--ink); } .dim { fill:var(--dim); } .title { font-size:16px; font-weight:600; } .head { font-size:13px; font-weight:600; }
.grid { stroke:var(--grid); } .axis { stroke:var(--axis); } .line { fill:none; stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.end { text-anchor:end; } .mid { text-anchor:middle; } .num { font-variant-numeric:tabular-nums; } .name { font-weight:600; }
`

// panel is one pair of axes.
type panel struct {
	b                        *strings.Builder
	left, right, top, bottom float64
	xs, ys                   scale
}

// scale maps values to 0..1.
type scale struct {
	low, high float64
	log       bool
}

func (s scale) at(v float64) float64 {
	if s.log {
		return math.Log(math.Max(v, s.low)/s.low) / math.Log(s.high/s.low)
	}
	return (v - s.low) / (s.high - s.low)
}

func (p *panel) x(v float64) float64 { return p.left + p.xs.at(v)*(p.right-p.left) }
func (p *panel) y(v float64) float64 { return p.bottom - p.ys.at(v)*(p.bottom-p.top) }

func (p *panel) gridX(v float64, label string) {
	x := p.x(v)
	fmt.Fprintf(p.b, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, x, p.top, x, p.bottom)
	fmt.Fprintf(p.b, `<text class="dim mid num" x="%.1f" y="%.1f">%s</text>`+"\n", x, p.bottom+17, html.EscapeString(label))
}

func (p *panel) gridY(v float64, label string) {
	y := p.y(v)
	fmt.Fprintf(p.b, `<line class="grid" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, p.left, y, p.right, y)
	fmt.Fprintf(p.b, `<text class="dim end num" x="%.1f" y="%.1f">%s</text>`+"\n", p.left-8, y+4, html.EscapeString(label))
}

func (p *panel) frame(title string) {
	fmt.Fprintf(p.b, `<line class="axis" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`, p.left, p.bottom, p.right, p.bottom)
	fmt.Fprintf(p.b, `<text class="head" x="%.1f" y="%.1f">%s</text>`+"\n", p.left, p.top-12, html.EscapeString(title))
}

// line draws points; a NaN breaks it. A point alone becomes a dot.
func (p *panel) line(colour string, points [][2]float64) {
	fmt.Fprintf(p.b, `<path class="line" stroke="var(--%s)" d="`, colour)
	alone := true
	for i, pt := range points {
		if math.IsNaN(pt[1]) {
			continue
		}
		verb := "L"
		if i == 0 || math.IsNaN(points[i-1][1]) {
			verb = "M"
			alone = i+1 == len(points) || math.IsNaN(points[i+1][1])
		}
		fmt.Fprintf(p.b, "%s%.1f %.1f", verb, p.x(pt[0]), p.y(pt[1]))
		if alone {
			p.b.WriteString("h0.01")
			alone = false
		}
	}
	p.b.WriteString("\"/>\n")
}

// name is the label at the end of a line.
type name struct {
	text, colour string
	y            float64
}

// names puts labels right of the panel, none on top of another.
func (p *panel) names(all []name) {
	const height = 15
	slices.SortStableFunc(all, func(a, b name) int { return cmp.Compare(a.y, b.y) })
	above := math.Inf(-1)
	for i := range all {
		all[i].y = math.Max(all[i].y, above+height)
		above = all[i].y
	}
	below := p.bottom + 4 + height
	for _, n := range slices.Backward(all) {
		below = math.Min(n.y, below-height)
		fmt.Fprintf(p.b, `<text class="name" style="fill:var(--%s)" x="%.1f" y="%.1f">%s</text>`+"\n",
			n.colour, p.right+8, below+4, html.EscapeString(n.text))
	}
}

// plot draws the results as SVG.
func (rep *report) plot(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" width="%d" height="%d" role="img" aria-labelledby="title desc">`+"\n",
		plotWidth, plotHeight, plotWidth, plotHeight)
	fmt.Fprintf(&b, "<title id=\"title\">Latency of pushes: %s</title>\n<desc id=\"desc\">%s</desc>\n<style>%s</style>\n",
		html.EscapeString(rep.headline()), html.EscapeString(rep.summary()), style)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" style="fill:var(--page)"/>`+"\n", plotWidth, plotHeight)
	fmt.Fprintf(&b, `<text class="title" x="%.0f" y="30">Latency from the moment a push was due to its answer</text>`+"\n", marginLeft)
	fmt.Fprintf(&b, `<text class="dim" x="%.0f" y="50">%s</text>`+"\n", marginLeft, html.EscapeString(clip(rep.headline(), 140)))
	fmt.Fprintf(&b, `<text class="dim" x="%.0f" y="68">%s</text>`+"\n", marginLeft, html.EscapeString(clip(rep.summary(), 140)))
	rep.percentiles(&b)
	rep.overTime(&b)
	rep.rates(&b)
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (rep *report) summary() string {
	l := rep.Total.Latency
	if l == nil {
		return "no push was answered"
	}
	ms := func(v float64) string { return brief(time.Duration(v * float64(time.Millisecond))) }
	return fmt.Sprintf("%s answers/s · p50 %s · p99 %s · p99.9 %s · max %s · %s errors",
		thousands(int64(rep.AchievedRate+0.5)), ms(l.P50), ms(l.P99), ms(l.P999), ms(l.Max), percent(rep.ErrorShare))
}

// percentiles draws latency by percentile, stretched so that each nine is as wide.
func (rep *report) percentiles(b *strings.Builder) {
	nines, low, high := 1.0, math.Inf(1), 0.0
	for _, d := range rep.Total.Distribution {
		low, high = math.Min(low, d[1]), math.Max(high, d[1])
		if d[0] < 100 {
			nines = math.Max(nines, nine(d[0]))
		}
	}
	p := &panel{b: b, left: marginLeft, right: plotRight, top: 112, bottom: 340, xs: scale{high: nines}, ys: logScale(low, high)}
	p.frame("By percentile")
	for _, label := range []string{"0", "50", "90", "99", "99.9", "99.99", "99.999", "99.9999", "99.99999", "99.999999"} {
		var q float64
		_, _ = fmt.Sscan(label, &q) // a constant
		if n := nine(q); n <= nines+1e-9 {
			p.gridX(n, label+" %")
		}
	}
	p.latencies()
	var ends []name
	draw := func(title string, k kindReport) {
		var points [][2]float64
		for _, d := range k.Distribution {
			x := nines // 100 % stands where the last one does that the count can show
			if d[0] < 100 {
				x = nine(d[0])
			} else if n := len(points); n > 0 {
				x = points[n-1][0]
			}
			points = append(points, [2]float64{x, d[1]})
		}
		if len(points) == 0 {
			return
		}
		p.line(title, points)
		ends = append(ends, name{text: title, colour: title, y: p.y(points[len(points)-1][1])})
	}
	if len(rep.Kinds) > 1 {
		draw("all", rep.Total)
	}
	for _, k := range load.Kinds() {
		if kind, ok := rep.Kinds[k.String()]; ok {
			draw(k.String(), kind)
		}
	}
	p.names(ends)
}

// nine is how many nines a percentile has: 1 for 90, 2 for 99.
func nine(q float64) float64 { return -math.Log10(1 - q/100) }

func pow10(x float64) float64 { return math.Pow(10, x) }

// logScale spans whole steps of 1, 2, 5 around values.
func logScale(low, high float64) scale {
	if !(low > 0) || math.IsInf(low, 0) {
		low = 0.001
	}
	high = math.Max(high, low)
	s := scale{low: steps()[0], high: steps()[1], log: true}
	for _, step := range steps() {
		if step <= low {
			s.low = step
		}
	}
	for _, step := range steps() {
		if s.high = step; step >= high && step > s.low {
			break
		}
	}
	return s
}

// steps are 1, 2, 5, 10, ... from a hundred nanoseconds to hours, in milliseconds.
func steps() []float64 {
	var all []float64
	for decade := -4.0; decade <= 7; decade++ {
		for _, digit := range []float64{1, 2, 5} {
			all = append(all, digit*pow10(decade))
		}
	}
	return all
}

// latencies draws the lines of an axis of milliseconds, at most about seven.
func (p *panel) latencies() {
	many := math.Log10(p.ys.high/p.ys.low) > 2.5
	for i, step := range steps() {
		if step < p.ys.low*0.999 || step > p.ys.high*1.001 || many && i%3 != 0 {
			continue
		}
		p.gridY(step, milliseconds(step))
	}
}

// milliseconds is a step of an axis in its unit.
func milliseconds(step float64) string {
	switch {
	case step > 999:
		return fmt.Sprintf("%.4g s", step/1000)
	case step > 0.999:
		return fmt.Sprintf("%.4g ms", step)
	default:
		return fmt.Sprintf("%.4g µs", step*1000)
	}
}

// overTime draws p50 and p99 of each interval.
func (rep *report) overTime(b *strings.Builder) {
	low, high := math.Inf(1), 0.0
	var p50, p99 [][2]float64
	value := func(v *float64) float64 {
		if v == nil {
			return math.NaN()
		}
		low, high = math.Min(low, *v), math.Max(high, *v)
		return *v
	}
	for i := range rep.Timeline {
		pt := &rep.Timeline[i]
		at := pt.At + pt.Length/2
		p50 = append(p50, [2]float64{at, value(pt.P50)})
		p99 = append(p99, [2]float64{at, value(pt.P99)})
	}
	p := &panel{b: b, left: marginLeft, right: plotRight, top: 406, bottom: 544, xs: rep.seconds(), ys: logScale(low, high)}
	p.frame("By the second of the answer")
	p.grids(false)
	p.latencies()
	p.line("p50", p50)
	p.line("p99", p99)
	p.names(append(lastName(p, "p50", p50), lastName(p, "p99", p99)...))
}

// lastName is a line's name at its last point, nothing for an empty line.
func lastName(p *panel, title string, points [][2]float64) []name {
	for _, pt := range slices.Backward(points) {
		if !math.IsNaN(pt[1]) {
			return []name{{text: title, colour: title, y: p.y(pt[1])}}
		}
	}
	return nil
}

// rates draws the answers a second, and errors where there are any.
func (rep *report) rates(b *strings.Builder) {
	high := math.Max(rep.AskedRate, 1)
	var answers, errors [][2]float64
	for i := range rep.Timeline {
		pt := &rep.Timeline[i]
		at, rate := pt.At+pt.Length/2, float64(pt.Answered)/pt.Length
		if pt.At >= rep.WindowSeconds {
			rate = math.NaN() // the last answers are no rate
		} else {
			high = math.Max(high, rate)
		}
		answers = append(answers, [2]float64{at, rate})
		errors = append(errors, [2]float64{at, float64(pt.Errors) / pt.Length})
		high = math.Max(high, errors[i][1])
	}
	top := niceAbove(high)
	p := &panel{b: b, left: marginLeft, right: plotRight, top: 600, bottom: 664, xs: rep.seconds(), ys: scale{high: top}}
	p.frame("Answers a second")
	p.grids(true)
	for _, v := range []float64{0, top / 2, top} {
		p.gridY(v, short(v))
	}
	if rep.AskedRate > 0 {
		y := p.y(rep.AskedRate)
		fmt.Fprintf(b, `<line class="axis" stroke-dasharray="4 4" x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f"/>`+"\n", p.left, y, p.right, y)
		fmt.Fprintf(b, `<text class="dim" x="%.1f" y="%.1f">asked</text>`+"\n", p.right+8, y+4)
	}
	p.line("fill", answers)
	if rep.Total.Pushes > 0 && rep.ErrorShare > 0 {
		p.line("bad", errors)
		p.names([]name{{text: "errors", colour: "bad", y: p.y(0)}})
	}
}

// seconds is the axis of time. The last answers may come after the window.
func (rep *report) seconds() scale {
	end := rep.WindowSeconds
	if n := len(rep.Timeline); n > 0 {
		end = math.Max(end, rep.Timeline[n-1].At+rep.Timeline[n-1].Length)
	}
	return scale{high: math.Max(end, 0.001)}
}

func (p *panel) grids(labels bool) {
	step := niceAbove(p.xs.high / 10)
	for i := 0; float64(i)*step <= p.xs.high*1.0001; i++ {
		v, label := float64(i)*step, ""
		if labels {
			label = fmt.Sprintf("%.4g s", v)
		}
		p.gridX(v, label)
	}
}

// niceAbove is the least of 1, 2, 2.5, 5 times a power of ten that is at least v.
func niceAbove(v float64) float64 {
	decade := pow10(math.Floor(math.Log10(v)))
	for _, digit := range []float64{1, 2, 2.5, 5} {
		if digit*decade >= v*0.9999 {
			return digit * decade
		}
	}
	return 10 * decade
}

// short is a count in few letters.
func short(v float64) string {
	switch {
	case v >= 1e6:
		return fmt.Sprintf("%.4gM", v/1e6)
	case v >= 1e3:
		return fmt.Sprintf("%.4gk", v/1e3)
	default:
		return fmt.Sprintf("%.4g", v)
	}
}

func clip(text string, n int) string {
	if r := []rune(text); len(r) > n {
		return string(r[:n-1]) + "…"
	}
	return text
}
