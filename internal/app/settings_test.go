package app_test

import (
	"bytes"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"testing"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/engine/route"
	"github.com/push-manager/push-manager/internal/app/connectnode"
	"github.com/push-manager/push-manager/internal/app/controller"
	"github.com/push-manager/push-manager/internal/app/pushmanager"
	"github.com/push-manager/push-manager/internal/cli"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/devstack"
	"github.com/push-manager/push-manager/internal/refcontroller"
	"github.com/push-manager/push-manager/internal/refgateway"
	"github.com/push-manager/push-manager/shard"
	"github.com/push-manager/push-manager/transport/discovery"
	"github.com/push-manager/push-manager/transport/ingress"
	"github.com/push-manager/push-manager/transport/link"
)

var update = flag.Bool("update", false, "write the documents of the settings anew")

func keysOf(settings cli.Settings) *config.Set {
	s := config.New()
	settings.Bind(s)
	return s
}

// TestDocumentsOfTheSettingsAreWhatTheTablesSay: make generate writes them anew.
func TestDocumentsOfTheSettingsAreWhatTheTablesSay(t *testing.T) {
	example := bytes.NewBufferString(`# All settings of push-manager with their defaults. Copy it to config.yaml, keep what differs.
#
# Each key is also a flag and an environment variable: etcd.dial_timeout is --etcd-dial-timeout and
# ETCD_DIAL_TIMEOUT. Flags come before the environment, the environment before this file. A password is no flag.
# ${NAME:default} stands for an environment variable. An unknown key stops the start.
# The OTEL_* variables of OpenTelemetry work. So do GOGC (unless set, garbage is collected when the heap
# has 160 MiB, or has grown by 64 MiB or half of what was in use, if that is more) and GOMEMLIMIT (unless set,
# 90 % of the container's memory).

`)
	if err := keysOf(&pushmanager.Config{}).Write(example, true); err != nil {
		t.Fatal(err)
	}
	table := bytes.NewBufferString(`# Settings

All settings of all programs, for whoever runs them. Written by ` + "`make generate`" + ` from the tables in ` + "`internal/app/*/config.go`" + `.

Each key is also a flag, unless it says that it is not: ` + "`etcd.dial_timeout`" + ` is ` + "`--etcd-dial-timeout`" + `. Flags come before environment
variables, those before the file, that before the default. Only ` + "`push-manager serve`" + ` reads a file.
`)
	for _, cmd := range []cli.Command{pushmanager.Command(), controller.Command(), connectnode.Command(), devstack.Command(io.Discard)} {
		name := cmd.Name
		if cmd.File {
			name = "push-manager"
		} else if name == "dev" {
			name = "push-manager dev"
		}
		fmt.Fprintf(table, "\n## %s\n\n", name)
		if err := keysOf(cmd.New()).WriteTable(table); err != nil {
			t.Fatal(err)
		}
	}
	for file, want := range map[string][]byte{"config.example.yaml": example.Bytes(), "docs/settings.md": table.Bytes()} {
		path := filepath.Join("../..", file)
		if *update {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the tables say: make generate (%v)", file, err)
		}
	}
	for _, readme := range []string{"README.md", "README.zh-CN.md"} {
		text, err := os.ReadFile(filepath.Join("../..", readme))
		if err != nil {
			t.Fatal(err)
		}
		rows := regexp.MustCompile("(?m)^\\| `([A-Z_]+)` \\| `[^`]*`").FindAllSubmatch(text, -1)
		for _, row := range rows {
			if string(row[1]) != "CONFIG_FILE" && !bytes.Contains(table.Bytes(), row[0]) {
				t.Errorf("%s: %s is not what the table says", readme, row[0])
			}
		}
		if len(rows) < 9 {
			t.Errorf("%s: %d settings, want those of the contract at least", readme, len(rows))
		}
	}
	none := func(string) (string, bool) { return "", false }
	if err := keysOf(&pushmanager.Config{}).Load(config.Options{File: "../../config.example.yaml", LookupEnv: none}); err != nil {
		t.Error(err)
	}
}

// TestNoSecretIsAFlag: all users of a machine see its command lines.
func TestNoSecretIsAFlag(t *testing.T) {
	for _, settings := range []cli.Settings{&pushmanager.Config{}, &controller.Config{}, &connectnode.Config{}} {
		set := keysOf(settings)
		if _, err := set.Parse([]string{"--etcd-password=x"}, true); err == nil {
			t.Errorf("%T takes the password of etcd as a flag", settings)
		}
		if _, err := set.Parse([]string{"--etcd-password-file=x"}, true); err != nil {
			t.Errorf("%T: %v", settings, err)
		}
	}
}

// TestNoDefaultStandsTwice: a program's default is that of the package that it is for.
func TestNoDefaultStandsTwice(t *testing.T) {
	var pm pushmanager.Config
	var co controller.Config
	var cn connectnode.Config
	for _, settings := range []cli.Settings{&pm, &co, &cn} {
		if err := cli.Fill(settings, nil); err != nil {
			t.Fatal(err)
		}
	}
	for name, pair := range map[string][2]any{
		"Shards": {pm.Shards, shard.Defaults()}, "Routes": {pm.Routes, route.Defaults()}, "Engine": {pm.Engine, engine.Defaults()},
		"Links": {pm.Links, link.Defaults()}, "Ingress": {pm.Ingress, ingress.Defaults()}, "Discovery": {pm.Discovery, discovery.Defaults()},
		"Controller": {co.Controller, refcontroller.Defaults()}, "Gateway": {cn.Gateway, refgateway.Defaults()},
	} {
		sameDefaults(t, name, reflect.ValueOf(pair[0]), reflect.ValueOf(pair[1]))
	}
}

// sameDefaults compares the fields that both sides set.
func sameDefaults(t *testing.T, path string, program, pkg reflect.Value) {
	t.Helper()
	switch program.Kind() {
	case reflect.Struct:
		for i := range program.NumField() {
			if field := program.Type().Field(i); field.IsExported() {
				sameDefaults(t, path+"."+field.Name, program.Field(i), pkg.Field(i))
			}
		}
	case reflect.Func, reflect.Pointer, reflect.Interface, reflect.Chan, reflect.Map:
	default:
		if !program.IsZero() && !pkg.IsZero() && !reflect.DeepEqual(program.Interface(), pkg.Interface()) {
			t.Errorf("%s: the program's default is %v, the package's %v", path, program, pkg)
		}
	}
}
