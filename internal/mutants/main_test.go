package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestBreakagesApply keeps the list in step with the code between two runs of it: each
// finds what it replaces, and there is a test of the name that it gives.
func TestBreakagesApply(t *testing.T) {
	const root = "../.."
	names := map[string]bool{}
	for _, b := range breakages() {
		if names[b.name] {
			t.Errorf("two breakages are called %q", b.name)
		}
		names[b.name] = true
		text, err := os.ReadFile(filepath.Join(root, b.file))
		if err != nil {
			t.Fatal(err)
		}
		broken, err := b.apply(string(text))
		if err != nil {
			t.Errorf("%s: %v", b.name, err)
		} else if broken == string(text) {
			t.Errorf("%s: nothing is broken", b.name)
		}
		files, err := filepath.Glob(filepath.Join(root, b.dir, "*_test.go"))
		if err != nil {
			t.Fatal(err)
		}
		there := false
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			there = there || strings.Contains(string(text), "func "+b.test+"(t *testing.T) {")
		}
		if !there {
			t.Errorf("%s: %s has no %s", b.name, b.dir, b.test)
		}
	}
	if len(names) != 23 {
		t.Errorf("%d breakages", len(names))
	}
}

func TestApplyWantsTheTextOnce(t *testing.T) {
	b := breakage{file: "f.go", edits: []edit{{"old", "new"}, {"new ", "other "}}}
	for text, want := range map[string]string{"an old one": "an other one", "none": "", "old and old": ""} {
		got, err := b.apply(text)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q becomes %q, %v", text, got, err)
		}
	}
}

// TestJudge: a test that fails, hangs, crashes or leaks has noticed; one that did not run
// has not, and has not survived either.
func TestJudge(t *testing.T) {
	exit := exec.Command("sh", "-c", "exit 1").Run()
	if exit == nil {
		t.Fatal("sh does not exit as it is told")
	}
	const run = "=== RUN   TestX\n"
	for _, test := range []struct {
		printed string
		err     error
		want    string
	}{
		{run + "--- PASS: TestX (0.00s)\nPASS\n", nil, "SURVIVED"},
		{run + "    --- FAIL: TestX/sub (0.00s)\n--- FAIL: TestX (0.00s)\nFAIL\n", exit, "TestX"},
		{run + "panic: test timed out after 1m0s\n", exit, "TestX (hangs)"},
		{run + "panic: close of closed channel\n", exit, "TestX (crashes)"},
		{run + "fatal error: all goroutines are asleep\n", exit, "TestX (crashes)"},
		{run + "PASS\ngoleak: Errors on successful test run: found unexpected goroutines\n", exit, "TestX (leaks goroutines)"},
		{"testing: warning: no tests to run\nPASS\n", nil, "ERROR: the test did not run"},
		{run, exit, "ERROR: the test ended strangely"},
		{run, errors.New("no memory"), "ERROR: no memory"},
	} {
		if got := judge("TestX", []byte(test.printed), test.err); !strings.HasPrefix(got.String(), test.want) {
			t.Errorf("%q, %v: %s, want %s", test.printed, test.err, got, test.want)
		}
	}
}
