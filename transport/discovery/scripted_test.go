package discovery

import (
	"context"
	"errors"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
	_ "unsafe" // for go:linkname

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/test/bufconn"
)

// valCtxCh is the Done of a context that never ends, below each watch of etcd's client.
// It is made when that package is loaded, outside of all bubbles, and the goroutine that
// waits on it keeps a bubble's clock from going on. TestMain makes it nil: nobody waits
// for a context without Done, which never ends either. A version of the client that has
// another name for it makes the tests of this file hang.
//
//go:linkname valCtxCh go.etcd.io/etcd/client/v3.valCtxCh
var valCtxCh chan struct{}

// scriptedEtcd is an etcd for tests in a synctest bubble: what the product asks of the
// real one, with the same meaning, behind a real gRPC server over memory. Nothing of it
// waits for anything outside of the bubble, so that five minutes pass at once.
type scriptedEtcd struct {
	etcdserverpb.UnimplementedKVServer
	etcdserverpb.UnimplementedWatchServer
	etcdserverpb.UnimplementedLeaseServer

	// Owned by the test.
	srv     *grpc.Server
	serving sync.WaitGroup

	// What the client did. Refused dials and requests that found no connection count, too.
	dials, requests tally

	mu         sync.Mutex
	lis        *bufconn.Listener // nil: refusing
	silent     bool
	leaderless bool
	conns      []*pathConn
	history    []*mvccpb.Event // the i-th made revision i+2: an empty etcd is at 1
	compacted  int64
	changed    chan struct{} // closed with each change of what a watch may tell
	leases     map[int64]*scriptedLease
	lastLease  int64
}

func startScripted(t *testing.T) *scriptedEtcd {
	t.Helper()
	e := &scriptedEtcd{changed: make(chan struct{}), leases: map[int64]*scriptedLease{}}
	e.serve()
	t.Cleanup(e.stop)
	return e
}

// serve begins to accept connections.
func (e *scriptedEtcd) serve() {
	lis := bufconn.Listen(1 << 16)
	e.srv = grpc.NewServer(
		grpc.UnaryInterceptor(func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
			if _, err := e.news(); err != nil {
				return nil, err
			}
			return handler(ctx, req)
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second}), // etcd's
	)
	etcdserverpb.RegisterKVServer(e.srv, e)
	etcdserverpb.RegisterWatchServer(e.srv, e)
	etcdserverpb.RegisterLeaseServer(e.srv, e)
	e.serving.Go(func() { _ = e.srv.Serve(lis) }) // ends with stop
	e.set(func() { e.lis = lis })
}

// stop breaks all connections and refuses new ones, like a process that is gone.
func (e *scriptedEtcd) stop() {
	e.set(func() { e.lis = nil })
	e.srv.Stop()
	e.serving.Wait()
}

// client is the product's own, but for the sockets.
func (e *scriptedEtcd) client(t *testing.T) *clientv3.Client {
	t.Helper()
	cfg := ClientConfig{Endpoints: []string{"etcd:2379"}}.withDefaults().etcd()
	cfg.DialOptions = append(cfg.DialOptions,
		grpc.WithContextDialer(e.dial),
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			e.requests.count(ctx)
			return invoke(ctx, method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			e.requests.count(ctx)
			return open(ctx, desc, cc, method, opts...)
		}),
	)
	client, err := clientv3.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() }) // an error here is only the client's own cancelled context
	return client
}

// tally counts attempts, in all and in the busiest second.
type tally struct {
	mu             sync.Mutex
	total, busiest int
	second         time.Time
	inSecond       int
}

// runaway is far beyond what any test makes in minutes.
const runaway = 20_000

// count holds attempts beyond runaway up: where they are made without a pause, the clock
// would never go on, and the test would hang instead of telling.
func (c *tally) count(ctx context.Context) {
	c.mu.Lock()
	if now := time.Now(); now.Sub(c.second) >= time.Second {
		c.second, c.inSecond = now, 0
	}
	c.total++
	c.inSecond++
	c.busiest = max(c.busiest, c.inSecond)
	spins := c.total > runaway
	c.mu.Unlock()
	if spins {
		<-ctx.Done()
	}
}

