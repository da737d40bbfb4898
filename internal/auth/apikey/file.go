package apikey

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/ids"
)

// maxFile is the size of the largest file, in bytes: some 5,000 keys.
const maxFile = 1 << 20

// entry is a key of the file.
type entry struct {
	Key

	hash [sha256.Size]byte
}

// keys are those of the file at one moment. They are immutable.
type keys struct {
	byID map[string]entry
	sum  [sha256.Size]byte // of the file
}

func read(path string) (*keys, error) {
	text, err := config.ReadSecretFile(path, maxFile)
	if err != nil {
		return nil, err
	}
	list, err := parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s:%w", path, err)
	}
	return list, nil
}

// parse reads a file. Its errors begin with the line, and hold no hash.
func parse(text []byte) (list *keys, err error) {
	defer func() {
		if recover() != nil { // of the library, on a text that nobody has thought of
			list, err = nil, errors.New("1: is not understood")
		}
	}()
	list = &keys{byID: map[string]entry{}, sum: sha256.Sum256(text)}
	var doc yaml.Node
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	switch err := decoder.Decode(&doc); {
	case errors.Is(err, io.EOF): // a file that somebody is about to write is empty, too
		return nil, errors.New("1: is empty: {} alone means that there are no keys")
	case err != nil:
		return nil, errors.New("1: is no YAML")
	case !errors.Is(decoder.Decode(new(yaml.Node)), io.EOF):
		return nil, errors.New("1: must be one YAML document")
	}
	root := doc.Content[0]
	if root.Kind != yaml.MappingNode {
		return nil, fmt.Errorf("%d: must hold lines such as 4fZ1q9aB: sha256:<64 hexadecimal digits>", root.Line)
	}
	for i := 0; i+1 < len(root.Content); i += 2 {
		id, value := root.Content[i], root.Content[i+1]
		if id.Kind != yaml.ScalarNode || !IsID(id.Value) {
			return nil, fmt.Errorf("%d: the id of a key has %d letters and digits", id.Line, idLen)
		}
		if _, twice := list.byID[id.Value]; twice {
			return nil, fmt.Errorf("%d: key %s is there twice", id.Line, id.Value)
		}
		e, err := parseEntry(value)
		if err != nil {
			return nil, fmt.Errorf("%d: key %s: %w", id.Line, id.Value, err)
		}
		e.ID = id.Value
		list.byID[id.Value] = e
	}
	return list, nil
}

func parseEntry(node *yaml.Node) (e entry, err error) {
	if node.Kind == yaml.ScalarNode {
		e.hash, err = parseHash(node.Value)
		return e, err
	}
	if node.Kind != yaml.MappingNode {
		return e, errors.New("must be a hash, or a section with one")
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		field, value := node.Content[i].Value, node.Content[i+1]
		switch {
		case value.Kind != yaml.ScalarNode:
			return e, errors.New("a field must be a text")
		case seen[field]:
			return e, errors.New("a field is set twice")
		}
		seen[field] = true
		switch field {
		case "hash":
			e.hash, err = parseHash(value.Value)
		case "name":
			e.Name, err = value.Value, ids.Check(value.Value, ids.MaxBytes)
		case "comment":
			e.Comment = value.Value
		case "not_after":
			e.NotAfter, err = ParseTime(value.Value)
		default:
			return e, errors.New("has a field that is none of hash, name, not_after, comment")
		}
		if err != nil {
			return e, fmt.Errorf("%s: %w", field, err)
		}
	}
	if !seen["hash"] {
		return e, errors.New("hash: missing")
	}
	return e, nil
}

func parseHash(text string) (hash [sha256.Size]byte, err error) {
	digits, ok := strings.CutPrefix(text, hashPrefix)
	if n, err := hex.Decode(hash[:], []byte(digits[:min(len(digits), 2*len(hash))])); !ok || err != nil || n != len(hash) || len(digits) != 2*n {
		return hash, fmt.Errorf("must be %s and %d hexadecimal digits", hashPrefix, 2*len(hash))
	}
	return hash, nil
}

// ParseTime reads when a key ends: a moment of RFC 3339, or the beginning of a day in UTC.
func ParseTime(text string) (time.Time, error) {
	for _, layout := range []string{time.RFC3339, time.DateOnly} {
		if t, err := time.Parse(layout, text); err == nil {
			return t, nil
		}
	}
	return time.Time{}, errors.New("must be a time such as 2027-01-31T12:00:00Z, or a day such as 2027-01-31")
}

// Append adds a line to a file of keys, which it makes for its owner alone if there is none. Readers see the file before or
// after. The file keeps its permissions; it must be right, and not be readable by others.
func Append(path, line string) (err error) {
	if target, err := filepath.EvalSymlinks(path); err == nil {
		path = target // or the link would be replaced
	}
	// Two who add at a time would lose one key. The name of the new file is their lock.
	fresh, err := os.OpenFile(path+".new", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%w: another one is adding a key, or was interrupted: then remove it", err)
	} else if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, fresh.Close(), os.Remove(fresh.Name()))
		}
	}()
	mode := fs.FileMode(0o600)
	text, err := config.ReadSecretFile(path, maxFile)
	switch info, statErr := os.Stat(path); {
	case err == nil && statErr == nil:
		mode = info.Mode().Perm()
	case !errors.Is(err, fs.ErrNotExist):
		return errors.Join(err, statErr)
	}
	if list, err := parse(text); err == nil && len(list.byID) == 0 {
		text = bytes.TrimSuffix(bytes.TrimSpace(text), []byte("{}"))
	}
	if len(text) > 0 && text[len(text)-1] != '\n' {
		text = append(text, '\n')
	}
	text = append(append(text, line...), '\n')
	if len(text) > maxFile {
		return fmt.Errorf("%s: would be larger than %s", path, config.FormatBytes(maxFile))
	}
	if _, err := parse(text); err != nil {
		return fmt.Errorf("%s:%w", path, err)
	}
	if _, err := fresh.Write(text); err != nil {
		return err
	}
	if err := errors.Join(fresh.Chmod(mode), fresh.Sync()); err != nil {
		return err
	}
	if err := os.Rename(fresh.Name(), path); err != nil {
		return err
	}
	_ = fresh.Close() // all of it is on disk
	return nil
}
