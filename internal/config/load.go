package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"strings"
	"syscall"
)

// maxProblems bounds the line that says what is wrong.
const maxProblems = 20

// maxSecret bounds a file with a secret.
const maxSecret = 64 << 10

// DefaultFile is read when it exists and no other file was named.
const DefaultFile = "config.yaml"

// Options says where a Set takes its values from.
type Options struct {
	Flags     map[string]string                // flags given, by name without dashes
	LookupEnv func(name string) (string, bool) // nil: os.LookupEnv
	File      string                           // "" : CONFIG_FILE, then config.yaml if present
	NoFile    bool                             // the program reads no file
}

// Load fills the bound fields. All that is wrong comes back as one error of one
// line, which wraps ErrUsage.
func (s *Set) Load(o Options) error {
	if o.LookupEnv == nil {
		o.LookupEnv = os.LookupEnv
	}
	file, err := readFile(&o)
	if err != nil {
		return usageError(err.Error())
	}
	problems := s.load(&o, file)
	for _, k := range s.keys {
		if k.path == "" {
			continue
		}
		if err := k.readSecret(); err != nil {
			problems = append(problems, s.Errorf(k.name+"_file", "%v", err).Error())
		}
	}
	for _, v := range file.values {
		if len(problems) > 2*maxProblems { // enough for "and more": a hint costs time
			break
		}
		if err := s.known(v); err != nil {
			problems = append(problems, fmt.Sprintf("%s: %s", v.where(file.path), err))
		}
	}
	if n := len(problems) - maxProblems; n > 0 {
		problems = append(problems[:maxProblems], fmt.Sprintf("and %d more", n))
	}
	if len(problems) > 0 {
		return usageError(strings.Join(problems, "; "))
	}
	return nil
}

// load fills all keys, and returns what is wrong.
func (s *Set) load(o *Options, file *document) (problems []string) {
	for _, k := range s.keys {
		if err := k.load(o, file); err != nil {
			problems = append(problems, err.Error())
		}
	}
	return problems
}

// usageError is the text of an error that wraps ErrUsage without saying so.
type usageError string

func (e usageError) Error() string        { return string(e) }
func (e usageError) Is(target error) bool { return target == ErrUsage }

// Usage makes err an error that wraps ErrUsage, with the same text.
func Usage(err error) error { return usageError(err.Error()) }

// known tells what is wrong with the name of a value in the file.
func (s *Set) known(v value) error {
	for _, k := range s.keys {
		if k.name == v.name {
			return nil
		}
		if strings.HasPrefix(k.name, v.name+".") {
			if v.section {
				return nil
			}
			return fmt.Errorf("%s must be a section with keys below it", v.name)
		}
		if k.sections != nil && strings.HasPrefix(v.name, k.name+"[") {
			return k.knownBelow(v)
		}
	}
	return fmt.Errorf("unknown key %q%s", v.name, hint(v.name, func(yield func(string) bool) {
		for _, k := range s.keys {
			if !yield(k.name) {
				return
			}
		}
	}))
}

// load takes the value of the first source that has one.
func (k *Key) load(o *Options, file *document) error {
	if text, ok := o.Flags[k.Flag()]; ok {
		return k.take(text, sourceFlag+k.Flag(), "--"+k.Flag())
	}
	for _, env := range k.envs {
		if text, ok := o.LookupEnv(env); ok && text != "" {
			return k.take(text, sourceEnv+env, env)
		}
	}
	if v, ok := file.lookup(k.name); ok {
		if v.section {
			return fmt.Errorf("%s: %s has no value", v.where(file.path), k.name)
		}
		if v.sections > 0 {
			if k.sections == nil {
				return fmt.Errorf("%s: %s: a section is not understood here", v.where(file.path), k.name)
			}
			if v.sections > k.sections.most {
				return fmt.Errorf("%s: %s: has more than %d sections", v.where(file.path), k.name, k.sections.most)
			}
			k.source = v.where(file.path)
			if problems := k.sections.fill(file, v.sections); len(problems) > 0 {
				return errors.New(strings.Join(problems, "; "))
			}
			return nil
		}
		return k.take(v.text, v.where(file.path), v.where(file.path)+": "+k.name)
	}
	return nil
}