// take returns what was counted and begins anew.
func (c *tally) take() (total, busiest int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	total, busiest = c.total, c.busiest
	c.total, c.busiest, c.inSecond = 0, 0, 0
	return total, busiest
}

// The ways to be out of reach, besides stop.

// fallSilent leaves all connections as they are and accepts new ones, and answers nothing
// on them, like a host behind a balancer that has lost its way. What was sent is gone for
// good: only connections made after speak work again.
func (e *scriptedEtcd) fallSilent() {
	e.set(func() {
		e.silent = true
		for _, conn := range e.conns {
			conn.mute.Store(true)
		}
		e.conns = nil
	})
}

func (e *scriptedEtcd) speak() { e.set(func() { e.silent = false }) }

// loseLeader refuses each request, like a member that is cut off from the others.
func (e *scriptedEtcd) loseLeader() { e.set(func() { e.leaderless = true }) }
func (e *scriptedEtcd) findLeader() { e.set(func() { e.leaderless = false }) }

// compact forgets all history but the present.
func (e *scriptedEtcd) compact() { e.set(func() { e.compacted = e.revLocked() }) }

func (e *scriptedEtcd) set(change func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change()
	e.changedLocked()
}

func (e *scriptedEtcd) changedLocked() {
	close(e.changed)
	e.changed = make(chan struct{})
}

// news is closed with the next change. Without a leader there is an error instead.
func (e *scriptedEtcd) news() (<-chan struct{}, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.leaderless {
		return nil, rpctypes.ErrGRPCNoLeader
	}
	return e.changed, nil
}

func (e *scriptedEtcd) dial(ctx context.Context, _ string) (net.Conn, error) {
	e.dials.count(ctx)
	e.mu.Lock()
	lis := e.lis
	e.mu.Unlock()
	if lis == nil {
		return nil, syscall.ECONNREFUSED
	}
	raw, err := lis.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	conn := &pathConn{Conn: raw}
	conn.mute.Store(e.silent)
	e.conns = append(e.conns, conn)
	return conn, nil
}

// pathConn is the client's end of a connection. Once mute it loses what passes, both ways.
type pathConn struct {
	net.Conn
	mute atomic.Bool
}

func (c *pathConn) Read(b []byte) (int, error) {
	for {
		n, err := c.Conn.Read(b)
		if err != nil || !c.mute.Load() {
			return n, err
		}
	}
}

func (c *pathConn) Write(b []byte) (int, error) {
	if c.mute.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// The store.

func (e *scriptedEtcd) revLocked() int64 { return int64(len(e.history)) + 1 }

func (e *scriptedEtcd) headerLocked() *etcdserverpb.ResponseHeader {
	return &etcdserverpb.ResponseHeader{ClusterId: 1, MemberId: 1, RaftTerm: 2, Revision: e.revLocked()}
}

// atLocked is what the keys from key up to end were at a revision, ordered by key.
func (e *scriptedEtcd) atLocked(rev int64, key, end string) []*mvccpb.KeyValue {
	keys := map[string]*mvccpb.KeyValue{}
	for _, ev := range e.history[:rev-1] {
		if !inRange(string(ev.Kv.Key), key, end) {
			continue
		}
		if keys[string(ev.Kv.Key)] = ev.Kv; ev.Type == mvccpb.Event_DELETE {
			delete(keys, string(ev.Kv.Key))
		}
	}
	kvs := make([]*mvccpb.KeyValue, 0, len(keys))
	for _, k := range slices.Sorted(maps.Keys(keys)) {
		kvs = append(kvs, keys[k])
	}
	return kvs
}

// inRange tells whether key is from, or lies between it and end.
func inRange(key, from, end string) bool {
	return key == from || (key > from && (key < end || end == "\x00"))
}

// present is a key as it is now, nil when there is none.
func (e *scriptedEtcd) present(key string) *mvccpb.KeyValue {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.presentLocked(key)
}

func (e *scriptedEtcd) presentLocked(key string) *mvccpb.KeyValue {
	for _, kv := range e.atLocked(e.revLocked(), key, "") {
		return kv
	}
	return nil
}

func (e *scriptedEtcd) put(key, value string, lease int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.putLocked(key, value, lease)
}

func (e *scriptedEtcd) putLocked(key, value string, lease int64) {
	kv := &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), Lease: lease, ModRevision: e.revLocked() + 1, Version: 1}
	kv.CreateRevision = kv.ModRevision
	if had := e.presentLocked(key); had != nil {
		kv.CreateRevision, kv.Version = had.CreateRevision, had.Version+1
	}
	e.history = append(e.history, &mvccpb.Event{Type: mvccpb.Event_PUT, Kv: kv})
	e.changedLocked()
}

