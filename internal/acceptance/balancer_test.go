package acceptance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

// balancer is a process with one of the example files, in front of Push-Managers.
type balancer struct {
	*process
	addr string
}

// example writes an example file with some of its text replaced.
func example(t *testing.T, name string, edits ...string) string {
	t.Helper()
	raw, err := os.ReadFile("../../deploy/" + name)
	if err != nil {
		t.Fatal(err)
	}
	text := string(raw)
	for pair := range slices.Chunk(edits, 2) {
		if !strings.Contains(text, pair[0]) {
			t.Fatalf("there is no %q in %s", pair[0], name)
		}
		text = strings.ReplaceAll(text, pair[0], pair[1])
	}
	path := filepath.Join(t.TempDir(), filepath.Base(name))
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// accepts waits until it does.
func (b *balancer) accepts() *balancer {
	b.t.Helper()
	eventually(b.t, b.name+" accepts", func() error {
		select {
		case <-b.done:
			b.t.Fatalf("%s has ended: %v", b.name, b.err)
		default:
		}
		c, err := net.DialTimeout("tcp", b.addr, time.Second)
		if err == nil {
			_ = c.Close()
		}
		return err
	})
	return b
}

func haproxy(t *testing.T, file string, env []string, managers []*manager) *balancer {
	t.Helper()
	addr := freeport.Addr(t)
	env = append(env, "PUSH_API_BIND="+addr)
	for i := range 3 {
		m := managers[i%len(managers)]
		port := m.metrics[strings.LastIndex(m.metrics, ":")+1:]
		env = append(env, fmt.Sprintf("PM_%d=%s", i+1, m.api), fmt.Sprintf("PM_%d_METRICS_PORT=%s", i+1, port))
	}
	b := &balancer{start(t, tool(t, "haproxy", "Debian: package haproxy"), env, "-db", "-f", file), addr}
	return b.accepts()
}

// haproxyTLS ends TLS at HAProxy. Behind it are certificates again, or plain text.
func (s *secured) haproxyTLS(t *testing.T, managers []*manager, plain bool, edits ...string) *balancer {
	t.Helper()
	env := []string{"PUSH_API_CERT=" + s.file("front.crt"), "PUSH_API_CLIENT_CA=" + s.file("ca.crt")}
	if !plain {
		env = append(env, "PM_CA="+s.file("ca.crt"), "PM_CLIENT_CERT="+s.file("client-balancer.crt"))
	}
	return haproxy(t, example(t, "haproxy/tls.cfg", edits...), env, managers)
}

func nginx(t *testing.T, file string, managers []*manager, edits ...string) *balancer {
	t.Helper()
	program := tool(t, "nginx", "Debian: package nginx")
	addr, dir := freeport.Addr(t), t.TempDir()
	edits = append(edits, "127.0.0.1:50050", addr)
	for i, port := range []string{"50053", "50063", "50073"} {
		edits = append(edits, "127.0.0.1:"+port, managers[i%len(managers)].api)
	}
	b := &balancer{start(t, program, nil, "-p", dir, "-e", "stderr", "-c", example(t, file, edits...), "-g", "daemon off; pid "+dir+"/pid;"), addr}
	t.Cleanup(func() { // killed, it would leave its workers behind
		_ = b.cmd.Process.Signal(syscall.SIGTERM)
		<-b.done
	})
	return b.accepts()
}

// nginxTLS ends TLS at nginx. Behind it are certificates again, or plain text.
func (s *secured) nginxTLS(t *testing.T, managers []*manager, plain bool, edits ...string) *balancer {
	t.Helper()
	const home = "/etc/push-manager/"
	if plain {
		edits = append(edits, "grpcs://", "grpc://")
	}
	return nginx(t, "nginx/tls.conf", managers, append(edits,
		home+"balancer.crt", s.file("front.crt"), home+"balancer.key", s.file("front.key"),
		home+"callers-ca.crt", s.file("ca.crt"), home+"ca.crt", s.file("ca.crt"),
		home+"balancer-client.crt", s.file("client-balancer.crt"), home+"balancer-client.key", s.file("client-balancer.key"))...)
}

// nginxPassthrough passes TLS through nginx.
func nginxPassthrough(t *testing.T, managers []*manager) *balancer {
	t.Helper()
	const module = "/usr/lib/nginx/modules/ngx_stream_module.so"
	if _, err := os.Stat(module); err != nil {
		missing(t, "nginx has no stream module (Debian: package libnginx-mod-stream)")
	}
	return nginx(t, "nginx/passthrough.conf", managers, "modules/ngx_stream_module.so", module)
}

// TestPushAPIBehindBalancers runs the examples in deploy.
func TestPushAPIBehindBalancers(t *testing.T) {
	s := startSecured(t)
	for _, way := range []struct {
		name  string
		plain bool // behind the balancer
		begin func(*testing.T, []*manager) *balancer
	}{
		{"HAProxy passes TLS through", false, func(t *testing.T, m []*manager) *balancer {
			t.Helper()
			return haproxy(t, example(t, "haproxy/haproxy.cfg"), nil, m)
		}},
		{"TLS ends at HAProxy", false, func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.haproxyTLS(t, m, false) }},
		{"TLS ends at HAProxy, plain behind it", true, func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.haproxyTLS(t, m, true) }},
		{"nginx passes TLS through", false, nginxPassthrough},
		{"TLS ends at nginx", false, func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.nginxTLS(t, m, false) }},
		{"TLS ends at nginx, plain behind it", true, func(t *testing.T, m []*manager) *balancer { t.Helper(); return s.nginxTLS(t, m, true) }},
	} {
		t.Run(way.name, func(t *testing.T) {
			launch := s.launch
			if way.plain {
				launch = s.launchPlain
			}
			var managers []*manager
			for _, id := range []string{"pm-1", "pm-2"} {
				managers = append(managers, launch(t, "MANAGER_ID="+id, "API_CONNECTION_AGE=1s", "LIMITS_DATA_BYTES=4MiB", "LIMITS_REQUEST_BYTES=5MiB"))
			}
			b := way.begin(t, managers)
			api := s.connect(t, b.addr, "client-billing")
			for _, cert := range []string{"", "stranger"} {
				if _, err := s.connect(t, b.addr, cert).PushToUser(within(t, patience), toAlice([]byte("x"))); err == nil {
					t.Errorf("a caller with the certificate %q is let in", cert)
				}
			}
			errorsArriveWhole(t, api)
			largeMessagesArrive(t, s, api)
			manyCallsAtOnce(t, api, 300) // more than one connection may have under way
			nothingBreaksWhileInstancesGo(t, s, b, managers)
		})
	}
}

