package web_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/gobwas/ws"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/devstack"
	pubsub "github.com/push-manager/push-manager/proto"
)

const service = "/pubsub.PushManagerService/"

// world is everything but the clients, with alice and bob in the room "lobby".
type world struct {
	stack *devstack.Stack
	url   string
	grpc  pubsub.PushManagerServiceClient
	conns []net.Conn
	read  sync.WaitGroup
}

var (
	once   sync.Once
	shared *world
	failed error
)

func TestMain(m *testing.M) {
	code := m.Run()
	if shared != nil {
		for _, c := range shared.conns {
			_ = c.Close()
		}
		shared.read.Wait()
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		if err := shared.stack.Drain(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = max(code, 1)
		}
		cancel()
	}
	os.Exit(code)
}

func newWorld(t testing.TB) *world {
	t.Helper()
	once.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		var w world
		if w.stack, failed = devstack.Start(ctx, devstack.Config{Nodes: 1, Store: "off"}); failed != nil {
			return
		}
		shared = &w
		if failed = w.stack.WaitReady(ctx); failed != nil {
			return
		}
		w.url = "http://" + w.stack.HTTPAddress()
		conn, err := grpc.NewClient(w.stack.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			failed = err
			return
		}
		w.grpc = pubsub.NewPushManagerServiceClient(conn)
		for _, user := range []string{"alice", "bob"} {
			c, _, _, err := ws.Dial(ctx, "ws://"+w.stack.Nodes()[0].HTTP+"/ws?room_id=lobby&user_id="+user)
			if err != nil {
				failed = err
				return
			}
			w.conns = append(w.conns, c)
			w.read.Go(func() { _, _ = io.Copy(io.Discard, c) })
		}
		for ctx.Err() == nil {
			r, err := w.grpc.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: "lobby", Content: &pubsub.MessageContent{Data: []byte("x")}})
			if err == nil && r.GetDeliveredCount() == 2 {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
		failed = errors.New("alice and bob are not in the lobby")
	})
	if failed != nil {
		t.Fatal(failed)
	}
	return shared
}

// clients speak HTTP/1.1 and HTTP/2.
var clients = map[string]*http.Client{"HTTP/1.1": {Transport: transport(false)}, "HTTP/2": {Transport: transport(true)}}

func transport(two bool) *http.Transport {
	p := new(http.Protocols)
	p.SetHTTP1(!two)
	p.SetUnencryptedHTTP2(two)
	return &http.Transport{Protocols: p}
}

// post sends a body, and returns what came back. header are pairs.
func post(t testing.TB, c *http.Client, url, body string, header ...string) (*http.Response, string) {
	t.Helper()
	return send(t, c, http.MethodPost, url, strings.NewReader(body), header...)
}

func send(t testing.TB, c *http.Client, method, url string, body io.Reader, header ...string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(b)
}

// wireError is what Connect writes for an error.
type wireError struct {
	Code, Message string
	Details       []struct {
		Type  string
		Debug json.RawMessage
	}
}

func errorOf(t testing.TB, body string) wireError {
	t.Helper()
	var e wireError
	if err := json.Unmarshal([]byte(body), &e); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return e
}

func (e wireError) detail(name string) string {
	for _, d := range e.Details {
		if d.Type == name {
			return string(d.Debug)
		}
	}
	return ""
}