func (e *scriptedEtcd) del(key string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.delLocked(key)
}

func (e *scriptedEtcd) delLocked(key string) {
	e.history = append(e.history, &mvccpb.Event{
		Type: mvccpb.Event_DELETE, Kv: &mvccpb.KeyValue{Key: []byte(key), ModRevision: e.revLocked() + 1},
	})
	e.changedLocked()
}

// The services.

func (e *scriptedEtcd) Range(_ context.Context, r *etcdserverpb.RangeRequest) (*etcdserverpb.RangeResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	rev := r.GetRevision()
	switch {
	case rev <= 0:
		rev = e.revLocked()
	case rev > e.revLocked():
		return nil, rpctypes.ErrGRPCFutureRev
	case rev < e.compacted:
		return nil, rpctypes.ErrGRPCCompacted
	}
	kvs := e.atLocked(rev, string(r.GetKey()), string(r.GetRangeEnd()))
	resp := &etcdserverpb.RangeResponse{Header: e.headerLocked(), Count: int64(len(kvs))}
	if r.GetCountOnly() {
		return resp, nil
	}
	if limit := int(r.GetLimit()); limit > 0 && limit < len(kvs) {
		kvs, resp.More = kvs[:limit], true
	}
	resp.Kvs = kvs
	return resp, nil
}

func (e *scriptedEtcd) Put(_ context.Context, r *etcdserverpb.PutRequest) (*etcdserverpb.PutResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if r.GetLease() != 0 && e.leases[r.GetLease()] == nil {
		return nil, rpctypes.ErrGRPCLeaseNotFound
	}
	e.putLocked(string(r.GetKey()), string(r.GetValue()), r.GetLease())
	return &etcdserverpb.PutResponse{Header: e.headerLocked()}, nil
}

// Txn knows the one that a Registration makes: put, if the key is as it was read.
func (e *scriptedEtcd) Txn(ctx context.Context, r *etcdserverpb.TxnRequest) (*etcdserverpb.TxnResponse, error) {
	if len(r.GetCompare()) != 1 || len(r.GetSuccess()) != 1 || r.GetSuccess()[0].GetRequestPut() == nil ||
		r.GetCompare()[0].GetTarget() != etcdserverpb.Compare_MOD || r.GetCompare()[0].GetResult() != etcdserverpb.Compare_EQUAL {
		return e.UnimplementedKVServer.Txn(ctx, r)
	}
	is := e.present(string(r.GetCompare()[0].GetKey())).GetModRevision()
	resp := &etcdserverpb.TxnResponse{Succeeded: is == r.GetCompare()[0].GetModRevision()}
	if resp.GetSucceeded() {
		put, err := e.Put(ctx, r.GetSuccess()[0].GetRequestPut())
		if err != nil {
			return nil, err
		}
		resp.Header = put.GetHeader()
	}
	return resp, nil
}

