package load

import (
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// maxID is the longest id that a Push-Manager takes.
const maxID = 256

// pattern makes ids of numbers.
type pattern struct {
	before, after string
	width         int // with zeros in front
}

// CheckPattern tells what is wrong with a pattern like "u%d" or "user-%06d".
func CheckPattern(text string) error {
	_, err := parsePattern(text)
	return err
}

func parsePattern(text string) (pattern, error) {
	before, rest, found := strings.Cut(text, "%")
	digits, after, ends := strings.Cut(rest, "d")
	p := pattern{before: before, after: after}
	if found && ends && digits != "" {
		var err error
		p.width, err = strconv.Atoi(digits)
		ends = err == nil && digits[0] == '0' && p.width > 0
	}
	switch {
	case !found || !ends || strings.Contains(after, "%"):
		return pattern{}, fmt.Errorf("%q does not have one %%d, or one like %%06d", text)
	case !utf8.ValidString(text):
		return pattern{}, fmt.Errorf("%q is not UTF-8", text)
	case len(before)+len(after)+max(p.width, len("1073741824")) > maxID:
		return pattern{}, fmt.Errorf("%q gives ids of more than %d bytes", text, maxID)
	}
	return p, nil
}

func (p *pattern) size(n int) int {
	return len(p.before) + max(p.width, decimals(n)) + len(p.after)
}

func (p *pattern) append(b []byte, n int) []byte {
	b = append(b, p.before...)
	for pad := p.width - decimals(n); pad > 0; pad-- {
		b = append(b, '0')
	}
	b = strconv.AppendInt(b, int64(n), 10)
	return append(b, p.after...)
}

func decimals(n int) int {
	d := 1
	for ; n >= 10; n /= 10 {
		d++
	}
	return d
}
