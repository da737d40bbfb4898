// Kube writes JSON schemas for kubeconform, and custom resource definitions for kubectl-validate, from modules of Go alone: what
// Kubernetes defines from the OpenAPI documents in kubectl-validate, what the chart uses beside that from the modules of cert-manager
// and the Prometheus operator.
//
//	go -C tools/kube run . 1.30 ../../.tmp/kube
//
// writes schemas/KIND-GROUP-VERSION.json and crds/*.yaml there.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

// crds are modules by version, and their files.
var crds = map[string][]string{
	"github.com/cert-manager/cert-manager@v1.21.2": {"deploy/crds/cert-manager.io_certificates.yaml"},
	"github.com/prometheus-operator/prometheus-operator@v0.85.0": {
		"example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml",
		"example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml",
	},
}

func main() {
	if len(os.Args) != 3 {
		fmt.Fprintln(os.Stderr, "usage: kube KUBERNETES-VERSION FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1], os.Args[2]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(version, folder string) error {
	schemas, definitions := filepath.Join(folder, "schemas"), filepath.Join(folder, "crds")
	for _, dir := range []string{schemas, definitions} {
		if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(dir, 0o755)); err != nil {
			return err
		}
	}
	written, err := builtins(version, schemas)
	if err != nil {
		return err
	}
	for module, files := range crds {
		dir, err := download(module)
		if err != nil {
			return err
		}
		for _, file := range files {
			text, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				return err
			}
			n, err := custom(text, schemas)
			if err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			written += n
			if err := os.WriteFile(filepath.Join(definitions, filepath.Base(file)), text, 0o644); err != nil {
				return err
			}
		}
	}
	fmt.Printf("%d schemas of Kubernetes %s and what the chart uses beside it\n", written, version)
	return nil
}

// download returns the folder of a module.
func download(module string) (string, error) {
	out, err := exec.Command("go", "mod", "download", "-json", module).Output()
	var found struct{ Dir, Error string }
	if e := json.Unmarshal(out, &found); e != nil || found.Error != "" {
		return "", fmt.Errorf("%s: %v %s", module, errors.Join(err, e), found.Error)
	}
	return found.Dir, nil
}

// builtins writes a schema for each kind of Kubernetes, with all that it refers to.
func builtins(version, folder string) (written int, err error) {
	out, err := exec.Command("go", "list", "-modfile=../kubevalidate/go.mod", "-m", "-f", "{{.Dir}}", "sigs.k8s.io/kubectl-validate").Output()
	if err != nil {
		return 0, fmt.Errorf("find kubectl-validate: %w", err)
	}
	root := filepath.Join(strings.TrimSpace(string(out)), "pkg/openapiclient/builtins", version)
	files, err := filepath.Glob(filepath.Join(root, "api*", "*.json"))
	if err != nil {
		return 0, err
	}
	groups, err := filepath.Glob(filepath.Join(root, "apis", "*", "*.json"))
	if err != nil {
		return 0, err
	}
	if files = append(files, groups...); len(files) == 0 {
		return 0, fmt.Errorf("kubectl-validate has no documents of Kubernetes %s", version)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, err
		}
		var document struct {
			Components struct{ Schemas map[string]map[string]any }
		}
		if err := json.Unmarshal([]byte(strings.ReplaceAll(string(text), "#/components/schemas/", "#/$defs/")), &document); err != nil {
			return 0, fmt.Errorf("%s: %w", file, err)
		}
		all := document.Components.Schemas
		for _, schema := range all {
			strict(schema)
		}
		for name, schema := range all {
			kinds, _ := schema["x-kubernetes-group-version-kind"].([]any)
			if len(kinds) != 1 { // options of requests have one for every group
				continue
			}
			kind, _ := kinds[0].(map[string]any)
			if err := write(folder, kind["group"], kind["version"], kind["kind"], map[string]any{"$ref": "#/$defs/" + name, "$defs": all}); err != nil {
				return 0, err
			}
			written++
		}
	}
	return written, nil
}

// custom writes a schema for each version of a custom resource.
func custom(text []byte, folder string) (written int, err error) {
	var definition struct {
		Spec struct {
			Group    string
			Names    struct{ Kind string }
			Versions []struct {
				Name   string
				Schema struct{ OpenAPIV3Schema map[string]any }
			}
		}
	}
	if err := yaml.Unmarshal(text, &definition); err != nil {
		return 0, err
	}
	for _, version := range definition.Spec.Versions {
		schema := version.Schema.OpenAPIV3Schema
		properties, ok := schema["properties"].(map[string]any)
		if !ok {
			return 0, fmt.Errorf("version %s has no properties", version.Name)
		}
		delete(properties, "metadata") // that of all objects, and not told here
		strict(schema)
		properties["metadata"] = map[string]any{"type": "object"}
		if err := write(folder, definition.Spec.Group, version.Name, definition.Spec.Names.Kind, schema); err != nil {
			return 0, err
		}
	}
	return len(definition.Spec.Versions), nil
}

func write(folder string, group, version, kind, schema any) error {
	text, err := json.Marshal(schema)
	if err != nil {
		return err
	}
	if group == "" {
		group = version // so kubeconform has it for what is in no group
	}
	name := fmt.Sprintf("%s-%s-%s.json", strings.ToLower(fmt.Sprint(kind)), group, version)
	return os.WriteFile(filepath.Join(folder, name), text, 0o644)
}

// strict refuses properties that a schema does not name, in it and below it.
func strict(schema map[string]any) {
	if _, named := schema["properties"]; named && schema["additionalProperties"] == nil && schema["x-kubernetes-preserve-unknown-fields"] != true {
		schema["additionalProperties"] = false
	}
	if schema["x-kubernetes-int-or-string"] == true {
		delete(schema, "type")
	}
	for key, below := range schema {
		switch below := below.(type) {
		case map[string]any:
			if key == "properties" {
				for _, property := range below {
					if property, ok := property.(map[string]any); ok {
						strict(property)
					}
				}
			} else if key != "default" && key != "example" {
				strict(below)
			}
		case []any:
			for _, part := range below {
				if part, ok := part.(map[string]any); ok {
					strict(part)
				}
			}
		}
	}
}