func (e *scriptedEtcd) Watch(st etcdserverpb.Watch_WatchServer) error {
	asked := make(chan *etcdserverpb.WatchRequest)
	go func() { // ends with the stream, at the latest when this returns
		defer close(asked)
		for {
			r, err := st.Recv()
			if err != nil {
				return
			}
			select {
			case asked <- r:
			case <-st.Context().Done():
				return
			}
		}
	}()
	watches := map[int64]*etcdserverpb.WatchCreateRequest{}
	for next := int64(0); ; {
		changed, err := e.news()
		if err != nil {
			return err
		}
		for id, w := range watches {
			resp := e.tell(id, w)
			if resp == nil {
				continue
			}
			if resp.GetCanceled() {
				delete(watches, id)
			}
			if err := st.Send(resp); err != nil {
				return err
			}
		}
		select {
		case <-changed:
		case r, ok := <-asked:
			if !ok {
				return nil
			}
			resp := &etcdserverpb.WatchResponse{WatchId: next, Created: true}
			if create := r.GetCreateRequest(); create != nil {
				watches[next] = create
				next++
			} else if cancel := r.GetCancelRequest(); cancel != nil {
				delete(watches, cancel.GetWatchId())
				resp = &etcdserverpb.WatchResponse{WatchId: cancel.GetWatchId(), Canceled: true}
			} else {
				return errors.New("asked for neither a watch nor its end")
			}
			e.mu.Lock()
			resp.Header = e.headerLocked()
			e.mu.Unlock()
			if err := st.Send(resp); err != nil {
				return err
			}
		}
	}
}

// tell is what w has not been told yet, nil when that is nothing.
func (e *scriptedEtcd) tell(id int64, w *etcdserverpb.WatchCreateRequest) *etcdserverpb.WatchResponse {
	e.mu.Lock()
	defer e.mu.Unlock()
	resp := &etcdserverpb.WatchResponse{Header: e.headerLocked(), WatchId: id}
	if w.StartRevision == 0 { // from now on
		w.StartRevision = e.revLocked() + 1
	}
	if w.StartRevision <= e.compacted {
		resp.Canceled, resp.CompactRevision = true, e.compacted
		return resp
	}
	for ; w.StartRevision <= e.revLocked(); w.StartRevision++ {
		if ev := e.history[w.StartRevision-2]; inRange(string(ev.Kv.Key), string(w.GetKey()), string(w.GetRangeEnd())) {
			resp.Events = append(resp.Events, ev)
		}
	}
	if len(resp.Events) == 0 {
		return nil
	}
	return resp
}

func (e *scriptedEtcd) LeaseGrant(_ context.Context, r *etcdserverpb.LeaseGrantRequest) (*etcdserverpb.LeaseGrantResponse, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.lastLease++
	id := e.lastLease
	ttl := time.Duration(r.GetTTL()) * time.Second
	e.leases[id] = &scriptedLease{ttl: ttl, expiry: time.AfterFunc(ttl, func() { e.expire(id) })}
	return &etcdserverpb.LeaseGrantResponse{Header: e.headerLocked(), ID: id, TTL: r.GetTTL()}, nil
}

func (e *scriptedEtcd) LeaseRevoke(_ context.Context, r *etcdserverpb.LeaseRevokeRequest) (*etcdserverpb.LeaseRevokeResponse, error) {
	if !e.expire(r.GetID()) {
		return nil, rpctypes.ErrGRPCLeaseNotFound
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return &etcdserverpb.LeaseRevokeResponse{Header: e.headerLocked()}, nil
}

// scriptedLease ends at its TTL after it was last kept alive.
type scriptedLease struct {
	ttl    time.Duration
	expiry *time.Timer
}

// expire ends a lease, and its keys with it.
func (e *scriptedEtcd) expire(id int64) (known bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	lease, known := e.leases[id]
	if !known {
		return false
	}
	lease.expiry.Stop()
	delete(e.leases, id)
	for _, kv := range e.atLocked(e.revLocked(), "\x00", "\x00") {
		if kv.GetLease() == id {
			e.delLocked(string(kv.GetKey()))
		}
	}
	return true
}

func (e *scriptedEtcd) LeaseKeepAlive(st etcdserverpb.Lease_LeaseKeepAliveServer) error {
	for {
		r, err := st.Recv()
		if err != nil {
			return err // the client is gone
		}
		if _, err := e.news(); err != nil {
			return err
		}
		resp := &etcdserverpb.LeaseKeepAliveResponse{ID: r.GetID()}
		e.mu.Lock()
		resp.Header = e.headerLocked()
		if lease := e.leases[r.GetID()]; lease != nil {
			lease.expiry.Reset(lease.ttl)
			resp.TTL = int64(lease.ttl / time.Second)
		}
		e.mu.Unlock()
		if err := st.Send(resp); err != nil {
			return err
		}
	}
}
