package config

import (
	"errors"
	"fmt"
	"math"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// ErrUsage is wrapped by every error that the person who starts the program can
// mend: a bad flag, an unknown key, a value out of bounds.
var ErrUsage = errors.New("usage")

// Bounds of durations.
const (
	Positive = time.Duration(1) // at least a nanosecond: zero is refused
	OrZero   = time.Duration(0) // zero allowed, negative refused
)

// How the source of a value is told to people.
const (
	sourceFlag = "flag --"
	sourceEnv  = "environment variable "
)

// maxDuration bounds durations: a deadline further away is a typing error.
const maxDuration = 24 * time.Hour

// Key is one setting.
type Key struct {
	// Static after binding.
	name     string   // where it stands in the file: "grpc_port", "etcd.endpoints"
	envs     []string // the environment variables, first come first served
	help     string
	def      string // the default as text
	bounds   string // what is allowed, for people
	secret   bool   // not a flag, and not to be printed
	path     string // of a secret: the file that holds it
	set      func(text string) error
	isSwitch bool          // a flag that needs no value
	text     func() string // the value now, as text
	sections *sections     // nil: not a list of sections

	// Written by Load.
	source string
}

// Env names further environment variables that set the key, looked at after its
// own.
func (k *Key) Env(names ...string) *Key {
	k.envs = append(k.envs, names...)
	return k
}

// Flag is the name of the command-line flag. A secret has none: all users of a machine
// see the command lines of all processes.
func (k *Key) Flag() string {
	if k.secret {
		return ""
	}
	return flagOf(k.name)
}

func flagOf(name string) string { return strings.NewReplacer("_", "-", ".", "-").Replace(name) }

// Name is where the key stands in the file, sections and names joined by dots.
func (k *Key) Name() string { return k.name }

// Variable is its environment variable.
func (k *Key) Variable() string { return k.envs[0] }

// IsSet tells whether anything but the default set the key. Valid after Load.
func (k *Key) IsSet() bool { return k.source != "" }

// Overridden tells whether a flag or an environment variable set the key. Valid
// after Load.
func (k *Key) Overridden() bool {
	return strings.HasPrefix(k.source, sourceFlag) || strings.HasPrefix(k.source, sourceEnv)
}

// Set is the settings of one program.
type Set struct {
	keys []*Key
}

// Keys are all keys, in the order in which they were bound.
func (s *Set) Keys() []*Key { return slices.Clone(s.keys) }

// New returns a Set without keys.
func New() *Set { return &Set{} }

func (s *Set) add(k *Key) *Key {
	for _, other := range s.keys {
		if other.name == k.name {
			panic("config: key bound twice: " + k.name)
		}
	}
	k.envs = []string{strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))}
	s.keys = append(s.keys, k)
	return k
}

// Text binds a text. It may not be empty unless its default is.
func (s *Set) Text(p *string, name, def, help string) *Key {
	*p = def
	return s.add(&Key{
		name: name, help: help, def: def,
		text: func() string { return *p },
		set: func(text string) error {
			if text == "" && def != "" {
				return errors.New("must not be empty")
			}
			if err := checkText(text); err != nil {
				return err
			}
			*p = text
			return nil
		},
	})
}

// Secret binds a text that is no flag and is not printed. The key name_file names a file
// that holds it, in place of the text itself.
func (s *Set) Secret(p *string, name, help string) *Key {
	k := s.Text(p, name, "", help)
	k.secret = true
	s.Text(&k.path, name+"_file", "", "File that holds "+name+", in place of it.")
	return k
}

// ID binds a name that stands in etcd keys and metric labels: 1 to 256 bytes
// without control characters or slashes.
func (s *Set) ID(p *string, name, def, help string) *Key {
	k := s.Text(p, name, def, help)
	set := k.set
	k.set = func(text string) error {
		switch {
		case text == "" || len(text) > 256:
			return errors.New("must have 1 to 256 bytes")
		case strings.ContainsAny(text, "/"):
			return fmt.Errorf("%q must not contain a slash", text)
		}
		return set(text)
	}
	return k
}

// Choice binds one of a few words.
func (s *Set) Choice(p *string, name, def, help string, words ...string) *Key {
	k := s.Text(p, name, def, help)
	k.bounds = strings.Join(words, ", ")
	k.set = func(text string) error {
		if !slices.Contains(words, strings.ToLower(text)) {
			return fmt.Errorf("%q is none of %s", text, k.bounds)
		}
		*p = strings.ToLower(text)
		return nil
	}
	return k
}

