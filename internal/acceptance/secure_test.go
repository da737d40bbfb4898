package acceptance

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/push-manager/push-manager/internal/freeport"
)

// terminal is a person's shell, in which our programs are found by their names.
type terminal struct {
	t   *testing.T
	pm  string // the line that sets PM, first in every terminal
	env []string
}

// command is a shell that becomes the command of a line. Nothing is left of it when the shell is killed.
func (s terminal) command(line string) []string {
	return []string{"-c", s.pm + "\n" + regexp.MustCompile(`^(PM_KEY=\S+ \S+ )?`).ReplaceAllString(line, "${1}exec ")}
}

// run runs a line to its end, and returns all that it printed and its exit code.
func (s terminal) run(line string) (out string, code int) {
	s.t.Helper()
	cmd := exec.CommandContext(within(s.t, patience), "bash", "-c", s.pm+"\n"+line)
	cmd.Env = s.env
	var text bytes.Buffer
	cmd.Stdout, cmd.Stderr = &text, &text
	err := cmd.Run()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return text.String(), exit.ExitCode()
	}
	if err != nil {
		s.t.Fatalf("%s: %v", line, err)
	}
	return text.String(), 0
}

// printedLines are the lines to copy that dev has printed, without what breaks them in the middle.
func printedLines(printed string) (lines []string) {
	_, printed, _ = strings.Cut(printed, "Ready.")
	for _, line := range regexp.MustCompile(`(?m)^  \S(.*\\\n)*.*$`).FindAllString(printed, -1) {
		lines = append(lines, strings.TrimSpace(line))
	}
	return lines
}

