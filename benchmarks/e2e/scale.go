package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	scaleManagers, scaleControllers = 3, 2

	crowdMost  = 10_000           // clients of one process
	spareFiles = 500              // descriptors that a gateway has beside those of clients
	portsMost  = 25_000           // connections from this machine to one gateway: the usual range of ports has 28,000
	arrival    = 10 * time.Second // how long after the last push what is missing is waited for
	joinTime   = 5 * time.Minute

	// aimResident is what a client may take in a gateway.
	aimResident = 15 << 10
)

// Scaling says how large a deployment Scale starts, and what it pushes. Rates are a second.
type Scaling struct {
	Clients, Nodes, Rooms int
	// Big is how many clients one room has.
	Big int
	// Pause is how long the clients are idle before their memory is read.
	Pause time.Duration
	// Each is how long there are pushes of each kind.
	Each time.Duration
	// Rates of pushes. Everybody is how many pushes to everybody are made.
	BigRate, RoomRate, UserRate float64
	Everybody                   int
}

// check finds what this machine cannot do, before anything is started.
func (s Scaling) check() error {
	each := (s.Clients + s.Nodes - 1) / s.Nodes
	var files unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	// 20 KiB in the gateway, as much in the client's process and in the kernel for each, and 100 MiB for a process.
	needs := s.Clients*3*20<<10 + (s.Nodes+scaleManagers+scaleControllers)*100<<20
	free, err := meminfo("MemAvailable")
	if err != nil {
		return err
	}
	switch {
	case s.Clients < 1 || s.Nodes < 1 || s.Rooms < 1 || s.Rooms > s.Clients || s.Big < 1 || s.Big > s.Clients || s.Each <= 0 || s.Everybody < 1:
		return fmt.Errorf("%d clients, %d nodes, %d rooms, %d in the large one, %v: at least 1 of each, and no more rooms or members than clients", s.Clients, s.Nodes, s.Rooms, s.Big, s.Each)
	case uint64(each+spareFiles) > files.Max:
		return fmt.Errorf("%d clients a gateway: a process may open %d files (ulimit -Hn); take more nodes", each, files.Max)
	case uint64(min(s.Clients, crowdMost)+spareFiles) > files.Max:
		return fmt.Errorf("%d clients a process: a process may open %d files (ulimit -Hn)", min(s.Clients, crowdMost), files.Max)
	case each > portsMost:
		return fmt.Errorf("%d clients a gateway: one address has no more than %d ports to connect from; take more nodes", each, portsMost)
	case needs > free:
		return fmt.Errorf("%d clients need some %d MiB, and %d are free", s.Clients, needs>>20, free>>20)
	}
	if _, err := exec.LookPath("redis-server"); err != nil {
		return fmt.Errorf("the store of the Controllers: %w", err)
	}
	return nil
}

