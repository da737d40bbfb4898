package acceptance

import (
	"cmp"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/push-manager/push-manager/internal/freeport"
	"github.com/push-manager/push-manager/internal/programs"
)

// hostile is an id that would do something if it were read as HTML.
const hostile = `<img src=x onerror=alert(1)>`

// consolePages are all of them.
var consolePages = []string{"overview", "topology", "nodes", "explain", "push", "presence", "jobs", "callers", "store", "settings", "warnings"}

// startDev runs push-manager dev and returns the address of its console.
func startDev(t *testing.T, args ...string) (dev *process, console string) {
	t.Helper()
	args = append([]string{"dev", "--base-port", strconv.Itoa(freeport.Row(t, 16)), "--data-dir", t.TempDir()}, args...)
	dev = start(t, binary(t, "push-manager"), nil, args...)
	eventually(t, "dev says that it is ready", func() error {
		if !strings.Contains(dev.out.String(), "Ctrl-C stops everything.") {
			return fmt.Errorf("printed:\n%s", dev.out.String())
		}
		return nil
	})
	return dev, "http://" + printedAddress(t, dev.out.String(), `\n +http://`) + "/console/"
}

const mainText = `document.querySelector("main").innerText`

// TestConsoleOfDevSendsAPushToTwoOtherTabs by one click, and everything for that is on the page that dev names.
func TestConsoleOfDevSendsAPushToTwoOtherTabs(t *testing.T) {
	dev, console := startDev(t)
	if !strings.Contains(dev.out.String(), console+"#push") {
		t.Fatalf("printed:\n%s", dev.out.String())
	}
	page := browse(t, console+"#push", "")
	page.shows(mainText, "Open alice", "Open bob", "Send")
	var users []*tab
	for _, user := range []string{"alice", "bob"} {
		page.eval(`[...document.querySelectorAll("main a")].find(a => a.textContent === "Open ` + user + `").click()`)
		link := page.eval(`[...document.querySelectorAll("main a")].find(a => a.textContent === "Open ` + user + `").href`)
		tab := page.other(link)
		tab.shows(`[$("state").textContent, $("user").value, $("rooms").innerText].join()`, "connected,"+user+",lobby")
		users = append(users, tab)
	}
	page.eval(`document.querySelector("main form button").click()`)
	for _, tab := range users {
		tab.shows(`$("list").innerText`, "room lobby", "Hello from the console")
	}
	page.shows(mainText, "2 of 2 delivered", "alice", "bob")

	// What becomes of each target of a list.
	page.eval(`(() => { const [kind, id] = document.querySelectorAll("main select, main input"); kind.value = "users"; kind.dispatchEvent(new Event("change")); id.value = "alice, nobody"; document.querySelector("main form button").click(); })()`)
	page.shows(mainText, "2 pushes", "alice\tdelivered", "nobody\toffline")
	page.eval(`location.hash = "explain"`)
	page.shows(mainText, "Nothing is sent")
	page.eval(`document.querySelector("main form button").click()`)
	page.shows(mainText, "2 deliveries, 2 users", "queued", "connect-node-1")

	// Several rooms, who is in one, where a user is, and the end of that.
	set := func(kind, id string) {
		page.eval(`(() => { const [kind, id] = document.querySelectorAll("main select, main input"); kind.value = "` + kind + `"; kind.dispatchEvent(new Event("change")); id.value = "` + id + `"; document.querySelector("main form button").click(); })()`)
	}
	set("rooms", "lobby, lobby")
	page.shows(mainText, "2 deliveries, 2 users")
	page.eval(`location.hash = "push"`)
	page.shows(mainText, "Open alice")
	set("rooms", "lobby, lobby")
	page.shows(mainText, "2 of 2 delivered")
	page.eval(`location.hash = "presence"`)
	page.shows(mainText, "Who is in a room")
	set("room", "lobby")
	page.shows(mainText, "2 users in lobby", "alice", "bob", "connect-node-1")
	set("users", "alice, nobody")
	page.shows(mainText, "1 of 2 online", "nobody\toffline", "1 connection")
	disconnect := `document.querySelector("main details").open = true; document.querySelector("main details form button").click(); document.querySelector("main details").innerText`
	page.eval(disconnect)
	page.shows(mainText, "One room or one user")
	set("user", "alice")
	page.shows(mainText, "1 of 1 online")
	page.eval(disconnect)
	page.shows(`document.querySelector("main details form button").textContent`, "Yes, disconnect alice")
	page.eval(disconnect)
	page.shows(mainText, "1 connection closed on 3 nodes")
	users[0].shows(`[$("state").textContent, $("rooms").innerText].join()`, "connected,lobby") // it comes back
}