// TestSecureDevPrintsLinesThatPush does what a person does with what dev --secure prints: copies the lines, and opens the
// link. Without the certificate, the key or the token the same lines are refused, in words.
func TestSecureDevPrintsLinesThatPush(t *testing.T) {
	bin := filepath.Dir(binary(t, "pushctl"))
	env := []string{"PATH=" + bin + ":" + os.Getenv("PATH"), "HOME=" + t.TempDir()}
	data := t.TempDir()
	dev := start(t, binary(t, "push-manager"), env, "dev", "--secure", "--nodes=2", "--base-port", strconv.Itoa(freeport.Row(t, 16)), "--data-dir", data)
	eventually(t, "dev says that it is ready", func() error {
		if !strings.Contains(dev.out.String(), "Ctrl-C stops everything.") {
			return fmt.Errorf("printed:\n%s", dev.out.String())
		}
		return nil
	})
	printed := dev.out.String()
	person := terminal{t: t, env: env}
	var listen, link, console, token, withCertificate, withKey string
	var pushes, curls []string
	for _, line := range printedLines(printed) {
		switch {
		case strings.HasPrefix(line, "PM="):
			person.pm = line
		case strings.HasPrefix(line, "pushctl listen "):
			listen = line
		case strings.HasPrefix(line, "pushctl token "):
			token = line
		case strings.HasPrefix(line, "https://") && strings.Contains(line, "/console/"):
			console = line
		case strings.HasPrefix(line, "https://"):
			link = line
		case strings.HasPrefix(line, "pushctl ") && strings.Contains(line, " --token-file "):
			withKey = line
			pushes = append(pushes, line)
		case strings.HasPrefix(line, "pushctl "):
			withCertificate = line
			pushes = append(pushes, line)
		case strings.Contains(line, "grpcurl "):
			curls = append(curls, line)
		default:
			t.Errorf("what is this line for? %s", line)
		}
	}
	if person.pm == "" || listen == "" || link == "" || console == "" || token == "" || len(pushes) != 3 || len(curls) != 2 {
		t.Fatalf("some lines are missing:\n%s", printed)
	}

	alice := start(t, "bash", env, terminal{t: t, pm: person.pm}.command(listen)...)
	alice.shows(`listening as "alice" in room lobby`, "joined lobby")
	for _, line := range pushes {
		if out, code := person.run(line); code != 0 || !strings.Contains(out, "delivered to 1 of 1") {
			t.Errorf("exit code %d: %s\n%s", code, line, out)
		}
	}
	if len(regexp.MustCompile(`Hello\n|Hello, Alice\n`).FindAllString(alice.out.String(), -1)) != len(pushes) {
		t.Errorf("alice got:\n%s", alice.out.String())
	}

	const refused = "unauthenticated, nothing was sent"
	flag := func(line string, names ...string) string {
		for _, name := range names {
			line = regexp.MustCompile(` --?`+name+` \S+`).ReplaceAllString(line, "")
		}
		return line
	}
	for _, test := range []struct {
		name, line, says string
	}{
		{"no certificate", flag(withCertificate, "cert", "key"), refused},
		{"no key", flag(withKey, "token-file"), refused},
		{"another key", "PUSHCTL_API_KEY=pmk_4fZ1q9aB_0000000000000000000000000000000000000000000_000000 " + flag(withKey, "token-file"), refused},
		{"no authority", flag(withCertificate, "ca"), "certificate signed by unknown authority"},
		{"no TLS", flag(withCertificate, "cert", "key", "ca"), "does not speak gRPC without TLS, nothing was sent"},
		{"what the key does not allow", strings.Replace(withKey, "room lobby", "broadcast", 1), "this method is not allowed to you"},
		{"certificate of a node", strings.ReplaceAll(withCertificate, "client-app", "node-connect-node-1"), refused},
		{"listen without a token", flag(listen, "token-file"), "4408 no token came in time): it asks for a token"},
		{"listen with a wrong token", flag(listen, "token-file") + " --token-file $PM/api-key", "4401"},
		{"listen with the token of another", listen + " --user bob", "4401"},
		{"listen without the authority", flag(listen, "ca"), "certificate signed by unknown authority"},
	} {
		if out, code := person.run(test.line); code != 1 || !strings.Contains(out, test.says) {
			t.Errorf("%s: exit code %d, want 1 and %q: %s\n%s", test.name, code, test.says, test.line, out)
		}
	}

	out, code := person.run(token)
	if code != 0 {
		t.Fatalf("exit code %d: %s\n%s", code, token, out)
	}
	carol := start(t, "bash", append(env, "PUSHCTL_TOKEN="+strings.TrimSpace(out)), terminal{t: t, pm: person.pm}.command(flag(listen, "token-file"))...)
	carol.shows(`listening as "carol"`, "joined lobby")

	t.Run("files", func(t *testing.T) {
		secret, err := os.ReadFile(filepath.Join(data, "secure", "api-key"))
		if err != nil || strings.Contains(printed, strings.TrimSpace(string(secret))) {
			t.Errorf("the API key is printed, or %v", err)
		}
		err = filepath.WalkDir(filepath.Join(data, "secure"), func(path string, entry os.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := entry.Info()
			if err == nil && info.Mode().Perm()&0o077 != 0 {
				t.Errorf("%s: others may read it", path)
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})

	t.Run("grpcurl", func(t *testing.T) {
		dir := filepath.Dir(tool(t, "grpcurl", "make interop-tools builds it"))
		person := terminal{t: t, pm: person.pm, env: append(env, "PATH="+bin+":"+dir+":"+os.Getenv("PATH"))}
		for _, line := range curls {
			if out, code := person.run(line); code != 0 || !strings.Contains(out, `"delivered": 2`) {
				t.Errorf("exit code %d: %s\n%s", code, line, out)
			}
			without := regexp.MustCompile(` -(cert|key) \S+| -H '[^']*'`).ReplaceAllString(line, "")
			if out, code := person.run(without); code == 0 || !strings.Contains(out, "code = Unauthenticated") {
				t.Errorf("exit code %d: %s\n%s", code, without, out)
			}
		}
	})

	t.Run("browser", func(t *testing.T) {
		page := browse(t, link, filepath.Join(data, "secure", "node-connect-node-1.crt"))
		page.shows(`[$("state").textContent, $("user").value, $("rooms").innerText].join()`, "connected,bob,lobby")
		out, code := person.run(strings.Replace(withKey, "room lobby", "user bob", 1))
		if code != 0 || !strings.Contains(out, "delivered to 1 of 1") {
			t.Errorf("exit code %d\n%s", code, out)
		}
		page.shows(`$("list").innerText`, "to bob", "Hello")
		address, _, _ := strings.Cut(link, "#")
		page.shows(`"at " + location.href + "; stored " + (localStorage.length + sessionStorage.length + document.cookie.length)`, "at "+address+"; stored 0")
		// What the page shows can be copied, too.
		line := page.eval(`$("pushctl").textContent`)
		if out, code := person.run(line); code != 0 || !strings.Contains(out, "delivered to 3 of 3") {
			t.Errorf("exit code %d: %s\n%s", code, line, out)
		}
	})

	t.Run("console", func(t *testing.T) {
		key, err := os.ReadFile(filepath.Join(data, "secure", "api-key"))
		if err != nil {
			t.Fatal(err)
		}
		page := browse(t, strings.Replace(console, "#push", "#overview", 1), filepath.Join(data, "secure", "manager-push-manager-1.crt"))
		page.shows(`document.querySelector("main").innerText`, "Sign in")
		signIn := func(credential string) {
			page.eval(`document.getElementById("credential").value = "` + credential + `"; document.querySelector("main button").click()`)
		}
		signIn("pmk_wrong")
		page.shows(`document.getElementById("refused").innerText`, "no credentials, or none that are valid here")
		signIn(strings.TrimSpace(string(key)))
		page.shows(`document.querySelector("main").innerText`, "2 of 2 up", "Users by outcome")
		page.shows(`"kept " + (localStorage.length + document.cookie.length) + location.href`, "kept 0https://")
	})

	dev.signal(syscall.SIGTERM)
	if code := dev.exit(20 * time.Second); code != 0 {
		t.Errorf("dev exits with %d", code)
	}
}

// shows waits until a process has printed all parts.
func (p *process) shows(parts ...string) {
	p.t.Helper()
	eventually(p.t, p.name, func() error {
		out := p.out.String()
		for _, part := range parts {
			if !strings.Contains(out, part) {
				return fmt.Errorf("%q is not in:\n%s", part, out)
			}
		}
		return nil
	})
}
