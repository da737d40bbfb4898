package conformance

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/s2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pubsub "github.com/push-manager/push-manager/proto"
)

// plain is a Connect-Node written after proto/README.md and nothing else, as an author
// in another language would. fault is what it does wrong.
type plain struct {
	pubsub.UnimplementedConnectNodeServiceServer

	fault     string
	unaryOnly bool
	bare      bool // Deliver without audiences, codecs and unary methods

	mu sync.Mutex
	// Guarded by mu.
	users    map[string]func(string) // connected, and how their clients get texts
	streams  map[string]*plainStream // by instance and shard, and by themselves
	draining bool
	boots    int
	calls    int
	lasting  plainLasting
}

func newPlain(fault string, users ...string) *plain {
	p := &plain{fault: fault, users: make(map[string]func(string)), streams: make(map[string]*plainStream)}
	p.lasting = plainLasting{had: map[string]uint32{}, keys: map[string]bool{}, asked: map[uint64]*plainGate{}, closed: map[string]*plainGate{}}
	for _, user := range users {
		p.users[user] = func(string) {}
	}
	return p
}

// client connects a user, as Config.Client.
func (p *plain) client(ctx context.Context, user string, got func(string)) error {
	p.mu.Lock()
	p.users[user] = got
	p.mu.Unlock()
	<-ctx.Done()
	return ctx.Err()
}

// hand gives a message to a user who is here.
func (p *plain) hand(user string, c *pubsub.MessageContent) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	got, here := p.users[user]
	if here && p.fault != "shows nothing" {
		got(string(c.GetData()))
	}
	if here && p.fault == "hands over twice" {
		got(string(c.GetData()))
	}
	return here
}

func (p *plain) online() uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fault == "online_users is 0" {
		return 0
	}
	return uint32(len(p.users))
}

func (p *plain) everybody(c *pubsub.MessageContent) uint32 {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, got := range p.users {
		if p.fault != "everybody is nobody" {
			got(string(c.GetData()))
		}
	}
	return uint32(len(p.users))
}

// plainStream is one Deliver stream.
type plainStream struct {
	p        *plain
	call     grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]
	codec    pubsub.Codec
	next     uint64
	audience map[uint32]*plainAudience
	key      string
	attempt  uint64
	late     string // held back

	// Of the delivery, and of the frame, in hand.
	dups, waits uint32
	filtered    uint32
	receipts    []*pubsub.Receipt
	taken       []*pubsub.ReplayTaken

	mu sync.Mutex // guards what follows, and Send
	// Guarded by mu.
	over    bool
	pending []*pubsub.DeliverResponse
	work    chan struct{}
}

type plainAudience struct {
	rooms   []string
	version uint32
	members map[string]bool
}

func broken(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}

