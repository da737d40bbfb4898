package pushctl

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// The formats of -o.
const (
	formatTable = "table" // for people
	formatWide  = "wide"  // the same with more columns, where there are more
	formatJSON  = "json"  // one object a line
	formatYAML  = "yaml"  // one document each, which begin with --- but for the first
)

// terminal is where a command reads and writes.
type terminal struct {
	in       io.Reader
	out, err io.Writer
	format   string
	colour   bool
	live     bool // out is a terminal, on which a picture can be painted over
	answers  int  // printed as JSON or YAML
}

// structured tells whether a program reads what is printed.
func (t *terminal) structured() bool { return t.format == formatJSON || t.format == formatYAML }

// tell prints an answer of the API: as text, or in the format that was asked for.
func (t *terminal) tell(m proto.Message, text string) error { return t.answer(m, text) }

// answer prints text for people, or v for programs. v is a protobuf message, JSON, or what encoding/json takes.
func (t *terminal) answer(v any, text string) error {
	if !t.structured() {
		_, err := fmt.Fprintln(t.out, strings.TrimRight(text, "\n"))
		return err
	}
	b, err := jsonOf(v)
	if err == nil && t.format == formatYAML {
		if b, err = yamlOf(b); err == nil && t.answers > 0 {
			b = append([]byte("---\n"), b...)
		}
	}
	if err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	t.answers++
	_, err = fmt.Fprintf(t.out, "%s\n", bytes.TrimRight(b, "\n"))
	return err
}

// jsonOf is v as one line of JSON.
func jsonOf(v any) ([]byte, error) {
	var b []byte
	var err error
	switch v := v.(type) {
	case proto.Message:
		b, err = protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(v)
	case json.RawMessage:
		b = v
	default:
		return json.Marshal(v)
	}
	if err != nil {
		return nil, err
	}
	var line bytes.Buffer
	err = json.Compact(&line, b) // protojson varies its spaces on purpose, and others send lines
	return line.Bytes(), err
}

// yamlOf is JSON as YAML, with the fields in their order.
func yamlOf(text []byte) ([]byte, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	n, err := yamlNode(d)
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err = errors.Join(e.Encode(n), e.Close())
	return b.Bytes(), err
}

func yamlNode(d *json.Decoder) (*yaml.Node, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	n := &yaml.Node{Kind: yaml.ScalarNode}
	switch v := token.(type) {
	case json.Delim:
		n.Kind = yaml.SequenceNode
		if v == '{' {
			n.Kind = yaml.MappingNode
		}
		for d.More() { // the name of a field is a token, too
			child, err := yamlNode(d)
			if err != nil {
				return nil, err
			}
			n.Content = append(n.Content, child)
		}
		_, err = d.Token() // its end
	case string:
		n.SetString(v)
		n.Style = 0 // a block of lines would lose spaces at its edges
	case json.Number:
		n.Value = v.String()
	case bool:
		n.Value = strconv.FormatBool(v)
	case nil:
		n.Value = "null"
	}
	return n, err
}

// fail prints the one line that says why, and returns code.
func (t *terminal) fail(err error, code int) int {
	_, _ = fmt.Fprintf(t.err, "pushctl: %v\n", err)
	return code
}

// isTerminal tells whether w is one.
func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// paint puts a text in one of the terminal's colours, where there are any.
func (t *terminal) paint(colour, text string) string {
	if !t.colour || colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// The colours in use.
const (
	green  = "32"
	red    = "31"
	yellow = "33"
	grey   = "90"
)
