package pushmanager

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/engine"
	"github.com/push-manager/push-manager/internal/etcdtest"
	pubsub "github.com/push-manager/push-manager/proto"
)

// logReader is a node that follows the logs of rooms, and reads one when it is told of a message in it.
type logReader struct {
	pubsub.UnimplementedConnectNodeServiceServer

	offered chan []pubsub.Feature
	marks   chan *pubsub.LogMark
	pages   chan *pubsub.LogPage
}

func (n *logReader) Deliver(st grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]) error {
	f, err := st.Recv()
	if err != nil {
		return err
	}
	select {
	case n.offered <- f.GetHello().GetFeatures():
	default:
	}
	err = st.Send(&pubsub.DeliverResponse{Hello: &pubsub.HelloReply{
		ProtocolVersion: 1, NodeId: "n1", BootId: "b", Features: []pubsub.Feature{pubsub.Feature_FEATURE_ROOM_LOG},
	}})
	follow := &pubsub.DeliverResponse{LogFollow: &pubsub.LogFollow{}}
	for gate := uint64(1); err == nil; {
		if err = st.Send(follow); err != nil {
			return err
		}
		if f, err = st.Recv(); err != nil || f.GetDrain() {
			return err
		}
		follow = &pubsub.DeliverResponse{Heartbeat: f.GetHeartbeat()}
		for _, m := range f.GetLogMarks() {
			if len(m.GetRooms()) > 0 {
				follow.LogReads = append(follow.LogReads, &pubsub.LogRead{
					RoomId: m.GetRooms()[0].GetRoomId(), Gate: gate, Epoch: m.GetEpoch(), After: slices.Repeat([]uint64{0}, int(m.GetPartitions())),
				})
				gate++
			}
			select {
			case n.marks <- m:
			default:
			}
		}
		for _, p := range f.GetLogPages() {
			select {
			case n.pages <- p:
			default:
			}
		}
	}
	return err
}

// Nodes are told what stands in the logs of the store, and read it.
func TestNodesFollowAndReadTheLogsOfRooms(t *testing.T) {
	etcd := etcdtest.Start(t)
	env := withStore(t, etcd.Endpoint(), "pm-1")
	env["CONTROLLER_ADDRESS"] = serveGRPC(t, "127.0.0.1:0", controllerServer())
	m := startPushManager(t, env)
	defer drain(t, m, 8*time.Second)

	n := &logReader{offered: make(chan []pubsub.Feature, 1), marks: make(chan *pubsub.LogMark, 1000), pages: make(chan *pubsub.LogPage, 1)}
	gs := grpc.NewServer()
	pubsub.RegisterConnectNodeServiceServer(gs, n)
	registerNode(t, etcd.Client(), serveGRPC(t, "127.0.0.1:0", gs))
	wait, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	next := func(what string) *pubsub.LogMark {
		select {
		case m := <-n.marks:
			return m
		case <-wait.Done():
			t.Fatalf("no %s", what)
			return nil
		}
	}
	if got := <-n.offered; !slices.Contains(got, pubsub.Feature_FEATURE_ROOM_LOG) {
		t.Fatalf("offered: %v", got)
	}
	if first := next("first mark"); len(first.GetRooms()) > 0 || first.GetEpoch() == 0 || first.GetPartitions() == 0 {
		t.Errorf("%v", first)
	}
	done := make(chan error, 1)
	var place engine.Place
	m.spool.AppendLog(&engine.Stored{MessageID: "m", Sender: "s", Room: "r", Payload: []byte("\x12\x01x"), Exclude: []string{"eve"}}, time.Now().Add(20*time.Second),
		func(p engine.Place, err error) { place = p; done <- err })
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	mark := next("mark")
	for len(mark.GetRooms()) == 0 {
		mark = next("mark with a room")
	}
	if r := mark.GetRooms()[0]; r.GetRoomId() != "r" || !slices.Equal(r.GetSeqs(), []uint64{place.Seq}) || mark.GetEpoch() != place.Epoch || mark.GetPartition() != place.Partition {
		t.Errorf("%v of %+v", mark, place)
	}
	select {
	case p := <-n.pages:
		if len(p.GetEntries()) != 1 || p.GetMore() || p.GetGap() || p.GetError() != "" || p.GetSeq() < place.Seq {
			t.Fatalf("%v", p)
		}
		if e := p.GetEntries()[0]; e.GetMessageId() != "m" || string(e.GetContent().GetData()) != "x" || !slices.Equal(e.GetLog().GetExcludeUserIds(), []string{"eve"}) {
			t.Errorf("%v", e)
		}
	case <-wait.Done():
		t.Fatal("no page")
	}
	_, metrics := get(t, "http://"+m.HTTPAddr()+"/metrics")
	for _, want := range []string{`push_manager_room_log_reads_total{result="stored"} `, "push_manager_room_log_following ", "push_manager_link_log_pages_total "} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no metric %s", want)
		}
	}
}

// Without a store there are no logs, and nobody is asked to follow them.
func TestRoomLogsAreNotOfferedWithoutAStore(t *testing.T) {
	m := &PushManager{}
	var c Config
	if err := m.openRoomLogs(&c); err != nil || c.Links.RoomLogs != nil {
		t.Errorf("%v, %v", c.Links.RoomLogs, err)
	}
}
