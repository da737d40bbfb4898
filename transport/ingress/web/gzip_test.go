package web_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	pubsub "github.com/push-manager/push-manager/proto"
	"github.com/push-manager/push-manager/transport/ingress"
)

func zipped(t *testing.T, text string) string {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if _, err := io.WriteString(z, text); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// A compressed request is what it becomes, over every protocol: it is read and bounded as one that comes as it is.
func TestCompressedRequestsAreWhatTheyBecome(t *testing.T) {
	s := serveSilent(t, ingress.Config{Gzip: true})
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.drain(ctx); err != nil {
			t.Error(err)
		}
	}()
	url, plain := "http://"+s.address, newWorld(t).url
	const short, long = "/v1/broadcasts", service + "BroadcastMessage"
	large := strings.Repeat("a", 300<<10)
	for name, tc := range map[string]struct {
		path, body string
		header     []string
		status     int
		says       string
	}{
		"short path":            {short, zipped(t, `{"text":"Hello"}`), []string{"Content-Encoding", "gzip"}, 200, "no connect-node"},
		"its own JSON":          {long, zipped(t, `{"content":{"data":"SGVsbG8="}}`), []string{"Content-Encoding", "gzip"}, 200, ""},
		"as it is":              {short, `{"text":"Hello"}`, []string{"Content-Encoding", "identity"}, 200, ""},
		"a field is not known":  {short, zipped(t, `{"text":"Hello","typo":1}`), []string{"Content-Encoding", "gzip"}, 400, "typo"},
		"data too large":        {short, zipped(t, `{"text":"`+large+`"}`), []string{"Content-Encoding", "gzip"}, 400, "content.data"},
		"request too large":     {short, zipped(t, strings.Repeat(large, 4)), []string{"Content-Encoding", "gzip"}, 413, "request: "},
		"no gzip":               {short, strings.Repeat("not gzip ", 5), []string{"Content-Encoding", "gzip"}, 400, "request: "},
		"cut short":             {short, zipped(t, `{"text":"Hello"}`)[:20], []string{"Content-Encoding", "gzip"}, 400, "request: "},
		"empty":                 {short, "", []string{"Content-Encoding", "gzip"}, 400, "request: "},
		"another encoding":      {short, "{}", []string{"Content-Encoding", "br"}, 501, "gzip"},
		"twice":                 {short, zipped(t, zipped(t, "{}")), []string{"Content-Encoding", "gzip, gzip"}, 501, "gzip"},
		"the header of another": {short, zipped(t, "{}"), []string{"Grpc-Encoding", "gzip"}, 501, "gzip"},
	} {
		for protocol, client := range clients {
			for _, known := range []bool{true, false} { // the length, before it has come
				var body io.Reader = strings.NewReader(tc.body)
				if !known {
					body = io.MultiReader(body)
				}
				resp, text := send(t, client, http.MethodPost, url+tc.path, body, append([]string{"Content-Type", "application/json"}, tc.header...)...)
				if resp.StatusCode != tc.status || !strings.Contains(text, tc.says) || resp.Header.Get("Content-Encoding") != "" {
					t.Errorf("%s, %s, length known %v: %d %s, want %d and %q", name, protocol, known, resp.StatusCode, text, tc.status, tc.says)
				}
			}
		}
	}
	for name, options := range map[string][]connect.ClientOption{
		"Connect": nil, "JSON": {connect.WithProtoJSON()}, "gRPC": {connect.WithGRPC()}, "gRPC-Web": {connect.WithGRPCWeb()},
	} {
		call := func(url, text string) error {
			c := connect.NewClient[pubsub.BroadcastMessageRequest, pubsub.BroadcastMessageResponse](clients["HTTP/2"], url+long, append(options, connect.WithSendGzip())...)
			_, err := c.CallUnary(t.Context(), connect.NewRequest(&pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Data: []byte(text)}}))
			return err
		}
		if err := call(url, "Hello"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := call(url, large); connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "content.data") {
			t.Errorf("%s, data too large: %v", name, err)
		}
		if err := call(plain, "Hello"); connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Errorf("%s, where it is off: %v", name, err)
		}
		stream := connect.NewClient[pubsub.PushStreamRequest, pubsub.PushStreamResponse](clients["HTTP/2"], url+service+"PushStream", append(options, connect.WithSendGzip())...).CallBidiStream(t.Context())
		err := stream.Send(&pubsub.PushStreamRequest{Id: 7, Push: &pubsub.PushStreamRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: &pubsub.MessageContent{Data: []byte("Hello")}}}})
		if err != nil {
			t.Errorf("%s, stream: %v", name, err)
		}
		if r, err := stream.Receive(); err != nil || r.GetId() != 7 || r.GetBroadcast() == nil {
			t.Errorf("%s, stream: answered %v, %v", name, r, err)
		}
		_ = stream.CloseRequest()
		_ = stream.CloseResponse()
	}
}
