package arch

import (
	"fmt"
	"regexp"
	"strings"
	"testing"

	_ "google.golang.org/genproto/googleapis/rpc/errdetails"
	_ "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
)

// TestThirdPartyProtosAreWhatOthersCompile compares every field of the files kept for
// authors in other languages with the published ones, as Go has them.
func TestThirdPartyProtosAreWhatOthersCompile(t *testing.T) {
	field := regexp.MustCompile(`^(repeated )?([\w.]+|map<[\w, ]+>) (\w+) = (\d+);$`)
	for _, file := range []string{"google/rpc/status.proto", "google/rpc/error_details.proto"} {
		scope, fields := "google.rpc", 0
		for line := range strings.Lines(read(t, "proto/third_party/"+file)) {
			line = strings.TrimSpace(line)
			if name, ok := strings.CutPrefix(line, "message "); ok {
				scope += "." + strings.TrimSuffix(name, " {")
			}
			if line == "}" {
				scope = scope[:strings.LastIndexByte(scope, '.')]
			}
			m := field.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			fields++
			d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(scope))
			if err != nil {
				t.Errorf("%s: %s: %v", file, scope, err)
				continue
			}
			f := d.(protoreflect.MessageDescriptor).Fields().ByName(protoreflect.Name(m[3]))
			if f == nil {
				t.Errorf("%s: %s has no %s", file, scope, m[3])
				continue
			}
			kind := f.Kind().String()
			switch {
			case f.IsMap():
				kind = "map<" + f.MapKey().Kind().String() + ", " + f.MapValue().Kind().String() + ">"
			case f.Message() != nil:
				kind = strings.TrimPrefix(string(f.Message().FullName()), scope+".")
			}
			got, want := fmt.Sprint(m[2], " ", m[4], " list: ", m[1] != ""), fmt.Sprint(kind, " ", f.Number(), " list: ", f.IsList())
			if got != want {
				t.Errorf("%s: %s.%s is %s, published as %s", file, scope, m[3], got, want)
			}
		}
		if fields < 3 {
			t.Errorf("%s: only %d fields found", file, fields)
		}
	}
}
