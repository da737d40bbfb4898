package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/push-manager/push-manager/internal/pause"
	pubsub "github.com/push-manager/push-manager/proto"
)

type membersCmd struct {
	Room string `arg:"" help:"The room."`
	apiFlags

	Limit   int           `default:"0" placeholder:"N" help:"Print so many at most. Default: all."`
	Timeout time.Duration `default:"10s" help:"Longest time for one page of 1,000."`
}

// Run lists the members of a room, each once. They are printed page by page: a room may have a million.
func (c *membersCmd) Run(ctx context.Context, t *terminal) error {
	conn, _, done, err := c.connect()
	if err != nil {
		return err
	}
	defer done()
	type place struct{ user, node string }
	seen := map[place]struct{}{}
	for token := ""; ; {
		var page *pubsub.GetRoomMembersResponse
		pageCtx, cancel := context.WithTimeout(ctx, c.Timeout)
		page, err = pubsub.NewPresenceServiceClient(conn).GetRoomMembers(pageCtx, &pubsub.GetRoomMembersRequest{RoomId: c.Room, PageToken: token})
		cancel()
		if err != nil {
			return presenceFailure(c.Address, err)
		}
		var b strings.Builder
		table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		if token == "" {
			_, _ = fmt.Fprintln(table, "USER\tNODE\tSINCE\tNAME")
		}
		for _, m := range page.GetMembers() {
			at := place{m.GetUserId(), m.GetNodeId()}
			if _, again := seen[at]; again || c.Limit > 0 && len(seen) >= c.Limit {
				continue
			}
			seen[at] = struct{}{}
			since := "-"
			if m.GetJoinTime() != nil {
				since = m.GetJoinTime().AsTime().Local().Format(time.DateTime)
			}
			_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", clean(m.GetUserId()), clean(m.GetNodeId()), since, clean(m.GetUserName()))
			if t.structured() {
				if err := t.tell(m, ""); err != nil {
					return err
				}
			}
		}
		_ = table.Flush() // into memory
		if !t.structured() && b.Len() > 0 {
			if _, err := fmt.Fprint(t.out, b.String()); err != nil {
				return fmt.Errorf("print members: %w", err)
			}
		}
		if token = page.GetNextPageToken(); token == "" || c.Limit > 0 && len(seen) >= c.Limit {
			return nil
		}
	}
}

type whereCmd struct {
	Users []string `arg:"" help:"The users, up to 1,000."`
	apiFlags

	Timeout time.Duration `default:"10s" help:"Longest time for the call."`
}

// Run tells where users are. Its exit code is 3 if none of them is online.
func (c *whereCmd) Run(ctx context.Context, t *terminal) error {
	conn, _, done, err := c.connect()
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	r, err := pubsub.NewPresenceServiceClient(conn).GetUsers(ctx, &pubsub.GetUsersRequest{UserIds: c.Users})
	if err != nil {
		return presenceFailure(c.Address, err)
	}
	var b strings.Builder
	online := false
	for _, u := range r.GetUsers() {
		if !u.GetOnline() {
			fmt.Fprintf(&b, "%s: %s\n", clean(u.GetUserId()), t.paint(red, "offline"))
			continue
		}
		online = true
		fmt.Fprintf(&b, "%s: %s on %s\n", clean(u.GetUserId()), t.paint(green, "online"), cleanList(u.GetNodeIds()))
		if len(u.GetRoomIds()) > 0 {
			fmt.Fprintf(&b, "  rooms  %s\n", cleanList(u.GetRoomIds()))
		}
		for _, conn := range u.GetConnections() {
			fmt.Fprintf(&b, "  %s %s", clean(conn.GetNodeId()), clean(conn.GetConnectionId()))
			if conn.GetDeviceId() != "" {
				b.WriteString(" device " + clean(conn.GetDeviceId()))
			}
			for _, key := range slices.Sorted(maps.Keys(conn.GetAttributes())) {
				b.WriteString(" " + clean(key) + "=" + clean(conn.GetAttributes()[key]))
			}
			if conn.GetConnectTime() != nil {
				b.WriteString(" since " + conn.GetConnectTime().AsTime().Local().Format(time.DateTime))
			}
			if len(conn.GetRoomIds()) > 0 {
				b.WriteString(" in " + cleanList(conn.GetRoomIds()))
			}
			b.WriteByte('\n')
		}
		if u.GetIncomplete() {
			b.WriteString("  (some connections are missing)\n")
		}
	}
	for _, f := range r.GetNodeFailures() {
		fmt.Fprintf(&b, "%s: %s (%s)\n", clean(f.GetNodeId()), t.paint(red, clean(f.GetReason())), plural(f.GetUsers(), "user"))
	}
	if err := t.tell(r, b.String()); err != nil {
		return err
	}
	if !online {
		return &outcome{code: exitOffline}
	}
	return nil
}

