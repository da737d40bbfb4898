package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestWhatComposeWouldRefuseIsRefused(t *testing.T) {
	for text, want := range map[string]string{
		"services: {a: {image: x}}":                                     "",
		"services: {a: {image: x, memlimit: 1m}}":                       "memlimit",
		"services: {a: {image: x, mem_limit: much}}":                    "mem_limit",
		"services: {a: {image: x, depends_on: [b]}}":                    "depends on undefined service",
		"services: {a: {image: x, networks: [b]}}":                      "undefined network",
		"services: {a: {image: x, healthcheck: {interval: 5 o'clock}}}": "interval",
	} {
		file := filepath.Join(t.TempDir(), "compose.yml")
		if err := os.WriteFile(file, []byte("name: test\n"+text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		err := check(file)
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}
