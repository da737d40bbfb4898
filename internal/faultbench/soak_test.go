package faultbench

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

// soakEnv is how long the load lasts; without it the run is skipped.
const soakEnv = "SOAK_DURATION"

const (
	// soakCycle is how often a node leaves. It joins in the middle of the cycle, and what
	// the Push-Manager holds is looked at shortly before the next one leaves.
	soakCycle = 5 * time.Second
	soakLook  = soakCycle - time.Second

	// soakHold is how long after its answer a push is checked: whatever is still to happen
	// to it has happened by then. soakLap is for how much longer it stays in the ledger, for
	// the order between it and the next ones.
	soakHold = 5 * time.Second
	soakLap  = time.Second

	// A node that leaves has consequences from when its users begin to move until a
	// while after its process has ended.
	soakWake = time.Second

	soakUsers   = 60
	soakCallers = 64
)

// TestSoak runs a Push-Manager at half of its peak load while a node leaves and another
// joins every five seconds. Nothing that it holds may grow, and the books must balance.
func TestSoak(t *testing.T) {
	text := os.Getenv(soakEnv)
	if text == "" {
		t.Skipf("long: set %s=3m, or run make soak", soakEnv)
	}
	duration, err := time.ParseDuration(text)
	if err != nil {
		t.Fatalf("%s: %v", soakEnv, err)
	}
	s := newSoak(t)
	peak := s.peak(5 * time.Second)
	t.Logf("peak: %.0f pushes/s with %d callers in a closed loop; the load is half of that", peak, soakCallers)
	s.load = s.open(peak / 2)
	begun := s.ledger.now()
	for cycle := 0; s.ledger.now()-begun < duration; cycle++ {
		s.cycle(cycle)
	}
	s.load.stop()
	took := s.ledger.now() - begun
	s.flush()
	s.settle(s.ledger.now() + time.Hour)
	s.verdict(took, peak/2)
	s.m.good(room("all"))
	s.m.atRest()
}

// soak is the deployment: nodes that stay, and one after the other that is a guest.
type soak struct {
	*bench
	m         *manager
	stay      []*child
	guest     *child
	connected []string // the guest's users, as long as there is one
	apis      []pubsub.PushManagerServiceClient
	users     []string
	load      *openLoad

	all     tally
	leaves  [][2]time.Duration // when a guest was about to leave, and when that was over
	stray   []*push            // unknown, or not a success and no leave near
	broken  map[string]violation
	excused map[string]bool // ids of the same, while the machine let nobody run
	series  struct{ goroutines, files, connections, heap series }
}

func newSoak(t *testing.T) *soak {
	t.Helper()
	s := &soak{bench: newBench(t), users: names("u", soakUsers), broken: map[string]violation{}, excused: map[string]bool{}}
	s.all = s.ledger.tally(0, 0, nil)
	s.series.goroutines = series{name: "goroutines", unit: 1, spare: 20}
	s.series.files = series{name: "descriptors", unit: 1, spare: 10}
	s.series.connections = series{name: "connections", unit: 1, spare: 10}
	s.series.heap = series{name: "live heap, MiB", unit: 1 << 20, spare: 4 << 20}
	for i := range 3 {
		c := newChild(t, s.ledger, fmt.Sprint("n", i), "127.0.0.1:0", s.etcd.Endpoint())
		s.children = append(s.children, c)
		s.stay = append(s.stay, c)
		mine := s.users[i*soakUsers/4 : (i+1)*soakUsers/4]
		c.connect(mine...)
		s.world.place(c.id, mine...)
	}
	s.connected = s.users[3*soakUsers/4:]
	s.stay[0].connect(s.connected...)
	s.join("guest")
	for i := range 6 {
		s.world.join(fmt.Sprint("r", i), s.users[i*10:i*10+10]...)
	}
	s.world.join("all", s.users...)
	s.m = s.manage(4)
	for range 4 {
		s.apis = append(s.apis, s.m.dial())
	}
	s.m.good(room("all"))
	s.m.rest()
	return s
}

// join starts a guest. Its users come from the node where they have been meanwhile, once
// the Push-Manager knows it: a gateway is registered before it takes clients.
func (s *soak) join(id string) {
	s.guest = newChild(s.t, s.ledger, id, "127.0.0.1:0", s.etcd.Endpoint())
	if s.m != nil {
		s.m.reaches(len(s.stay) + 1)
	}
	s.guest.connect(s.connected...)
	s.world.place(id, s.connected...)
	for _, user := range s.connected {
		s.stay[0].leave(user)
	}
}

