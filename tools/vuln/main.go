// Command vuln looks for known faults in what a module's programs call. It runs govulncheck over a database that is
// itself a pinned module, so that the same commit gives the same answer anywhere the module proxy is reachable.
//
//	go -C tools/vuln run . DIRECTORY
//
// It fails for each fault whose code is called, unless exceptions.txt names it with a date that has not passed.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

func main() {
	log.SetFlags(0)
	if len(os.Args) != 2 {
		log.Fatal("usage: vuln DIRECTORY")
	}
	if err := run(os.Args[1]); err != nil {
		log.Fatal(err)
	}
}

func run(dir string) error {
	excepted, err := exceptions("exceptions.txt", time.Now())
	if err != nil {
		return err
	}
	db, err := os.MkdirTemp("", "vulndb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(db)
	count, err := index(db)
	if err != nil {
		return fmt.Errorf("database: %w", err)
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	out, err := command("go", "tool", "govulncheck", "-C", dir, "-db", "file://"+db, "-format", "json", "./...")
	if err != nil {
		return err
	}
	called, err := findings(out)
	if err != nil {
		return fmt.Errorf("govulncheck's answer: %w", err)
	}
	bad := 0
	for id, way := range called {
		if reason, ok := excepted[id]; ok {
			fmt.Printf("%s: excepted: %s\n", id, reason)
			delete(excepted, id)
			continue
		}
		bad++
		fmt.Printf("%s: https://pkg.go.dev/vuln/%s\n  %s\n", id, id, way)
	}
	for id := range excepted {
		bad++
		fmt.Printf("%s: the exception is not needed: nothing calls it\n", id)
	}
	if bad > 0 {
		return fmt.Errorf("%d of %d known faults are called or excepted in vain", bad, count)
	}
	fmt.Printf("none of %d known faults is called\n", count)
	return nil
}

// exceptions reads lines of "ID DATE REASON". A date that has passed is an error.
func exceptions(name string, now time.Time) (map[string]string, error) {
	text, err := os.ReadFile(name)
	if err != nil {
		return nil, err
	}
	list := map[string]string{}
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		id, rest, _ := strings.Cut(line, " ")
		date, reason, ok := strings.Cut(rest, " ")
		until, err := time.Parse(time.DateOnly, date)
		switch {
		case err != nil || !ok:
			return nil, fmt.Errorf("%s: want ID DATE REASON: %q", name, line)
		case now.After(until):
			return nil, fmt.Errorf("%s: %s was excepted until %s: %s", name, id, date, reason)
		}
		list[id] = reason
	}
	return list, nil
}

// index makes a database of the module's OSV files in the form that govulncheck reads
// (https://go.dev/doc/security/vuln/database#api), and returns how many there are.
func index(db string) (int, error) {
	dir, err := command("go", "mod", "download", "-json", "golang.org/x/vulndb")
	if err != nil {
		return 0, err
	}
	var module struct{ Dir string }
	if err := json.Unmarshal(dir, &module); err != nil {
		return 0, err
	}
	files, err := filepath.Glob(filepath.Join(module.Dir, "data", "osv", "*.json"))
	if err != nil {
		return 0, err
	}
	if len(files) == 0 {
		return 0, errors.New("the module has no data/osv")
	}
	type entry struct {
		ID       string    `json:"id"`
		Modified time.Time `json:"modified"`
	}
	byModule := map[string][]entry{}
	var latest time.Time
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return 0, err
		}
		var osv struct {
			entry
			Affected []struct{ Package struct{ Name string } }
		}
		if err := json.Unmarshal(text, &osv); err != nil {
			return 0, fmt.Errorf("%s: %w", filepath.Base(name), err)
		}
		seen := map[string]bool{}
		for _, a := range osv.Affected {
			if !seen[a.Package.Name] {
				seen[a.Package.Name] = true
				byModule[a.Package.Name] = append(byModule[a.Package.Name], osv.entry)
			}
		}
		if osv.Modified.After(latest) {
			latest = osv.Modified
		}
	}
	type modules struct {
		Path  string  `json:"path"`
		Vulns []entry `json:"vulns"`
	}
	var list []modules
	for path, vulns := range byModule {
		list = append(list, modules{path, vulns})
	}
	if err := os.Mkdir(filepath.Join(db, "index"), 0o755); err != nil {
		return 0, err
	}
	for name, value := range map[string]any{"db": map[string]any{"modified": latest}, "modules": list} {
		text, err := json.Marshal(value)
		if err != nil {
			return 0, err
		}
		if err := os.WriteFile(filepath.Join(db, "index", name+".json"), text, 0o644); err != nil {
			return 0, err
		}
	}
	return len(files), os.Symlink(filepath.Join(module.Dir, "data", "osv"), filepath.Join(db, "ID"))
}

// findings reads govulncheck's messages, and returns the way to each fault that is called.
func findings(out []byte) (map[string]string, error) {
	type frame struct{ Module, Version, Package, Receiver, Function string }
	called := map[string]string{}
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var message struct {
			Finding *struct {
				OSV          string `json:"osv"`
				FixedVersion string `json:"fixed_version"`
				Trace        []frame
			}
		}
		switch err := d.Decode(&message); {
		case errors.Is(err, io.EOF):
			return called, nil
		case err != nil:
			return nil, err
		}
		f := message.Finding
		if f == nil || len(f.Trace) == 0 || f.Trace[0].Function == "" || called[f.OSV] != "" {
			continue
		}
		way := fmt.Sprintf("%s %s (fixed in %q)", f.Trace[0].Module, f.Trace[0].Version, f.FixedVersion)
		for _, t := range f.Trace {
			way += fmt.Sprintf(" <- %s.%s", t.Package, strings.TrimPrefix(t.Receiver+"."+t.Function, "."))
		}
		called[f.OSV] = way
	}
}

func command(name string, args ...string) ([]byte, error) {
	cmd := exec.Command(name, args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s", strings.Join(cmd.Args, " "), err, stderr.Bytes())
	}
	return out, nil
}
