package micro

import (
	"context"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"google.golang.org/grpc"

	"github.com/push-manager/push-manager/client"
	"github.com/push-manager/push-manager/internal/devstack"
	pubsub "github.com/push-manager/push-manager/proto"
)

const (
	streamUsers  = 64
	streamOpen   = 1024   // pushes without an answer, on either side
	streamRound  = 20_000 // pushes of a round
	streamBatch  = 64     // pushes of a message, where the raw caller makes batches
	streamBudget = time.Minute
)

// BenchmarkClientStream holds client.Stream against the generated PushStream, used as well as one can: a goroutine that sends, one that
// receives, and a window. All push to connected users of a whole deployment in this process. Each iteration is a round of each, in turn;
// what counts is the median of the rounds' ratios.
func BenchmarkClientStream(b *testing.B) {
	ctx := b.Context()
	stack := startStack(b)
	c, err := client.New(stack.Address())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = c.Close() })
	rounds := []struct {
		name string
		push func(context.Context, testing.TB, *client.Client)
	}{{"raw", func(ctx context.Context, tb testing.TB, c *client.Client) {
		tb.Helper()
		pushRaw(ctx, tb, c.Conn(), 1)
	}},
		{"rawbatched", func(ctx context.Context, tb testing.TB, c *client.Client) {
			tb.Helper()
			pushRaw(ctx, tb, c.Conn(), streamBatch)
		}},
		{"stream", pushStreamed}}
	for _, round := range rounds {
		round.push(ctx, b, c) // routes are cached, memory is warm
	}
	var single, batched []float64
	took := map[string]time.Duration{}
	n := 0
	for b.Loop() {
		var each [3]time.Duration
		for i := range rounds {
			i = (i + n) % len(rounds)
			begin := time.Now()
			rounds[i].push(ctx, b, c)
			each[i] = time.Since(begin)
			took[rounds[i].name] += each[i]
		}
		n++
		single = append(single, each[0].Seconds()/each[2].Seconds())
		batched = append(batched, each[1].Seconds()/each[2].Seconds())
	}
	b.ReportMetric(0, "ns/op")
	b.ReportMetric(float64(notDelivered.Load()), "not-delivered") // the machine has other work
	for name, d := range took {
		b.ReportMetric(float64(n*streamRound)/d.Seconds(), name+"/s")
	}
	b.ReportMetric(median(single), "of-raw")
	b.ReportMetric(median(batched), "of-rawbatched")
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// startStack has users connected, and everything found.
func startStack(b *testing.B) *devstack.Stack {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), streamBudget)
	defer cancel()
	stack, err := devstack.Start(ctx, devstack.Config{Store: "off"})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), streamBudget)
		defer cancel()
		if err := stack.Drain(ctx); err != nil {
			b.Error(err)
		}
	})
	if err := stack.WaitReady(ctx); err != nil {
		b.Fatal(err)
	}
	nodes := stack.Nodes()
	var reading sync.WaitGroup
	b.Cleanup(reading.Wait) // after the connections are closed
	for i := range streamUsers {
		q := url.Values{"user_id": {streamUser(i)}}
		ws, resp, err := gws.NewClient(new(gws.BuiltinEventHandler), &gws.ClientOption{Addr: nodes[i%len(nodes)].WebSocket() + "?" + q.Encode(), RequestHeader: http.Header{}})
		if err != nil {
			b.Fatal(err)
		}
		_ = resp.Body.Close()
		reading.Go(ws.ReadLoop)
		b.Cleanup(func() { _ = ws.NetConn().Close() })
	}
	// All are delivered before anything is measured.
	c, err := client.New(stack.Address())
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	for i := range streamUsers {
		for {
			r, err := c.PushToUser(ctx, streamUser(i), client.Text("x"))
			if err != nil {
				b.Fatal(err)
			}
			if r.Delivered == 1 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return stack
}

func streamUser(i int) string { return fmt.Sprintf("user-%d", i%streamUsers) }

var streamData = make([]byte, 128)

var notDelivered atomic.Int64

// pushRaw is a round over the generated code, with so many pushes in a message.
func pushRaw(ctx context.Context, tb testing.TB, conn *grpc.ClientConn, batch int) {
	tb.Helper()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := pubsub.NewPushManagerServiceClient(conn).PushStream(ctx)
	if err != nil {
		tb.Fatal(err)
	}
	window := make(chan struct{}, streamOpen)
	var receiving sync.WaitGroup
	receiving.Go(func() {
		for done := 0; done < streamRound; {
			r, err := stream.Recv()
			if err != nil {
				tb.Error(err)
				return
			}
			all := r.GetBatch()
			if all == nil {
				all = []*pubsub.PushStreamResponse{r}
			}
			for _, one := range all {
				if one.GetToUser().GetSummary().GetDelivered() != 1 {
					notDelivered.Add(1)
				}
				<-window
			}
			done += len(all)
		}
	})
	for i := 0; i < streamRound; {
		var r pubsub.PushStreamRequest
		for range min(batch, streamRound-i) {
			i++
			window <- struct{}{}
			push := &pubsub.PushStreamRequest{Id: uint64(i), Push: &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{
				UserId: streamUser(i), Content: &pubsub.MessageContent{Data: streamData},
			}}}
			if batch == 1 {
				r.Id, r.Push = push.Id, push.Push
			} else {
				r.Batch = append(r.Batch, push)
			}
		}
		if err := stream.Send(&r); err != nil {
			tb.Error(err)
			break
		}
	}
	receiving.Wait()
}

// pushStreamed is a round over a Stream, which is waited for push by push.
func pushStreamed(ctx context.Context, tb testing.TB, c *client.Client) {
	tb.Helper()
	s := c.Stream(client.StreamConfig{MaxOpen: streamOpen})
	sent := make(chan *client.Pending, streamOpen)
	var waiting sync.WaitGroup
	waiting.Go(func() {
		for p := range sent {
			if r, err := p.Wait(ctx); err != nil || r.Delivered != 1 {
				notDelivered.Add(1)
			}
		}
	})
	for i := range streamRound {
		p, err := s.Send(ctx, client.User(streamUser(i)), client.Message{Data: streamData})
		if err != nil {
			tb.Fatal(err)
		}
		sent <- p
	}
	close(sent)
	waiting.Wait()
	if err := s.Close(ctx); err != nil {
		tb.Error(err)
	}
}