// leave has the guest go in order.
func (s *soak) leave() {
	begun := s.ledger.now()
	s.stay[0].connect(s.connected...)
	s.world.place(s.stay[0].id, s.connected...)
	s.guest.signal(sigterm)
	<-s.guest.done
	<-s.guest.read
	s.leaves = append(s.leaves, [2]time.Duration{begun, s.ledger.now() + soakWake})
}

// cycle is one leave, one join and one look at what the Push-Manager holds. Every other
// guest has an id that was never there before: what is kept by id must go with it.
func (s *soak) cycle(n int) {
	begun := time.Now()
	s.leave()
	wait(time.Until(begun.Add(soakCycle / 2)))
	id := "guest"
	if n%2 == 1 {
		id = fmt.Sprint("guest-", n)
	}
	s.join(id)
	wait(time.Until(begun.Add(soakLook)))
	s.load.pause()
	s.look()
	s.load.resume()
	s.settle(s.ledger.now() - soakHold)
	wait(time.Until(begun.Add(soakCycle)))
}

// request draws what a caller asks for: mostly users, some rooms, some lists.
func (s *soak) request(r *rand.Rand) request {
	switch n := r.IntN(20); {
	case n == 0:
		q := request{kind: toUsers, key: "some", deadline: 4 * time.Second}
		for range 5 {
			q.users = append(q.users, pick(r, s.users))
		}
		return q
	case n < 5:
		return room(fmt.Sprint("r", r.IntN(6)))
	default:
		return user(pick(r, s.users))
	}
}

// peak is the answers a second of callers that ask again as soon as they are answered.
func (s *soak) peak(d time.Duration) float64 {
	var callers sync.WaitGroup
	var answers atomic.Int64
	stop := make(chan struct{})
	for i := range soakCallers {
		callers.Go(func() {
			r := rand.New(rand.NewPCG(s.seed, uint64(i)))
			for {
				select {
				case <-stop:
					return
				default:
					s.m.ask(context.Background(), s.apis[i%len(s.apis)], s.request(r))
					answers.Add(1)
				}
			}
		})
	}
	wait(time.Second)
	before, begun := answers.Load(), time.Now()
	wait(d)
	rate := float64(answers.Load()-before) / time.Since(begun).Seconds()
	close(stop)
	callers.Wait()
	return rate
}

// openLoad pushes at a rate, whatever the answers do.
type openLoad struct {
	wg  sync.WaitGroup
	end chan struct{}
	due chan struct{}

	mu     sync.Mutex // held while paused
	paused time.Duration
	begun  time.Time // of the pause
	sent   int64
	held   int64 // due while all callers were busy: they went out later
}

// open starts the load. Pushes that no caller is free for wait in a line that has a
// bound, and are counted.
func (s *soak) open(rate float64) *openLoad {
	l := &openLoad{end: make(chan struct{}), due: make(chan struct{}, 1<<16)}
	for i := range 8 * soakCallers {
		l.wg.Go(func() {
			r := rand.New(rand.NewPCG(s.seed, uint64(1000+i)))
			for range l.due {
				s.m.ask(context.Background(), s.apis[i%len(s.apis)], s.request(r))
			}
		})
	}
	l.wg.Go(func() {
		defer close(l.due)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		begun := time.Now()
		for {
			select {
			case <-l.end:
				return
			case <-tick.C:
				l.catchUp(rate, begun)
			}
		}
	})
	s.t.Cleanup(l.stop)
	return l
}

// catchUp has callers ask for all that is due.
func (l *openLoad) catchUp(rate float64, begun time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for float64(l.sent) < rate*(time.Since(begun)-l.paused).Seconds() {
		if len(l.due) > 8*soakCallers {
			l.held++
		}
		l.due <- struct{}{}
		l.sent++
	}
}

// pause stops the clock of the schedule, resume lets it go on.
func (l *openLoad) pause() {
	l.mu.Lock()
	l.begun = time.Now()
}

func (l *openLoad) resume() {
	l.paused += time.Since(l.begun)
	l.mu.Unlock()
}