// meminfo is a line of /proc/meminfo in bytes.
func meminfo(name string) (int, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, fmt.Errorf("memory of this machine: %w", err)
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == name+":" {
			n, err := strconv.Atoi(fields[1])
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("memory of this machine: no %s", name)
}

// deployment is what Scale starts, by what it is.
type deployment struct {
	bench    *Bench
	town     Town
	programs map[string][]*child // of the deployment, and "clients"
	apis     []pubsub.PushManagerServiceClient
	empty    float64 // bytes resident in all gateways before the first client
}

// Scale starts a whole deployment as processes and clients for it, pushes to them, and reports what that
// cost. The error is also about pushes that were lost or came twice.
func (b *Bench) Scale(ctx context.Context, s Scaling, out io.Writer) ([]*Result, error) {
	if err := s.check(); err != nil {
		return nil, err
	}
	d := &deployment{bench: b, programs: map[string][]*child{}}
	defer d.end()
	if err := d.start(ctx, s); err != nil {
		return nil, err
	}
	memory, err := d.connect(ctx, s, out)
	if err != nil {
		return nil, err
	}
	runs := []struct {
		to     PushTarget
		pushes int
		rate   float64
	}{
		{ToBig, int(s.BigRate * s.Each.Seconds()), s.BigRate},
		{ToRooms, int(s.RoomRate * s.Each.Seconds()), s.RoomRate},
		{ToUsers, int(s.UserRate * s.Each.Seconds()), s.UserRate},
		{ToEverybody, s.Everybody, float64(s.Everybody) / s.Each.Seconds()},
	}
	latencies, costs := &Result{Suite: "pushes"}, &Result{Suite: "CPU"}
	var wrong error
	for i, p := range runs {
		// The caches of routes are filled first: what is measured is a push, not a first one.
		warm := PushRun{ID: 2*i + 1, To: p.to, Pushes: warmPushes(p.to, p.pushes)}
		if _, err := d.run(ctx, warm, p.rate); err != nil {
			return nil, err
		}
		done, err := d.run(ctx, PushRun{ID: 2*i + 2, To: p.to, Pushes: p.pushes}, p.rate)
		if err != nil {
			return nil, err
		}
		latencies.Rows, costs.Rows = append(latencies.Rows, done.row()), append(costs.Rows, done.costs())
		wrong = errors.Join(wrong, done.wrong())
	}
	return []*Result{memory, latencies, costs}, errors.Join(wrong, d.resident(memory, "KiB/client-active", s))
}

// warmPushes is how many pushes fill the caches. Each Push-Manager has its own.
func warmPushes(to PushTarget, pushes int) int {
	switch to {
	case ToBig:
		return 2 * scaleManagers
	case ToEverybody: // nobody is looked up
		return 1
	default:
		return pushes
	}
}

// start starts everything but the clients.
func (d *deployment) start(ctx context.Context, s Scaling) error {
	ctx, cancel := context.WithTimeout(ctx, 4*startTimeout)
	defer cancel()
	b := d.bench
	etcd, err := b.role("etcd", none{})
	if err != nil {
		return err
	}
	d.programs["etcd"] = []*child{etcd}
	w := &World{bench: b, nodes: map[string]string{}}
	if w.etcd, err = ask[string](ctx, etcd, "address"); err != nil {
		return err
	}
	redis, err := d.redis(ctx)
	if err != nil {
		return err
	}
	env := []string{"GRPC_PORT=0", "METRICS_PORT=0", "LOG_FORMAT=json", "ETCD_ENDPOINTS=" + w.etcd}
	var at struct{ GRPC, HTTP string }
	var controllers []string
	for range scaleControllers {
		c, err := b.program(ctx, "controller", b.binary, append(slices.Clip(env), "CONTROLLER_STORE=redis", "REDIS_URL=redis://"+redis+"/0"), &at)
		if err != nil {
			return err
		}
		d.programs["controller"] = append(d.programs["controller"], c)
		controllers = append(controllers, at.GRPC)
	}
	for i := range s.Nodes {
		id := NodeID(i)
		c, err := b.program(ctx, "connect-node", b.binary, append(slices.Clip(env), "HTTP_PORT=0", "NODE_ID="+id, "CONTROLLER_ADDRESS="+controllers[i%len(controllers)]), &at)
		if err != nil {
			return err
		}
		d.programs["gateway"] = append(d.programs["gateway"], c)
		d.town.Gateways = append(d.town.Gateways, at.HTTP)
		w.nodes[id] = at.GRPC
	}
	w.address = strings.Join(controllers, ",")
	for i := range scaleManagers {
		pm, err := w.pushManager(ctx, "scale-"+strconv.Itoa(i), b.binary, nil, access{})
		if err != nil {
			return err
		}
		cc, err := grpc.NewClient("passthrough:///"+pm.where.API, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return fmt.Errorf("push API: %w", err)
		}
		d.apis = append(d.apis, pubsub.NewPushManagerServiceClient(cc)) // as long as the process
		d.programs["push-manager"] = append(d.programs["push-manager"], pm.child)
	}
	return nil
}

// redis starts a server that keeps nothing.
func (d *deployment) redis(ctx context.Context) (address string, err error) {
	address, port, err := freePort(ctx)
	if err != nil {
		return "", err
	}
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return "", err
	}
	c, err := d.bench.child("redis", path, nil, "--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--logfile", "/dev/stderr")
	if err != nil {
		return "", err
	}
	d.programs["redis"] = []*child{c}
	for deadline := time.Now().Add(startTimeout); ; {
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
		if err == nil {
			return address, conn.Close()
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("redis does not listen: %w%s", err, c.stderr)
		}
		if err := pause(ctx, 20*time.Millisecond); err != nil {
			return "", err
		}
	}
}

