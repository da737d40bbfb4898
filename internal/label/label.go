// Package label writes names of metrics with their labels, as Prometheus reads them.
//
// strconv.Quote and %q are for Go: they write what Go does not print, such as the joiner in many
// emoji, as \u200d, and Prometheus refuses the whole page for that. In its text format a value is
// UTF-8 as it is, and only the backslash, the quote and the line break are escaped.
package label

import "strings"

// Name is a metric's name with labels: pairs of a key and its value. Invalid UTF-8 in a value
// becomes U+FFFD.
func Name(metric string, pairs ...string) string {
	var b strings.Builder
	b.WriteString(metric)
	for i := 0; i+1 < len(pairs); i += 2 {
		if i == 0 {
			b.WriteByte('{')
		} else {
			b.WriteByte(',')
		}
		b.WriteString(pairs[i])
		b.WriteString(`="`)
		value := strings.ToValidUTF8(pairs[i+1], "\uFFFD")
		_, _ = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`).WriteString(&b, value) // a Builder does not fail
		b.WriteByte('"')
	}
	if len(pairs) > 0 {
		b.WriteByte('}')
	}
	return b.String()
}