// TestShortPathsAndJSONAnswerAsGRPCDoes: the same push by a short path, as JSON of the method and by gRPC has the same reply.
func TestShortPathsAndJSONAnswerAsGRPCDoes(t *testing.T) {
	w := newWorld(t)
	content := func(data string) *pubsub.MessageContent { return &pubsub.MessageContent{Data: []byte(data)} }
	for name, tc := range map[string]struct {
		path, body, method string
		request, reply     proto.Message
	}{
		"a room": {"/v1/rooms/lobby/messages", `{"text":"Hello"}`, "PushToRoom", &pubsub.PushToRoomRequest{RoomId: "lobby", Content: content("Hello")}, &pubsub.PushToRoomResponse{}},
		"a room without somebody": {
			"/v1/rooms/lobby/messages", `{"text":"Hello","exclude_user_ids":["bob"]}`, "PushToRoom",
			&pubsub.PushToRoomRequest{RoomId: "lobby", Content: content("Hello"), ExcludeUserIds: []string{"bob"}}, &pubsub.PushToRoomResponse{},
		},
		"no room":       {"/v1/rooms/a%2Fb%22/messages", `{"json": {"a": 1}}`, "PushToRoom", &pubsub.PushToRoomRequest{RoomId: `a/b"`, Content: content(`{"a":1}`)}, &pubsub.PushToRoomResponse{}},
		"a user":        {"/v1/users/alice/messages", `{"data":"SGVsbG8=","type":"SYSTEM","timestamp":"5","metadata":{"k":"v"}}`, "PushToUser", &pubsub.PushToUserRequest{UserId: "alice", Content: content("Hello")}, &pubsub.PushToUserResponse{}},
		"with an id":    {"/v1/users/nobody/messages", `{"text":"","options":{"message_id":"m-1","ttlMs":1000}}`, "PushToUser", &pubsub.PushToUserRequest{UserId: "nobody", Content: content(""), Options: &pubsub.PushOptions{MessageId: "m-1", TtlMs: 1000}}, &pubsub.PushToUserResponse{}},
		"several users": {"/v1/users/messages", `{"text":"Hello","user_ids":["alice","nobody"]}`, "PushToUsers", &pubsub.PushToUsersRequest{UserIds: []string{"alice", "nobody"}, Content: content("Hello")}, &pubsub.PushToUsersResponse{}},
		"several rooms": {"/v1/rooms/messages", `{"text":"Hello","room_ids":["lobby","nowhere"],"exclude_user_ids":["x"]}`, "PushToRooms", &pubsub.PushToRoomsRequest{RoomIds: []string{"lobby", "nowhere"}, Content: content("Hello"), ExcludeUserIds: []string{"x"}}, &pubsub.PushToRoomsResponse{}},
		"everybody":     {"/v1/broadcasts", `{"json":"Hello"}`, "BroadcastMessage", &pubsub.BroadcastMessageRequest{Content: content(`"Hello"`)}, &pubsub.BroadcastMessageResponse{}},
	} {
		conn, err := grpc.NewClient(w.stack.Address(), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		want := proto.Clone(tc.reply)
		if err := conn.Invoke(t.Context(), service+tc.method, tc.request, want); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		_ = conn.Close()
		asJSON, err := protojson.Marshal(tc.request)
		if err != nil {
			t.Fatal(err)
		}
		for protocol, c := range clients {
			for what, do := range map[string]func() (*http.Response, string){
				"short, as curl sends it": func() (*http.Response, string) {
					return post(t, c, w.url+tc.path, tc.body, "Content-Type", "application/x-www-form-urlencoded")
				},
				"short, as JSON": func() (*http.Response, string) {
					return post(t, c, w.url+tc.path, tc.body, "Content-Type", "application/json; charset=utf-8")
				},
				"short, of unknown length": func() (*http.Response, string) {
					return send(t, c, http.MethodPost, w.url+tc.path, io.MultiReader(strings.NewReader(tc.body)))
				},
				"the method's JSON, in capitals": func() (*http.Response, string) {
					return post(t, c, w.url+service+tc.method, string(asJSON), "Content-Type", "Application/JSON")
				},
				"the method's JSON": func() (*http.Response, string) {
					return post(t, c, w.url+service+tc.method, string(asJSON), "Content-Type", "application/json")
				},
			} {
				resp, body := do()
				got := proto.Clone(tc.reply)
				if err := protojson.Unmarshal([]byte(body), got); resp.StatusCode != http.StatusOK || err != nil || !proto.Equal(got, want) {
					t.Errorf("%s, %s, %s: %d %s, want %v", name, protocol, what, resp.StatusCode, body, want)
				}
			}
		}
	}
}

func TestWhatIsWrongWithARequestIsNamed(t *testing.T) {
	w := newWorld(t)
	short, whole := "/v1/rooms/lobby/messages", service+"PushToUser"
	for body, tc := range map[string]struct{ path, field string }{
		`{"txt":"Hello"}`:                          {short, "txt"},
		`{"Text":"Hello"}`:                         {short, "Text"},
		`{"text":"Hello","text":"Bye"}`:            {short, "text"},
		`{"text":"Hello","json":1}`:                {short, "json"},
		`{}`:                                       {short, "text"},
		`{"text":1}`:                               {short, "text"},
		`{"data":"*"}`:                             {short, "data"},
		`{"text":"a","type":"SONG"}`:               {short, "type"},
		`{"text":"a","user_ids":["a"]}`:            {short, "user_ids"},
		`{"text":"a","room_id":"b"}`:               {short, "room_id"},
		`{"text":"a","options":{"ttl":1}}`:         {short, "ttl"},
		`{"text":"a","exclude_user_ids":[""]}`:     {short, "exclude_user_ids[0]"},
		`{"text":"a","metadata":{"k":5}}`:          {short, "metadata"},
		`{"text":"a","options":{"value":5}}`:       {short, "value"},
		"{\"text\":\"\xff\"}":                      {short, "text"},
		`{"text":"\ud800"}`:                        {short, "text"},
		`{"text":"\udc00\ud800"}`:                  {short, "text"},
		"{\"json\":[\"\xff\"]}":                    {short, "json"},
		`[]`:                                       {short, "request"},
		`{"text":"a"} {}`:                          {short, "request"},
		`{"text":"a"`:                              {short, "request"},
		``:                                         {short, "request"},
		`{"user_id":"alice","contnet":{}}`:         {whole, "contnet"},
		`{"user_id":"alice","content":{"dat":""}}`: {whole, "dat"},
		`{"user_id":"alice","userId":"bob","content":{}}`: {whole, "userId"},
		`{"content":{}}`: {whole, "user_id"},
		`{"user_id":"alice","content":{"type":{}}}`:         {whole, "type"},
		`{"user_id":"a","options":{"priority":"PRIORITY"}}`: {whole, "priority"},
	} {
		resp, text := post(t, clients["HTTP/1.1"], w.url+tc.path, body, "Content-Type", "application/json")
		e := errorOf(t, text)
		var bad errdetails.BadRequest
		_ = protojson.Unmarshal([]byte(e.detail("google.rpc.BadRequest")), &bad)
		if resp.StatusCode != http.StatusBadRequest || e.Code != "invalid_argument" || e.detail("google.rpc.ErrorInfo") == "" ||
			len(bad.GetFieldViolations()) != 1 || !strings.Contains(bad.GetFieldViolations()[0].GetField(), tc.field) || !strings.HasPrefix(e.Message, bad.GetFieldViolations()[0].GetField()+": ") {
			t.Errorf("%s: %d %s", body, resp.StatusCode, text)
		}
	}
}

func TestOtherErrorsHaveTheirStatus(t *testing.T) {
	w := newWorld(t)
	large := `{"text":"` + strings.Repeat("a", 1<<20) + `"}`
	for name, tc := range map[string]struct {
		method, path, body string
		header             []string
		status             int
		code               string
	}{
		"no such path":          {"POST", "/v2/rooms", "{}", nil, 404, "not_found"},
		"no such method":        {"POST", service + "PushToNobody", "{}", nil, 404, "not_found"},
		"GET of a short path":   {"GET", "/v1/broadcasts", "", nil, 405, "unimplemented"},
		"no JSON":               {"POST", "/v1/broadcasts", "<a/>", []string{"Content-Type", "text/xml"}, 415, "invalid_argument"},
		"too large":             {"POST", "/v1/broadcasts", large, nil, 413, "resource_exhausted"},
		"data too large":        {"POST", "/v1/broadcasts", `{"text":"` + strings.Repeat("a", 300<<10) + `"}`, nil, 400, "invalid_argument"},
		"a stream over 1.1":     {"POST", service + "PushStream", "", []string{"Content-Type", "application/connect+proto"}, 505, "unimplemented"},
		"no time":               {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"Connect-Timeout-Ms", "x"}, 400, "invalid_argument"},
		"negative time":         {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"Connect-Timeout-Ms", "-1"}, 400, "invalid_argument"},
		"compressed, short":     {"POST", "/v1/broadcasts", `{}`, []string{"Content-Encoding", "gzip"}, 501, "unimplemented"},
		"a room with a NUL":     {"POST", "/v1/rooms/%00/messages", `{"text":"a"}`, nil, 400, "invalid_argument"},
		"a room with no UTF-8":  {"POST", "/v1/rooms/%ff/messages", `{"text":"a"}`, nil, 400, "invalid_argument"},
		"time is over":          {"POST", "/v1/users/alice/messages", `{"text":"a"}`, []string{"Connect-Timeout-Ms", "0"}, 504, "deadline_exceeded"},
		"no such priority":      {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"X-Priority", "now"}, 400, "invalid_argument"},
		"compressed":            {"POST", service + "PushToUser", `{}`, []string{"Content-Type", "application/json", "Content-Encoding", "gzip"}, 501, "unimplemented"},
		"a page of a stranger":  {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"Origin", "https://evil.example"}, 403, "permission_denied"},
		"one without an origin": {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"Origin", "null"}, 403, "permission_denied"},
		"its preflight":         {"OPTIONS", "/v1/broadcasts", "", []string{"Origin", "https://evil.example", "Access-Control-Request-Method", "POST"}, 403, "permission_denied"},
		"a page of ours":        {"POST", "/v1/broadcasts", `{"text":"a"}`, []string{"Origin", w.url}, 200, ""},
	} {
		resp, body := send(t, clients["HTTP/1.1"], tc.method, w.url+tc.path, strings.NewReader(tc.body), tc.header...)
		if e := errorOf(t, body); resp.StatusCode != tc.status || e.Code != tc.code || tc.code != "" && name != "time is over" && e.detail("google.rpc.ErrorInfo") == "" {
			t.Errorf("%s: %d %s, want %d", name, resp.StatusCode, body, tc.status)
		}
		if resp.Header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("%s: another origin may read it", name)
		}
	}
	resp, body := send(t, clients["HTTP/2"], http.MethodPost, w.url+"/v1/broadcasts", io.MultiReader(strings.NewReader(large)))
	if resp.StatusCode != http.StatusRequestEntityTooLarge {
		t.Errorf("too large, of unknown length: %d %s", resp.StatusCode, body)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, w.url+"/openapi.yaml", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("X-Large", strings.Repeat("a", 32<<10))
	if resp, err := clients["HTTP/1.1"].Do(req); err == nil { // else it was cut off while it sent them
		defer func() { _ = resp.Body.Close() }()
		if resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			t.Errorf("large headers: %d", resp.StatusCode)
		}
	}
}

