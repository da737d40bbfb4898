package pushctl

import (
	"encoding/json"
	"math"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
	"pgregory.net/rapid"

	pubsub "github.com/push-manager/push-manager/proto"
)

// TestEachCommandPrintsInEachFormat: what one prints as YAML is what it prints as JSON.
func TestEachCommandPrintsInEachFormat(t *testing.T) {
	home(t)
	address := serve(t, &server{success: true, message: "7", summary: &pubsub.DeliverySummary{Targets: 2, Delivered: 2, MessageId: "no: \"x\"\n"}})
	for _, line := range []string{
		"room r x", "user u x", "users u,v x", "broadcast x", "explain room r", "explain broadcast", "forget u", "replay u n", "receipts",
		"version", "conformance --list", "completion bash", "context ls",
	} {
		args := strings.Fields(line)
		switch args[0] {
		case "version", "conformance", "completion", "context":
		default:
			args = append(args, "--address", address)
		}
		printed := map[string]string{}
		for _, format := range []string{formatTable, formatWide, formatJSON, formatYAML} {
			code, out, errOut := pushctl(t, "", append(args, "-o", format)...)
			if code != exitOK || errOut != "" {
				t.Errorf("%s -o %s: exit %d, %q", line, format, code, errOut)
			}
			printed[format] = out
		}
		var asJSON, asYAML []any
		for one := range strings.Lines(printed[formatJSON]) {
			var v any
			if err := json.Unmarshal([]byte(one), &v); err != nil {
				t.Errorf("%s: %q: %v", line, one, err)
			}
			asJSON = append(asJSON, v)
		}
		for d := yaml.NewDecoder(strings.NewReader(printed[formatYAML])); ; {
			var v any
			if err := d.Decode(&v); err != nil {
				break
			}
			asYAML = append(asYAML, v)
		}
		a, _ := json.Marshal(asJSON)
		if b, err := json.Marshal(asYAML); string(a) != string(b) || err != nil {
			t.Errorf("%s: as YAML %s, as JSON %s", line, b, a)
		}
		if len(asJSON) == 0 && line != "context ls" {
			t.Errorf("%s printed nothing", line)
		}
		if strings.HasPrefix(strings.TrimSpace(printed[formatTable]), "{") {
			t.Errorf("%s -o table printed %q", line, printed[formatTable])
		}
	}
	if code, _, errOut := pushctl(t, "", "version", "-o", "xml"); code != exitUsage || !strings.Contains(errOut, "--output") {
		t.Errorf("exit %d, %q", code, errOut)
	}
}

// TestYAMLSaysWhatJSONSays, for any JSON.
func TestYAMLSaysWhatJSONSays(t *testing.T) {
	value := rapid.OneOf(rapid.Map(rapid.String(), func(s string) any { return s }), rapid.Map(rapid.Int64(), func(n int64) any { return n }),
		rapid.Map(rapid.Float64(), func(n float64) any { return math.Abs(n) }), rapid.Map(rapid.Bool(), func(b bool) any { return b }), rapid.Just(any(nil)))
	rapid.Check(t, func(t *rapid.T) {
		want, err := json.Marshal(map[string]any{"map": rapid.MapOf(rapid.String(), value).Draw(t, "map"), "list": rapid.SliceOf(value).Draw(t, "list")})
		if err != nil {
			t.Skip(err)
		}
		text, err := yamlOf(want)
		if err != nil {
			t.Fatal(err)
		}
		var back any
		if err := yaml.Unmarshal(text, &back); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		var plain any
		if err := json.Unmarshal(want, &plain); err != nil {
			t.Fatal(err)
		}
		a, _ := json.Marshal(plain)
		// YAML reads 1e21 and 10 as numbers of different kinds: compare them as JSON has them.
		through, err := json.Marshal(back)
		if err != nil {
			t.Fatal(err)
		}
		var again any
		if err := json.Unmarshal(through, &again); err != nil {
			t.Fatal(err)
		}
		if b, _ := json.Marshal(again); string(a) != string(b) {
			t.Fatalf("%s became\n%s, which is %s", a, text, b)
		}
	})
}