// checkText refuses what could not be shown, or written to a file and read back.
func checkText(text string) error {
	if !utf8.ValidString(text) {
		return errors.New("is not valid UTF-8")
	}
	if i := strings.IndexFunc(text, unicode.IsControl); i >= 0 {
		return fmt.Errorf("has a control character at byte %d", i)
	}
	return nil
}

// List binds texts separated by commas, or a YAML list.
func (s *Set) List(p *[]string, name, def, help string) *Key {
	split := func(text string) []string {
		var list []string
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				list = append(list, part)
			}
		}
		return list
	}
	*p = split(def)
	return s.add(&Key{
		name: name, help: help, def: def,
		text: func() string { return strings.Join(*p, ",") },
		set: func(text string) error {
			list := split(text)
			if len(list) == 0 && def != "" {
				return errors.New("must not be empty")
			}
			if err := checkText(text); err != nil {
				return err
			}
			*p = list
			return nil
		},
	})
}

// Int binds a whole number between lo and hi, both included.
func (s *Set) Int(p *int, name string, def, lo, hi int, help string) *Key {
	*p = def
	return s.add(&Key{
		name: name, help: help, def: strconv.Itoa(def), bounds: bounds(strconv.Itoa(lo), strconv.Itoa(hi), hi >= math.MaxInt32),
		text: func() string { return strconv.Itoa(*p) },
		set: func(text string) error {
			n, err := strconv.Atoi(text)
			if err != nil {
				return fmt.Errorf("%q is not a whole number", text)
			}
			if n < lo || n > hi {
				return fmt.Errorf("%s must be %s", text, bounds(strconv.Itoa(lo), strconv.Itoa(hi), hi == math.MaxInt))
			}
			*p = n
			return nil
		},
	})
}

// Auto binds a whole number between 1 and hi, or the word auto for the number
// that fits the machine.
func (s *Set) Auto(p *int, name string, auto, hi int, help string) *Key {
	return s.Int(p, name, auto, 1, hi, help).auto(p, auto)
}

// AutoOrNone binds a bound as Auto does, whose auto leaves 0. It may also be 0 for no bound, which
// leaves -1.
func (s *Set) AutoOrNone(p *int, name string, hi int, help string) *Key {
	return s.Auto(p, name, 0, hi, help).word(p, "0", -1)
}

// AutoBytes binds a size between lo and hi, or the word auto, which leaves 0.
func (s *Set) AutoBytes(p *int, name string, lo, hi int, help string) *Key {
	return s.Bytes(p, name, 0, lo, hi, help).auto(p, 0)
}

// auto makes a word of the default.
func (k *Key) auto(p *int, auto int) *Key {
	k.def = "auto"
	return k.word(p, k.def, auto)
}

// word makes a word of one value.
func (k *Key) word(p *int, word string, value int) *Key {
	set, number := k.set, k.text
	k.bounds += ", or " + word
	k.text = func() string {
		if *p == value {
			return word
		}
		return number()
	}
	k.set = func(text string) error {
		if text == word {
			*p = value
			return nil
		}
		return set(text)
	}
	return k
}

// Port binds a TCP port. 0 lets the system choose one.
func (s *Set) Port(p *int, name string, def int, help string) *Key {
	k := s.Int(p, name, def, 0, 65535, help)
	set := k.set
	k.set = func(text string) error {
		if err := set(text); err != nil {
			return fmt.Errorf("%w (a TCP port, 0 for any free one)", err)
		}
		return nil
	}
	return k
}

// Float binds a number between lo and hi, both included.
func (s *Set) Float(p *float64, name string, def, lo, hi float64, help string) *Key {
	format := func(f float64) string { return strconv.FormatFloat(f, 'g', -1, 64) }
	*p = def
	return s.add(&Key{
		name: name, help: help, def: format(def), bounds: bounds(format(lo), format(hi), false),
		text: func() string { return format(*p) },
		set: func(text string) error {
			f, err := strconv.ParseFloat(text, 64)
			if err != nil {
				return fmt.Errorf("%q is not a number", text)
			}
			if !(f >= lo && f <= hi) { // also refuses NaN
				return fmt.Errorf("%s must be %s", text, bounds(format(lo), format(hi), false))
			}
			*p = f
			return nil
		},
	})
}