// protocols are those that clients of Connect can speak.
var protocols = map[string][]connect.ClientOption{
	"Connect": nil, "Connect, JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()}, "gRPC-Web, JSON": {connect.WithGRPCWeb(), connect.WithProtoJSON()},
}

func TestClientsOfConnectPushByEveryProtocol(t *testing.T) {
	w := newWorld(t)
	for name, options := range protocols {
		c := connect.NewClient[pubsub.PushToUserRequest, pubsub.PushToUserResponse](clients["HTTP/2"], w.url+service+"PushToUser", options...)
		reply, err := c.CallUnary(t.Context(), connect.NewRequest(&pubsub.PushToUserRequest{UserId: "alice", Content: &pubsub.MessageContent{Data: []byte("a")}}))
		if err != nil || !reply.Msg.GetSuccess() || reply.Msg.GetMessage() != "delivered" {
			t.Errorf("%s: %v, %v", name, reply, err)
		}
		_, err = c.CallUnary(t.Context(), connect.NewRequest(&pubsub.PushToUserRequest{}))
		var e *connect.Error
		if !errors.As(err, &e) || e.Code() != connect.CodeInvalidArgument || len(e.Details()) != 2 {
			t.Errorf("%s: a push to nobody: %v", name, err)
		}
		health := connect.NewClient[healthpb.HealthCheckRequest, healthpb.HealthCheckResponse](clients["HTTP/2"], w.url+"/grpc.health.v1.Health/Check", options...)
		if h, err := health.CallUnary(t.Context(), connect.NewRequest(&healthpb.HealthCheckRequest{})); err != nil || h.Msg.GetStatus() != healthpb.HealthCheckResponse_SERVING {
			t.Errorf("%s: health: %v, %v", name, h, err)
		}
		testStream(t, w, name, options)
	}
}