func (p *plain) Deliver(call grpc.BidiStreamingServer[pubsub.DeliverRequest, pubsub.DeliverResponse]) error {
	if p.unaryOnly {
		return status.Error(codes.Unimplemented, "no Deliver")
	}
	st := &plainStream{p: p, call: call, next: 1, audience: make(map[uint32]*plainAudience), work: make(chan struct{}, 1)}
	if p.fault == "one state for all streams" {
		p.mu.Lock()
		if shared := p.streams["shared"]; shared != nil {
			st.audience = shared.audience
		}
		p.streams["shared"] = st
		p.mu.Unlock()
	}
	f, err := call.Recv()
	if err != nil {
		return err
	}
	h := f.GetHello()
	alone := proto.Equal(f, &pubsub.DeliverRequest{Hello: h})
	if p.fault == "unknown fields are an error" && len(h.ProtoReflect().GetUnknown()) > 0 {
		return broken("what is this?")
	}
	if (h == nil || !alone && len(f.ProtoReflect().GetUnknown()) == 0) && p.fault != "any first frame will do" {
		return broken("hello first, and alone")
	}
	if v := h.GetProtocolVersion(); (v < 1 || v > 2) && p.fault != "any version will do" && p.fault != "any first frame will do" {
		return broken("version %d", v)
	}
	p.mu.Lock()
	if p.draining && p.fault != "does not leave" {
		p.mu.Unlock()
		return status.Error(codes.Unavailable, "leaving")
	}
	instance, attempt := h.GetInstanceId(), h.GetAttempt()
	st.key, st.attempt = fmt.Sprintf("%s/%d", instance, h.GetShard()), attempt
	if p.fault == "streams are known by their manager" {
		st.key = fmt.Sprintf("manager/%d", h.GetShard())
	}
	if old := p.streams[st.key]; old != nil && (instance != "" || p.fault == "streams are known by their manager") && p.fault != "streams live side by side" {
		if attempt < old.attempt && p.fault != "late hellos supersede" {
			p.mu.Unlock()
			return status.Error(codes.Aborted, "late")
		}
		old.mu.Lock()
		old.over = true
		old.mu.Unlock()
	}
	if instance != "" {
		p.streams[st.key] = st
	}
	p.streams[fmt.Sprintf("%p", st)] = st
	p.boots++
	boot := "boot"
	if p.fault == "a boot id for each stream" {
		boot = fmt.Sprint("boot-", p.boots)
	}
	p.mu.Unlock()
	reply := &pubsub.HelloReply{ProtocolVersion: 1, NodeId: "plain", BootId: boot, MaxAudienceMembers: 1 << 20, MaxUnacked: 20_000, OnlineUsers: p.online(), Features: p.features()}
	if p.bare {
		reply.MaxAudienceMembers, reply.MaxUnacked = 0, 0
	}
	if p.fault == "another id" {
		reply.NodeId = "somebody-else"
	}
	for _, c := range h.GetCodecs() {
		if c == pubsub.Codec_S2 && !p.bare {
			reply.Codec, st.codec = c, c
		}
	}
	if p.fault == "a codec unasked" {
		reply.Codec = pubsub.Codec_ZSTD
	}
	if p.fault == "hello takes long" {
		time.Sleep(1500 * time.Millisecond)
	}
	if err := call.Send(&pubsub.DeliverResponse{Hello: reply}); err != nil {
		return err
	}
	var sender sync.WaitGroup
	stop := make(chan struct{})
	sender.Go(func() { st.sendLoop(stop) })
	st.askAll(h)
	err = st.readLoop()
	st.endAll()
	close(stop)
	sender.Wait()
	return err
}

// send leaves a frame to the sender, which takes all there is.
func (st *plainStream) send(f *pubsub.DeliverResponse) {
	if st.p.fault == "reads after it has written" {
		_ = st.call.Send(f)
		return
	}
	st.mu.Lock()
	st.pending = append(st.pending, f)
	st.mu.Unlock()
	select {
	case st.work <- struct{}{}:
	default:
	}
}

func (st *plainStream) sendLoop(stop chan struct{}) {
	for {
		st.mu.Lock()
		frames := st.pending
		st.pending = nil
		st.mu.Unlock()
		for _, f := range frames {
			if st.call.Send(f) != nil {
				return
			}
		}
		if len(frames) > 0 {
			continue
		}
		select {
		case <-st.work:
		case <-stop:
			st.mu.Lock()
			left := len(st.pending)
			st.mu.Unlock()
			if left == 0 {
				return
			}
		}
	}
}

func (st *plainStream) readLoop() error {
	for {
		f, err := st.call.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if f.Compressed != nil || f.RawBytes != 0 {
			if f, err = st.unpack(f); err != nil {
				return err
			}
		}
		if f.Hello != nil && st.p.fault != "any first frame will do" {
			return broken("a second hello")
		}
		if len(f.Deliveries) > 0 && f.FirstSeq != st.next {
			if st.p.fault != "a gap is accepted" {
				return broken("first_seq %d instead of %d", f.FirstSeq, st.next)
			}
			st.next = f.FirstSeq
		}
		out, size := &pubsub.DeliverResponse{}, 0
		for _, d := range f.Deliveries {
			delivered, miss, err := st.deliver(d)
			if err != nil {
				if st.p.fault != "what was handed over is lost" {
					st.send(out)
				}
				return err
			}
			st.ack(out, delivered, miss)
			if size += proto.Size(miss); size > 500<<10 && st.p.fault != "frames of any size" {
				st.send(out)
				out, size = &pubsub.DeliverResponse{}, 0
			}
		}
		for _, id := range f.ForgetAudiences {
			if st.p.fault != "nothing is forgotten" {
				delete(st.audience, id)
			}
		}
		if f.Heartbeat != 0 && st.p.fault != "heartbeats are not answered" {
			out.Heartbeat, out.OnlineUsers = f.Heartbeat, st.p.online()
			if st.p.fault == "heartbeats are counted" {
				out.Heartbeat = st.next
			}
		}
		if proto.Size(out) > 0 {
			st.send(out)
		}
		st.rest(f)
		if err := st.disconnect(f); err != nil {
			return err
		}
		if f.Drain {
			switch st.p.fault {
			case "drain is an error":
				return status.Error(codes.Unavailable, "you go")
			case "drain is ignored":
			default:
				return nil
			}
		}
	}
}