// TestConsoleInABrowser: ids that look like HTML do nothing, a killed node is red within two seconds, and axe finds no serious fault on any
// of its pages in light, in dark and on a phone.
func TestConsoleInABrowser(t *testing.T) {
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+2*3+3)
	controller := "127.0.0.1:" + p[0]
	start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[1])
	var nodes []*process
	for i := range 2 {
		p := p[2+3*i:]
		nodes = append(nodes, start(t, binary(t, "connect-node"), []string{
			fmt.Sprint("NODE_ID=connect-node-", i+1), "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
			"CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
		}))
		ready(t, p[2])
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{etcd}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	register(t, client, hostile, freeport.Addr(t)) // nobody is there
	api, web, metrics := p[8], p[9], p[10]
	start(t, binary(t, "push-manager"), []string{
		"GRPC_PORT=" + api, "HTTP_PORT=" + web, "METRICS_PORT=" + metrics, "CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd,
	})
	ready(t, metrics)
	alice := connect(t, "127.0.0.1:"+p[3], hostile, "lobby")
	alice.in("lobby")

	page := browse(t, "http://127.0.0.1:"+web+"/console/", "")
	page.shows(mainText, "2 of 3 up")
	page.eval(`window.alerts = 0; window.alert = () => window.alerts++; ""`)
	show := func(name string, parts ...string) {
		t.Helper()
		page.eval(`location.hash = "` + name + `"; ""`)
		page.shows(mainText, parts...)
	}

	t.Run("ids that look like HTML", func(t *testing.T) {
		page.t = t
		show("nodes", hostile, "down")
		show("warnings", hostile, "node not reachable")
		show("topology", "3 Connect-Nodes")
		page.shows(`[...document.querySelectorAll("svg title")].map(t => t.textContent).join()`, hostile)
		submit := func(kind, id string) {
			page.eval(`(() => { const [kind, id] = document.querySelectorAll("main select, main input"); kind.value = "` + kind + `"; kind.dispatchEvent(new Event("change")); id.value = "` + id + `"; document.querySelector("main form button").click(); })()`)
		}
		show("explain", "Nothing is sent")
		submit("room", "lobby")
		page.shows(mainText, "1 delivery", hostile)
		show("push", "Send")
		submit("room", "lobby")
		page.shows(mainText, "1 of 1 delivered", hostile)
		submit("user", hostile)
		page.shows(mainText, "1 of 1 delivered")
		page.shows(`"alerts " + window.alerts + ", images " + document.querySelectorAll("main img, main script").length`, "alerts 0, images 0")
	})

	t.Run("jobs", func(t *testing.T) {
		page.t = t
		jobsOnThePage(t, page, show)
	})

	t.Run("a fault of the page is not said to be the server's", func(t *testing.T) {
		page.t = t
		show("overview", "Latency of pushes")
		page.shows(`document.getElementById("live").textContent`, "live")
		page.eval(`globalThis.parsed = Date.parse; Date.parse = () => { throw new Error("a fault of ours"); }; ""`)
		page.shows(`document.getElementById("live").textContent`, "this page has a fault: a fault of ours")
		page.eval(`Date.parse = parsed; ""`)
		page.shows(`document.getElementById("live").textContent`, "live")
	})

	t.Run("axe", func(t *testing.T) {
		page.t = t
		show("jobs", "New job")
		makeJob(page, "for-axe", "users", manyUsers(300), "1")
		page.shows(mainText, "for-axe")
		script, err := os.ReadFile("nodejs/node_modules/axe-core/axe.min.js")
		if err != nil {
			missing(t, "there is no axe-core (make interop-tools)")
		}
		for _, screen := range []struct {
			name, scheme string
			width        int
		}{{"light", "light", 1280}, {"dark", "dark", 1280}, {"phone", "light", 390}} {
			page.call(nil, "Emulation.setDeviceMetricsOverride", map[string]any{"width": screen.width, "height": 844, "deviceScaleFactor": 1, "mobile": screen.width < 500})
			page.call(nil, "Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": screen.scheme}}})
			for _, name := range consolePages {
				show(name, "")
				page.shows(`document.querySelector("nav a[aria-current]").hash`, "#"+name)
				page.eval(string(script) + `; ""`)
				found := page.eval(`axe.run(document, {resultTypes: ["violations"]}).then(r => JSON.stringify(r.violations.filter(v => ["serious", "critical"].includes(v.impact)).map(v => [v.id, v.help, v.nodes.map(n => n.html + " " + n.failureSummary)])))`)
				if found != "[]" {
					t.Errorf("%s, %s: %s", name, screen.name, found)
				}
				if wide := page.eval(`String(document.documentElement.scrollWidth - document.documentElement.clientWidth)`); wide != "0" {
					t.Errorf("%s, %s: %s pixels wider than the screen", name, screen.name, wide)
				}
				page.picture(name + "-" + screen.name)
			}
		}
		page.call(nil, "Emulation.clearDeviceMetricsOverride", nil)
	})

	t.Run("a killed node", func(t *testing.T) {
		page.t = t
		show("nodes", "connect-node-2")
		page.eval(`new MutationObserver(() => {
			const row = [...document.querySelectorAll("tbody tr")].find(r => r.innerText.startsWith("connect-node-2"));
			if (row?.querySelector(".state.bad")) window.red ??= Date.now();
		}).observe(document.querySelector("tbody"), { subtree: true, childList: true, attributes: true, characterData: true }); ""`)
		killed := time.Now()
		if err := nodes[1].cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		page.shows(`String(window.red ?? "")`, "1")
		red, err := strconv.ParseInt(page.eval(`String(window.red)`), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		took := time.UnixMilli(red).Sub(killed)
		t.Logf("red after %v", took)
		if took > 2*time.Second && !programs.Race() {
			t.Errorf("red after %v", took)
		}
		page.shows(`document.getElementById("said").textContent`, "connect-node-2 is down")
	})
}

