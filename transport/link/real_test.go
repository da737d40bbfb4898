package link

import (
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	connectnode "github.com/push-manager/push-manager/transport/node"
)

// gatewayThat is a gateway whose answers are a test's. It notes who got what, in order.
type gatewayThat struct {
	deliver   func(user, text string) connectnode.Outcome
	broadcast func() (delivered, failed int)
	online    int

	mu  sync.Mutex
	got []string
}

func (g *gatewayThat) Deliver(user string, m *connectnode.Message) connectnode.Outcome {
	o := g.deliver(user, string(m.Data))
	if o == connectnode.Delivered {
		g.mu.Lock()
		g.got = append(g.got, user+" "+string(m.Data))
		g.mu.Unlock()
	}
	return o
}

func (g *gatewayThat) Broadcast(*connectnode.Message) (delivered, failed int) { return g.broadcast() }
func (g *gatewayThat) Online() int                                            { return g.online }

func (g *gatewayThat) received() []string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.Clone(g.got)
}

// A gateway hangs in the middle of a frame for so long that its stream is given up, which
// leaves the rest of the frame at the node. What callers have been told is unknown must not
// come after what they push next.
func TestReplacedStreamKeepsTheOrderOfAUser(t *testing.T) {
	for name, hang := range map[string]time.Duration{"for a while": 3200 * time.Millisecond, "for long": 20 * time.Second} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				w := newWorld(t, Config{})
				let := make(chan struct{})
				g := &gatewayThat{deliver: func(_, text string) connectnode.Outcome {
					if text == "slow" {
						<-let
					}
					return connectnode.Delivered
				}}
				w.startReal("a:1", connectnode.Config{NodeID: "A", Sessions: g})
				w.register("A", "a:1")
				w.up(1)
				w.room("r", "A", "u", "x")
				w.do(w.toUser("u", "warm"))
				w.do(w.toUser("x", "warm"))
				slow, first := w.begin(w.toUser("x", "slow")), w.begin(w.toUser("u", "first"))
				time.AfterFunc(hang, func() { close(let) })
				if s, f := w.end(slow), w.end(first); s.Unknown != 1 || f.Unknown != 1 {
					t.Fatalf("what the gateway hangs in: %+v; behind it: %+v", s, f)
				}
				began, tries := time.Now(), 0
				for w.do(w.toUser("u", "second")).Delivered == 0 {
					if tries++; tries > 1000 {
						t.Fatal("the node never comes back")
					}
					time.Sleep(50 * time.Millisecond)
				}
				if took := time.Since(began); took < hang-2*time.Second || took > hang+time.Second {
					t.Errorf("pushes arrive again %v after the answer, the gateway hung for %v", took, hang)
				}
				synctest.Wait()
				if got := strings.Join(g.received(), ", "); got != "u warm, x warm, x slow, u second" {
					t.Errorf("arrived: %s", got)
				}
			})
		})
	}
}