// ack adds the ack of the next delivery to a frame.
func (st *plainStream) ack(out *pubsub.DeliverResponse, delivered uint32, miss *pubsub.Miss) {
	seq := st.next
	st.next++
	if st.p.fault == "acks of absent users are left out" && delivered == 0 {
		return
	}
	r := &pubsub.AckRange{First: seq, Delivered: []uint32{delivered}}
	if st.dups > 0 {
		r.Duplicates = []uint32{st.dups}
	}
	if st.waits > 0 {
		r.Pending = []uint32{st.waits}
		st.receipts = append(st.receipts, &pubsub.Receipt{Seq: seq, Acked: st.waits, Final: st.p.fault != "no receipt is final"})
	}
	if st.filtered > 0 {
		r.Filtered = []uint32{st.filtered}
	}
	st.dups, st.waits, st.filtered = 0, 0, 0
	out.Acks = append(out.Acks, r)
	if st.p.fault == "acks come twice" && seq%100 == 0 {
		st.send(&pubsub.DeliverResponse{Acks: []*pubsub.AckRange{{First: seq, Delivered: []uint32{delivered}}}})
	}
	if miss == nil {
		return
	}
	miss.Seq = seq
	switch {
	case st.p.fault == "not_here in another frame":
		st.send(&pubsub.DeliverResponse{Misses: []*pubsub.Miss{miss}})
		return
	case st.p.fault == "absent users are not named":
		return
	case st.p.fault == "absent users count as delivered":
		out.Acks[len(out.Acks)-1].Delivered[0] += uint32(len(miss.NotHere))
		return
	case proto.Size(miss) > 900<<10 && delivered == 0 && st.p.fault != "frames of any size":
		miss = &pubsub.Miss{Seq: seq, Refused: true}
	}
	out.Misses = append(out.Misses, miss)
}

func (st *plainStream) unpack(f *pubsub.DeliverRequest) (*pubsub.DeliverRequest, error) {
	if st.p.fault == "lengths are not checked" {
		if b, err := s2.Decode(nil, f.Compressed); err == nil {
			in := new(pubsub.DeliverRequest)
			if proto.Unmarshal(b, in) == nil {
				return in, nil
			}
		}
		return f, nil
	}
	if st.codec != pubsub.Codec_S2 || !proto.Equal(f, &pubsub.DeliverRequest{Compressed: f.Compressed, RawBytes: f.RawBytes}) {
		return nil, broken("compressed")
	}
	n, err := s2.DecodedLen(f.Compressed)
	if err != nil || n == 0 || n != int(f.RawBytes) || n > 16<<20 {
		return nil, broken("a length of %d", n)
	}
	b, err := s2.Decode(nil, f.Compressed)
	in := new(pubsub.DeliverRequest)
	if err != nil || proto.Unmarshal(b, in) != nil || in.Hello != nil || in.Compressed != nil || in.RawBytes != 0 {
		return nil, broken("no frame in it")
	}
	return in, nil
}

