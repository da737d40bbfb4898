package program

import (
	"slices"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/config"
)

func TestConnectNodeSaysWhichCodecsItAccepts(t *testing.T) {
	for value, want := range map[string]struct {
		codecs []string
		err    string
	}{
		"":     {codecs: []string{"s2", "zstd"}},
		"zstd": {codecs: []string{"zstd"}},
		"off":  {codecs: []string{"off"}},
		"gzip": {err: "COMPRESSION: \"gzip\" is none of off, s2, zstd"},
	} {
		var c ConnectNodeConfig
		s := config.New()
		c.Bind(s)
		env := func(name string) (string, bool) { return value, name == "COMPRESSION" }
		err := s.Load(config.Options{NoFile: true, LookupEnv: env})
		if err == nil {
			err = c.Settle(s, env)
		}
		switch {
		case want.err != "":
			if err == nil || !strings.Contains(err.Error(), want.err) {
				t.Errorf("%q: %v", value, err)
			}
		case err != nil || !slices.Equal(c.Gateway.Compression, want.codecs):
			t.Errorf("%q: %v, %v", value, c.Gateway.Compression, err)
		}
	}
}
