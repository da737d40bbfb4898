package load

import (
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/lxzan/gws"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

func optionsOf(t *testing.T, m proto.Message) *pubsub.PushOptions {
	t.Helper()
	with, ok := m.(interface{ GetOptions() *pubsub.PushOptions })
	if !ok {
		t.Fatalf("%T has no options", m)
	}
	return with.GetOptions()
}

// TestPushesHaveTheOptionsThatWereAskedFor, of every kind: an id of their own, twice where they are repeated.
func TestPushesHaveTheOptionsThatWereAskedFor(t *testing.T) {
	var all []string
	inBubble(t, nil, func(c *Config) {
		c.Repeat, c.ClientAck, c.Mix, c.InFlight = 1, true, Mix{1, 1, 1, 1}, 1
	}, func(t *testing.T, s *server, _ *Result) {
		times := map[string]int{}
		for _, m := range s.got {
			o := optionsOf(t, m)
			if o.GetMessageId() == "" || o.GetAck() != pubsub.AckPolicy_ACK_CLIENT {
				t.Fatalf("%v", m)
			}
			times[o.GetMessageId()]++
		}
		for i := 1; i < len(s.got); i += 2 {
			if !proto.Equal(s.got[i-1], s.got[i]) {
				t.Fatalf("%v is followed by %v", s.got[i-1], s.got[i])
			}
		}
		if len(s.got) < 100 || len(times) != len(s.got)/2 {
			t.Errorf("%d pushes with %d ids", len(s.got), len(times))
		}
		all = append(all, optionsOf(t, s.got[0]).GetMessageId())
	})
	if all[0] == all[1] {
		t.Errorf("two runs use the id %s", all[0])
	}
	inBubble(t, nil, func(*Config) {}, func(t *testing.T, s *server, _ *Result) {
		if o := optionsOf(t, s.got[0]); o != nil {
			t.Errorf("a push that nothing was asked for has %v", o)
		}
	})
}

// node is a gateway that says to each client what it is told to.
type node struct {
	gws.BuiltinEventHandler

	words []string // to each client, once it is confirmed

	mu   sync.Mutex
	asks []string // the queries
	says []string // of the clients
}

func (n *node) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n.mu.Lock()
	n.asks = append(n.asks, r.URL.RawQuery)
	n.mu.Unlock()
	conn, err := gws.NewUpgrader(n, nil).Upgrade(w, r)
	if err != nil {
		return
	}
	for _, word := range n.words {
		_ = conn.WriteString(word)
	}
	conn.ReadLoop()
}

func (n *node) OnMessage(_ *gws.Conn, m *gws.Message) {
	n.mu.Lock()
	n.says = append(n.says, m.Data.String())
	n.mu.Unlock()
	_ = m.Close()
}

func pushed(id string, ack int, more string) string {
	return fmt.Sprintf(`{"type":"text","data":{"content":"x"},"id":%q,"ack":%d%s}`, id, ack, more)
}

// TestClientsAcknowledgeAndFindWhatComesTwice.
func TestClientsAcknowledgeAndFindWhatComesTwice(t *testing.T) {
	n := &node{words: []string{
		`{"type":"joined","room_id":"r0"}`, `{"type":"text","data":{"content":"without an id"}}`,
		pushed("a", 1, ""), pushed("b", 2, ""), pushed("a", 3, `,"replayed":true`), pushed("b", 4, ""),
	}}
	web := httptest.NewServer(n)
	defer web.Close()
	s := start(t, nil)
	defer s.close()
	cfg := s.config()
	cfg.Clients, cfg.Users, cfg.Rooms, cfg.ClientURLs, cfg.Duration = 2, 10, 5, []string{"ws" + strings.TrimPrefix(web.URL, "http") + "/ws"}, 500*time.Millisecond
	res, err := Run(t.Context(), cfg)
	ok(t, err)
	if diff := cmp.Diff(Clients{Connected: 2, Received: 10, Acked: 8, Replayed: 2, Twice: 2}, res.Clients); diff != "" {
		t.Error(diff)
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if diff := cmp.Diff(map[string]bool{"ack=1&room_id=r0&user_id=u0": true, "ack=1&room_id=r1&user_id=u1": true}, map[string]bool{n.asks[0]: true, n.asks[1]: true}); diff != "" {
		t.Error(diff)
	}
	last := n.says[len(n.says)-1]
	if last != `{"type":"ack","ack":4}` {
		t.Errorf("acknowledged last %s", last)
	}
}

func TestClientsThatAreRefusedEndTheRun(t *testing.T) {
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	s := start(t, nil)
	defer s.close()
	cfg := s.config()
	cfg.Clients, cfg.ClientURLs = 3, []string{"ws" + strings.TrimPrefix(web.URL, "http")}
	if _, err := Run(t.Context(), cfg); !errors.Is(err, ErrUnreachable) {
		t.Errorf("got %v", err)
	}
}
