package hooks

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/ids"
	"github.com/push-manager/push-manager/internal/webhook"
)

// Bounds of a file.
const (
	maxFile  = 256 << 10
	maxHooks = 16
	maxRooms = 1000 // patterns of a hook
)

// hook is an entry of the file.
type hook struct {
	Name       string   `yaml:"name"`
	URL        string   `yaml:"url"`
	SecretFile string   `yaml:"secret_file"`
	Events     []string `yaml:"events"`
	Rooms      []string `yaml:"rooms"`

	secret []byte
}

var nameRule = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,31}$`)

// Check reads a file and the files that it names, and tells what is wrong with them.
func Check(file string, allowPlain bool) error {
	_, err := read(file, allowPlain)
	return err
}

// read reads a file and the files that it names. The error names the hook and the field.
func read(file string, allowPlain bool) ([]hook, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return nil, err
	}
	list, err := parse(text, allowPlain)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for i := range list {
		h := &list[i]
		if h.secret, err = webhook.ReadSecret(h.SecretFile); err != nil {
			return nil, fmt.Errorf("%s: hook %q: secret_file: %w", file, h.Name, err)
		}
	}
	return list, nil
}

// parse reads the text of a file.
func parse(text []byte, allowPlain bool) (list []hook, err error) {
	defer func() {
		if v := recover(); v != nil { // of the library, on a text that nobody has thought of
			list, err = nil, fmt.Errorf("is not understood: %.100q", fmt.Sprint(v))
		}
	}()
	if len(text) > maxFile {
		return nil, fmt.Errorf("has more than %d bytes", maxFile)
	}
	var doc struct {
		Version int    `yaml:"version"`
		Hooks   []hook `yaml:"hooks"`
	}
	d := yaml.NewDecoder(bytes.NewReader(text))
	d.KnownFields(true)
	switch err := d.Decode(&doc); {
	case errors.Is(err, io.EOF):
		return nil, errors.New("holds nothing")
	case err != nil:
		line, _, _ := strings.Cut(strings.ReplaceAll(strings.TrimPrefix(err.Error(), "yaml: "), "unmarshal errors:\n  ", ""), "\n")
		return nil, fmt.Errorf("%.300s", line)
	case doc.Version != 1:
		return nil, fmt.Errorf("version: must be 1, not %d", doc.Version)
	case len(doc.Hooks) > maxHooks:
		return nil, fmt.Errorf("hooks: more than %d", maxHooks)
	}
	if err := d.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return nil, errors.New("has more than one YAML document")
	}
	seen := map[string]bool{}
	for i := range doc.Hooks {
		h := &doc.Hooks[i]
		if !nameRule.MatchString(h.Name) || seen[h.Name] {
			return nil, fmt.Errorf("hooks[%d].name: %.64q must be 1 to 32 of a-z, 0-9, - and _, and no other hook's", i, h.Name)
		}
		seen[h.Name] = true
		if err := h.check(allowPlain); err != nil {
			return nil, fmt.Errorf("hook %q: %w", h.Name, err)
		}
	}
	return doc.Hooks, nil
}

// check says what is wrong with an entry.
func (h *hook) check(allowPlain bool) error {
	u, err := webhook.CheckURL(h.URL)
	switch {
	case err != nil:
		return fmt.Errorf("url: %w", err)
	case u.Scheme == "http" && !allowPlain && !config.Loopback(u.Hostname()):
		return errors.New("url: events would be sent without TLS; https, or ALLOW_INSECURE=true")
	case h.SecretFile == "":
		return errors.New("secret_file: is missing")
	case len(h.Events) == 0:
		return fmt.Errorf("events: is missing; there are %s", strings.Join(kinds(), ", "))
	case len(h.Rooms) > maxRooms:
		return fmt.Errorf("rooms: more than %d", maxRooms)
	}
	for i, name := range h.Events {
		if !slices.Contains(kinds(), name) || slices.Contains(h.Events[:i], name) {
			return fmt.Errorf("events: %.64q is not one of %s, each once", name, strings.Join(kinds(), ", "))
		}
	}
	for _, pattern := range h.Rooms {
		if err := ids.Check(pattern, ids.MaxBytes); err != nil || strings.Contains(strings.TrimSuffix(pattern, "*"), "*") {
			return fmt.Errorf("rooms: %.64q is no room, nor one with a star at its end", pattern)
		}
	}
	return nil
}

// wants tells whether an event is for the hook. Rooms concern joins and leaves.
func (h *hook) wants(e *Event) bool {
	if !slices.Contains(h.Events, string(e.Kind)) {
		return false
	}
	return e.Room == "" || len(h.Rooms) == 0 || slices.ContainsFunc(h.Rooms, func(pattern string) bool {
		head, isPrefix := strings.CutSuffix(pattern, "*")
		return e.Room == pattern || isPrefix && strings.HasPrefix(e.Room, head)
	})
}