// manyUsers is a list of users who are not there.
func manyUsers(n int) string {
	var users []string
	for i := range n {
		users = append(users, fmt.Sprint("user-", i))
	}
	return strings.Join(users, ",")
}

// makeJob fills in the form of the page Jobs, and sends it.
func makeJob(page *tab, name, kind, id, rate string) {
	page.t.Helper()
	page.eval(`(() => {
		document.querySelector("main details").open = true;
		const [name, kind, id, rate, text] = document.querySelectorAll("main details input, main details select, main details textarea");
		name.value = "` + name + `"; kind.value = "` + kind + `"; kind.dispatchEvent(new Event("change")); id.value = "` + id + `"; rate.value = "` + rate + `"; text.value = "news";
		document.querySelector("main details button").click();
	})(); ""`)
}

// jobsOnThePage: a job is made, watched, held, changed and ended; one that waits says why, with whatever text a node brings; lists have pages
// and are read only while they are looked at.
func jobsOnThePage(t *testing.T, page *tab, show func(name string, parts ...string)) {
	t.Helper()
	button := func(job, text string) {
		page.eval(`[...document.querySelectorAll(".jobs > li")].find(li => li.querySelector("h3").textContent === "` + job + `")` +
			`.querySelectorAll("button").forEach(b => { if (b.textContent === "` + text + `") b.click(); }); ""`)
	}
	card := func(job string) string {
		return `[...document.querySelectorAll(".jobs > li")].find(li => li.querySelector("h3").textContent === "` + job + `")?.innerText ?? ""`
	}
	show("jobs", "There is no job that has not ended.")
	makeJob(page, "sale", "users", manyUsers(200), "2")
	page.shows(mainText, "sale: pending, for 200 users")
	page.shows(card("sale"), "running", "for 200 users", "of 2 users a second", "done in about", "of about 200 users", "offline")
	button("sale", "Pause")
	page.shows(card("sale"), "paused", "Resume")
	page.eval(`document.querySelector(".jobs .rate input").value = "7"; ""`)
	button("sale", "Set rate")
	page.shows(card("sale"), "7 users a second")
	button("sale", "Resume")
	page.shows(card("sale"), "running", "of 7 users a second")
	button("sale", "Cancel")
	page.shows(card("sale"), "End it for good")
	button("sale", "End it for good")
	page.shows(mainText, "There is no job that has not ended.")
	page.eval(`document.querySelector("main .check input").click(); ""`)
	page.shows(card("sale"), "cancelled", "ended")
	makeJob(page, "sale", "users", "alice", "2")
	page.shows(mainText, "there is a job of that name with another spec")

	// The node that cannot be reached has an id that would be an image.
	makeJob(page, "waits", "everybody", "", "1")
	page.shows(card("waits"), hostile)
	page.shows(`"alerts " + window.alerts + ", images " + document.querySelectorAll("main img, main script").length`, "alerts 0, images 0")
	button("waits", "Cancel")
	button("waits", "End it for good")

	for i := range 21 {
		makeJob(page, fmt.Sprintf("z-%02d", i), "users", "alice", "1")
		page.shows(mainText, fmt.Sprintf("z-%02d: pending", i))
	}
	page.shows(mainText, "20 jobs, page 1")
	page.eval(`[...document.querySelectorAll("main .bar button")].find(b => b.textContent === "Next page").click(); ""`)
	page.shows(mainText, "3 jobs, page 2", "z-20")
	page.eval(`[...document.querySelectorAll("main .bar button")].find(b => b.textContent === "First page").click(); ""`)
	page.shows(mainText, "20 jobs, page 1", "sale")

	// Nobody looks: nothing is asked.
	count := `String(performance.getEntriesByType("resource").filter(e => e.name.endsWith("/ListJobs")).length)`
	page.eval(`performance.clearResourceTimings(); ""`)
	page.shows(count, "2")
	show("settings", "manager_id")
	page.eval(`performance.clearResourceTimings(); ""`)
	time.Sleep(3 * time.Second)
	if n := page.eval(count); n != "0" {
		t.Errorf("the page has asked for jobs %s times while it was not shown", n)
	}
}

