package config

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"go.yaml.in/yaml/v3"
)

// sections is what makes a Key a list of sections with equal fields.
type sections struct {
	most   int
	fields []*Key                               // of a section that nobody has
	fill   func(from *document, n int) []string // takes n sections of a document, or returns what is wrong
	filled []*Set                               // those in force
}

// Sections binds a list of at most most sections, each with the fields that bind adds to its Set: texts and numbers as
// everywhere, but no secrets and no lists of sections. In the file it is a YAML list; a flag or a variable holds the same
// as one text, such as [{issuer: "https://a.example", audience: b}]. Fields that are not bound are refused.
func Sections[T any](s *Set, p *[]T, name string, most int, help string, bind func(*T, *Set)) *Key {
	*p = nil
	bound := func(path string, item *T) *Set {
		set := New()
		bind(item, set)
		for _, field := range set.keys {
			if field.secret || field.sections != nil {
				panic("config: not for a section of a list: " + field.name)
			}
			field.name = path + field.name
		}
		return set
	}
	k := s.add(&Key{name: name, help: help, bounds: fmt.Sprintf("at most %d sections", most)})
	k.sections = &sections{
		most:   most,
		fields: bound("", new(T)).keys,
		fill: func(from *document, n int) (problems []string) {
			var items []T // nil for none, as without any source
			if n > 0 {
				items = make([]T, n)
			}
			filled := make([]*Set, n)
			for i := range items {
				filled[i] = bound(fmt.Sprintf("%s[%d].", name, i), &items[i])
				problems = append(problems, filled[i].load(&Options{LookupEnv: noEnv}, from)...)
			}
			if len(problems) == 0 {
				*p, k.sections.filled = items, filled
			}
			return problems[:min(len(problems), maxProblems)]
		},
	}
	k.text = func() string { return "" } // see writeSections
	k.set = func(text string) error {
		if text == "" {
			*p, k.sections.filled = nil, nil
			return nil
		}
		d, err := parseSections(name, text)
		if err != nil {
			return err
		}
		d.path = k.source // of the fields as well
		for i := range d.values {
			d.values[i].line = 0
			if err := k.knownBelow(d.values[i]); err != nil {
				return err
			}
		}
		list, _ := d.lookup(name)
		if list.sections > most {
			return fmt.Errorf("has more than %d sections", most)
		}
		problems := k.sections.fill(d, list.sections)
		for i := range problems {
			problems[i] = strings.TrimPrefix(problems[i], k.source+": ")
		}
		if len(problems) > 0 {
			return errors.New(strings.Join(problems, "; "))
		}
		return nil
	}
	return k
}

func noEnv(string) (string, bool) { return "", false }

// parseSections reads the YAML list that a flag or a variable holds. Its variables are text: who starts the program has
// filled them in.
func parseSections(name, text string) (d *document, err error) {
	defer func() {
		if recover() != nil { // of the library, on a text that nobody has thought of
			d, err = nil, errors.New("is not understood")
		}
	}()
	var doc yaml.Node
	decoder := yaml.NewDecoder(strings.NewReader(text))
	if err := decoder.Decode(&doc); err != nil {
		return nil, fmt.Errorf("is no YAML: %.300s", oneLine(strings.TrimPrefix(err.Error(), "yaml: ")))
	}
	if more := decoder.Decode(new(yaml.Node)); !errors.Is(more, io.EOF) {
		return nil, errors.New("is more than one YAML document")
	}
	if len(doc.Content) != 1 || doc.Content[0].Kind != yaml.SequenceNode {
		return nil, errors.New("is no list of sections such as [{key: value}]")
	}
	d = &document{byName: map[string]int{}}
	list := doc.Content[0]
	if len(list.Content) > 0 && !isSections(list) {
		return nil, errors.New("is no list of sections such as [{key: value}]")
	}
	if err := d.walk(list, name, 0, &variables{}); err != nil {
		_, after, _ := strings.Cut(err.Error(), ": ") // without the line
		return nil, errors.New(after)
	}
	return d, nil
}

// knownBelow tells what is wrong with the name of a value in the list.
func (k *Key) knownBelow(v value) error {
	rest := strings.TrimPrefix(v.name, k.name)
	at := "" // where in the list it stands: a name has no brackets of its own
	if strings.HasPrefix(rest, "[") {
		at = rest[:strings.Index(rest, "]")+1]
	}
	name := strings.TrimPrefix(rest[len(at):], ".")
	if name == "" {
		return nil // the list, or a section without anything
	}
	fields := Set{keys: k.sections.fields}
	if fields.known(value{name: name, section: v.section}) == nil {
		return nil
	}
	var here Set // the same, as they are named in the list
	for _, field := range fields.keys {
		here.keys = append(here.keys, &Key{name: k.name + at + "." + field.name})
	}
	return here.known(v)
}

// help names the fields.
func (l *sections) help() string {
	var names []string
	for _, field := range l.fields {
		names = append(names, field.name)
	}
	return " A YAML list of sections with " + strings.Join(names, ", ") + "."
}

// writeSections writes the list. With help, an empty one is followed by what a section has.
func (k *Key) writeSections(b *strings.Builder, indent, name string, help bool) {
	l := k.sections
	if len(l.filled) == 0 {
		b.WriteString(indent + name + ": []" + k.comment(help) + "\n")
		if help {
			for i, field := range l.fields {
				dash := "  "
				if i == 0 {
					dash = "- "
				}
				fmt.Fprintf(b, "%s#   %s%s: %s # %s\n", indent, dash, field.name, quote(field.def), field.help)
			}
		}
		return
	}
	b.WriteString(indent + name + ":" + k.comment(help) + "\n")
	for i, set := range l.filled {
		dash := "  - "
		for _, field := range set.keys {
			path := fmt.Sprintf("%s[%d].", k.name, i)
			fmt.Fprintf(b, "%s%s%s: %s%s\n", indent, dash, strings.TrimPrefix(field.name, path), quote(field.shown()), field.comment(help))
			dash = "    "
		}
	}
}
