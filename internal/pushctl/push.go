package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"google.golang.org/grpc"
	"google.golang.org/grpc/stats"
	"google.golang.org/protobuf/proto"

	"github.com/push-manager/push-manager/internal/apiclient"
	"github.com/push-manager/push-manager/internal/app"
	pubsub "github.com/push-manager/push-manager/proto"
)

// maxData bounds what is read of a file; the server has a limit of its own.
const maxData = 16 << 20

// messageFlags are the flags of every push.
type messageFlags struct {
	Address string `default:"localhost:50053" env:"PUSH_MANAGER_ADDRESS" help:"Push-Manager's HOST:PORT, or any gRPC target."`
	apiclient.Flags

	Timeout  time.Duration     `default:"5s" help:"Longest time for the push."`
	Type     string            `default:"text" help:"Type of the message: text, audio, video, translation, system or a number."`
	DataFile string            `placeholder:"FILE" help:"Read the text from a file, - for standard input."`
	Metadata map[string]string `placeholder:"KEY=VALUE" mapsep:"none" help:"Metadata of the message, may be repeated."`
}

type roomCmd struct {
	Room    string   `arg:"" help:"The room."`
	Text    string   `arg:"" optional:"" help:"What to push."`
	Exclude []string `placeholder:"USER" sep:"none" help:"Members that do not get it, may be repeated."`
	messageFlags
}

type userCmd struct {
	User string `arg:"" help:"The user."`
	Text string `arg:"" optional:"" help:"What to push."`
	messageFlags
}

type usersCmd struct {
	Users string `arg:"" help:"The users, separated by commas."`
	Text  string `arg:"" optional:"" help:"What to push."`
	messageFlags
}

type broadcastCmd struct {
	Text string `arg:"" optional:"" help:"What to push."`
	messageFlags
}

// reply is what all replies have in common.
type reply interface {
	proto.Message
	GetSuccess() bool
	GetMessage() string
	GetSummary() *pubsub.DeliverySummary
}

// Run pushes to a room.
func (c *roomCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "room "+strconv.Quote(c.Room), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent) (reply, error) {
		return api.PushToRoom(ctx, &pubsub.PushToRoomRequest{RoomId: c.Room, Content: m, ExcludeUserIds: c.Exclude})
	})
}

// Run pushes to a user.
func (c *userCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "user "+strconv.Quote(c.User), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent) (reply, error) {
		return api.PushToUser(ctx, &pubsub.PushToUserRequest{UserId: c.User, Content: m})
	})
}

// Run pushes to several users.
func (c *usersCmd) Run(ctx context.Context, t *terminal) error {
	var users []string
	for user := range strings.SplitSeq(c.Users, ",") {
		if user = strings.TrimSpace(user); user != "" {
			users = append(users, user)
		}
	}
	return c.push(ctx, t, c.Text, "users "+strconv.Quote(c.Users), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent) (reply, error) {
		return api.PushToUsers(ctx, &pubsub.PushToUsersRequest{UserIds: users, Content: m})
	})
}

// Run pushes to everybody.
func (c *broadcastCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "broadcast", func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent) (reply, error) {
		return api.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: m})
	})
}

type call func(context.Context, pubsub.PushManagerServiceClient, *pubsub.MessageContent) (reply, error)

// push does one call and prints its outcome.
func (f *messageFlags) push(ctx context.Context, t *terminal, text, what string, do call) error {
	content, err := f.content(text, t.in)
	if err != nil {
		return err
	}
	if f.Timeout <= 0 || f.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", f.Timeout, maxTimeout)}
	}
	if app.CheckTarget(f.Address) != nil {
		return &usageError{fmt.Sprintf("--address: %q is not HOST:PORT", f.Address)}
	}
	options, done, err := f.Dial(f.Address)
	if err != nil {
		return &usageError{err.Error()}
	}
	defer done()
	var sent sending
	conn, err := grpc.NewClient(f.Address, append(options, grpc.WithStatsHandler(&sent))...)
	if err != nil {
		return &usageError{fmt.Sprintf("--address: %v", err)}
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(ctx, f.Timeout)
	defer cancel()
	r, err := do(ctx, pubsub.NewPushManagerServiceClient(conn), content)
	if err != nil {
		return explain(err, f.Address, f.Timeout, sent.begun.Load())
	}
	if err := t.show(what, r); err != nil {
		return err
	}
	if code := exitCode(r); code != exitOK {
		return &outcome{code: code}
	}
	return nil
}

// sending notes whether a call has left this process. Before its header goes out,
// whatever is wrong has happened here.
type sending struct{ begun atomic.Bool }

// HandleRPC implements stats.Handler.
func (s *sending) HandleRPC(_ context.Context, e stats.RPCStats) {
	if _, ok := e.(*stats.OutHeader); ok {
		s.begun.Store(true)
	}
}

// TagRPC, TagConn and HandleConn implement stats.Handler.
func (*sending) TagRPC(ctx context.Context, _ *stats.RPCTagInfo) context.Context   { return ctx }
func (*sending) TagConn(ctx context.Context, _ *stats.ConnTagInfo) context.Context { return ctx }
func (*sending) HandleConn(context.Context, stats.ConnStats)                       {}

func (f *messageFlags) content(text string, in io.Reader) (*pubsub.MessageContent, error) {
	kind, err := messageType(f.Type)
	if err != nil {
		return nil, err
	}
	for k, v := range f.Metadata {
		if !utf8.ValidString(k) || !utf8.ValidString(v) {
			return nil, &usageError{"--metadata: not valid UTF-8"}
		}
	}
	data := []byte(text)
	switch {
	case f.DataFile != "" && text != "":
		return nil, &usageError{"give the text or --data-file, not both"}
	case f.DataFile == "-":
		data, err = io.ReadAll(io.LimitReader(in, maxData))
	case f.DataFile != "":
		data, err = os.ReadFile(f.DataFile)
	case text == "" && len(f.Metadata) == 0:
		return nil, &usageError{"nothing to push: give a text, --data-file or --metadata"}
	}
	if err != nil {
		return nil, fmt.Errorf("read the data: %w", err)
	}
	return &pubsub.MessageContent{Type: kind, Data: data, Metadata: f.Metadata}, nil
}

// messageType reads the name or the number of a type; the enum is open.
func messageType(word string) (pubsub.MessageType, error) {
	if n, ok := pubsub.MessageType_value[strings.ToUpper(word)]; ok {
		return pubsub.MessageType(n), nil
	}
	n, err := strconv.ParseInt(word, 10, 32)
	if errors.Is(err, strconv.ErrRange) || err != nil {
		return 0, &usageError{fmt.Sprintf("--type: %q is none of text, audio, video, translation, system and no number", word)}
	}
	return pubsub.MessageType(n), nil
}
