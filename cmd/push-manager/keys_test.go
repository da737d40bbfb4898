package main

import (
	"path/filepath"
	"testing"

	"github.com/push-manager/push-manager/internal/auth/apikey"
)

func TestKeysIsACommand(t *testing.T) {
	file := filepath.Join(t.TempDir(), "keys.yaml")
	if code, text := programMain(t, "keys", "new", "--name=billing", "--file="+file); code != 0 {
		t.Fatalf("exit code %d: %s", code, text)
	}
	if err := apikey.Check(file); err != nil {
		t.Error(err)
	}
}