// Bool binds a switch.
func (s *Set) Bool(p *bool, name string, def bool, help string) *Key {
	*p = def
	return s.add(&Key{
		name: name, help: help, def: strconv.FormatBool(def), isSwitch: true, bounds: "true, false",
		text: func() string { return strconv.FormatBool(*p) },
		set: func(text string) error {
			switch strings.ToLower(text) {
			case "true", "yes", "on", "1":
				*p = true
			case "false", "no", "off", "0":
				*p = false
			default:
				return fmt.Errorf("%q is neither true nor false", text)
			}
			return nil
		},
	})
}

// Duration binds a length of time of at least lo, as "300ms" or "1m30s".
func (s *Set) Duration(p *time.Duration, name string, def, lo time.Duration, help string) *Key {
	return s.DurationUpTo(p, name, def, lo, maxDuration, help)
}

// DurationUpTo is Duration for what may be longer than a day.
func (s *Set) DurationUpTo(p *time.Duration, name string, def, lo, hi time.Duration, help string) *Key {
	*p = def
	return s.add(&Key{
		name: name, help: help, def: formatDuration(def), bounds: bounds(formatDuration(lo), formatDuration(hi), false),
		text: func() string { return formatDuration(*p) },
		set: func(text string) error {
			d, err := time.ParseDuration(text)
			switch {
			case err != nil:
				return fmt.Errorf("%q is not a duration like 300ms or 1m30s", text)
			case d < 0 || d == 0 && lo > 0:
				return fmt.Errorf("%s must be above zero", text)
			case d < lo || d > hi:
				return fmt.Errorf("%s must be %s", text, bounds(formatDuration(lo), formatDuration(hi), false))
			}
			*p = d
			return nil
		},
	})
}

// formatDuration writes 1m and 24h, not 1m0s and 24h0m0s.
func formatDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// Bytes binds a size between lo and hi: a number of bytes, or with KiB, MiB, GiB.
func (s *Set) Bytes(p *int, name string, def, lo, hi int, help string) *Key {
	*p = def
	return s.add(&Key{
		name: name, help: help, def: FormatBytes(def), bounds: bounds(FormatBytes(lo), FormatBytes(hi), hi >= math.MaxInt32),
		text: func() string { return FormatBytes(*p) },
		set: func(text string) error {
			n, err := ParseBytes(text)
			if err != nil {
				return err
			}
			if n < lo || n > hi {
				return fmt.Errorf("%s must be %s", text, bounds(FormatBytes(lo), FormatBytes(hi), hi == math.MaxInt))
			}
			*p = n
			return nil
		},
	})
}

// Address binds HOST:PORT. Empty is allowed when the default is.
func (s *Set) Address(p *string, name, def, help string) *Key {
	k := s.Text(p, name, def, help)
	set := k.set
	k.set = func(text string) error {
		if text == "" && def == "" {
			return set(text)
		}
		if err := CheckAddress(text); err != nil {
			return err
		}
		return set(text)
	}
	return k
}

// CheckAddress tells what is wrong with a HOST:PORT.
func CheckAddress(text string) error {
	host, port, err := net.SplitHostPort(text)
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT", text)
	}
	if n, err := strconv.Atoi(port); err != nil || n < 1 || n > 65535 || host == "" {
		return fmt.Errorf("%q is not HOST:PORT with a port from 1 to 65535", text)
	}
	return nil
}

// Loopback tells whether a listen address can be reached from this machine only.
func Loopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip := net.ParseIP(strings.Trim(host, "[]"))
	return ip != nil && ip.IsLoopback()
}

func bounds(lo, hi string, open bool) string {
	if open {
		return "at least " + lo
	}
	return "from " + lo + " to " + hi
}

// units are the sizes that Bytes reads, largest first.
func units() []struct {
	name string
	size int
} {
	return []struct {
		name string
		size int
	}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}
}

// ParseBytes reads "262144", "256KiB", "1 MiB".
func ParseBytes(text string) (int, error) {
	number, size := strings.TrimSpace(text), 1
	for _, u := range units() {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, size = strings.TrimSpace(rest), u.size
			break
		}
	}
	n, err := strconv.Atoi(number)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size like 262144 or 256KiB", text)
	}
	if n > math.MaxInt/size || n < math.MinInt/size {
		return 0, fmt.Errorf("%s is too large", text)
	}
	return n * size, nil
}

// FormatBytes writes a size with the largest unit that divides it.
func FormatBytes(n int) string {
	for _, u := range units() {
		if n != 0 && u.size > 1 && n%u.size == 0 {
			return strconv.Itoa(n/u.size) + u.name
		}
	}
	return strconv.Itoa(n)
}
