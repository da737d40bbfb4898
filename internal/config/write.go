package config

import (
	"cmp"
	"fmt"
	"io"
	"regexp"
	"strings"
)

// Write writes the settings in force as a YAML file that Load reads back, but for what is masked. With
// help each key has its description above it, otherwise its source beside it.
func (s *Set) Write(w io.Writer, help bool) error {
	var b strings.Builder
	var open []string // the sections that the key before stands in
	for _, k := range s.ordered() {
		path := strings.Split(k.name, ".")
		sections, name := path[:len(path)-1], path[len(path)-1]
		for i, section := range sections {
			if i < len(open) && open[i] == section {
				continue
			}
			if open = open[:min(i, len(open))]; help && i == 0 {
				b.WriteString("\n")
			}
			b.WriteString(strings.Repeat("  ", i) + section + ":\n")
			open = append(open, section)
		}
		open = open[:len(sections)]
		k.write(&b, strings.Repeat("  ", len(sections)), name, help)
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return fmt.Errorf("write the configuration: %w", err)
	}
	return nil
}

// WriteTable writes the keys as rows of a table in Markdown.
func (s *Set) WriteTable(w io.Writer) error {
	var b strings.Builder
	b.WriteString("| key | variable | default | allowed | |\n|---|---|---|---|---|\n")
	code := func(text string) string {
		if text == "" {
			return ""
		}
		return "`" + text + "`"
	}
	for _, k := range s.ordered() {
		help := strings.ReplaceAll(k.help, "|", `\|`)
		if k.secret {
			help += " Not a flag."
		}
		fmt.Fprintf(&b, "| `%s` | `%s` | %s | %s | %s |\n", k.name, k.envs[0], code(k.def), k.bounds, help)
		if k.sections == nil {
			continue
		}
		for _, field := range k.sections.fields {
			fmt.Fprintf(&b, "| `%s[].%s` | | %s | %s | %s |\n", k.name, field.name, code(field.def), field.bounds, strings.ReplaceAll(field.help, "|", `\|`))
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (k *Key) write(b *strings.Builder, indent, name string, help bool) {
	if help {
		b.WriteString(indent + "# " + k.help + "\n")
	}
	if k.sections != nil {
		k.writeSections(b, indent, name, help)
		return
	}
	b.WriteString(indent + name + ": " + quote(k.shown()) + k.comment(help) + "\n")
}

// shown is the value as it may be shown.
func (k *Key) shown() string {
	text := k.text()
	if k.secret && text != "" {
		return mask
	}
	return urlSecrets.ReplaceAllStringFunc(text, func(url string) string {
		part := urlSecrets.FindStringSubmatch(url)
		for i, with := range map[int]string{2: mask + "@", 4: "?" + mask} {
			if part[i] != "" {
				part[i] = with
			}
		}
		return strings.Join(part[1:], "")
	})
}

// mask is shown in the place of a secret.
const mask = "********"

// urlSecrets finds what of a URL may be a secret: a name with a password before the host, and the query.
var urlSecrets = regexp.MustCompile(`(\w://)([^/?#@\s,]*@)?([^?#\s,]*)(\?[^#\s,]*)?`)

// Value is a setting in force.
type Value struct{ Name, Value, Source string }

// Values are all settings in force, in the order of Write and with what it masks. Of a list of sections the value is the YAML.
func (s *Set) Values() []Value {
	var all []Value
	for _, k := range s.ordered() {
		v := Value{Name: k.name, Source: cmp.Or(k.source, "default")}
		switch {
		case k.sections == nil:
			v.Value = k.shown()
		case len(k.sections.filled) > 0:
			var b strings.Builder
			k.writeSections(&b, "", k.name, false)
			_, v.Value, _ = strings.Cut(strings.TrimSpace(b.String()), "\n") // below its name
		}
		all = append(all, v)
	}
	return all
}

// comment is the source of a key, unless it has its description above it.
func (k *Key) comment(help bool) string {
	switch {
	case help:
		return ""
	case k.source == "":
		return " # default"
	}
	return " # " + k.source
}

// ordered returns the keys with those of a section side by side, plain ones
// first.
func (s *Set) ordered() []*Key {
	var heads []string
	byHead := map[string][]*Key{}
	for _, k := range s.keys {
		head := ""
		if before, _, found := strings.Cut(k.name, "."); found {
			head = before
		}
		if _, ok := byHead[head]; !ok && head != "" {
			heads = append(heads, head)
		}
		byHead[head] = append(byHead[head], k)
	}
	keys := byHead[""]
	for _, head := range heads {
		keys = append(keys, byHead[head]...)
	}
	return keys
}

// quote writes a text so that YAML reads it as that text.
func quote(text string) string {
	plain := text != ""
	for _, r := range text {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:", r)) {
			plain = false
		}
	}
	if plain && !strings.HasSuffix(text, ":") && !strings.HasPrefix(text, "-") && !strings.HasPrefix(text, ":") {
		return text
	}
	return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`, "${", "$${").Replace(text) + `"`
}