// readSecret takes a secret from the file that its second key names.
func (k *Key) readSecret() error {
	if k.IsSet() {
		return fmt.Errorf("%s is set, too", k.name)
	}
	text, err := ReadFile(k.path, maxSecret)
	if err == nil && strings.TrimSpace(string(text)) == "" {
		err = fmt.Errorf("%s: holds nothing", k.path)
	}
	if err != nil {
		return err
	}
	return k.take(string(text), k.name+"_file", k.path)
}

func (k *Key) take(text, source, blame string) error {
	k.source = source
	if err := k.set(strings.TrimSpace(text)); err != nil {
		return fmt.Errorf("%s: %w", blame, err)
	}
	return nil
}

// Errorf is an error about the value of a key that only its package could
// find, worded like the ones of Load. The name may go on to a field of a list of sections: "auth.jwt[1].audience".
func (s *Set) Errorf(name, format string, args ...any) error {
	key, _, below := strings.Cut(name, "[")
	blame := strings.ToUpper(strings.ReplaceAll(key, ".", "_"))
	if below {
		blame += ": " + name
	}
	for _, k := range s.keys {
		if k.name != key || k.source == "" {
			continue
		}
		blame = k.source
		if !k.Overridden() || below {
			blame += ": " + name
		}
	}
	return usageError(blame + ": " + fmt.Sprintf(format, args...))
}

// hint names what was probably meant.
func hint(name string, known iter.Seq[string]) string {
	best, distance := "", 3
	if len(name) > maxKey {
		return ""
	}
	for k := range known {
		if d := editDistance(k, name); d < distance {
			best, distance = k, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean %q?", best)
}

// editDistance counts the letters to add, drop or change to make b of a.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		left := row[0]
		row[0] = i + 1
		for j := range len(b) {
			up := row[j+1]
			cost := left
			if a[i] != b[j] {
				cost = 1 + min(left, up, row[j])
			}
			left, row[j+1] = up, cost
		}
	}
	return row[len(b)]
}

// readFile finds, reads and parses the file.
func readFile(o *Options) (*document, error) {
	path, must := o.File, true
	if path == "" {
		if env, ok := o.LookupEnv("CONFIG_FILE"); ok {
			path = env
		}
	}
	if path == "" {
		path, must = DefaultFile, false
	}
	if o.NoFile {
		return &document{}, nil
	}
	text, err := ReadFile(path, maxFile)
	if errors.Is(err, fs.ErrNotExist) && !must {
		return &document{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("CONFIG_FILE: %w", err)
	}
	return parse(path, text, o.LookupEnv)
}

// ReadFile reads a regular file of at most limit bytes. A device would have no end, and a pipe
// would wait for whoever may never write to it.
func ReadFile(path string, limit int) ([]byte, error) { return readRegular(path, limit, 0) }

// ReadSecretFile reads a file as ReadFile does, and refuses one that others than its owner and its group may use.
func ReadSecretFile(path string, limit int) ([]byte, error) { return readRegular(path, limit, 0o007) }

// readRegular refuses a file that has one of the permissions in forbidden.
func readRegular(path string, limit int, forbidden fs.FileMode) (text []byte, err error) {
	file, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0) // or the open of a pipe waits
	if err != nil {
		return nil, err
	}
	defer func() { _ = file.Close() }() // nothing was written
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: is no regular file", path)
	}
	if info.Mode().Perm()&forbidden != 0 {
		return nil, fmt.Errorf("%s: has mode %04o, others than its owner and group must not have access to a secret", path, info.Mode().Perm())
	}
	text, err = io.ReadAll(io.LimitReader(file, int64(limit)+1))
	if err == nil && len(text) > limit {
		err = fmt.Errorf("%s: larger than %s", path, FormatBytes(limit))
	}
	return text, err
}