// TestConsoleOf50ViewersCostsLittle measures what 50 who look cost Push-Manager at 10,000 pushes a second, in turns with and without
// them. The figure is for PERF.md.
func TestConsoleOf50ViewersCostsLittle(t *testing.T) {
	if os.Getenv("LONG") == "" {
		t.Skip("takes minutes, see make bench-console")
	}
	const viewers, pairs, turn = 50, 12, 3 * time.Second
	etcd := startEtcd(t)
	p := freeport.Take(t, 2+3+3)
	controller := "127.0.0.1:" + p[0]
	start(t, binary(t, "controller"), []string{"GRPC_PORT=" + p[0], "METRICS_PORT=" + p[1], "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[1])
	start(t, binary(t, "connect-node"), []string{"NODE_ID=connect-node-1", "GRPC_PORT=" + p[2], "HTTP_PORT=" + p[3], "METRICS_PORT=" + p[4], "CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd})
	ready(t, p[4])
	api, web, metrics := p[5], p[6], p[7]
	manager := start(t, binary(t, "push-manager"), []string{"GRPC_PORT=" + api, "HTTP_PORT=" + web, "METRICS_PORT=" + metrics, "CONTROLLER_ADDRESS=" + controller, "ETCD_ENDPOINTS=" + etcd})
	ready(t, metrics)
	pushed := func() float64 {
		_, body, err := get("http://127.0.0.1:" + metrics + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(body, "\npush_manager_push_total ")
		line, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.ParseFloat(line, 64)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	load := start(t, binary(t, "pushload"), nil, "--address=127.0.0.1:"+api, "--way="+cmp.Or(os.Getenv("WAY"), "stream"), "--rate=10000", "--mix=user=1", "--users=100", "--rooms=10",
		"--clients=100", "--client-url=ws://127.0.0.1:"+p[3]+"/ws", "--warmup=3s", "--duration=10m", "--max-errors=1")
	time.Sleep(8 * time.Second)

	// As the page does: a connection of its own, and the next snapshot when it is due.
	look := func(ctx context.Context) {
		client := &http.Client{Transport: &http.Transport{}}
		defer client.CloseIdleConnections()
		wait := time.NewTimer(rand.N(time.Second))
		defer wait.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-wait.C:
			}
			req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://127.0.0.1:"+web+"/console/snapshot", http.NoBody)
			if err != nil {
				return
			}
			req.Header.Set("Accept-Encoding", "gzip")
			resp, err := client.Do(req)
			if err != nil {
				return // the turn is over
			}
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			age, _ := strconv.Atoi(resp.Header.Get("X-Snapshot-Age"))
			wait.Reset(time.Second + 15*time.Millisecond - time.Duration(age)*time.Millisecond + rand.N(60*time.Millisecond))
		}
	}
	cores := func() float64 {
		before, began := cpuOf(t, manager.cmd.Process.Pid), time.Now()
		time.Sleep(turn)
		return (cpuOf(t, manager.cmd.Process.Pid) - before).Seconds() / time.Since(began).Seconds()
	}
	compare := func(what string) {
		var differences []float64
		alone, first, began := 0.0, pushed(), time.Now()
		for range pairs {
			var with, without float64
			for _, watched := range rand.Perm(2) {
				ctx, stop := context.WithCancel(t.Context())
				var looking sync.WaitGroup
				if watched == 1 {
					for range viewers {
						looking.Go(func() { look(ctx) })
					}
					time.Sleep(1500 * time.Millisecond) // until all look
					with = cores()
				} else {
					without = cores()
				}
				stop()
				looking.Wait()
			}
			alone += without / pairs
			differences = append(differences, with-without)
		}
		mean, square := 0.0, 0.0
		for _, d := range differences {
			mean += d / pairs
		}
		for _, d := range differences {
			square += (d - mean) * (d - mean)
		}
		half := 1.96 * math.Sqrt(square/(pairs-1)/pairs)
		t.Logf("%s (%.0f pushes a second), %d turns of %v: %.1f %% of a core without viewers; %d of them add %.2f [%.2f, %.2f]",
			what, (pushed()-first)/time.Since(began).Seconds(), 2*pairs, turn, 100*alone, viewers, 100*mean, 100*(mean-half), 100*(mean+half))
		if mean-half > 0.01 {
			t.Error("more than a hundredth of a core")
		}
	}
	compare("under load")
	load.signal(syscall.SIGINT)
	load.exit(patience)
	compare("idle")
}

// TestPicturesOfTheConsole makes the picture of the README, console.png, and pictures of all pages for whoever changes them: of dev, under a
// light load.
func TestPicturesOfTheConsole(t *testing.T) {
	if os.Getenv("CONSOLE_PICTURES") == "" {
		t.Skip("makes pictures: make console-pictures")
	}
	dev, console := startDev(t)
	web, ws := strings.TrimSuffix(console, "/console/"), printedAddress(t, dev.out.String(), `page and WebSocket at http://`)
	api := printedAddress(t, dev.out.String(), `Push-Manager +`)
	start(t, binary(t, "pushload"), nil, "--address="+api, "--rate=20", "--mix=user=70,room=30", "--users=110", "--rooms=10", "--clients=100", "--client-url=ws://"+ws+"/ws",
		"--warmup=1s", "--duration=10m", "--max-errors=1")
	page := browse(t, console, "")
	page.call(nil, "Emulation.setScrollbarsHidden", map[string]any{"hidden": true})
	screen := func(width, height int, scheme string) {
		page.call(nil, "Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})
		page.call(nil, "Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}})
	}
	screen(1280, 900, "light")
	page.eval(`location.hash = "jobs"; ""`)
	page.shows(mainText, "New job")
	for _, job := range [][4]string{{"sale-2026", "everybody", "", "1"}, {"reminder", "users", manyUsers(4000), "20"}, {"weekly", "users", manyUsers(500), "1"}} {
		makeJob(page, job[0], job[1], job[2], job[3])
		page.shows(mainText, job[0]+": pending")
	}
	page.eval(`[...document.querySelectorAll(".jobs button")].find(b => b.textContent === "Pause")?.click(); ""`)
	page.eval(`location.hash = "overview"; ""`)
	time.Sleep(90 * time.Second)
	page.picture("console")
	for _, s := range []struct {
		name, scheme  string
		width, height int
	}{{"light", "light", 1280, 900}, {"dark", "dark", 1280, 900}, {"phone", "light", 390, 1600}} {
		screen(s.width, s.height, s.scheme)
		for _, name := range consolePages {
			page.eval(`location.hash = "` + name + `"; ""`)
			page.shows(`document.querySelector("nav a[aria-current]").hash`, "#"+name)
			if name == "explain" || name == "push" {
				page.eval(`document.querySelector("main form button").click(); ""`)
			}
			time.Sleep(2500 * time.Millisecond)
			page.picture(name + "-" + s.name)
		}
	}
	dev.signal(syscall.SIGINT)
	t.Log("pictures of " + web)
}

// cpuOf is the CPU time of a process.
func cpuOf(t *testing.T, pid int) time.Duration {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Skip("there is no /proc")
	}
	_, rest, _ := strings.Cut(string(text), ") ")
	fields := strings.Fields(rest) // from the third one on
	ticks := 0
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond
}

// picture writes what the tab shows into the directory CONSOLE_PICTURES, if there is one.
func (b *tab) picture(name string) {
	b.t.Helper()
	dir := os.Getenv("CONSOLE_PICTURES")
	if dir == "" {
		return
	}
	var shot struct{ Data string }
	b.call(&shot, "Page.captureScreenshot", map[string]any{"format": "png", "captureBeyondViewport": false})
	image, err := base64.StdEncoding.DecodeString(shot.Data)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+".png"), image, 0o644); err != nil {
		b.t.Fatal(err)
	}
}