func (st *plainStream) deliver(d *pubsub.Delivery) (delivered uint32, miss *pubsub.Miss, err error) {
	if st.p.fault == "few acks at a time" && st.next > 5000 {
		return 0, nil, status.Error(codes.ResourceExhausted, "too many")
	}
	targets := 0
	for _, is := range []bool{len(d.UserIds) > 0, d.Audience != nil, d.Everybody, d.Scope != ""} {
		if is {
			targets++
		}
	}
	users := d.UserIds
	everybody := d.Everybody
	switch {
	case targets == 0 && st.p.fault == "an empty list is everybody":
		everybody = true
	case targets > 1 && st.p.fault == "the first target counts":
		d.Audience, everybody = nil, false
	case targets != 1:
		return 0, nil, broken("%d targets", targets)
	}
	if st.p.fault != "room_ids are not checked" && len(d.RoomIds) > 0 && (len(d.UserIds) == 0 || d.RoomId != "") {
		return 0, nil, broken("room_ids where they do not belong")
	}
	rooms := d.RoomIds
	if d.Audience != nil {
		if users, err = st.members(d); err != nil {
			return 0, nil, err
		}
		rooms = st.audience[d.Audience.Id].rooms
	}
	st.mu.Lock()
	over := st.over
	st.mu.Unlock()
	if over {
		return 0, nil, status.Error(codes.Aborted, "superseded")
	}
	st.p.mu.Lock()
	draining := st.p.draining && st.p.fault != "delivers while it leaves"
	st.p.mu.Unlock()
	if draining {
		return 0, &pubsub.Miss{Refused: true, Reason: "not any more"}, nil
	}
	passes, err := st.passes(d)
	if err != nil {
		return 0, nil, err
	}
	if d.Scope != "" && st.p.fault != "a scope is everybody" { // its users are of no tenant
		return 0, nil, nil
	}
	if everybody && !passes {
		st.filtered = st.p.online()
		return 0, nil, nil
	}
	if everybody || d.Scope != "" {
		return st.p.everybody(d.Content), nil, nil
	}
	miss = &pubsub.Miss{}
	if st.p.fault == "the last comes first" && len(users) == 1 && st.next > 1 {
		// Held back until the next one has gone past.
		if st.late == "" {
			st.late = string(d.Content.GetData())
			return 1, nil, nil
		}
		late := &pubsub.MessageContent{Data: []byte(st.late)}
		st.late = ""
		defer st.p.hand(users[0], late)
	}
	for _, user := range users {
		in := len(rooms) == 0 || slices.Contains(rooms, "conformance") // in which all are
		if !in && st.p.fault != "room_ids are ignored" {
			miss.NotHere = append(miss.NotHere, user)
			continue
		}
		if !passes {
			st.leaveOut(user, d, miss)
			continue
		}
		if st.p.fault == "shows it for each of the rooms" {
			for range len(rooms) - 1 {
				st.p.hand(user, d.Content)
			}
		}
		switch here, reason := st.handLasting(user, d); {
		case here:
			delivered++
		case reason == "reused":
			miss.Reused = append(miss.Reused, user)
		case reason != "":
			miss.Failed, miss.Reason = append(miss.Failed, user), reason
		default:
			miss.NotHere = append(miss.NotHere, user)
		}
	}
	switch {
	case len(miss.NotHere)+len(miss.Failed)+len(miss.Reused)+len(miss.Filtered) == 0:
		miss = nil
	case st.p.fault == "one of many is named" && len(miss.NotHere) > 0:
		miss.NotHere = miss.NotHere[:1]
	}
	if st.p.fault == "a delivery is for one" {
		delivered = min(delivered, 1)
	}
	return delivered, miss, nil
}

// passes tells whether a filter lets the clients of plain pass, who have no attributes.
func (st *plainStream) passes(d *pubsub.Delivery) (bool, error) {
	if len(d.Filter) == 0 || st.p.fault == "filters are ignored" {
		return true, nil
	}
	wrong := len(d.Filter) > 8 || d.Replay != nil || d.Log != nil
	passes := true
	for _, m := range d.Filter {
		wrong = wrong || m.Key == "" || len(m.Values) == 0
		passes = passes && m.Not
	}
	if wrong && st.p.fault != "filters are not checked" {
		return false, broken("filter")
	}
	return passes, nil
}

