package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
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

// apiFlags are the flags of every call.
type apiFlags struct {
	Address string `default:"localhost:50053" env:"PUSHCTL_ADDRESS,PUSH_MANAGER_ADDRESS" context:"address" help:"Push-Manager's HOST:PORT, or any gRPC target."`
	apiclient.Flags
}

// messageFlags are the flags of every push.
type messageFlags struct {
	apiFlags

	Timeout  time.Duration     `default:"5s" help:"Longest time for the push."`
	Type     string            `default:"text" help:"Type of the message: text, audio, video, translation, system or a number."`
	DataFile string            `placeholder:"FILE" help:"Read the text from a file, - for standard input."`
	Metadata map[string]string `placeholder:"KEY=VALUE" mapsep:"none" help:"Metadata of the message, may be repeated."`

	ID         string        `name:"id" placeholder:"ID" help:"Names the message: who has had it does not get it again with the same ID."`
	TTL        time.Duration `name:"ttl" placeholder:"1m" help:"How long the message is worth showing. Default: to the end of the push; in the store STORE_TTL of the server."`
	Ack        string        `default:"node" enum:"node,client" help:"Whose word makes it delivered: node, or client, where the client can acknowledge."`
	AckTimeout time.Duration `placeholder:"2s" help:"How long clients may take, with --ack=client."`
	Store      bool          `help:"Store it for users who are not reached. Not for broadcasts and several rooms."`
	Collapse   string        `placeholder:"KEY" help:"While it waits, a newer message to the same user with this key takes its place."`
	Receipt    string        `default:"none" enum:"none,async" help:"none: wait for acknowledgements by clients. async, with --ack=client and an id: do not wait, pushctl receipts shows them."`
	Priority   string        `default:"" enum:",low,normal,high,critical" placeholder:"high" help:"low, normal, high or critical."`
	Filter     []string      `placeholder:"KEY=VALUE[,VALUE]" sep:"none" help:"Only for connections whose attribute KEY has one of the values, as in platform=ios; not for those with !KEY=VALUE. May be repeated: all must hold."`
	Trace      bool          `help:"Show how long each stage took, for each node."`
}

type roomCmd struct {
	Room    string   `arg:"" help:"The room."`
	Text    string   `arg:"" optional:"" help:"What to push."`
	Exclude []string `placeholder:"USER" sep:"none" help:"Members that do not get it, may be repeated."`
	messageFlags
}

type roomsCmd struct {
	Rooms   string   `arg:"" help:"The rooms, separated by commas. Clients see the first that they are in."`
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
	return c.push(ctx, t, c.Text, "room "+strconv.Quote(c.Room), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent, o *pubsub.PushOptions) (reply, error) {
		return api.PushToRoom(ctx, c.request(m, o))
	})
}

func (c *roomCmd) request(m *pubsub.MessageContent, o *pubsub.PushOptions) *pubsub.PushToRoomRequest {
	return &pubsub.PushToRoomRequest{RoomId: c.Room, Content: m, ExcludeUserIds: c.Exclude, Options: o}
}

// Run pushes to several rooms.
func (c *roomsCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "rooms "+strconv.Quote(c.Rooms), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent, o *pubsub.PushOptions) (reply, error) {
		return api.PushToRooms(ctx, c.request(m, o))
	})
}

func (c *roomsCmd) request(m *pubsub.MessageContent, o *pubsub.PushOptions) *pubsub.PushToRoomsRequest {
	return &pubsub.PushToRoomsRequest{RoomIds: listed(c.Rooms), Content: m, ExcludeUserIds: c.Exclude, Options: o}
}

// listed takes a list of ids apart.
func listed(text string) (ids []string) {
	for id := range strings.SplitSeq(text, ",") {
		if id = strings.TrimSpace(id); id != "" {
			ids = append(ids, id)
		}
	}
	return ids
}

// Run pushes to a user.
func (c *userCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "user "+strconv.Quote(c.User), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent, o *pubsub.PushOptions) (reply, error) {
		return api.PushToUser(ctx, c.request(m, o))
	})
}

func (c *userCmd) request(m *pubsub.MessageContent, o *pubsub.PushOptions) *pubsub.PushToUserRequest {
	return &pubsub.PushToUserRequest{UserId: c.User, Content: m, Options: o}
}

// Run pushes to several users.
func (c *usersCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "users "+strconv.Quote(c.Users), func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent, o *pubsub.PushOptions) (reply, error) {
		return api.PushToUsers(ctx, c.request(m, o))
	})
}

func (c *usersCmd) request(m *pubsub.MessageContent, o *pubsub.PushOptions) *pubsub.PushToUsersRequest {
	return &pubsub.PushToUsersRequest{UserIds: listed(c.Users), Content: m, Options: o}
}

// Run pushes to everybody.
func (c *broadcastCmd) Run(ctx context.Context, t *terminal) error {
	return c.push(ctx, t, c.Text, "broadcast", func(ctx context.Context, api pubsub.PushManagerServiceClient, m *pubsub.MessageContent, o *pubsub.PushOptions) (reply, error) {
		return api.BroadcastMessage(ctx, &pubsub.BroadcastMessageRequest{Content: m, Options: o})
	})
}

type call func(context.Context, pubsub.PushManagerServiceClient, *pubsub.MessageContent, *pubsub.PushOptions) (reply, error)

