package acceptance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/push-manager/push-manager/internal/freeport"
)

// step is something to do on a page of the tutorial: a block of code, or a comment that says what a person does in a browser.
type step struct{ kind, text string }

// steps are those of a page, in order. The kind of a comment is "do".
func steps(t *testing.T, file string) (all []step) {
	t.Helper()
	page, err := os.ReadFile("../../docs/" + file)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile("(?ms)^```([a-z]+)\n(.*?)^```$|^<!-- (.*?) -->$").FindAllStringSubmatch(string(page), -1) {
		if m[3] != "" {
			all = append(all, step{"do", m[3]})
		} else {
			all = append(all, step{m[1], m[2]})
		}
	}
	return all
}

// TestTheTutorialIsTheSameInBothLanguages: commands, what they print, and what is done between them.
func TestTheTutorialIsTheSameInBothLanguages(t *testing.T) {
	if english, chinese := steps(t, "tutorial.md"), steps(t, "tutorial.zh-CN.md"); !slices.Equal(english, chinese) {
		for i := range min(len(english), len(chinese)) {
			if english[i] != chinese[i] {
				t.Fatalf("step %d: %+v, and in Chinese %+v", i, english[i], chinese[i])
			}
		}
		t.Fatalf("%d steps, and in Chinese %d", len(english), len(chinese))
	}
}

// TestTheTutorialDoesWhatItSays runs each command, does in a browser what a person would, and compares what is to be seen. The
// code that it shows is that of the example. Only ports are replaced.
func TestTheTutorialDoesWhatItSays(t *testing.T) {
	if _, err := exec.LookPath("curl"); err != nil {
		missing(t, "there is no curl")
	}
	example := map[string]string{}
	for kind, file := range map[string]string{"js": "page.html", "go": "main.go"} {
		text, err := os.ReadFile("../../examples/chat/" + file)
		if err != nil {
			t.Fatal(err)
		}
		example[kind] = string(text)
	}
	bin := t.TempDir()
	if out, err := exec.Command("go", "build", "-o", bin+"/", "../../examples/chat").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	base := freeport.Row(t, 16)
	port := func(i int) string { return strconv.Itoa(base + i) }
	chats := freeport.Take(t, 2)
	replace := strings.NewReplacer("localhost:8080", "localhost:"+port(6), "localhost:8081", "localhost:"+port(8), "localhost:8000", "localhost:"+chats[0], "localhost:8001", "localhost:"+chats[1],
		"go run ./cmd/push-manager dev", "exec push-manager dev --base-port "+port(0), "go run ./examples/chat", "exec chat", "go run ./cmd/pushctl", "exec pushctl")
	// What would stand in flags if the ports were not the usual ones.
	env := []string{
		"PATH=" + filepath.Dir(binary(t, "pushctl")) + ":" + bin + ":" + os.Getenv("PATH"), "HOME=" + t.TempDir(),
		"PUSHCTL_ADDRESS=localhost:" + port(3), "PUSHCTL_METRICS=localhost:" + port(4), "CONTROLLER_ADDRESS=localhost:" + port(2), "ETCD_ENDPOINTS=localhost:" + port(0),
		"PUSH_MANAGER_ADDRESS=localhost:" + port(3), "CONNECT_NODE_URL=ws://localhost:" + port(6) + "/ws", "CHAT_ADDRESS=localhost:" + chats[0],
	}
	window := regexp.MustCompile(`^(open|close) (\w+)(?: at (\S+))?$`)
	says := regexp.MustCompile(`^(\w+) says to (\S+): (.*)$`)
	sees := regexp.MustCompile(`^(\w+) sees (.*)$`)
	tabs, links := map[string]*tab{}, map[string]string{}
	var printed func() string // of the command before
	var running []*process    // in terminals of their own
	for _, s := range steps(t, "tutorial.md") {
		if t.Failed() {
			return // what follows builds on it
		}
		switch s.kind {
		case "js", "go":
			if !strings.Contains(example[s.kind], s.text) {
				t.Errorf("the example does not have\n%s", s.text)
			}
		case "sh":
			line := replace.Replace(strings.TrimSpace(s.text))
			if strings.Contains(line, "push-manager dev") || strings.HasSuffix(line, "exec chat") { // until the end
				running = append(running, start(t, "bash", env, "-c", line))
				printed = running[len(running)-1].out.String
				continue
			}
			out, code := (terminal{t: t, env: env}).run(line)
			if code != 0 {
				t.Errorf("%s: exit code %d\n%s", line, code, out)
			}
			printed = func() string { return out }
		case "text":
			for line := range strings.Lines(replace.Replace(s.text)) {
				eventually(t, line, func() error {
					if out := printed(); !strings.Contains(out, strings.TrimSpace(line)) {
						return fmt.Errorf("printed:\n%s", out)
					}
					return nil
				})
			}
		case "do":
			if m := window.FindStringSubmatch(s.text); m != nil {
				who, at := m[2], m[3]
				if at == "" {
					at = "localhost:8000"
				}
				links[who] = "http://" + replace.Replace(at) + "/?me=" + who
				switch {
				case m[1] == "close":
					// Until the gateway has told it where it is; it does so once a second.
					tabs[who].shows(`localStorage.getItem("position `+who+`") ? "position" : ""`, "position")
					tabs[who].eval(`location.replace("about:blank")`)
					tabs[who].shows(`"at " + location.href`, "at about:blank")
				case tabs[who] == nil:
					tabs[who] = browse(t, links[who], "")
				default:
					tabs[who].eval(`location.replace(` + strconv.Quote(links[who]) + `)`)
				}
				if m[1] == "open" {
					tabs[who].shows(`$("state")?.textContent ?? ""`, "open")
				}
			} else if m := says.FindStringSubmatch(s.text); m != nil {
				tabs[m[1]].eval(fmt.Sprintf(`[$("to").value = %q, $("text").value = %q, $("say").requestSubmit()].join()`, m[2], m[3]))
			} else if m := sees.FindStringSubmatch(s.text); m != nil {
				tabs[m[1]].shows(`$("list").innerText`, strings.Split(m[2], " | ")...)
			} else {
				t.Errorf("what is to be done? %s", s.text)
			}
		default:
			t.Errorf("a block of %q", s.kind)
		}
	}
	if len(tabs) != 3 || len(running) != 3 {
		t.Errorf("%d windows, %d terminals", len(tabs), len(running))
	}
	running[0].signal(os.Interrupt)
	if code := running[0].exit(patience); code != 0 {
		t.Errorf("dev exits with %d", code)
	}
}
