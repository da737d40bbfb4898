package conformance

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/config"
	pubsub "github.com/push-manager/push-manager/proto"
)

// Config says which node is tried, and how much of it.
type Config struct {
	// Address is the node's gRPC port, HOST:PORT. It is required.
	Address string
	// NodeID is the id under which the node is registered. Empty: any is right.
	NodeID string
	// Users are connected to the node, and in Room, for as long as Run runs. Two
	// or more let every check run.
	Users []string
	// Room is the room that pushes to rooms are for. Default: conformance.
	Room string
	// Absent is a user who is not connected. Default: conformance-absent.
	Absent string
	// Client connects one of Users and shows what reaches it. Nil: the users are
	// connected already, and nobody looks at what arrives.
	Client Client
	// Drain asks the node to leave, as SIGTERM does. Nil: leaving is not checked.
	Drain func(context.Context) error
	// Within is how long the node may take for an answer, an ack or the end of a
	// broken stream. Default 1 s, which is what a Push-Manager grants.
	Within time.Duration
	// Only and Skip choose checks by name, or by what is before the slash of one.
	Only, Skip []string
	// PingEvery is the pause between the pings of the keepalive check. Default
	// 5.1 s: nodes have to allow one every 5 s.
	PingEvery time.Duration
}

// Client connects a user and calls got with whatever it receives, in order, until
// ctx ends. What is a push and what is not is told apart by the payload, which
// stands somewhere in the text.
type Client func(ctx context.Context, user string, got func(text string)) error

// Outcome is what became of a check.
type Outcome string

// The outcomes.
const (
	OK   Outcome = "ok"
	Fail Outcome = "FAIL"
	Skip Outcome = "skip" // Got says why
)

// Result is one check that has run.
type Result struct {
	Check   string        `json:"check"`
	Outcome Outcome       `json:"outcome"`
	Expect  string        `json:"expect"`
	Got     string        `json:"got,omitempty"`
	Took    time.Duration `json:"-"`
}

// check is one thing that a node has to hold.
type check struct {
	name, expect string
	users        int  // that must be connected
	clients      bool // what arrives must be seen
	audiences    bool
	run          func(context.Context, *tester) error
}

// skipped is the error of a check that does not apply.
type skipped struct{ why string }

func (s *skipped) Error() string { return s.why }

// tester is one run against one node.
type tester struct {
	// Static after newTester, but for cfg.Users: none count once their check has failed.
	cfg     Config
	api     pubsub.ConnectNodeServiceClient
	manager string // begins the ids of our managers
	arrived *arrivals

	// Static after the first check.
	streaming bool
	audiences uint32 // max_audience_members of the node
	unacked   uint32 // max_unacked of the node

	// Static after the second check.
	strayed bool // users were given, and are not as they should be

	managers, tokens atomic.Uint64
}

// Checks are the names of all checks with what each expects, in order.
func Checks() []Result {
	var all []Result
	for _, c := range everyCheck() {
		all = append(all, Result{Check: c.name, Expect: c.expect})
	}
	return all
}

func everyCheck() []check {
	return slices.Concat(
		[]check{{name: "connect", expect: "the port answers, with the Deliver stream or with the unary methods", run: connect},
			{name: "users", expect: "every user given is connected and in the room, and the absent one is not", users: 1, run: usersAreHere}},
		helloChecks(), deliverChecks(), audienceChecks(), streamChecks(), sizeChecks(), lastingChecks(), roomsChecks(), filterChecks(), disconnectChecks(), unaryChecks(), listingChecks(),
		[]check{lastDisconnect(), {name: "keepalive", expect: "a ping every 5 s, without a call, does not end the connection", run: nil},
			{name: "leaving", expect: "a node that leaves says drain on every stream, acks what it took and does nothing with what comes later", run: leaving}},
	)
}