// testStream pushes to one user: the replies come in order, each to its push, and the stream ends in good order.
func testStream(t *testing.T, w *world, name string, options []connect.ClientOption) {
	t.Helper()
	const n = 50
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	s := connect.NewClient[pubsub.PushStreamRequest, pubsub.PushStreamResponse](clients["HTTP/2"], w.url+service+"PushStream", options...).CallBidiStream(ctx)
	for i := range uint64(n) {
		user := "alice"
		if i == 7 {
			user = ""
		}
		err := s.Send(&pubsub.PushStreamRequest{Id: i + 1, Push: &pubsub.PushStreamRequest_ToUser{ToUser: &pubsub.PushToUserRequest{UserId: user, Content: &pubsub.MessageContent{Data: []byte(strings.Repeat("x", int(i)*1000))}}}})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
	if err := s.CloseRequest(); err != nil {
		t.Fatal(err)
	}
	seen := map[uint64]bool{}
	for {
		r, err := s.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%s: after %d replies: %v", name, len(seen), err)
		}
		if seen[r.GetId()] || (r.GetId() == 8) != (r.GetError() != nil) || r.GetId() != 8 && !r.GetToUser().GetSuccess() {
			t.Errorf("%s: %v", name, r)
		}
		seen[r.GetId()] = true
	}
	if len(seen) != n {
		t.Errorf("%s: %d replies for %d pushes", name, len(seen), n)
	}
	if err := s.CloseResponse(); err != nil {
		t.Errorf("%s: %v", name, err)
	}
}

