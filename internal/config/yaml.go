package config

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds a configuration file: all keys with their help have 20 KB.
const maxFile = 256 << 10

// value is one leaf of a file, or an empty section.
type value struct {
	name    string // dotted
	text    string
	line    int
	section bool

	sections int // of a list of sections, how many there are; their leaves follow
}

// where is the place in a file, or the path alone of what is no file.
func (v *value) where(path string) string {
	if v.line == 0 {
		return path
	}
	return path + ":" + strconv.Itoa(v.line)
}

// document is a parsed file: its leaves in the order of the file.
type document struct {
	path   string
	values []value
	byName map[string]int // where they stand
}

// lookup finds a leaf. Of a section that stands where a leaf is expected it
// returns the first key.
func (d *document) lookup(name string) (value, bool) {
	i, ok := d.byName[name]
	if !ok {
		return value{}, false
	}
	return d.values[i], true
}

func (d *document) add(v value) {
	if _, ok := d.byName[v.name]; !ok {
		d.byName[v.name] = len(d.values)
	}
	d.values = append(d.values, v)
}

// maxDepth bounds sections in sections: no key is that deep.
const maxDepth = 16

// parse reads a YAML file. Variables are cut out of the text before and put
// into the values after YAML has been read: they may stand where YAML would not
// allow their braces, and what they hold is never read as YAML.
func parse(path string, text []byte, lookupEnv func(string) (string, bool)) (d *document, err error) {
	defer func() {
		if e := recover(); e != nil { // of the library, on a text that nobody has thought of
			d, err = nil, fmt.Errorf("%s: is not understood: %.100s", path, oneLine(fmt.Sprint(e)))
		}
	}()
	vars := &variables{lookupEnv: lookupEnv}
	decoder := yaml.NewDecoder(strings.NewReader(vars.cut(string(text))))
	d = &document{path: path, byName: map[string]int{}}
	for docs := 0; ; {
		var doc yaml.Node
		switch err := decoder.Decode(&doc); {
		case errors.Is(err, io.EOF):
			return d, nil
		case err != nil:
			text := strings.TrimPrefix(vars.restore(err.Error()), "yaml: ")
			return nil, fmt.Errorf("%s: %.300s", path, oneLine(text))
		}
		if len(doc.Content) == 0 || null(doc.Content[0]) {
			continue
		}
		if docs++; docs > 1 {
			return nil, fmt.Errorf("%s: more than one YAML document", path)
		}
		if err := d.walk(doc.Content[0], "", 0, vars); err != nil {
			return nil, fmt.Errorf("%s:%w", path, err)
		}
	}
}

// walk collects the leaves below node. Its errors start with the line.
func (d *document) walk(node *yaml.Node, name string, depth int, vars *variables) error {
	if depth > maxDepth {
		return fmt.Errorf("%d: nested too deeply", node.Line)
	}
	if node.Kind != yaml.MappingNode || node.Anchor != "" {
		if name == "" {
			return fmt.Errorf("%d: must hold keys and values", node.Line)
		}
		if isSections(node) {
			d.add(value{name: name, line: node.Line, sections: len(node.Content)})
			for i, section := range node.Content {
				path := fmt.Sprintf("%s[%d]", name, i)
				if section.Kind != yaml.MappingNode {
					return fmt.Errorf("%d: %s must be a section, as others in the list are", section.Line, path)
				}
				if err := d.walk(section, path, depth+1, vars); err != nil {
					return err
				}
			}
			return nil
		}
		text, err := scalar(node, vars)
		if err != nil {
			return fmt.Errorf("%d: %s: %w", node.Line, name, err)
		}
		d.add(value{name: name, text: text, line: node.Line})
		return nil
	}
	if len(node.Content) == 0 && name != "" {
		d.add(value{name: name, line: node.Line, section: true})
	}
	for i := 0; i+1 < len(node.Content); i += 2 {
		keyNode, below := node.Content[i], node.Content[i+1]
		if keyNode.Kind != yaml.ScalarNode || len(keyNode.Value) > maxKey || strings.Contains(keyNode.Value, "[") { // which is for places in a list
			return fmt.Errorf("%d: a key is no name", keyNode.Line)
		}
		key := vars.restore(keyNode.Value)
		if name != "" {
			key = name + "." + key
		}
		if _, dup := d.lookup(key); dup {
			return fmt.Errorf("%d: %s is set twice", keyNode.Line, key)
		}
		if null(below) {
			// An empty section is none at all; an empty value is a mistake, which the
			// line below shows when the key turns out to be no section.
			d.add(value{name: key, line: keyNode.Line, section: true})
			continue
		}
		if err := d.walk(below, key, depth+1, vars); err != nil {
			return err
		}
	}
	return nil
}

// isSections tells whether a list holds sections.
func isSections(node *yaml.Node) bool {
	return node.Kind == yaml.SequenceNode && node.Anchor == "" && node.Style&yaml.TaggedStyle == 0 &&
		slices.ContainsFunc(node.Content, func(n *yaml.Node) bool { return n.Kind == yaml.MappingNode })
}

// maxKey bounds the name of a key in its section.
const maxKey = 256

// null tells whether nothing stands there, or the word for it.
func null(node *yaml.Node) bool {
	return node.Kind == yaml.ScalarNode && node.Tag == "!!null" && node.Anchor == ""
}

// scalar is the text of a value; a list becomes its texts with commas between.
func scalar(node *yaml.Node, vars *variables) (string, error) {
	switch {
	case node.Anchor != "" || node.Kind == yaml.AliasNode:
		return "", errors.New("YAML anchors are not understood")
	case node.Style&yaml.TaggedStyle != 0:
		return "", errors.New("YAML tags are not understood")
	case null(node):
		return "", errors.New("has no value")
	case node.Kind == yaml.ScalarNode:
		return vars.fill(node.Value)
	case node.Kind != yaml.SequenceNode:
		return "", errors.New("a section is not understood here")
	}
	texts := make([]string, 0, len(node.Content))
	for _, v := range node.Content {
		if v.Kind == yaml.SequenceNode {
			return "", errors.New("a list in a list is not understood")
		}
		text, err := scalar(v, vars)
		if err != nil {
			return "", err
		}
		texts = append(texts, text)
	}
	return strings.Join(texts, ","), nil
}

// oneLine shortens the parser's error to its message.
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

// written is the variable that a mark stands for, or the mark, where the file has it itself.
func (v *variables) written(mark string) string {
	number := strings.TrimSuffix(strings.TrimPrefix(mark, "\uE000"), "\uE001")
	i, err := strconv.Atoi(number)
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
		inner, isVariable := strings.CutPrefix(written, "${")
		switch {
		case written == "$${":
			return "${"
		case !isVariable:
			return mark
		}
		name, fallback, hasFallback := strings.Cut(strings.TrimSuffix(inner, "}"), ":")
		if held, ok := v.lookupEnv(name); ok && held != "" {
			return held
		}
		if !hasFallback {
			missing = fmt.Errorf("%s is not set and has no default", written)
		}
		return fallback
	})
	return text, missing
}