func errorsArriveWhole(t *testing.T, api pubsub.PushManagerServiceClient) {
	t.Helper()
	_, err := api.PushToUser(within(t, patience), &pubsub.PushToUserRequest{Content: text("x")})
	field := ""
	for _, detail := range status.Convert(err).Details() {
		if bad, ok := detail.(*errdetails.BadRequest); ok {
			field = bad.GetFieldViolations()[0].GetField()
		}
	}
	if status.Code(err) != codes.InvalidArgument || nothingSent(err) != "REQUIRED" || field != "user_id" {
		t.Errorf("a user_id that is missing: %v, %q, field %q", err, nothingSent(err), field)
	}
	for range 5 { // it is answered while it is still being sent
		if _, err := api.PushToUser(within(t, patience), toAlice(make([]byte, 6<<20))); nothingSent(err) != "REQUEST_TOO_LARGE" {
			t.Errorf("6 MiB: %v", err)
		}
	}
}

func largeMessagesArrive(t *testing.T, s *secured, api pubsub.PushManagerServiceClient) {
	t.Helper()
	if r, err := api.PushToUser(within(t, patience), toAlice(make([]byte, 4<<20))); err != nil || !r.GetSuccess() {
		t.Errorf("4 MiB: %v %v", r, err)
	}
	long := metadata.AppendToOutgoingContext(within(t, patience), "authorization", "Bearer "+strings.Repeat("x", 12<<10))
	if r, err := api.PushToUser(long, toAlice([]byte("x"))); err != nil || !r.GetSuccess() {
		t.Errorf("a token of 12 KiB: %v %v", r, err)
	}
	before := len(s.users.of("alice"))
	stream, err := api.PushStream(within(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	const count, size = 6, 512 << 10 // 3 MiB on one stream, more than each balancer keeps of a request
	for id := range uint64(count) {
		data := make([]byte, size)
		data[0] = byte(id)
		if err := stream.Send(&pubsub.PushStreamRequest{Id: id, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toAlice(data)}}); err != nil {
			break // Recv tells why
		}
	}
	_ = stream.CloseSend()
	answered := 0
	for ; err == nil; answered++ {
		_, err = stream.Recv()
	}
	if answered--; status.Convert(err).Code() == codes.Unavailable && nothingSent(err) == "DRAINING" {
		return // the connection was too old; what was taken is answered
	}
	if !errors.Is(err, io.EOF) || answered != count {
		t.Errorf("a PushStream of 3 MiB: %d of %d answered, %v", answered, count, err)
	}
	for i, data := range s.users.of("alice")[before:] {
		if len(data) != size || data[0] != byte(i) {
			t.Errorf("message %d of the PushStream is not that", i)
		}
	}
}

func manyCallsAtOnce(t *testing.T, api pubsub.PushManagerServiceClient, count int) {
	t.Helper()
	var calls sync.WaitGroup
	for range count {
		calls.Go(func() {
			if _, err := api.PushToUser(within(t, patience), toAlice([]byte("x"))); err != nil && nothingSent(err) == "" {
				t.Errorf("of many calls at once: %v", err)
			}
		})
	}
	calls.Wait()
}

// nothingBreaksWhileInstancesGo: connections grow too old, then one Push-Manager is stopped. A call is answered, or refused
// with the word that nothing was sent; and nothing is sent twice.
func nothingBreaksWhileInstancesGo(t *testing.T, s *secured, b *balancer, managers []*manager) {
	t.Helper()
	before := len(s.users.of("alice"))
	stop := make(chan struct{})
	var delivered, refused, unanswered atomic.Int64
	var callers sync.WaitGroup
	stopped := func() bool {
		select {
		case <-stop:
			return true
		default:
			return false
		}
	}
	for i := range 4 {
		api := s.connect(t, b.addr, "client-billing")
		for j := range 4 {
			callers.Go(func() {
				for n := 0; !stopped(); n++ {
					r, err := api.PushToUser(within(t, patience), toAlice(fmt.Appendf(nil, "call %d %d %d", i, j, n)))
					switch {
					case r.GetSuccess():
						delivered.Add(1)
					case err != nil && nothingSent(err) != "":
						refused.Add(1)
					case status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "502 (Bad Gateway)"):
						unanswered.Add(1) // nginx had sent it on the connection that the instance was closing: nobody knows
					default:
						t.Errorf("a call: %v %v", r, err)
					}
					time.Sleep(2 * time.Millisecond)
				}
			})
		}
		callers.Go(func() {
			for n := 0; !stopped(); n++ {
				err := pushStream(within(t, patience), api, fmt.Sprintf("stream %d %d", i, n), &delivered, stop)
				switch {
				case err == nil, nothingSent(err) == "DRAINING":
				case status.Code(err) == codes.Unavailable && strings.Contains(err.Error(), "502 (Bad Gateway)"):
					unanswered.Add(1) // opened while an instance closed its listener: nginx cannot open a stream again elsewhere
				default:
					t.Errorf("a PushStream: %v", err)
				}
			}
		})
	}
	eventually(t, "connections of both are told to go", func() error {
		for _, m := range managers {
			values, err := m.readMetrics()
			if err != nil {
				return err
			}
			if told := values["push_manager_api_connections_told_total"]; told < 2 {
				return fmt.Errorf("%v", told)
			}
		}
		return nil
	})
	managers[0].signal(syscall.SIGTERM)
	if code := managers[0].exit(patience); code != 0 {
		t.Errorf("exit code %d", code)
	}
	enough := delivered.Load() + 50
	eventually(t, "the other one serves", func() error {
		if n := delivered.Load(); n < enough {
			return fmt.Errorf("%d of %d", n, enough)
		}
		return nil
	})
	close(stop)
	callers.Wait()
	got := s.users.of("alice")[before:]
	slices.Sort(got)
	if len(slices.Compact(slices.Clone(got))) != len(got) || int64(len(got)) != delivered.Load() {
		t.Errorf("%d messages arrived, %d of them different, and %d are said to be delivered", len(got), len(slices.Compact(got)), delivered.Load())
	}
	if n := int(unanswered.Load()); n > 4*len(managers) { // each stream once for each instance that goes
		t.Errorf("%d streams met an instance that was gone", n)
	}
	t.Logf("%d delivered, %d refused, %d streams met an instance that was gone", delivered.Load(), refused.Load(), unanswered.Load())
	if strings.Contains(b.name, "haproxy") && !strings.Contains(b.out.String(), "Layer7 wrong status, code: 503") {
		t.Error("HAProxy has not heard from /readyz that one stops")
	}
}