// connect starts the clients, and measures how long they took and what they cost idle.
func (d *deployment) connect(ctx context.Context, s Scaling, out io.Writer) (*Result, error) {
	d.town.Clients, d.town.Rooms, d.town.Big = s.Clients, s.Rooms, s.Big
	r := &Result{Suite: "clients", Rows: []Row{{Name: strconv.Itoa(s.Clients)}}}
	var crowds []Crowd
	for first := 0; first < s.Clients; first += crowdMost {
		c, err := d.bench.role("crowd", none{})
		if err != nil {
			return nil, err
		}
		d.programs["clients"] = append(d.programs["clients"], c)
		crowds = append(crowds, Crowd{Town: d.town, First: first, Count: min(crowdMost, s.Clients-first)})
	}
	var err error
	if d.empty, err = d.total("gateway", resident); err != nil {
		return nil, err
	}
	slab, err := meminfo("Slab")
	if err != nil {
		return nil, err
	}
	began, err := d.cpu()
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, len(crowds))
	for i, c := range d.programs["clients"] {
		wg.Go(func() { errs[i] = c.call(ctx, "connect", crowds[i], nil) })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	open := time.Since(begin)
	for want := s.Clients + s.Big; ; {
		joined := 0
		for _, c := range d.programs["clients"] {
			n, err := ask[int](ctx, c, "joined")
			if err != nil {
				return nil, err
			}
			joined += n
		}
		if joined >= want {
			break
		}
		if time.Since(begin) > joinTime {
			return nil, fmt.Errorf("%d of %d joins within %v", joined, want, joinTime)
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
	joined := time.Since(begin)
	_, _ = fmt.Fprintf(out, "%d clients are connected after %v and in their rooms after %v\n", s.Clients, open.Round(time.Millisecond), joined.Round(time.Millisecond)) // nobody reads it when this fails
	add := func(name string, value float64) { r.Rows[0].Columns = append(r.Rows[0].Columns, plain(name, value)) }
	add("opened/s", float64(s.Clients)/open.Seconds())
	add("joins/s", float64(s.Clients*2+s.Big)/joined.Seconds()) // each is also told to be on its node
	used, err := d.cpu()
	if err != nil {
		return nil, err
	}
	for _, kind := range slices.Sorted(maps.Keys(used)) {
		add(kind+"-ms/join", (used[kind]-began[kind]).Seconds()*1e3/float64(s.Clients))
	}
	add("MiB/gateway-empty", d.empty/float64(s.Nodes<<20))
	now, err := meminfo("Slab")
	if err != nil {
		return nil, err
	}
	add("kernel-KiB/socket", float64(now-slab)/float64(2*s.Clients<<10)) // both ends are here
	before, err := d.cpu()
	if err != nil {
		return nil, err
	}
	if err := pause(ctx, s.Pause); err != nil {
		return nil, err
	}
	after, err := d.cpu()
	if err != nil {
		return nil, err
	}
	for _, kind := range slices.Sorted(maps.Keys(after)) {
		add(kind+"-idle-cores", (after[kind]-before[kind]).Seconds()/s.Pause.Seconds())
	}
	return r, d.resident(r, "KiB/client-idle", s)
}

// resident adds what a client takes in a gateway now, and what the programs take.
func (d *deployment) resident(r *Result, name string, s Scaling) error {
	now, err := d.total("gateway", resident)
	if err != nil {
		return err
	}
	each := (now - d.empty) / float64(s.Clients)
	row := &r.Rows[0]
	row.Columns = append(row.Columns, plain(name, each/1024))
	r.Bars = append(r.Bars, Bar{What: "resident in a gateway, " + name, Figure: row.Columns[len(row.Columns)-1].Figure, Limit: aimResident >> 10, Kind: Stretch})
	for _, kind := range slices.Sorted(maps.Keys(d.programs)) {
		all, err := d.total(kind, resident)
		if err != nil {
			return err
		}
		mib := all / float64(len(d.programs[kind])<<20)
		row.Columns = append(row.Columns, plain(kind+"-MiB", mib))
	}
	return nil
}

// total sums a figure of all processes of a kind.
func (d *deployment) total(kind string, of func(pid int) (float64, error)) (sum float64, err error) {
	for _, c := range d.programs[kind] {
		v, err := of(c.pid())
		if err != nil {
			return 0, err
		}
		sum += v
	}
	return sum, nil
}

// cpu is what each kind of program has used so far.
func (d *deployment) cpu() (map[string]time.Duration, error) {
	used := map[string]time.Duration{}
	for kind, all := range d.programs {
		for _, c := range all {
			t, err := cpuTime(c.pid())
			if err != nil {
				return nil, err
			}
			used[kind] += t
		}
	}
	return used, nil
}

// pushed is what a run has come to.
type pushed struct {
	PushRun

	want, failed int // deliveries; pushes
	why          error
	heard        CrowdHeard
	reply        Histogram
	cpu          map[string]time.Duration
	elapsed      time.Duration
}

// run pushes, and waits until everything has arrived.
func (d *deployment) run(ctx context.Context, p PushRun, rate float64) (*pushed, error) {
	out := &pushed{PushRun: p, cpu: map[string]time.Duration{}}
	for _, c := range d.programs["clients"] {
		if err := c.call(ctx, "run", p, nil); err != nil {
			return nil, err
		}
	}
	before, err := d.cpu()
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex // guards out.failed, why and reply
	var calls sync.WaitGroup
	begin := time.Now()
	for n := range p.Pushes {
		out.want += p.deliveries(d.town, n)
		due := begin.Add(time.Duration(float64(n) / rate * float64(time.Second)))
		if err := pause(ctx, time.Until(due)); err != nil {
			return nil, err
		}
		calls.Go(func() {
			err := d.push(ctx, p, n, due)
			mu.Lock()
			defer mu.Unlock()
			out.reply.Add(time.Since(due))
			if err != nil {
				out.failed, out.why = out.failed+1, err
			}
		})
	}
	calls.Wait()
	for deadline := time.Now().Add(arrival); ; {
		heard := CrowdHeard{Latency: &Histogram{}}
		for _, c := range d.programs["clients"] {
			one, err := ask[CrowdHeard](ctx, c, "heard")
			if err != nil {
				return nil, err
			}
			heard.Delivered, heard.Twice, heard.Stray, heard.Ended = heard.Delivered+one.Delivered, heard.Twice+one.Twice, heard.Stray+one.Stray, heard.Ended+one.Ended
			heard.Latency.Merge(one.Latency)
		}
		if out.heard = heard; heard.Delivered >= out.want || time.Now().After(deadline) {
			break
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return nil, err
		}
	}
	out.elapsed = time.Since(begin)
	after, err := d.cpu()
	if err != nil {
		return nil, err
	}
	for kind, t := range after {
		out.cpu[kind] = t - before[kind]
	}
	return out, pause(ctx, d.bench.span(time.Second)) // what comes twice comes late
}

// push makes the n-th push of a run, which was due at a time. The Push-Managers take turns.
func (d *deployment) push(ctx context.Context, p PushRun, n int, due time.Time) error {
	ctx, cancel := context.WithTimeout(ctx, arrival)
	defer cancel()
	api := d.apis[n%len(d.apis)]
	data := strconv.AppendInt(nil, int64(p.ID), 10)
	data = append(strconv.AppendInt(append(data, '.'), int64(n), 10), '.')
	data = append(data, letters(max(payload-len(data), 0))...)
	content := &pubsub.MessageContent{Type: pubsub.MessageType_TEXT, Data: data, Timestamp: due.UnixNano()}
	var delivered int32
	var message string
	switch p.To {
	case ToBig, ToRooms:
		room := bigRoom
		if p.To == ToRooms {
			room = d.town.Room(n % d.town.Rooms)
		}
		reply, err := d.apis[n%len(d.apis)].PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: room, Content: content})
		if err != nil {
			return err
		}
		delivered, message = reply.GetDeliveredCount(), reply.GetMessage()
	case ToUsers:
		reply, err := api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: d.town.User(n % d.town.Clients), Content: content})
		if err != nil {
			return err
		}
		delivered, message = reply.GetSummary().GetDelivered(), reply.GetMessage()
	case ToEverybody:
		reply, err := api.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: content})
		if err != nil {
			return err
		}
		delivered, message = reply.GetTotalDelivered(), reply.GetMessage()
	}
	if want := p.deliveries(d.town, n); int(delivered) != want {
		return fmt.Errorf("%d of %d delivered: %w: %s", delivered, want, errNoSuccess, message)
	}
	return nil
}

