package pushctl

import (
	"slices"
	"testing"

	pubsub "github.com/push-manager/push-manager/proto"
)

func TestFilterFlags(t *testing.T) {
	list, err := matches([]string{"platform=ios,android", "!app_version=1.0", "a=b=c"})
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []*pubsub.Match{
		{Key: "platform", Values: []string{"ios", "android"}},
		{Key: "app_version", Values: []string{"1.0"}, Not: true},
		{Key: "a", Values: []string{"b=c"}},
	} {
		if m := list[i]; m.GetKey() != want.GetKey() || m.GetNot() != want.GetNot() || !slices.Equal(m.GetValues(), want.GetValues()) {
			t.Errorf("%v, want %v", m, want)
		}
	}
	if got := matchesText(list[:2]); got != "platform=ios,android and !app_version=1.0" {
		t.Errorf("shown as %q", got)
	}
	for _, wrong := range []string{"platform", "=ios", "platform=", "!", "\xff=x"} {
		if _, err := matches([]string{wrong}); err == nil {
			t.Errorf("%q is taken", wrong)
		}
	}
}