// pushStream pushes one by one until it is told to stop or the stream ends.
func pushStream(ctx context.Context, api pubsub.PushManagerServiceClient, name string, delivered *atomic.Int64, stop <-chan struct{}) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := api.PushStream(ctx)
	for id := uint64(1); err == nil; id++ {
		_ = stream.Send(&pubsub.PushStreamRequest{Id: id, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toAlice(fmt.Appendf(nil, "%s %d", name, id))}})
		var reply *pubsub.PushStreamResponse
		if reply, err = stream.Recv(); reply.GetToUser().GetSuccess() {
			delivered.Add(1)
		}
		time.Sleep(5 * time.Millisecond)
		select {
		case <-stop:
			return nil
		default:
		}
	}
	return err
}

// TestBalancerThatEndsTLSCutsSilentPushStreamsOnly: its time-outs are for what is silent, and what is cut is unknown to the
// caller.
func TestBalancerThatEndsTLSCutsSilentPushStreamsOnly(t *testing.T) {
	s := startSecured(t)
	managers := []*manager{s.launch(t)}
	for name, begin := range map[string]func(*testing.T) *balancer{
		"HAProxy": func(t *testing.T) *balancer {
			t.Helper()
			return s.haproxyTLS(t, managers, false, "timeout server 1h", "timeout server 2s")
		},
		"nginx": func(t *testing.T) *balancer {
			t.Helper()
			return s.nginxTLS(t, managers, false, "grpc_read_timeout 1h", "grpc_read_timeout 2s", "client_body_timeout 1h", "client_body_timeout 2s")
		},
	} {
		t.Run(name, func(t *testing.T) {
			api := s.connect(t, begin(t).addr, "client-billing")
			stop := make(chan struct{})
			var delivered atomic.Int64
			var busy sync.WaitGroup
			busy.Go(func() {
				if err := pushStream(within(t, patience), api, "busy "+name, &delivered, stop); err != nil {
					t.Errorf("the busy one: %v", err)
				}
			})
			silent, err := api.PushStream(within(t, patience))
			if err == nil {
				_ = silent.Send(&pubsub.PushStreamRequest{Id: 1, Push: &pubsub.PushStreamRequest_ToUser{ToUser: toAlice([]byte("and no more"))}})
				if _, err = silent.Recv(); err == nil {
					_, err = silent.Recv()
				}
			}
			close(stop)
			busy.Wait()
			if err == nil || errors.Is(err, io.EOF) || nothingSent(err) != "" || errors.Is(context.Cause(silent.Context()), context.DeadlineExceeded) {
				t.Errorf("the silent one: %v", err)
			}
			if delivered.Load() < 50 {
				t.Errorf("%d pushes of the busy one are delivered", delivered.Load())
			}
		})
	}
}