// leaveOut says of a user whom a filter leaves out what there is to say.
func (st *plainStream) leaveOut(user string, d *pubsub.Delivery, miss *pubsub.Miss) {
	st.p.mu.Lock()
	_, here := st.p.users[user]
	st.p.mu.Unlock()
	if !here || st.p.fault == "who is left out is not here" {
		miss.NotHere = append(miss.NotHere, user)
		return
	}
	st.filtered++
	if d.NameFiltered || st.p.fault == "who is left out is named unasked" {
		miss.Filtered = append(miss.Filtered, user)
	}
}

func (st *plainStream) members(d *pubsub.Delivery) ([]string, error) {
	a := d.Audience
	au := st.audience[a.Id]
	lenient := st.p.fault == "audiences are not checked"
	if au == nil {
		if a.RoomId != "" && len(a.RoomIds) > 0 && st.p.fault != "room_ids are not checked" {
			return nil, broken("audience %d has both", a.Id)
		}
		if a.Version != 1 && !lenient || len(a.Join) == 0 && a.RoomId == "" && !lenient {
			return nil, broken("audience %d is not known", a.Id)
		}
		au = &plainAudience{members: make(map[string]bool), rooms: a.RoomIds}
		st.audience[a.Id] = au
	} else if !lenient && (a.Version == au.version && len(a.Join)+len(a.Leave) > 0 || a.Version != au.version && a.Version != au.version+1) {
		return nil, broken("audience %d has version %d, not %d", a.Id, au.version, a.Version)
	}
	au.version = a.Version
	for _, user := range a.Leave {
		if !au.members[user] && !lenient {
			return nil, broken("%q leaves", user)
		}
		if st.p.fault != "nobody ever leaves" {
			delete(au.members, user)
		}
	}
	for _, user := range a.Join {
		if au.members[user] && !lenient {
			return nil, broken("%q joins", user)
		}
		au.members[user] = true
	}
	except := make(map[string]bool)
	for _, user := range d.ExceptUserIds {
		if !au.members[user] && !lenient {
			return nil, broken("%q is excepted", user)
		}
		except[user] = st.p.fault != "nobody is excepted"
	}
	var users []string
	for user := range au.members {
		if !except[user] {
			users = append(users, user)
		}
	}
	return users, nil
}

// ListUsers names those who are here.
func (p *plain) ListUsers(_ context.Context, r *pubsub.ListUsersRequest) (*pubsub.ListUsersResponse, error) {
	turn := func(user string) uint64 {
		sum := sha256.Sum256([]byte(user))
		return binary.BigEndian.Uint64(sum[:8])
	}
	var users []string
	p.mu.Lock()
	for user := range p.users {
		if turn(user) >= r.FirstTurn && (strings.HasPrefix(user, r.Scope) || p.fault == "tenants see each other's users") {
			users = append(users, user)
		}
	}
	p.mu.Unlock()
	slices.SortFunc(users, func(a, b string) int { return cmp.Compare(turn(a), turn(b)) })
	reply := &pubsub.ListUsersResponse{LastTurn: math.MaxUint64}
	n := int(r.Limit)
	switch p.fault {
	case "users are listed as they come":
		slices.Reverse(users)
	case "users are listed twice":
		users = slices.Concat(users, users[max(len(users)-1, 0):])
	case "who has left is listed":
		users = append(users, "conformance-absent")
		slices.SortFunc(users, func(a, b string) int { return cmp.Compare(turn(a), turn(b)) })
	case "a list is not whole":
		users = users[min(1, len(users)):]
	case "lists have no limit":
		n = len(users)
	}
	for n > 0 && n < len(users) && turn(users[n]) == turn(users[n-1]) {
		n++
	}
	if n < len(users) {
		users = users[:n]
		if reply.LastTurn = turn(users[n-1]); p.fault == "a list ends where it is cut" {
			reply.LastTurn = math.MaxUint64
		}
	}
	reply.UserIds = users
	return reply, nil
}

// ListConnections says that each user has one connection, and nothing but its id.
func (p *plain) ListConnections(_ context.Context, r *pubsub.ListConnectionsRequest) (*pubsub.ListConnectionsResponse, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	reply := &pubsub.ListConnectionsResponse{}
	for _, user := range r.UserIds {
		u, id := &pubsub.UserConnections{}, "of "+user
		if p.fault == "connections share an id" {
			id = "one"
		}
		if _, here := p.users[user]; here && p.fault != "connections are nobody's" {
			u.Connections = []*pubsub.Connection{{ConnectionId: id}}
		}
		reply.Users = append(reply.Users, u)
	}
	if p.fault == "connections come in any order" {
		slices.Reverse(reply.Users)
	}
	return reply, nil
}

