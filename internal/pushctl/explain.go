package pushctl

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	pubsub "github.com/push-manager/push-manager/proto"
)

type explainCmd struct {
	Room      explainRoomCmd      `cmd:"" help:"A push to the members of a room."`
	Rooms     explainRoomsCmd     `cmd:"" help:"A push to the members of several rooms."`
	User      explainUserCmd      `cmd:"" help:"A push to a user."`
	Users     explainUsersCmd     `cmd:"" help:"A push to several users."`
	Broadcast explainBroadcastCmd `cmd:"" help:"A push to everybody."`
}

// explaining are the flags of each of them, beside those of the push. The message counts for its size, the options for the priority.
type explaining struct {
	Refresh bool  `help:"Ask the Controller, though the route is cached."`
	Sample  int32 `default:"10" help:"How many ids each list shows, up to 1000."`
}

type explainRoomCmd struct {
	roomCmd
	explaining
}

type explainRoomsCmd struct {
	roomsCmd
	explaining
}

type explainUserCmd struct {
	userCmd
	explaining
}

type explainUsersCmd struct {
	usersCmd
	explaining
}

type explainBroadcastCmd struct {
	broadcastCmd
	explaining
}

// Run explains a push to several rooms.
func (c *explainRoomsCmd) Run(ctx context.Context, t *terminal) error {
	return c.explain(ctx, t, &c.messageFlags, c.Text, "rooms "+strconv.Quote(c.Rooms), func(r *pubsub.ExplainRequest, m *pubsub.MessageContent, o *pubsub.PushOptions) {
		r.Push = &pubsub.ExplainRequest_ToRooms{ToRooms: c.request(m, o)}
	})
}

// Run explains a push to a room.
func (c *explainRoomCmd) Run(ctx context.Context, t *terminal) error {
	return c.explain(ctx, t, &c.messageFlags, c.Text, "room "+strconv.Quote(c.Room), func(r *pubsub.ExplainRequest, m *pubsub.MessageContent, o *pubsub.PushOptions) {
		r.Push = &pubsub.ExplainRequest_ToRoom{ToRoom: c.request(m, o)}
	})
}

// Run explains a push to a user.
func (c *explainUserCmd) Run(ctx context.Context, t *terminal) error {
	return c.explain(ctx, t, &c.messageFlags, c.Text, "user "+strconv.Quote(c.User), func(r *pubsub.ExplainRequest, m *pubsub.MessageContent, o *pubsub.PushOptions) {
		r.Push = &pubsub.ExplainRequest_ToUser{ToUser: c.request(m, o)}
	})
}

// Run explains a push to several users.
func (c *explainUsersCmd) Run(ctx context.Context, t *terminal) error {
	return c.explain(ctx, t, &c.messageFlags, c.Text, "users "+strconv.Quote(c.Users), func(r *pubsub.ExplainRequest, m *pubsub.MessageContent, o *pubsub.PushOptions) {
		r.Push = &pubsub.ExplainRequest_ToUsers{ToUsers: c.request(m, o)}
	})
}

// Run explains a broadcast.
func (c *explainBroadcastCmd) Run(ctx context.Context, t *terminal) error {
	return c.explain(ctx, t, &c.messageFlags, c.Text, "broadcast", func(r *pubsub.ExplainRequest, m *pubsub.MessageContent, o *pubsub.PushOptions) {
		r.Push = &pubsub.ExplainRequest_Broadcast{Broadcast: &pubsub.BroadcastMessageRequest{Content: m, Options: o}}
	})
}

func (e *explaining) explain(ctx context.Context, t *terminal, f *messageFlags, text, what string, set func(*pubsub.ExplainRequest, *pubsub.MessageContent, *pubsub.PushOptions)) error {
	content, err := f.content(text, t.in)
	if err != nil {
		return err
	}
	options, err := f.options()
	if err != nil {
		return err
	}
	r := &pubsub.ExplainRequest{Refresh: e.Refresh, Sample: e.Sample}
	set(r, content, options)
	var x *pubsub.ExplainResponse
	if err := f.call(ctx, f.Timeout, func(ctx context.Context, api pubsub.PushManagerServiceClient) (err error) {
		x, err = api.Explain(ctx, r)
		return err
	}); err != nil {
		return err
	}
	return t.tell(x, t.explanation(what, x))
}

