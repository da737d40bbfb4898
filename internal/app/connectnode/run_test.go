package connectnode

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
		var c Config
		s := config.New()
		c.Bind(s)
		env := func(name string) (string, bool) {
			if name != "COMPRESSION" {
				return "", false
			}
			return value, true
		}
		err := s.Load(config.Options{NoFile: true, LookupEnv: env})
		if err == nil {
			err = c.Validate(s, env)
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

func TestConnectNodeSettingsReachTheGateway(t *testing.T) {
	var c Config
	s := config.New()
	c.Bind(s)
	env := map[string]string{"QUEUE_TOTAL_BYTES": "3MiB", "MESSAGE_RATE": "7", "QUEUE_BYTES": "2KiB", "QUEUE_FRAMES": "5"}
	if err := s.Load(config.Options{NoFile: true, LookupEnv: func(name string) (string, bool) { v, ok := env[name]; return v, ok }}); err != nil {
		t.Fatal(err)
	}
	g := c.Gateway
	if g.QueueTotalBytes != 3<<20 || g.MessageRate != 7 || g.QueueBytes != 2<<10 || g.QueueFrames != 5 {
		t.Errorf("queue_total_bytes %d, message_rate %d, queue_bytes %d, queue_frames %d", g.QueueTotalBytes, g.MessageRate, g.QueueBytes, g.QueueFrames)
	}
}

func TestLittleGarbageIsKept(t *testing.T) {
	if got := new(Config).GarbageShare(); got <= 1 {
		t.Errorf("a Connect-Node keeps as much garbage as a Push-Manager: %d", got)
	}
}