// Validate reports what is wrong with c.
func (c *Config) Validate() error {
	var errs []error
	if err := config.CheckAddress(c.Address); err != nil {
		errs = append(errs, fmt.Errorf("address %w", err))
	}
	for _, name := range slices.Concat(c.Only, c.Skip) {
		if !slices.ContainsFunc(everyCheck(), func(c check) bool { return c.is(name) }) {
			errs = append(errs, fmt.Errorf("no check is called %q", name))
		}
	}
	if slices.Contains(c.Users, c.Absent) {
		errs = append(errs, fmt.Errorf("user %q cannot be both connected and absent", c.Absent))
	}
	return errors.Join(errs...)
}

// Run plays a Push-Manager against the node and reports each check as it ends. It
// returns how many failed. An error means that the run could not begin, or was
// interrupted.
func Run(ctx context.Context, cfg Config, report func(Result)) (failed int, err error) {
	cfg.Within = cmp.Or(cfg.Within, time.Second)
	cfg.PingEvery = cmp.Or(cfg.PingEvery, 5100*time.Millisecond)
	cfg.Room = cmp.Or(cfg.Room, "conformance")
	cfg.Absent = cmp.Or(cfg.Absent, "conformance-absent")
	if err := cfg.Validate(); err != nil {
		return 0, err
	}
	conn, err := grpc.NewClient(cfg.Address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxNodeFrame), grpc.MaxCallSendMsgSize(maxManagerFrame)))
	if err != nil {
		return 0, fmt.Errorf("address: %w", err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	t := &tester{cfg: cfg, api: pubsub.NewConnectNodeServiceClient(conn), manager: "conformance-" + rand.Text()[:6]}
	t.arrived = watch(ctx, &t.cfg)
	defer t.arrived.wait()
	defer cancel()

	// It takes the time of its pauses, on a connection of its own.
	type pinged struct {
		err  error
		took time.Duration
	}
	pings := make(chan pinged, 1)
	if t.wants(check{name: "keepalive"}) {
		begin := time.Now()
		go func() { err := ping(ctx, cfg.Address, cfg.PingEvery); pings <- pinged{err, time.Since(begin)} }()
	}

	stop := ""
	for _, c := range everyCheck() {
		if !t.wants(c) && c.name != "connect" && c.name != "users" {
			continue // those two find out what the others need
		}
		begin := time.Now()
		var err error
		switch why := t.lacks(c); {
		case stop != "":
			err = &skipped{stop}
		case why != "":
			err = &skipped{why}
		case c.name == "keepalive":
			p := <-pings
			err, begin = p.err, begin.Add(-p.took)
		default:
			one, cancel := context.WithTimeout(ctx, 10*time.Second+20*cfg.Within)
			err = c.run(one, t)
			cancel()
		}
		if ctx.Err() != nil {
			return failed, fmt.Errorf("interrupted: %w", context.Cause(ctx))
		}
		r := Result{Check: c.name, Outcome: OK, Expect: c.expect, Took: time.Since(begin)}
		if err != nil {
			r.Outcome, r.Got = Fail, err.Error()
			if skip := (*skipped)(nil); errors.As(err, &skip) {
				r.Outcome = Skip
			} else {
				failed++
			}
		}
		report(r)
		if r.Outcome == Fail && c.name == "connect" {
			stop = "nothing can be said after connect has failed"
		}
	}
	return failed, nil
}

// is tells whether a name chooses the check.
func (c check) is(name string) bool {
	group, _, _ := strings.Cut(c.name, "/")
	return name == c.name || name == group
}

func (t *tester) wants(c check) bool {
	return !slices.ContainsFunc(t.cfg.Skip, c.is) && (len(t.cfg.Only) == 0 || slices.ContainsFunc(t.cfg.Only, c.is))
}

// lacks is why a check cannot run, empty if it can.
func (t *tester) lacks(c check) string {
	group, _, _ := strings.Cut(c.name, "/")
	switch {
	case !t.streaming && !slices.Contains([]string{"connect", "users", "unary", "listing", "keepalive", "leaving"}, group):
		return "the node has no Deliver stream"
	case len(t.cfg.Users) < c.users:
		why := "needs a connected user"
		if c.users > 1 {
			why = fmt.Sprintf("needs %d connected users", c.users)
		}
		if t.strayed {
			why += ", and the check of users has failed"
		}
		return why
	case c.clients && t.cfg.Client == nil:
		return "needs to see what reaches the users"
	case c.audiences && t.audiences == 0:
		return "the node keeps no audiences (max_audience_members is 0)"
	}
	return ""
}

// connect finds out which of the two ways the node has.
func connect(ctx context.Context, t *tester) error {
	ctx, cancel := context.WithTimeout(ctx, t.cfg.Within)
	defer cancel()
	l, err := t.open(ctx, nil)
	if status.Code(err) == codes.Unimplemented {
		if err := t.unaryWorks(ctx); err != nil {
			return fmt.Errorf("no Deliver (%w)", err)
		}
		return nil
	}
	if err != nil {
		return err
	}
	defer l.close()
	t.streaming, t.audiences, t.unacked = true, l.hello.GetMaxAudienceMembers(), l.hello.GetMaxUnacked()
	return nil
}

// usersAreHere waits for clients that are still connecting. Those that are no clients of
// ours are connected already.
func usersAreHere(ctx context.Context, t *tester) (err error) {
	defer func() {
		if err != nil {
			t.strayed, t.cfg.Users = true, nil
			err = fmt.Errorf("%w; what follows is tried as without users", err)
		}
	}()
	patience := t.cfg.Within
	if t.cfg.Client != nil {
		patience += 10 * time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, patience+t.cfg.Within)
	defer cancel()
	enough := time.NewTimer(patience)
	defer enough.Stop()
	look := time.NewTicker(50 * time.Millisecond)
	defer look.Stop()
	for _, user := range t.cfg.Users {
		here, token, err := t.isHere(ctx, user)
		for ; err == nil && !here; here, token, err = t.isHere(ctx, user) {
			select {
			case <-look.C:
			case err := <-t.arrived.ended:
				return fmt.Errorf("the client of %w", err)
			case <-enough.C:
				return fmt.Errorf("user %q is not connected to the node, or not in room %q", user, t.cfg.Room)
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err != nil {
			return fmt.Errorf("user %q: %w", user, err)
		}
		if t.cfg.Client != nil {
			if err := t.arrived.until(ctx, user, token); err != nil {
				return fmt.Errorf("%w: its client must show every message that it gets, with the payload in it", err)
			}
		}
	}
	here, _, err := t.isHere(ctx, t.cfg.Absent)
	if err == nil && here {
		err = fmt.Errorf("user %q, who must not be connected, is said to be here", t.cfg.Absent)
	}
	return err
}

// isHere pushes to the room for one user, in whichever way the node has.
func (t *tester) isHere(ctx context.Context, user string) (here bool, token string, err error) {
	content, token := t.content()
	if !t.streaming {
		r, err := t.api.PushMessage(ctx, &pubsub.PushMessageRequest{UserId: user, RoomId: t.cfg.Room, Content: content})
		return r.GetSuccess(), token, err
	}
	l, err := t.open(ctx, nil)
	if err != nil {
		return false, token, err
	}
	defer l.close()
	r, err := l.ask(ctx, &pubsub.Delivery{Content: content, RoomId: t.cfg.Room, UserIds: []string{user}})
	return r.delivered == 1, token, err
}

// content is a message that is like no other, and the text by which it is known.
func (t *tester) content() (*pubsub.MessageContent, string) {
	token := fmt.Sprintf("%s.%06d.", t.manager, t.tokens.Add(1))
	return &pubsub.MessageContent{Data: []byte(token), Timestamp: 1767225600}, token
}