// explanation is what an ExplainResponse says, for people.
func (t *terminal) explanation(what string, x *pubsub.ExplainResponse) string {
	var b strings.Builder
	broadcast := x.GetTargets() == 0 && len(x.GetDeliveries()) > 0 && x.GetDeliveries()[0].GetUsers() == 0
	switch {
	case broadcast:
		fmt.Fprintf(&b, "%s: would go to %s", what, plural(int32(len(x.GetDeliveries())), "node"))
	case !x.GetFound() && x.GetUnlocated() == 0:
		fmt.Fprintf(&b, "%s: %s", what, t.paint(yellow, "nobody is there"))
	default:
		fmt.Fprintf(&b, "%s: %s", what, plural(x.GetTargets(), "user"))
	}
	fmt.Fprintf(&b, "; %s of content; nothing was sent\n", plural(x.GetContentBytes(), "byte"))

	if r := x.GetRoute(); !broadcast {
		fmt.Fprintf(&b, "  route   %d from memory, %d asked of the Controller", r.GetCached(), r.GetLookedUp())
		switch age := time.Duration(r.GetAgeMs()) * time.Millisecond; {
		case r.GetChanged():
			b.WriteString(", " + t.paint(red, fmt.Sprintf("known to have changed; true %v ago", age)))
		case r.GetStale():
			b.WriteString(", " + t.paint(yellow, fmt.Sprintf("not confirmed; true %v ago", age)))
		case r.GetWatched():
			b.WriteString(", the Controller tells of changes")
		default:
			fmt.Fprintf(&b, ", true %v ago", age)
		}
		b.WriteString("\n")
		if r.GetError() != "" {
			b.WriteString("          " + t.paint(red, clean(r.GetError())) + "\n")
		}
	}
	if filter := x.GetFilter(); len(filter) > 0 {
		b.WriteString("  filter  " + clean(matchesText(filter)) + ": nodes decide, whom it leaves out is counted here\n")
	}
	c := x.GetCaller()
	b.WriteString("  caller  ")
	if c.GetName() != "" {
		b.WriteString(clean(c.GetName()) + ", ")
	}
	if c.GetTenant() != "" {
		b.WriteString("tenant " + clean(c.GetTenant()) + ", ")
	}
	b.WriteString("priority " + strings.ToLower(strings.TrimPrefix(c.GetPriority().String(), "PRIORITY_")))
	if c.GetRule() != "" {
		b.WriteString(", policy " + clean(c.GetRule()))
	}
	if c.RateLeft != nil {
		fmt.Fprintf(&b, ", %d left of the rate", c.GetRateLeft())
	}
	if c.QuotaLeft != nil {
		fmt.Fprintf(&b, ", %d left of the day here", c.GetQuotaLeft())
	}
	b.WriteString("\n")

	if len(x.GetDeliveries()) > 0 {
		table := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
		_, _ = fmt.Fprintln(table, "  NODE\tUSERS\tVERDICT\tLINK\tQUEUED\tUNACKED\t")
		for _, d := range x.GetDeliveries() {
			users := "all"
			if d.GetUsers() > 0 {
				users = strconv.Itoa(int(d.GetUsers()))
			}
			_, _ = fmt.Fprintf(table, "  %s\t%s\t%s\t%s\t%s\t%s\t%s\n", clean(d.GetNodeId()), users, clean(d.GetVerdict()), clean(d.GetLinkState()),
				waiting(d.GetQueued(), 0, d.GetQueuedMs()), waiting(d.GetUnacked(), d.GetWindow(), d.GetUnackedMs()), someOf(d.GetUserIds(), d.GetUsers()))
		}
		_ = table.Flush() // into memory
	}
	for _, list := range []struct {
		name  string
		count int32
		ids   []string
	}{
		{"offline", x.GetOffline(), x.GetOfflineUserIds()},
		{"unlocated", x.GetUnlocated(), x.GetUnlocatedUserIds()},
		{"excluded", x.GetExcluded(), x.GetExcludedUserIds()},
	} {
		if list.count > 0 {
			fmt.Fprintf(&b, "  %s: %d  %s\n", list.name, list.count, someOf(list.ids, list.count))
		}
	}
	return strings.TrimRight(b.String(), "\n")
}

// waiting is how much waits, of how much there may be, and for how long.
func waiting(n, of int32, ms int64) string {
	text := strconv.Itoa(int(n))
	if of > 0 {
		text += fmt.Sprintf(" of %d", of)
	}
	if n > 0 {
		text += fmt.Sprintf(", %v", time.Duration(ms)*time.Millisecond)
	}
	return text
}

// someOf lists the ids that were told of so many.
func someOf(ids []string, of int32) string {
	list := make([]string, len(ids))
	for i, id := range ids {
		list[i] = clean(id)
	}
	text := strings.Join(list, ", ")
	if rest := int(of) - len(ids); rest > 0 && len(ids) > 0 {
		text += fmt.Sprintf(" and %d more", rest)
	}
	return text
}
