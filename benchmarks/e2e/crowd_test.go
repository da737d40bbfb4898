package e2e

import (
	"fmt"
	"testing"
	"time"
)

// TestCrowdSeesWhatIsLostTwiceAndAstray: each client counts each push that is for it once, and notices the rest.
func TestCrowdSeesWhatIsLostTwiceAndAstray(t *testing.T) {
	town := Town{Clients: 10, Rooms: 4, Big: 3, Gateways: []string{"a", "b"}}
	frame := func(run, push int) []byte {
		return fmt.Appendf(nil, `{"type":"text","room_id":"r","user_id":"u","timestamp":%d,"data":{"content":"%d.%d.letters"},"metadata":{}}`, time.Now().UnixNano(), run, push)
	}
	for to, clients := range map[PushTarget][]int{ToBig: {0, 1, 2}, ToRooms: {1, 5, 9}, ToUsers: {1}, ToEverybody: {0, 1, 2, 3, 4, 5, 6, 7, 8, 9}} {
		t.Run(string(to), func(t *testing.T) {
			p := PushRun{ID: 7, To: to, Pushes: 2}
			c := &crowd{Crowd: Crowd{Town: town, Count: town.Clients}}
			c.run.Store(newHearing(p))
			if n := p.deliveries(town, 1); n != len(clients) {
				t.Errorf("%d deliveries, want %d", n, len(clients))
			}
			isFor := map[int]bool{}
			for _, client := range clients {
				isFor[client] = true
			}
			for client := range town.Clients {
				c.hear(client, frame(7, 1))
			}
			c.hear(clients[0], frame(7, 1))
			c.hear(clients[0], frame(7, 2)) // of no such push
			c.hear(clients[0], frame(6, 1)) // of the run before
			c.hear(clients[0], []byte(`{"type":"joined","room_id":"r"}`))
			h := c.heard()
			if h.Delivered != len(clients) || h.Twice != 1 || h.Stray != town.Clients-len(clients)+2 || h.Latency.Count() != int64(len(clients)) || c.joined.Load() != 1 {
				t.Errorf("%+v, %d latencies, %d joined", h, h.Latency.Count(), c.joined.Load())
			}
		})
	}
}

func TestScaleSaysWhatTheMachineCannot(t *testing.T) {
	for name, s := range map[string]Scaling{
		"no clients":       {Nodes: 1, Rooms: 1, Big: 1, Each: 1, Everybody: 1},
		"more than memory": {Clients: 1 << 30, Nodes: 1 << 20, Rooms: 1, Big: 1, Each: 1, Everybody: 1},
		"more than files":  {Clients: 2 << 30, Nodes: 1, Rooms: 1, Big: 1, Each: 1, Everybody: 1},
	} {
		if err := s.check(); err == nil {
			t.Errorf("%s: no error", name)
		} else {
			t.Log(err)
		}
	}
}