// plain is a figure that was measured once.
func plain(name string, v float64) Column { return Column{name, Figure{v, v, v}} }

func (o *pushed) lost() int { return max(0, o.want-o.heard.Delivered) }

func (o *pushed) row() Row {
	ms := func(d time.Duration) float64 { return float64(d) / 1e6 }
	return Row{string(o.To), []Column{
		plain("pushes", float64(o.Pushes)), plain("failed", float64(o.failed)), plain("deliveries", float64(o.heard.Delivered)),
		plain("lost", float64(o.lost())), plain("twice", float64(o.heard.Twice)), plain("stray", float64(o.heard.Stray)),
		plain("client-p50-ms", ms(o.heard.Latency.Quantile(0.5))), plain("client-p99-ms", ms(o.heard.Latency.Quantile(0.99))),
		plain("reply-p50-ms", ms(o.reply.Quantile(0.5))), plain("reply-p99-ms", ms(o.reply.Quantile(0.99))),
	}}
}

// costs is CPU for each delivery, by program, and how busy the machine was with all of them.
func (o *pushed) costs() Row {
	r := Row{Name: string(o.To), Columns: []Column{plain("deliveries/s", float64(o.heard.Delivered)/o.elapsed.Seconds())}}
	var all time.Duration
	for _, kind := range slices.Sorted(maps.Keys(o.cpu)) {
		all += o.cpu[kind]
		r.Columns = append(r.Columns, plain(kind+"-us", o.cpu[kind].Seconds()*1e6/float64(max(o.heard.Delivered, 1))))
	}
	r.Columns = append(r.Columns, plain("cores", all.Seconds()/o.elapsed.Seconds()), plain("of-cores", float64(runtime.NumCPU())))
	return r
}

// wrong is what must not be.
func (o *pushed) wrong() error {
	if o.lost() == 0 && o.heard.Twice == 0 && o.heard.Stray == 0 && o.heard.Ended == 0 && o.failed == 0 {
		return nil
	}
	return fmt.Errorf("%s: %d lost, %d twice, %d to others, %d connections ended, %d pushes failed (%w)",
		o.To, o.lost(), o.heard.Twice, o.heard.Stray, o.heard.Ended, o.failed, o.why)
}

// end ends the clients first, then what takes its time all at once.
func (d *deployment) end() {
	for _, kinds := range [][]string{{"clients"}, {"push-manager", "gateway"}, {"controller"}, {"redis", "etcd"}} {
		var wg sync.WaitGroup
		for _, kind := range kinds {
			for _, c := range d.programs[kind] {
				wg.Go(c.end)
			}
		}
		wg.Wait()
	}
}