func (l *openLoad) stop() {
	select {
	case <-l.end:
	default:
		close(l.end)
	}
	l.wg.Wait()
}

// look notes what the Push-Manager holds while it has no push in its hands. Of several
// readings the smallest counts: the one that reads is a connection and goroutines itself,
// and what is allocated while the collector runs counts as alive.
func (s *soak) look() {
	s.t.Helper()
	s.m.until("pushes_in_flight", func(n float64) bool { return n == 0 })
	at := s.ledger.now()
	var goroutines, files, connections, heap []float64
	for range 5 {
		wait(20 * time.Millisecond)
		values, err := s.m.read()
		if err != nil {
			s.t.Fatal(err)
		}
		goroutines = append(goroutines, values["go_goroutines"])
		files = append(files, values["process_open_fds"])
		connections = append(connections, float64(established(s.t, s.m.cmd.Process.Pid)))
		heap = append(heap, s.m.liveHeap())
	}
	s.series.goroutines.add(at, slices.Min(goroutines))
	s.series.files.add(at, slices.Min(files))
	s.series.connections.add(at, slices.Min(connections))
	s.series.heap.add(at, slices.Min(heap))
}

// liveHeap collects the garbage of the process and reads what is left.
func (m *manager) liveHeap() float64 {
	m.b.t.Helper()
	_, body, err := get(m.metrics + "/debug/pprof/heap?gc=1&debug=1")
	if err != nil {
		m.b.t.Fatal(err)
	}
	_, rest, ok := strings.Cut(body, "\n# HeapAlloc = ")
	text, _, _ := strings.Cut(rest, "\n")
	v, err := strconv.ParseFloat(text, 64)
	if !ok || err != nil {
		m.b.t.Fatalf("the heap profile has no HeapAlloc: %v", err)
	}
	return v
}

// established counts the TCP connections that a process has open.
func established(t testing.TB, pid int) int {
	t.Helper()
	const open = "01" // TCP_ESTABLISHED
	fds := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(fds)
	if err != nil {
		t.Fatal(err)
	}
	own := map[string]bool{}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(fds, e.Name()))
		if err != nil {
			continue // closed meanwhile
		}
		if inode, ok := strings.CutPrefix(target, "socket:["); ok {
			own[strings.TrimSuffix(inode, "]")] = true
		}
	}
	count := 0
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/net/%s", pid, table))
		if err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(f); lines.Scan(); {
			if field := strings.Fields(lines.Text()); len(field) > 9 && field[3] == open && own[field[9]] {
				count++
			}
		}
		_ = f.Close()
	}
	return count
}

// settle closes the books on what was answered before a moment. What was answered
// shortly before stays in the ledger for once more: the order of a push is that between
// it and those around it.
func (s *soak) settle(before time.Duration) {
	done := s.ledger.takeOut(before, before-soakLap)
	excuses := s.starvations()
	for _, v := range done.check(slackForCI) {
		if v.rule == "I7" && within(v.push, excuses) {
			s.excused[v.push.id] = true
			continue
		}
		s.broken[v.rule+" "+v.push.id] = v
	}
	for _, p := range done.pushes {
		if p.end < before-soakLap {
			s.book(p, excuses)
		}
	}
}

// book sums a push up.
func (s *soak) book(p *push, excuses [][2]time.Duration) {
	s.all.add(p)
	switch {
	case p.success || within(p, s.leaves) && p.summary.GetUnknown() == 0 && (p.err == nil || p.safe()):
	case within(p, excuses):
		s.excused[p.id] = true
	default:
		s.stray = append(s.stray, p)
	}
}

// within tells whether a push was under way in one of some spans of time.
func within(p *push, spans [][2]time.Duration) bool {
	return slices.ContainsFunc(spans, func(s [2]time.Duration) bool { return p.start <= s[1] && p.end >= s[0] })
}

// starvations lists when the machine let nobody run, and what came of it.
func (s *soak) starvations() (spans [][2]time.Duration) {
	s.ledger.mu.Lock()
	defer s.ledger.mu.Unlock()
	var begun time.Duration
	for _, n := range s.ledger.notes {
		switch n.text {
		case starving + " begins":
			begun = n.at
		case starving + " is over":
			spans = append(spans, [2]time.Duration{begun, n.at + afterwards})
		}
	}
	return spans
}