// TestBalancersSendNothingTwice: a push that is slow has been sent, and the time-out of a balancer is no reason to send it again.
func TestBalancersSendNothingTwice(t *testing.T) {
	for name, begin := range map[string]func(*testing.T, *secured, []*manager) *balancer{
		"HAProxy": func(t *testing.T, s *secured, m []*manager) *balancer {
			t.Helper()
			return s.haproxyTLS(t, m, false, "timeout server 1h", "timeout server 2s")
		},
		"nginx": func(t *testing.T, s *secured, m []*manager) *balancer {
			t.Helper()
			return s.nginxTLS(t, m, false, "grpc_read_timeout 1h", "grpc_read_timeout 2s")
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := startSecured(t)
			s.users.slow = 6 * time.Second
			b := begin(t, s, []*manager{s.launch(t, "MANAGER_ID=pm-1"), s.launch(t, "MANAGER_ID=pm-2")})
			r, err := s.connect(t, b.addr, "client-billing").PushToUser(within(t, patience), toAlice([]byte("once")))
			if status.Code(err) != codes.Unavailable || nothingSent(err) != "" {
				t.Errorf("the caller is told %v %v, and not that it is unknown", r, err)
			}
			if got := s.users.of("alice"); len(got) != 1 {
				t.Errorf("alice got %q", got)
			}
		})
	}
}
