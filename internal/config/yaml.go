package config

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/parser"
)

// maxFile bounds a configuration file.
const maxFile = 1 << 20

// value is one leaf of a file, or an empty section.
type value struct {
	name    string // dotted
	text    string
	line    int
	section bool
}

func (v *value) where(path string) string { return path + ":" + strconv.Itoa(v.line) }

// document is a parsed file: its leaves in the order of the file.
type document struct {
	path   string
	values []value
}

// lookup finds a leaf. Of a section that stands where a leaf is expected it
// returns the first key.
func (d *document) lookup(name string) (value, bool) {
	for _, v := range d.values {
		if v.name == name {
			return v, true
		}
	}
	return value{}, false
}

// parse reads a YAML file. Variables are cut out of the text before and put
// into the values after YAML has been read: they may stand where YAML would not
// allow their braces, and what they hold is never read as YAML.
func parse(path string, text []byte, lookupEnv func(string) (string, bool)) (*document, error) {
	if len(text) > maxFile {
		return nil, fmt.Errorf("%s: larger than %s", path, FormatBytes(maxFile))
	}
	vars := &variables{lookupEnv: lookupEnv}
	file, err := parser.ParseBytes([]byte(vars.cut(string(text))), 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %s", path, oneLine(vars.restore(err.Error())))
	}
	d := &document{path: path}
	docs := 0
	for _, doc := range file.Docs {
		if doc.Body == nil {
			continue
		}
		if docs++; docs > 1 {
			return nil, fmt.Errorf("%s: more than one YAML document", path)
		}
		if err := d.walk(doc.Body, "", vars); err != nil {
			return nil, fmt.Errorf("%s:%w", path, err)
		}
	}
	return d, nil
}

// walk collects the leaves below node. Its errors start with the line.
func (d *document) walk(node ast.Node, name string, vars *variables) error {
	switch n := node.(type) {
	case *ast.MappingNode:
		if len(n.Values) == 0 && name != "" {
			d.values = append(d.values, value{name: name, line: lineOf(n), section: true})
		}
		for _, entry := range n.Values {
			if err := d.entry(entry, name, vars); err != nil {
				return err
			}
		}
		return nil
	case *ast.MappingValueNode:
		return d.entry(n, name, vars)
	case *ast.CommentGroupNode:
		return nil
	}
	if name == "" {
		return fmt.Errorf("%d: must hold keys and values", lineOf(node))
	}
	text, err := scalar(node, vars)
	if err != nil {
		return fmt.Errorf("%d: %s: %w", lineOf(node), name, err)
	}
	d.values = append(d.values, value{name: name, text: text, line: lineOf(node)})
	return nil
}

func (d *document) entry(entry *ast.MappingValueNode, name string, vars *variables) error {
	key := vars.restore(entry.Key.GetToken().Value)
	if name != "" {
		key = name + "." + key
	}
	if _, dup := d.lookup(key); dup {
		return fmt.Errorf("%d: %s is set twice", lineOf(entry.Key), key)
	}
	if _, empty := entry.Value.(*ast.NullNode); empty {
		// An empty section is none at all; an empty value is a mistake, which the
		// line below shows when the key turns out to be no section.
		d.values = append(d.values, value{name: key, line: lineOf(entry.Key), section: true})
		return nil
	}
	return d.walk(entry.Value, key, vars)
}

// scalar is the text of a value; a list becomes its texts with commas between.
func scalar(node ast.Node, vars *variables) (string, error) {
	switch n := node.(type) {
	case *ast.StringNode:
		return vars.fill(n.Value)
	case *ast.LiteralNode:
		return vars.fill(n.Value.Value)
	case *ast.IntegerNode, *ast.FloatNode, *ast.BoolNode, *ast.InfinityNode, *ast.NanNode:
		return n.GetToken().Value, nil
	case *ast.SequenceNode:
		texts := make([]string, 0, len(n.Values))
		for _, v := range n.Values {
			if _, nested := v.(*ast.SequenceNode); nested {
				return "", errors.New("a list in a list is not understood")
			}
			text, err := scalar(v, vars)
			if err != nil {
				return "", err
			}
			texts = append(texts, text)
		}
		return strings.Join(texts, ","), nil
	case *ast.NullNode:
		return "", errors.New("has no value")
	}
	return "", fmt.Errorf("a YAML %s is not understood here", strings.ToLower(node.Type().String()))
}

func lineOf(node ast.Node) int {
	if t := node.GetToken(); t != nil && t.Position != nil {
		return t.Position.Line
	}
	return 0
}

// oneLine shortens the parser's drawing of the place to its message.
func oneLine(text string) string {
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// variables stands in for the ${...} of one file while YAML is being read.
type variables struct {
	lookupEnv func(string) (string, bool)
	texts     []string // as written, by number
}

var (
	// variablePattern finds ${NAME} and ${NAME:default}, and $${ which is neither.
	variablePattern = regexp.MustCompile(`\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::([^}\n]*))?\}`)
	// markPattern finds what stands for them. No file has the control character.
	markPattern = regexp.MustCompile("\uE000([0-9]+)\uE001")
)

func (v *variables) cut(text string) string {
	return variablePattern.ReplaceAllStringFunc(text, func(found string) string {
		v.texts = append(v.texts, found)
		return "\uE000" + strconv.Itoa(len(v.texts)-1) + "\uE001"
	})
}

// restore puts the variables back as they were written.
func (v *variables) restore(text string) string {
	return markPattern.ReplaceAllStringFunc(text, func(mark string) string {
		return v.written(mark)
	})
}

func (v *variables) written(mark string) string {
	m := markPattern.FindStringSubmatch(mark)
	i, err := strconv.Atoi(m[1])
	if err != nil || i >= len(v.texts) {
		return mark
	}
	return v.texts[i]
}

// fill puts in what the variables hold.
func (v *variables) fill(text string) (string, error) {
	var missing error
	text = markPattern.ReplaceAllStringFunc(text, func(mark string) string {
		written := v.written(mark)
		if written == "$${" {
			return "${"
		}
		m := variablePattern.FindStringSubmatch(written)
		if m == nil {
			return mark
		}
		if held, ok := v.lookupEnv(m[1]); ok && held != "" {
			return held
		}
		if !strings.Contains(written, ":") {
			missing = fmt.Errorf("%s is not set and has no default", written)
		}
		return m[2]
	})
	return text, missing
}