// TestSlowRequestsEnd: a client that announces a body and sends none is answered, and pushes of others go on meanwhile.
func TestSlowRequestsEnd(t *testing.T) {
	w := newWorld(t)
	var d net.Dialer
	ended, counts := make(chan string, 20), map[string]int{}
	for i := range cap(ended) {
		c, err := d.DialContext(t.Context(), "tcp", w.stack.HTTPAddress())
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.Close() }()
		begin := "POST /v1/broadcasts HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + strings.Repeat("{", 5000)
		switch i % 4 {
		case 0:
			begin = "POST /v1/broadcasts HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n1"
		case 1:
			begin = "POST /v1/broadcasts HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{"
		case 2: // HTTP has no status for it but that of gRPC
			begin = "POST " + service + "PushToUser HTTP/1.1\r\nHost: a\r\nContent-Type: application/grpc-web\r\nContent-Length: 100\r\n\r\n\x00\x00"
		}
		if _, err := c.Write([]byte(begin)); err != nil {
			t.Fatal(err)
		}
		go func() {
			_ = c.SetReadDeadline(time.Now().Add(20 * time.Second)) // the server's own bound is 40 s
			b := make([]byte, 12)
			n, _ := io.ReadFull(c, b)
			ended <- string(b[:n])
		}()
	}
	for range 20 {
		if resp, body := post(t, clients["HTTP/1.1"], w.url+"/v1/users/alice/messages", `{"text":"a"}`); resp.StatusCode != http.StatusOK {
			t.Errorf("meanwhile: %d %s", resp.StatusCode, body)
		}
	}
	for range cap(ended) {
		got := <-ended
		counts[got]++
	}
	if want := map[string]int{"HTTP/1.1 504": 15, "HTTP/1.1 200": 5}; !maps.Equal(counts, want) {
		t.Errorf("slow ones got %v, want %v", counts, want)
	}
}