func (p *plain) unary(c *pubsub.MessageContent) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.bare:
		return status.Error(codes.Unimplemented, "no unary methods")
	case p.draining && p.fault != "delivers while it leaves" && p.fault != "does not leave":
		if p.fault == "leaves in doubt" {
			return status.Error(codes.Unavailable, "leaving")
		}
		return status.Error(codes.FailedPrecondition, "leaving")
	}
	return nil
}

func (p *plain) PushMessage(_ context.Context, r *pubsub.PushMessageRequest) (*pubsub.PushMessageResponse, error) {
	if err := p.unary(r.Content); err != nil {
		return nil, err
	}
	if r.UserId == "" && p.fault != "an empty list is everybody" {
		return nil, status.Error(codes.InvalidArgument, "user_id")
	}
	if p.fault == "the last comes first" {
		p.mu.Lock()
		got, here := p.users[r.UserId]
		p.calls++
		pause := time.Duration(p.calls%2) * 20 * time.Millisecond
		p.mu.Unlock()
		if here {
			time.AfterFunc(pause, func() { got(string(r.Content.GetData())) })
		}
		return &pubsub.PushMessageResponse{Success: here}, nil
	}
	here := p.hand(r.UserId, r.Content)
	if !here && p.fault == "absent users are an error" {
		return nil, status.Error(codes.NotFound, "not here")
	}
	return &pubsub.PushMessageResponse{Success: here}, nil
}

func (p *plain) PushMessageBatch(_ context.Context, r *pubsub.PushMessageBatchRequest) (*pubsub.PushMessageBatchResponse, error) {
	if err := p.unary(r.Content); err != nil {
		return nil, err
	}
	if len(r.UserIds) == 0 {
		switch p.fault {
		case "an empty list is everybody":
			p.everybody(r.Content)
			return &pubsub.PushMessageBatchResponse{Success: true}, nil
		case "nobody is an unknown error":
			return nil, status.Error(codes.Internal, "nobody")
		}
		return nil, status.Error(codes.InvalidArgument, "user_ids")
	}
	reply := &pubsub.PushMessageBatchResponse{}
	for _, user := range r.UserIds {
		switch {
		case p.hand(user, r.Content):
			reply.DeliveredCount++
		case p.fault != "a batch names nobody":
			reply.FailedUserIds = append(reply.FailedUserIds, user)
		}
	}
	reply.Success = len(reply.FailedUserIds) == 0
	return reply, nil
}

func (p *plain) Broadcast(_ context.Context, r *pubsub.BroadcastRequest) (*pubsub.BroadcastResponse, error) {
	if err := p.unary(r.Content); err != nil {
		return nil, err
	}
	return &pubsub.BroadcastResponse{Success: true, DeliveredCount: int32(p.everybody(r.Content))}, nil
}

// drain is Config.Drain.
func (p *plain) drain(context.Context) error {
	p.mu.Lock()
	p.draining = true
	streams := make([]*plainStream, 0, len(p.streams))
	for _, st := range p.streams {
		streams = append(streams, st)
	}
	p.mu.Unlock()
	for _, st := range streams {
		if p.fault != "leaves without a word" && st.call != nil && st.call.Context().Err() == nil {
			st.send(&pubsub.DeliverResponse{Drain: true})
		}
	}
	return nil
}

// serve serves a node on a port of its own.
func serve(t *testing.T, strict bool, attach func(grpc.ServiceRegistrar), options ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if !strict {
		options = append(options, grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Millisecond, PermitWithoutStream: true}))
	}
	gs := grpc.NewServer(append(options, grpc.WaitForHandlers(true))...)
	attach(gs)
	done := make(chan error, 1)
	go func() { done <- gs.Serve(l) }()
	t.Cleanup(func() {
		gs.Stop()
		<-done
	})
	return l.Addr().String()
}
