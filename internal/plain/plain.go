// Package plain makes text from outside fit for a log, a report or a reply.
package plain

import (
	"strings"
	"unicode"
	"unicode/utf8"
)

// Line is text as one line of what can be printed, most bytes at most. What cannot be printed
// and what is not UTF-8 becomes a space. Of a long text only the part that is kept stays in
// memory.
func Line(text string, most int) string {
	if len(text) > most {
		for most > 0 && !utf8.RuneStart(text[most]) {
			most--
		}
		text = strings.Clone(text[:most])
	}
	return strings.Map(func(r rune) rune {
		if r != utf8.RuneError && unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, text)
}