// push does one call and prints its outcome.
func (f *messageFlags) push(ctx context.Context, t *terminal, text, what string, do call) error {
	if text == "" && f.DataFile == "" && len(f.Metadata) == 0 {
		return &usageError{"nothing to push: give a text, --data-file or --metadata"}
	}
	content, err := f.content(text, t.in)
	if err != nil {
		return err
	}
	options, err := f.options()
	if err != nil {
		return err
	}
	var r reply
	if err := f.call(ctx, f.Timeout, func(ctx context.Context, api pubsub.PushManagerServiceClient) (err error) {
		r, err = do(ctx, api, content, options)
		return err
	}); err != nil {
		return err
	}
	return t.show(what, r)
}

// call does one call within a timeout.
func (f *apiFlags) call(ctx context.Context, timeout time.Duration, do func(context.Context, pubsub.PushManagerServiceClient) error) error {
	return f.callOver(ctx, timeout, func(ctx context.Context, conn *grpc.ClientConn) error {
		return do(ctx, pubsub.NewPushManagerServiceClient(conn))
	})
}

// callOver is call for any service.
func (f *apiFlags) callOver(ctx context.Context, timeout time.Duration, do func(context.Context, *grpc.ClientConn) error) error {
	if timeout <= 0 || timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", timeout, maxTimeout)}
	}
	conn, sent, done, err := f.connect()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := do(ctx, conn); err != nil {
		return explain(err, f.Address, timeout, sent.begun.Load())
	}
	return nil
}

// connect makes a connection, which done closes. sent knows whether a call has left.
func (f *apiFlags) connect() (conn *grpc.ClientConn, sent *sending, done func(), err error) {
	if app.CheckTarget(f.Address) != nil {
		return nil, nil, nil, &usageError{fmt.Sprintf("--address: %q is not HOST:PORT", f.Address)}
	}
	options, release, err := f.Dial(f.Address)
	if err != nil {
		return nil, nil, nil, &usageError{err.Error()}
	}
	sent = new(sending)
	conn, err = grpc.NewClient(f.Address, append(options, grpc.WithStatsHandler(sent))...)
	if err != nil {
		release()
		return nil, nil, nil, &usageError{fmt.Sprintf("--address: %v", err)}
	}
	return conn, sent, func() { _ = conn.Close(); release() }, nil
}

// options are those of the push, nil if none are asked for.
func (f *messageFlags) options() (*pubsub.PushOptions, error) {
	o := &pubsub.PushOptions{MessageId: f.ID, CollapseKey: f.Collapse, Trace: f.Trace}
	for _, text := range []struct{ name, value string }{{"--id", f.ID}, {"--collapse", f.Collapse}} {
		if !utf8.ValidString(text.value) {
			return nil, &usageError{text.name + ": not valid UTF-8"}
		}
	}
	for _, d := range []struct {
		name  string
		value time.Duration
		into  *uint32
	}{{"--ttl", f.TTL, &o.TtlMs}, {"--ack-timeout", f.AckTimeout, &o.AckTimeoutMs}} {
		if d.value < 0 || d.value.Milliseconds() > math.MaxUint32 || d.value > 0 && d.value < time.Millisecond {
			return nil, &usageError{fmt.Sprintf("%s: %v must be between 1ms and %v", d.name, d.value, time.Duration(math.MaxUint32)*time.Millisecond)}
		}
		*d.into = uint32(d.value.Milliseconds())
	}
	if f.Ack == "client" {
		o.Ack = pubsub.AckPolicy_ACK_CLIENT
	}
	if f.Store {
		o.Offline = pubsub.OfflinePolicy_OFFLINE_STORE
	}
	if f.Receipt == "async" {
		o.Receipt = pubsub.ReceiptMode_RECEIPT_ASYNC
	}
	if f.Priority != "" {
		o.Priority = pubsub.Priority(pubsub.Priority_value["PRIORITY_"+strings.ToUpper(f.Priority)])
	}
	var err error
	if o.Filter, err = matches(f.Filter); err != nil {
		return nil, err
	}
	if proto.Equal(o, &pubsub.PushOptions{}) {
		return nil, nil //nolint:nilnil // most pushes have none
	}
	return o, nil
}

// matches reads --filter: KEY=VALUE,VALUE, with a ! before it for the contrary.
func matches(filters []string) (list []*pubsub.Match, err error) {
	for _, text := range filters {
		rest, not := strings.CutPrefix(text, "!")
		key, values, is := strings.Cut(rest, "=")
		if !is || key == "" || values == "" {
			return nil, &usageError{fmt.Sprintf("--filter: %q is not KEY=VALUE", text)}
		}
		if !utf8.ValidString(text) {
			return nil, &usageError{"--filter: not valid UTF-8"}
		}
		list = append(list, &pubsub.Match{Key: key, Values: strings.Split(values, ","), Not: not})
	}
	return list, nil
}

// matchesText is the contrary of matches.
func matchesText(list []*pubsub.Match) string {
	texts := make([]string, len(list))
	for i, m := range list {
		if m.GetNot() {
			texts[i] = "!"
		}
		texts[i] += m.GetKey() + "=" + strings.Join(m.GetValues(), ",")
	}
	return strings.Join(texts, " and ")
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