func cleanList(ids []string) string {
	all := make([]string, len(ids))
	for i, id := range ids {
		all[i] = clean(id)
	}
	return strings.Join(all, ", ")
}

type presenceCmd struct {
	Room     string `xor:"what" required:"" help:"Watch who enters and leaves a room."`
	User     string `xor:"what" required:"" help:"Watch where a user is."`
	Position string `help:"Go on behind this position; -o json shows the position of each message."`
	apiFlags
}

// Run prints what changes, until it is interrupted. It goes on at another instance when one stops.
func (c *presenceCmd) Run(ctx context.Context, t *terminal) error {
	conn, _, done, err := c.connect()
	if err != nil {
		return err
	}
	defer done()
	for position, came := c.Position, false; ; {
		stream, err := pubsub.NewPresenceServiceClient(conn).WatchPresence(ctx, &pubsub.WatchPresenceRequest{RoomId: c.Room, UserId: c.User, Position: position})
		for err == nil {
			var m *pubsub.WatchPresenceResponse
			if m, err = stream.Recv(); err == nil {
				if m.GetPosition() != "" {
					position = m.GetPosition()
				}
				came = true
				if text := presenceText(t, m); text != "" || t.structured() { // the last part of a snapshot may be empty
					err = t.tell(m, text)
				}
			}
		}
		s, answered := status.FromError(err)
		switch {
		case ctx.Err() != nil, s.Code() == codes.Canceled:
			return nil
		case errors.Is(err, io.EOF):
			return errors.New("the watch ended")
		case !answered:
			return err
		case !came || s.Code() != codes.Unavailable:
			return presenceFailure(c.Address, err)
		}
		if !pause.For(ctx, time.Second) {
			return nil
		}
	}
}

// presenceText is a message of a watch for people.
func presenceText(t *terminal, m *pubsub.WatchPresenceResponse) string {
	var b strings.Builder
	at := t.paint(grey, time.Now().Format(time.TimeOnly))
	line := func(word string, e *pubsub.PresenceEntry) {
		fmt.Fprintf(&b, "%s %s %s", at, word, clean(e.GetUserId()))
		if e.GetRoomId() != "" {
			b.WriteString(" in " + clean(e.GetRoomId()))
		}
		if len(e.GetNodeIds()) > 0 {
			b.WriteString(" on " + cleanList(e.GetNodeIds()))
		}
		b.WriteByte('\n')
	}
	if snapshot := m.GetSnapshot(); snapshot != nil {
		if snapshot.GetFirst() {
			fmt.Fprintf(&b, "%s all there is (%s):\n", at, strings.ToLower(strings.TrimPrefix(snapshot.GetReason().String(), "SNAPSHOT_")))
		}
		for _, e := range snapshot.GetEntries() {
			line("is here  ", e)
		}
	}
	for _, c := range m.GetChanges().GetChanges() {
		line(strings.ToLower(c.GetKind().String()), c.GetEntry())
	}
	return b.String()
}

// presenceFailure is an error of a call about presence in a line. Such calls may all be repeated.
func presenceFailure(address string, err error) error {
	s := status.Convert(err)
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return fmt.Errorf("%s: %s [%s]", words(s.Code()), clean(s.Message()), clean(info.GetReason()))
		}
	}
	if s.Code() == codes.Unimplemented {
		return fmt.Errorf("what answers at %s tells nobody who is connected: %s", clean(address), clean(s.Message()))
	}
	return fmt.Errorf("%s from %s: %s", words(s.Code()), clean(address), clean(s.Message()))
}