// takeOut returns a ledger of the pushes that were answered before a moment, and of those
// that arrived and were never made, and forgets what was answered before an earlier one.
//
// The ledger is locked for moments only: whoever pushes meanwhile would wait.
func (l *ledger) takeOut(answered, forget time.Duration) *ledger {
	out := newLedger()
	out.clientsLeave = l.clientsLeave
	var kept []*push
	forgotten := map[string]bool{}
	l.mu.Lock()
	arrivals := l.arrivals
	for _, p := range l.pushes {
		if p.done && p.end < answered {
			out.pushes = append(out.pushes, p)
		}
		if !p.done || p.end >= forget {
			kept = append(kept, p)
		}
	}
	l.pushes, l.arrivals = kept, nil
	l.mu.Unlock()

	open := make(map[string]bool, len(kept))
	for _, p := range kept {
		open[p.id] = true
	}
	for _, p := range out.pushes {
		if !open[p.id] {
			forgotten[p.id] = true
		}
		delete(open, p.id) // what is left of it is still to come
	}
	var rest []arrival
	for _, a := range arrivals {
		if !open[a.push] {
			out.arrivals = append(out.arrivals, a)
		}
		if !forgotten[a.push] {
			rest = append(rest, a)
		}
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	l.arrivals = append(rest, l.arrivals...)
	return out
}

// verdict prints all figures and fails on those that are no good.
func (s *soak) verdict(took time.Duration, rate float64) {
	s.t.Helper()
	l := s.load
	s.t.Logf("%v with %d leaves: asked for %.0f pushes/s, %.0f answered, %d held back", took.Round(time.Second), len(s.leaves), rate,
		float64(l.sent)/(took-l.paused).Seconds(), l.held)
	s.t.Log(s.all)
	unknown := 0
	for _, p := range s.stray {
		if p.err != nil && !p.safe() || p.summary.GetUnknown() > 0 {
			if unknown++; unknown <= 5 {
				s.t.Errorf("unknown, though all nodes leave in good order: at %v: %v", p.start, p)
			}
		}
	}
	s.t.Logf("%d unknown, and %d failed otherwise while no node left; besides, %d unknown, failed or late around the %d times when the machine let nobody run",
		unknown, len(s.stray)-unknown, len(s.excused), len(s.starvations()))
	if len(s.stray)*1000 > s.all.pushes {
		s.t.Errorf("more than 0.1 %% failed while no node left, such as %v", s.stray[0])
	}
	s.t.Logf("%d promises broken", len(s.broken))
	for _, v := range s.broken {
		s.t.Errorf("%s is broken: %s\n%s", v.rule, v.text, v.push)
	}
	table, growing := report([]*series{&s.series.goroutines, &s.series.files, &s.series.connections, &s.series.heap})
	s.t.Logf("what the Push-Manager holds, at the same phase of each cycle:\n%s", table)
	if len(growing) > 0 {
		s.t.Errorf("more than noise allows: %v", growing)
	}
}

// TestBooksAreClosedPieceByPiece: pieces add up to the whole, and nothing escapes between
// two of them.
func TestBooksAreClosedPieceByPiece(t *testing.T) {
	b := book{newLedger()}
	for i := range 100 {
		p := b.told(&push{kind: toUser, key: "u", manager: "m"}, 1000*i, 1000*i+5, summary(1, 0, 0, 0), nil)
		if i != 50 {
			b.arrive(p.id, "u", "u", "n")
		}
		if i == 70 {
			b.arrive("p9999", "u", "u", "n")
		}
	}
	open := &push{kind: toUser, key: "u", manager: "m"}
	b.begin(open)
	found, booked := map[string]bool{}, 0
	for before := time.Duration(0); before <= 130*time.Second; before += 5 * time.Second {
		done := b.takeOut(before, before-10*time.Second)
		for _, v := range done.check(time.Second) {
			found[v.rule+" "+v.push.id] = true
		}
		for _, p := range done.pushes {
			if p.end < before-10*time.Second {
				booked++
			}
		}
	}
	if booked != 100 || len(found) != 2 || !found["I1 p51"] || !found["I1 p9999"] {
		t.Errorf("%d booked, found %v", booked, found)
	}
	if len(b.pushes) != 1 || b.pushes[0] != open || len(b.arrivals) != 1 {
		t.Errorf("left are %v and %v", b.pushes, b.arrivals)
	}
}
