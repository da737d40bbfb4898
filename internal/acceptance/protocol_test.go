package acceptance

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/lxzan/gws"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/freeport"
	pubsub "github.com/push-manager/push-manager/proto"
)

const protocolPage = "../../docs/client-protocol.md"

// TestClientProtocolPageSaysWhatTheGatewayDoes runs every transcript of the page.
func TestClientProtocolPageSaysWhatTheGatewayDoes(t *testing.T) {
	page, err := os.ReadFile(protocolPage)
	if err != nil {
		t.Fatal(err)
	}
	base := freeport.Row(t, 16)
	dev := start(t, binary(t, "push-manager"), nil, "dev", "--base-port", strconv.Itoa(base), "--nodes", "1")
	eventually(t, "dev says that it is ready", func() error {
		if !strings.Contains(dev.out.String(), "Ready.") {
			return fmt.Errorf("printed:\n%s", dev.out.String())
		}
		return nil
	})
	printed := dev.out.String()
	d := deployment{
		manager:  pubsub.NewPushManagerServiceClient(dial(t, printedAddress(t, printed, `Push-Manager +`))),
		gateways: []string{printedAddress(t, printed, `connect-node-1 .*WebSocket at http://`)},
	}
	transcripts := regexp.MustCompile("(?ms)^```\n(connect .*?)^```$").FindAllStringSubmatch(string(page), -1)
	if len(transcripts) < 7 {
		t.Errorf("%s has only %d transcripts", protocolPage, len(transcripts))
	}
	secured := d
	secured.gateways = []string{nodeWithTokens(t, printed)}
	withTokens, withPosition := 0, 0
	for _, transcript := range transcripts {
		text := strings.TrimSpace(transcript[1])
		switch {
		case strings.Contains(text, "TOKEN"):
			withTokens++
			secured.replay(t, filledIn(t, text))
		case strings.Contains(text, "POSITION"):
			withPosition++
			d.replay(t, strings.ReplaceAll(text, "POSITION", d.position))
		default:
			d.replay(t, text)
		}
	}
	if withTokens == 0 {
		t.Errorf("%s has no transcript with a token", protocolPage)
	}
	if withPosition == 0 {
		t.Errorf("%s has no transcript with a position", protocolPage)
	}
}

// clientSecret is what the tokens of the transcripts are signed with.
const clientSecret = "a secret of at least thirty-two bytes"

// nodeWithTokens adds a node to a development stack whose clients need tokens, and returns where they connect.
func nodeWithTokens(t *testing.T, printed string) string {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(clientSecret), 0o600); err != nil {
		t.Fatal(err)
	}
	p := freeport.Take(t, 3)
	start(t, binary(t, "connect-node"), []string{
		"NODE_ID=connect-node-tokens", "GRPC_PORT=" + p[0], "HTTP_PORT=" + p[1], "METRICS_PORT=" + p[2],
		"CONTROLLER_ADDRESS=" + printedAddress(t, printed, `Controller +`), "ETCD_ENDPOINTS=" + printedAddress(t, printed, `etcd +`),
		"CLIENT_AUTH_MODE=jwt", "CLIENT_AUTH_JWT=[{issuer: idp, audience: gateway, hs_secret_file: " + secret + "}]",
	})
	ready(t, p[2])
	return "127.0.0.1:" + p[1]
}

// filledIn puts tokens and dates in place of their names: TOKEN user rooms.
func filledIn(t *testing.T, transcript string) string {
	t.Helper()
	exp := time.Now().Add(time.Hour).Unix()
	transcript = strings.ReplaceAll(transcript, "EXPIRES", strconv.FormatInt(exp, 10))
	return regexp.MustCompile(`TOKEN (\S+) ([^"\s]+)`).ReplaceAllStringFunc(transcript, func(text string) string {
		words := strings.Fields(text)
		token, err := jwt.Mint([]byte(clientSecret), map[string]any{
			"iss": "idp", "aud": "gateway", "sub": words[1], "exp": exp, "rooms": strings.Split(words[2], ","),
		})
		if err != nil {
			t.Fatal(err)
		}
		return token
	})
}

// replay does what a transcript says, line by line.
func (d *deployment) replay(t *testing.T, transcript string) {
	t.Helper()
	lines := strings.Split(transcript, "\n")
	path := strings.TrimPrefix(lines[0], "connect ")
	if len(lines) == 2 && strings.HasPrefix(lines[1], "< HTTP ") {
		code, text := d.refused(t, path)
		if got := fmt.Sprintf("< HTTP %d %s", code, text); !strings.HasPrefix(got, lines[1]) {
			t.Errorf("%s\ngot %s", transcript, got)
		}
		return
	}
	frames := &transcriber{ch: make(chan string, 64), closed: make(chan error, 1)}
	conn, _, err := gws.NewClient(frames, &gws.ClientOption{Addr: "ws://" + d.gateways[0] + path})
	if err != nil {
		t.Errorf("%s\n%v", transcript, err)
		return
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conn.ReadLoop()
	}()
	defer func() {
		_ = conn.WriteClose(1000, nil)
		_ = conn.NetConn().Close()
		<-ended
	}()
	for _, line := range lines[1:] {
		what, rest, _ := strings.Cut(line, " ")
		switch what {
		case ">":
			err = conn.WriteMessage(gws.OpcodeText, []byte(rest))
		case "!":
			err = d.push(t, rest)
		case "<":
			if code, ok := strings.CutPrefix(rest, "close "); ok {
				err = frames.closedWith(code)
			} else {
				err = frames.next(rest)
			}
		default:
			err = fmt.Errorf("%q is not understood", what)
		}
		if err != nil {
			t.Errorf("%s\nat %q: %v", transcript, line, err)
			return
		}
	}
}

