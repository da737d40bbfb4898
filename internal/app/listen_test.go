package app

import (
	"errors"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/config"
)

func TestOnePortForTwoListenersIsRefused(t *testing.T) {
	for name, tc := range map[string]struct {
		grpc, http, metrics int
		want                string
	}{
		"three ports":          {1, 2, 3, ""},
		"any free ones":        {0, 0, 0, ""},
		"two of them any":      {0, 1, 0, ""},
		"the first two":        {1, 1, 3, "HTTP_PORT: 1 is grpc_port, too"},
		"the first and last":   {1, 2, 1, "METRICS_PORT: 1 is grpc_port, too"},
		"the last two":         {1, 2, 2, "METRICS_PORT: 2 is http_port, too"},
		"the last two and any": {0, 2, 2, "METRICS_PORT: 2 is http_port, too"},
		"all":                  {1, 1, 1, "HTTP_PORT: 1 is grpc_port, too"},
	} {
		err := CheckPorts(config.New(), Port{"grpc_port", tc.grpc}, Port{"http_port", tc.http}, Port{"metrics_port", tc.metrics})
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || err.Error() != tc.want || !errors.Is(err, config.ErrUsage)):
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// TestAListOfControllersIsRefusedWhereOneIsTaken and says so: a Connect-Node reports to one target.
func TestAListOfControllersIsRefusedWhereOneIsTaken(t *testing.T) {
	if err := CheckTarget("one:50051,two:50051"); err == nil || !strings.Contains(err.Error(), "it is a list") {
		t.Errorf("said %v", err)
	}
	for _, target := range []string{"one:50051", "[::1]:50051", "dns:///controllers:50051"} {
		if err := CheckTarget(target); err != nil {
			t.Error(err)
		}
	}
}
