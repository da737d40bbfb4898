package browser

import (
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

func TestPagesOfAnyOriginMayImportTheModule(t *testing.T) {
	w := httptest.NewRecorder()
	Serve(w, httptest.NewRequest(http.MethodGet, "/push-client.js", http.NoBody))
	h := w.Header()
	if w.Code != http.StatusOK || !strings.HasPrefix(h.Get("Content-Type"), "text/javascript") || h.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(w.Body.String(), "export class PushClient") {
		t.Errorf("%d, %v", w.Code, h)
	}
}

// TestModule runs the tests of the module itself, which are for Node.js.
func TestModule(t *testing.T) {
	node, err := exec.LookPath("node")
	if err == nil {
		var out []byte
		if out, err = exec.Command(node, "-p", "parseInt(process.versions.node)").Output(); err == nil {
			if major, _ := strconv.Atoi(strings.TrimSpace(string(out))); major < 20 {
				err = exec.ErrNotFound
			}
		}
	}
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("there is no Node.js 20: %v", err)
		}
		t.Skip("the module is not tried, because there is no Node.js 20 or later")
	}
	if out, err := exec.Command(node, "--test", "test/").CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