// TestSecuredHTTPKnowsItsCallers: with TLS and authentication a push needs a key or a certificate, as over gRPC.
func TestSecuredHTTPKnowsItsCallers(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	dir := t.TempDir()
	s, err := devstack.Start(ctx, devstack.Config{Nodes: 1, Store: "off", Secure: true, DataDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Drain(ctx); err != nil {
			t.Error(err)
		}
	}()
	if err := s.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(dir + "/secure/api-key")
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(dir+"/secure/client-app.crt", dir+"/secure/client-app.key")
	if err != nil {
		t.Fatal(err)
	}
	for _, two := range []bool{false, true} {
		for name, tc := range map[string]struct {
			certs  []tls.Certificate
			header []string
			status int
		}{
			"nobody":        {status: 401},
			"a certificate": {certs: []tls.Certificate{cert}, status: 200},
			"a key":         {header: []string{"X-API-Key", strings.TrimSpace(string(key))}, status: 200},
			"a bearer":      {header: []string{"Authorization", "Bearer " + strings.TrimSpace(string(key))}, status: 200},
			"a wrong key":   {header: []string{"X-API-Key", "pmk_00000000_x"}, status: 401},
			"a key twice":   {header: []string{"X-API-Key", strings.TrimSpace(string(key)), "Authorization", "Bearer " + strings.TrimSpace(string(key))}, status: 401},
			"two keys":      {header: []string{"X-API-Key", strings.TrimSpace(string(key)), "Authorization", "Bearer x"}, status: 401},
		} {
			p := new(http.Protocols)
			p.SetHTTP1(!two)
			p.SetHTTP2(two)
			tr := &http.Transport{Protocols: p, TLSClientConfig: &tls.Config{InsecureSkipVerify: true, Certificates: tc.certs, MinVersion: tls.VersionTLS13}} // whose it is is tested elsewhere
			resp, body := post(t, &http.Client{Transport: tr}, "https://"+s.HTTPAddress()+"/v1/users/alice/messages", `{"text":"a"}`, tc.header...)
			if resp.StatusCode != tc.status || (tc.status == 401) != (resp.Header.Get("WWW-Authenticate") != "") || (resp.ProtoMajor == 2) != two {
				t.Errorf("%s: %s %d %s", name, resp.Proto, resp.StatusCode, body)
			}
			tr.CloseIdleConnections()
		}
	}
}

// FuzzRequests sends anything to the paths of a running server: it answers, and nothing panics.
func FuzzRequests(f *testing.F) {
	w := newWorld(f)
	paths := slices.Sorted(maps.Keys(map[string]bool{
		"/v1/rooms/lobby/messages": true, "/v1/users/messages": true, service + "PushToUser": true, service + "PushToUsers": true, service + "ForgetUser": true,
		service + "WatchReceipts": true, "/pubsub.BroadcastJobService/CreateJob": true, "/pubsub.BroadcastJobService/WatchJob": true, "/grpc.health.v1.Health/Check": true,
	}))
	kinds := []string{"application/json", "application/proto", "application/grpc-web", "application/grpc+proto", "application/connect+json", "application/grpc-web+json", "text/plain"}
	for i := range paths {
		for j := range kinds {
			f.Add(uint8(i), uint8(j), []byte(`{"text":"Hello","options":{"message_id":"a"}}`))
			f.Add(uint8(i), uint8(j), []byte("\x00\x00\x00\x00\x07\x0a\x05alice"))
		}
	}
	f.Fuzz(func(t *testing.T, path, kind uint8, body []byte) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, w.url+paths[int(path)%len(paths)], bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kinds[int(kind)%len(kinds)])
		req.Header.Set("Connect-Timeout-Ms", "50")
		req.Header.Set("Grpc-Timeout", "50m")
		resp, err := clients["HTTP/1.1"].Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		answer, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode == http.StatusInternalServerError || strings.Contains(string(answer), "internal") {
			t.Errorf("%d %s %v", resp.StatusCode, answer, err)
		}
	})
}