// refused asks for a connection and reads the plain answer.
func (d *deployment) refused(t *testing.T, path string) (code int, text string) {
	t.Helper()
	r, err := http.NewRequest(http.MethodGet, "http://"+d.gateways[0]+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	for key, value := range map[string]string{"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="} {
		r.Header.Set(key, value)
	}
	resp, err := httpClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var body bytes.Buffer
	_, _ = io.Copy(&body, io.LimitReader(resp.Body, 1<<10))
	return resp.StatusCode, strings.TrimSpace(body.String())
}

// push pushes as a transcript says: to whom, then the content as JSON.
func (d *deployment) push(t *testing.T, line string) error {
	t.Helper()
	whom, text, _ := strings.Cut(line, " {")
	content := new(pubsub.MessageContent)
	if err := protojson.Unmarshal([]byte("{"+text), content); err != nil {
		return err
	}
	ctx := within(t, patience)
	kind, id, _ := strings.Cut(whom, " ")
	if kind == "kept" {
		return d.keep(t, id, content)
	}
	var reply interface {
		GetSummary() *pubsub.DeliverySummary
	}
	var err error
	switch kind {
	case "room":
		reply, err = d.manager.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: id, Content: content})
	case "user":
		reply, err = d.manager.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: id, Content: content})
	case "everybody":
		reply, err = d.manager.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: content})
	default:
		return fmt.Errorf("%q is not understood", kind)
	}
	if err == nil && reply.GetSummary().GetDelivered() != 1 {
		err = fmt.Errorf("not delivered: %v", reply)
	}
	return err
}

// keep pushes to a room, with its log, and remembers where the first such push stands.
func (d *deployment) keep(t *testing.T, room string, content *pubsub.MessageContent) error {
	t.Helper()
	d.kept++
	reply, err := d.manager.PushToRoom(within(t, patience), &pubsub.PushToRoomRequest{RoomId: room, Content: content, Options: &pubsub.PushOptions{
		MessageId: fmt.Sprint("kept-", d.kept), Offline: pubsub.OfflinePolicy_OFFLINE_STORE,
	}})
	if err != nil {
		return err
	}
	position := reply.GetSummary().GetPosition()
	if position == "" {
		return fmt.Errorf("not kept: %v", reply)
	}
	if d.position == "" {
		d.position = position
	}
	return nil
}

// transcriber keeps what a client gets.
type transcriber struct {
	gws.BuiltinEventHandler

	ch     chan string
	closed chan error
}

// OnClose implements gws.Event.
func (f *transcriber) OnClose(_ *gws.Conn, err error) { f.closed <- err }

// closedWith waits for the close frame.
func (f *transcriber) closedWith(code string) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case err := <-f.closed:
		if got, ok := errors.AsType[*gws.CloseError](err); !ok || strconv.Itoa(int(got.Code)) != code {
			return fmt.Errorf("closed with %w", err)
		}
		return nil
	case got := <-f.ch:
		return fmt.Errorf("got %s", got)
	case <-timer.C:
		return errors.New("not closed")
	}
}

// OnMessage implements gws.Event.
func (f *transcriber) OnMessage(_ *gws.Conn, m *gws.Message) {
	f.ch <- string(m.Bytes())
	_ = m.Close()
}

// next compares the next message with JSON, or with the name of a type alone. Positions come in between.
func (f *transcriber) next(want string) error {
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		select {
		case got := <-f.ch:
			var g, w map[string]any
			if err := json.Unmarshal([]byte(got), &g); err != nil {
				return fmt.Errorf("got %s: %w", got, err)
			}
			if g["type"] == "resume" && want != "resume" {
				continue
			}
			if !strings.HasPrefix(want, "{") {
				w = map[string]any{"type": want, "message": g["message"]}
				if g["type"] == "resume" {
					w = map[string]any{"type": want, "token": g["token"]}
				}
			} else if err := json.Unmarshal([]byte(want), &w); err != nil {
				return err
			}
			if !reflect.DeepEqual(g, w) {
				return fmt.Errorf("got %s", got)
			}
			return nil
		case <-timer.C:
			return errors.New("nothing came")
		}
	}
}
